"""The error of an engine that does not run."""

from __future__ import annotations


class EngineError(ValueError, RuntimeError):
    """The engine that was asked for does not run on this machine or with this backbone; says why."""
