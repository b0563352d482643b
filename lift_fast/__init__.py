"""LiFT for dense features of frozen Vision Transformers, and exact matching of the result.

Importing it touches no CUDA device and compiles nothing; timm and Triton are imported at their first use.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from . import _interrupts

# Before PyTorch is imported, which takes seconds.
_interrupts.quiet_start()

if not os.path.isdir(os.path.join(os.path.dirname(__file__), "kernels")):
    from . import _checkout

    _checkout.enable()

# Not lazily: a later import of a submodule would hide the function of the same name.
from .backends import backends  # noqa: E402
from .lift import LiFT  # noqa: E402
from .losses import CosineLoss, cosine_loss  # noqa: E402
from .matching import DenseMatches, NearestResult, Window, dense_match, nearest  # noqa: E402
from .ops.lift_forward.cache import clear_plans  # noqa: E402
from .propagation import propagate_labels  # noqa: E402

if TYPE_CHECKING:
    from .backbones import FrozenViT, WeightsNotFoundError, load_backbone
    from .checkpoints import load_lift, save_lift
    from .extractor import ViTLiFTExtractor
    from .graphs import CapturedExtractor, capture
    from .image_matching import ImageMatches, match_images
    from .tuning import tune

__version__ = version("lift_fast")

__all__ = [
    "CapturedExtractor",
    "CosineLoss",
    "DenseMatches",
    "FrozenViT",
    "ImageMatches",
    "LiFT",
    "NearestResult",
    "ViTLiFTExtractor",
    "WeightsNotFoundError",
    "Window",
    "__version__",
    "backends",
    "capture",
    "clear_plans",
    "cosine_loss",
    "dense_match",
    "load_backbone",
    "load_lift",
    "match_images",
    "nearest",
    "propagate_labels",
    "save_lift",
    "tune",
]

# Names that need more than PyTorch are imported at their first use.
_LAZY = {
    "CapturedExtractor": ".graphs",
    "FrozenViT": ".backbones",
    "ImageMatches": ".image_matching",
    "ViTLiFTExtractor": ".extractor",
    "WeightsNotFoundError": ".backbones",
    "capture": ".graphs",
    "load_backbone": ".backbones",
    "load_lift": ".checkpoints",
    "match_images": ".image_matching",
    "save_lift": ".checkpoints",
    "tune": ".tuning",
}
_SUBPACKAGES = ("backbones", "evaluation", "show", "tracking", "training")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name], __name__), name)
        globals()[name] = value
        return value
    if name in _SUBPACKAGES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
