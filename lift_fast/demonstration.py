"""The demonstration pair: a small backbone and its LiFT, shipped with the package.

They were trained from scratch on 754 photographs (docs/demonstration.md) for examples and tests, and recognise textures
and parts, not objects. For real work use DINO or another pretrained backbone with the LiFT trained for it.
"""

from __future__ import annotations

import os
from pathlib import Path

BACKBONE = "demo_vitt16"
"""Name for :func:`lift_fast.load_backbone`: ViT of width 192, depth 6, patch 16."""

LIFT = "lift_demo_vitt16"
"""Name for :func:`lift_fast.load_lift` and ``lift_path`` in place of a file: trained on the keys of the last block of
:data:`BACKBONE`, heads interleaved, as :class:`lift_fast.ViTLiFTExtractor` computes them."""

_FOLDER = Path(__file__).with_name("weights")


def backbone_file() -> Path:
    """The backbone's weights, float16, timm layout; FileNotFoundError if they are not installed."""
    return _packaged(BACKBONE)


def lift_file(path: str | os.PathLike[str]) -> Path:
    """``path``, or the packaged file for the name :data:`LIFT`; FileNotFoundError if that is not installed."""
    return _packaged(LIFT) if path == LIFT else Path(path)


def _packaged(name: str) -> Path:
    file = _FOLDER / f"{name}.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"the demonstration weights {file} are missing; install lift_fast again")
    return file
