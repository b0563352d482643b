"""LiFT for dense features of frozen Vision Transformers, and exact matching of the result.

Importing it takes milliseconds: PyTorch and everything else is imported at the first use of a name.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from . import _interrupts

# Before PyTorch is imported, which takes seconds.
_interrupts.quiet_start()

if not os.path.isdir(os.path.join(os.path.dirname(__file__), "kernels")):
    from . import _checkout

    _checkout.enable()

# Not lazily: a later import of a submodule would hide the function of the same name.
from . import _operators  # noqa: E402
from .backends import backends  # noqa: E402

_operators.register_with_torch()

if TYPE_CHECKING:
    from .backbones import FrozenViT, WeightsNotFoundError, load_backbone
    from .checkpoints import load_lift, save_lift
    from .export import export_onnx
    from .extractor import ViTLiFTExtractor
    from .graphs import CapturedExtractor, capture, capture_pair
    from .image_matching import ImageMatches, match_images
    from .image_stream import ImageDescriptors, extract_images
    from .lift import LiFT
    from .losses import CosineLoss, cosine_loss
    from .matching import DenseMatches, NearestResult, Window, dense_match, nearest
    from .ops.lift_forward.cache import clear_plans
    from .propagation import propagate_labels
    from .tuning import tune

    __version__: str

__all__ = [
    "CapturedExtractor",
    "CosineLoss",
    "DenseMatches",
    "FrozenViT",
    "ImageDescriptors",
    "ImageMatches",
    "LiFT",
    "NearestResult",
    "ViTLiFTExtractor",
    "WeightsNotFoundError",
    "Window",
    "__version__",
    "backends",
    "capture",
    "capture_pair",
    "clear_plans",
    "cosine_loss",
    "dense_match",
    "export_onnx",
    "extract_images",
    "load_backbone",
    "load_lift",
    "match_images",
    "nearest",
    "propagate_labels",
    "save_lift",
    "tune",
]

_HOME = {
    "CapturedExtractor": ".graphs",
    "CosineLoss": ".losses",
    "DenseMatches": ".matching",
    "FrozenViT": ".backbones",
    "ImageDescriptors": ".image_stream",
    "ImageMatches": ".image_matching",
    "LiFT": ".lift",
    "NearestResult": ".matching",
    "ViTLiFTExtractor": ".extractor",
    "WeightsNotFoundError": ".backbones",
    "Window": ".matching",
    "capture": ".graphs",
    "capture_pair": ".graphs",
    "clear_plans": ".ops.lift_forward.cache",
    "cosine_loss": ".losses",
    "dense_match": ".matching",
    "export_onnx": ".export",
    "extract_images": ".image_stream",
    "load_backbone": ".backbones",
    "load_lift": ".checkpoints",
    "match_images": ".image_matching",
    "nearest": ".matching",
    "propagate_labels": ".propagation",
    "save_lift": ".checkpoints",
    "tune": ".tuning",
}
# What completion shows; any submodule is imported by its name.
_SUBMODULES = ("backbones", "demonstration", "evaluation", "export", "images", "show", "tracking", "training")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name], __name__), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("lift_fast")
    elif not name.startswith("__") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
