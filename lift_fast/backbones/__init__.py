"""Frozen Vision Transformers as dense feature extractors. Importing this package does not import timm."""

from __future__ import annotations

from .checkpoints import Checkpoint, read_checkpoint
from .engines import ENGINES, EngineError
from .reference import extract_hooked
from .registry import OFFICIAL, Backbone, WeightsNotFoundError, load_backbone
from .vit import FrozenViT

__all__ = [
    "ENGINES",
    "OFFICIAL",
    "Backbone",
    "Checkpoint",
    "EngineError",
    "FrozenViT",
    "WeightsNotFoundError",
    "extract_hooked",
    "load_backbone",
    "read_checkpoint",
]
