"""Networks for programs without this package: as ``torch.export`` programs and as ONNX files."""

from __future__ import annotations

from .check import Deviation, compare_onnx
from .onnx_file import export_onnx
from .program import OUTPUTS, export_program

__all__ = ["OUTPUTS", "Deviation", "compare_onnx", "export_onnx", "export_program"]
