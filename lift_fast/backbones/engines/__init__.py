"""Engines that compute a frozen backbone: PyTorch, OpenVINO or ``torch.compile``, each imported when it is used."""

from __future__ import annotations

from .choice import ENGINES, Engine
from .errors import EngineError

__all__ = ["ENGINES", "Engine", "EngineError"]
