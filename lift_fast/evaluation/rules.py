"""Rules between which the protocols let one choose, where published evaluations differ; the first is the default."""

from __future__ import annotations

from collections.abc import Sequence

IMAGE_BRANCHES = ("published", "aligned")
"""What LiFT's image branch sees, see :func:`lift_fast.evaluation.methods.build_methods`."""
PLACEMENTS = ("stretch", "cover")
"""Where a map lies: over the whole image, or over the pixels that its cells see."""
DRAWS = ("distinct", "published")
"""How pairs of SPair-71k are drawn, see :func:`lift_fast.evaluation.spair.evaluate`."""
RULES = ("published", "exact")
"""How images are resized and boxes compared, see :func:`lift_fast.evaluation.discovery.prepare`."""
PROTOCOLS = ("lift", "dino")
"""Whose evaluation on DAVIS, see :class:`lift_fast.evaluation.davis.PropagationOptions`."""


def check_rule(name: str, value: object, rules: Sequence[str]) -> None:
    """Refuse what is none of ``rules``.

    Raises:
        ValueError: names what came.
    """
    if value not in rules:
        raise ValueError(f"{name} must be {' or '.join(rules)}, got {value!r}")
