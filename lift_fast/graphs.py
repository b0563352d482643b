"""CUDA graphs: backbone and LiFT recorded once and replayed, without the host's time to launch each kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._text import shown
from .checks import as_whole
from .lift import LiFT
from .witnesses import Witnesses


class CapturedExtractor:
    """An extractor recorded as one CUDA graph for images of one shape; made by :func:`capture`."""

    def __init__(self, extractor: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = tuple(int(size) for size in shape)
        self.dtype = dtype
        self.device = device
        self._lifts = [module for module in extractor.modules() if isinstance(module, LiFT)]
        with torch.cuda.device(device), torch.no_grad():
            self._input = torch.zeros(self.shape, dtype=dtype, device=device)
            # Work of the first call (plans, position embeddings, compiling and loading kernels) must not be recorded.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    extractor(self._input)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output: Tensor = extractor(self._input)
        self._folded = Witnesses(self._weights())

    def __call__(self, batch: Tensor, *, clone: bool = False) -> Tensor:
        """Run the graph.

        Args:
            batch: ``[B, 3, H, W]`` normalised images of the captured shape, any floating dtype and device.
            clone: return a copy; otherwise the next call overwrites the result.

        Returns:
            ``[B, T, C]`` descriptors. The host does not wait for them.

        Raises:
            ValueError: for another shape, or images that are not floating point.
            RuntimeError: if LiFT's weights have changed since the capture.
        """
        if not isinstance(batch, Tensor) or tuple(batch.shape) != self.shape:
            got = list(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"batch must be {list(self.shape)} as captured, got {got}; capture that shape as well")
        if not batch.is_floating_point():
            raise ValueError(f"batch must be floating point and normalised, got {batch.dtype}")
        if not self._folded.recognise(self._weights()):
            raise RuntimeError(
                "LiFT's weights have changed since the capture, but the graph holds the old ones folded; capture again"
            )
        with torch.cuda.device(self.device):
            self._input.copy_(batch, non_blocking=True)
            self._graph.replay()
            return self._output.clone() if clone else self._output

    def _weights(self) -> list[Tensor]:
        # Read from the modules at each call: a parameter may have been replaced.
        return [weight for lift in self._lifts for weight in lift._plan_sources()[0]]


def capture(extractor: nn.Module, shape: Sequence[int], *, dtype: torch.dtype | None = None) -> CapturedExtractor:
    """Record an extractor, backbone and LiFT together, as one CUDA graph.

    The graph reads the backbone's weights from their memory: it sees changes in place, but not a module that was moved.
    LiFT's weights are folded into the graph: after they change, calls raise an error.

    Args:
        extractor: a :class:`lift_fast.ViTLiFTExtractor`, or another module from one batch of images to one tensor,
            on a CUDA device.
        shape: ``(B, 3, H, W)`` of the images.
        dtype: dtype of the images inside the graph; None for that of the module's weights.

    Raises:
        TypeError: if ``extractor`` is not a module.
        ValueError: for a shape that is not ``(B, 3, H, W)``.
        RuntimeError: if the module is not on a CUDA device.
    """
    if not isinstance(extractor, nn.Module):
        raise TypeError(f"extractor must be an nn.Module such as ViTLiFTExtractor, got {type(extractor).__name__}")
    if isinstance(extractor, LiFT):
        raise TypeError("a LiFT alone takes images and features; capture a ViTLiFTExtractor(..., lift=...) instead")
    sizes = [as_whole(side) or 0 for side in shape]
    if len(sizes) != 4 or min(sizes) < 1 or sizes[1] != 3:
        raise ValueError(f"shape must be (B, 3, H, W), got {shown(tuple(shape))}")
    weight = next(extractor.parameters(), None)
    if weight is None or weight.device.type != "cuda":
        where = "has no weights" if weight is None else f"is on {weight.device}"
        raise RuntimeError(f"CUDA graphs need a CUDA device, but the extractor {where}; move it with .cuda()")
    return CapturedExtractor(extractor, sizes, weight.dtype if dtype is None else dtype, weight.device)
