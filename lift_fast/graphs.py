"""CUDA graphs: networks, or a pair from its pixels to its matches, recorded once and replayed.

The host then launches one graph instead of some hundred kernels, which takes it longer than the GPU computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._text import shown
from .backbones import FrozenViT
from .checks import as_whole, check_flag, check_rule, check_size
from .extractor import ViTLiFTExtractor, check_lift_iter
from .lift import LiFT
from .ops.dense_match.bilinear import pixel_grid, vector
from .ops.dense_match.op import match_pixels
from .ops.lift_forward.cache import holder
from .witnesses import Witnesses


class _Recording:
    """A call of a module's networks as one CUDA graph, which reads and writes always the same memory."""

    def __init__(self, module: nn.Module, call: Callable[[], Any], device: torch.device) -> None:
        # Kept, because a compiled module has constants of its own, which the graph reads.
        self._module = module
        self._lifts = [part for part in module.modules() if isinstance(part, LiFT)]
        self.replay, self.output = _record(call, device)
        self._folded = Witnesses(self._weights())
        # The graph reads this memory as long as it is replayed: weights, also of a dropped or moved module, and
        # what caches made of them, which drop what was not used for long.
        self._read = [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
        self._positions = [list(part._positions.values()) for part in module.modules() if isinstance(part, FrozenViT)]
        self._plans = [holder(lift._plan_sources()[0]) for lift in self._lifts]

    def check(self) -> None:
        """RuntimeError if LiFT's weights have changed."""
        if not self._folded.recognise(self._weights()):
            raise RuntimeError(
                "LiFT's weights have changed since the capture, but the graph holds the old ones folded; capture again"
            )

    def _weights(self) -> list[Tensor]:
        # Read from the modules at each call: a parameter may have been replaced.
        return [weight for lift in self._lifts for weight in lift._plan_sources()[0]]


def _record(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Record a call; returns what runs it again, and its result, which that overwrites."""
    with torch.cuda.device(device), torch.no_grad():
        # Work of the first call (plans, position embeddings, compiling and loading kernels) must not be recorded.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, output


class CapturedExtractor:
    """An extractor recorded as one CUDA graph for images of one shape; made by :func:`capture`."""

    def __init__(self, extractor: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = tuple(int(size) for size in shape)
        self.dtype = dtype
        self.device = device
        self._input = torch.zeros(self.shape, dtype=dtype, device=device)
        self._recording = _Recording(extractor, lambda: extractor(self._input), device)

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
        _check_images("batch", batch, self.shape)
        self._recording.check()
        self._input.copy_(batch.detach(), non_blocking=True)
        self._recording.replay()
        output: Tensor = self._recording.output
        return output.clone() if clone else output


class PairMatches(NamedTuple):
    """Matches of the pixels of A that its descriptors cover, ``[H, W]`` of ``extractor.covered(*size_a)``."""

    xy: Tensor
    """[H, W, 2] int64: (x, y) of the match in pixels of B as loaded; (-1, -1) without a match."""
    similarity: Tensor
    """[H, W] float32; -inf without a match."""
    distance: Tensor
    """[H, W] float32: forward-backward distance in cells of A's map, as :func:`lift_fast.match_images`; or inf."""
    valid: Tensor
    """[H, W] bool: there is a match and, with ``mutual``, ``distance <= 1``."""


class CapturedPair:
    """A pair of images of fixed sizes from pixels to matches as one CUDA graph; made by :func:`capture_pair`."""

    def __init__(
        self,
        extractor: ViTLiFTExtractor,
        sizes: Sequence[tuple[int, int]],
        normalize: str,
        lift_iter: int,
        mutual: bool,
    ) -> None:
        self.size_a, self.size_b = sizes
        self.device = device = extractor.device
        # Images of one size go through the networks as one batch.
        counts = [2] if sizes[0] == sizes[1] else [1, 1]
        batches = [
            torch.zeros((count, 3, *size), dtype=extractor.dtype, device=device)
            for count, size in zip(counts, sizes, strict=False)
        ]
        self._inputs = [one for batch in batches for one in batch.split(1)]
        covered_a, (top, left, *covered_b) = (extractor.covered(*size) for size in sizes)
        frames = covered_a[2:], (covered_b[0], covered_b[1])
        at = pixel_grid(frames[0], 0, frames[0][0] * frames[0][1], device).view(*frames[0], 2)
        corner = vector(left, top, torch.int64, device)

        def match() -> PairMatches:
            maps = [one for batch in batches for one in extractor.matching_map(batch, lift_iter).split(1)]
            xy, *rest = match_pixels(maps, *frames, at, normalize, mutual)
            return PairMatches(torch.where(xy < 0, xy, xy + corner), *rest)

        self._recording = _Recording(extractor, match, device)

    def __call__(self, a: Tensor, b: Tensor, *, clone: bool = False) -> PairMatches:
        """Run the graph.

        Args:
            a, b: ``[1, 3, H, W]`` normalised images of the captured sizes, any floating dtype and device.
            clone: return copies; otherwise the next call overwrites the result.

        Returns:
            :class:`PairMatches` on the extractor's device. The host does not wait for them.

        Raises:
            ValueError: for another shape, or images that are not floating point.
            RuntimeError: if LiFT's weights have changed since the capture.
        """
        for name, image, size in (("a", a, self.size_a), ("b", b, self.size_b)):
            _check_images(name, image, (1, 3, *size))
        self._recording.check()
        for place, image in zip(self._inputs, (a, b), strict=True):
            place.copy_(image.detach(), non_blocking=True)
        self._recording.replay()
        output: PairMatches = self._recording.output
        return PairMatches(*(part.clone() for part in output)) if clone else output


def _check_images(name: str, images: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(images, Tensor) or tuple(images.shape) != shape:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{name} must be {list(shape)} as captured, got {got}; capture that shape as well")
    if not images.is_floating_point():
        raise ValueError(f"{name} must be floating point and normalised, got {images.dtype}")


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
    _require_cuda(None if weight is None else weight.device)
    assert weight is not None
    # Its memory is written by calls outside of inference mode, too.
    with torch.inference_mode(False):
        return CapturedExtractor(extractor, sizes, weight.dtype if dtype is None else dtype, weight.device)


def capture_pair(
    extractor: ViTLiFTExtractor,
    size_a: Sequence[int],
    size_b: Sequence[int] | None = None,
    *,
    normalize: str = "pixel",
    lift_iter: int = 1,
    mutual: bool = True,
) -> CapturedPair:
    """Record a pair of images, from their pixels to the matches of every pixel and back, as one CUDA graph.

    For many pairs of the same sizes, such as the frames of a video. ``a, image = extractor.preprocess(file, size_a)``
    gives what the graph takes. :func:`lift_fast.match_images` records nothing, because a recording takes some calls and
    memory for as long as it lives. For changes of the weights see :func:`capture`.

    Args:
        extractor: on a CUDA device.
        size_a, size_b: ``(H, W)`` of the images as loaded; None is ``size_a``. Whole patches are covered as a whole.
        normalize: ``"pixel"`` or ``"grid"``.
        lift_iter: applications of LiFT.
        mutual: ``valid`` requires ``distance <= 1``.

    Raises:
        TypeError: for an extractor of another type.
        ValueError: for sizes that are not two whole numbers or smaller than a patch, and options out of range.
        RuntimeError: if the extractor is not on a CUDA device.
    """
    if not isinstance(extractor, ViTLiFTExtractor):
        raise TypeError(f"extractor must be a ViTLiFTExtractor, got {type(extractor).__name__}")
    check_rule(normalize)
    lift_iter, mutual = check_lift_iter(lift_iter), check_flag("mutual", mutual)
    sizes = []
    for name, size in (("size_a", size_a), ("size_b", size_a if size_b is None else size_b)):
        height, width = check_size(name, size)
        extractor.check_size(height, width, lift_iter)
        sizes.append((height, width))
    _require_cuda(extractor.device)
    with torch.inference_mode(False):
        return CapturedPair(extractor, sizes, normalize, lift_iter, mutual)


def _require_cuda(device: torch.device | None) -> None:
    if device is None or device.type != "cuda":
        where = "has no weights" if device is None else f"is on {device}"
        raise RuntimeError(f"CUDA graphs need a CUDA device, but the extractor {where}; move it with .cuda()")
