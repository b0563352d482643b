"""Choices of rule where published evaluations differ; the first one is the default."""

from __future__ import annotations

from collections.abc import Sequence

IMAGE_BRANCHES = ("published", "aligned")
"""What LiFT's image branch sees, see :func:`lift_fast.evaluation.methods.build_methods`."""
PLACEMENTS = ("stretch", "cover")
"""Where a map lies: over the whole image, or over the pixels that its cells cover."""
DRAWS = ("distinct", "published")
"""How pairs of SPair-71k are drawn, see :func:`lift_fast.evaluation.spair.evaluate`."""
RULES = ("published", "exact")
"""How images are resized and boxes compared, see :func:`lift_fast.evaluation.discovery.prepare`."""
PROTOCOLS = ("lift", "dino")
"""Whose evaluation on DAVIS, see :class:`lift_fast.evaluation.davis.PropagationOptions`."""


def check_rule(name: str, value: object, rules: Sequence[str]) -> None:
    """Raise a ``ValueError`` with the value if it is not one of ``rules``."""
    if value not in rules:
        raise ValueError(f"{name} must be {' or '.join(rules)}, got {value!r}")


def check_sizes(sizes: Sequence[int], seeds: int, patch_size: int) -> None:
    """Raise a ``ValueError`` without a seed, and for sizes S of S x S that are missing, equal or less than a patch."""
    if seeds < 1 or not sizes or min(sizes) < patch_size or len(set(sizes)) < len(sizes):
        raise ValueError(
            f"expected at least one seed and different sizes of at least a patch ({patch_size} pixels), got {seeds} "
            f"seeds and sizes {', '.join(map(str, sizes))}"
        )
