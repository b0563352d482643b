"""What programs that PyTorch records to be run elsewhere compute in their own way."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def is_exporting() -> bool:
    """Whether ``torch.export`` or ``torch.onnx`` records this call, so that only plain operations on symbolic sizes may
    run: neither this package's operators, which other programs lack, nor branches on sizes."""
    return torch.compiler.is_exporting() or (torch.jit.is_tracing() and torch.onnx.is_in_onnx_export())


def crop(imgs: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """``height x width`` pixels of ``[B, C, H, W]`` from (``top``, ``left``), as a copy.

    Slices would ask whether they are contiguous, and so bind the program to sizes with the same answer.
    """
    below, right = imgs.shape[2] - top - height, imgs.shape[3] - left - width
    return F.pad(imgs, (-left, -right, -top, -below))


def resize_patches(imgs: Tensor, patch: int, to: int) -> Tensor:
    """Bilinear, antialiased resize of ``[B, C, patch * h, patch * w]`` float32 to ``[B, C, to * h, to * w]``.

    Equals PyTorch's up to rounding. Enlarging needs no filter. OpenVINO ignores the filter of ONNX's resize, so that
    convolutions compute it here.
    """
    batch, channels, height, width = imgs.shape
    h, w = height // patch, width // patch
    if patch <= to:
        return F.interpolate(imgs, size=(to * h, to * w), mode="bilinear", align_corners=False)
    columns = _shrink_rows(imgs.flatten(0, 1)[:, None], patch, to).transpose(2, 3)
    return _shrink_rows(columns, patch, to).transpose(2, 3).view(batch, channels, to * h, to * w)


def _shrink_rows(x: Tensor, patch: int, to: int) -> Tensor:
    """``[N, 1, patch * h, W]`` to ``[N, 1, to * h, W]``."""
    # A pixel weighs by a triangle around each cell's centre; those beyond the border do not count.
    scale = patch / to
    around = math.ceil(scale)
    centres = (torch.arange(to, device=x.device) + 0.5) * scale
    pixels = torch.arange(-around, patch + around, device=x.device) + 0.5
    taps = (1 - (pixels - centres[:, None]).abs() / scale).clamp(min=0)[:, None, :, None]
    total, weight = (
        F.conv2d(values, taps, stride=(patch, 1), padding=(around, 0)) for values in (x, torch.ones_like(x[:1]))
    )
    return (total / weight).transpose(1, 2).flatten(1, 2)[:, None]
