"""``torch.export`` programs of LiFT, backbones and extractors: plain PyTorch operations for any size of image."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._text import said, shown
from ..backbones import FrozenViT
from ..checks import check_flag, check_size, check_whole
from ..defaults import plain_defaults
from ..extractor import ViTLiFTExtractor
from ..lift import LiFT
from ..precision import without_autocast
from .graph import Network, build_graph

OUTPUTS = ("descriptors", "matching_map")
_SIZE = (448, 448)
_MOST_ITERATIONS, _MOST_SIDE, _MOST_BATCH = 8, 1 << 15, 1 << 16


def export_program(
    network: Network,
    dynamic: bool = True,
    *,
    output: str = "descriptors",
    size: tuple[int, int] | None = None,
    batch: int = 1,
    iterations: int = 1,
    normalize: bool = False,
) -> torch.export.ExportedProgram:
    """Record a network's inference graph: it needs neither this package nor Python's control flow to run.

    The program computes in float32 on the CPU what the network computes in evaluation mode; the network is not changed.
    Position embeddings are resampled within the program by the backbone's own rule, and pixels beyond the last whole
    patch are ignored, as in :class:`lift_fast.FrozenViT`.

    Args:
        network: a :class:`LiFT` (``imgs [B, 3, H, W]`` and ``tokens``, as its ``forward``), a :class:`FrozenViT` or a
            :class:`ViTLiFTExtractor` (``imgs``). Images are normalised with the backbone's ``mean`` and ``std``.
        dynamic: batch, height and width are free, from two patches along each side; False fixes them to ``batch`` and
            ``size``.
        output: ``"descriptors"``: the result of ``forward``. ``"matching_map"``: that of ``matching_map``, of a LiFT
            or an extractor.
        size: (height, width) in pixels of a program that is not dynamic; None is 448 x 448.
        batch: images of a program that is not dynamic.
        iterations: applications of LiFT by an extractor that has one, at most 8; 0 is the backbone alone.
        normalize: divide each descriptor of a matching map by its norm.

    Raises:
        TypeError: for another kind of network.
        ValueError: for an argument out of range, weights that are not finite, or a network that cannot be recorded,
            with the reason.
    """
    if not isinstance(network, (LiFT, FrozenViT, ViTLiFTExtractor)):
        kind = network.__name__ if isinstance(network, type) else type(network).__name__
        raise TypeError(f"network must be a LiFT, a FrozenViT or a ViTLiFTExtractor, got {kind}")
    if output not in OUTPUTS:
        raise ValueError(f"output must be 'descriptors' or 'matching_map', got {shown(output)}")
    matching, dynamic = output == "matching_map", check_flag("dynamic", dynamic)
    if matching and isinstance(network, FrozenViT):
        raise ValueError("a backbone alone has no matching_map; export its descriptors, or a ViTLiFTExtractor")
    if check_flag("normalize", normalize) and not matching:
        raise ValueError("normalize belongs to output='matching_map'")
    if dynamic and (size is not None or batch != 1):
        raise ValueError("size and batch belong to dynamic=False")
    iterations = check_whole("iterations", iterations, 0, _MOST_ITERATIONS)
    if iterations != 1 and getattr(network, "lift", None) is None:
        raise ValueError(f"iterations={iterations} repeats the LiFT of an extractor, which this network does not have")
    inputs = _inputs(network, None if dynamic else check_size("size", size or _SIZE, _MOST_SIDE), batch)
    graph = build_graph(network, matching, iterations, normalize)
    shapes = None
    if dynamic:
        free = torch.export.Dim.DYNAMIC
        tokens = {0: free, 1: free} if getattr(network, "pre_shape", True) else {0: free, 2: free, 3: free}
        shapes = ({0: free, 2: free, 3: free}, tokens)[: len(inputs)]
    try:
        with untouched_by_settings():
            return torch.export.export(
                graph, inputs, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=dynamic
            )
    except Exception as error:
        # Any part of a model may raise anything while it is recorded.
        advice = "; try dynamic=False with the size of your images" if dynamic else ""
        raise ValueError(f"{_name(network)} cannot be exported: {said(error)}{advice}") from error


@contextmanager
def untouched_by_settings() -> Iterator[None]:
    """Whatever the program's default dtype and device, autocast, gradients and filters of warnings."""
    with (
        plain_defaults(),
        torch.inference_mode(False),
        torch.no_grad(),
        without_autocast("cpu"),
        warnings.catch_warnings(),
    ):
        # Notes to developers of PyTorch.
        warnings.simplefilter("ignore")
        yield


def _inputs(network: Network, size: list[int] | None, batch: int) -> tuple[Tensor, ...]:
    """Example inputs. Sizes differ, and one is no whole patches: what is equal would become one symbol."""
    patch = network.patch if isinstance(network, ViTLiFTExtractor) else network.patch_size
    batch = check_whole("batch", batch, 1, _MOST_BATCH) if size else 2
    height, width = size or (4 * patch + 1, 6 * patch)
    if height < patch or width < patch:
        raise ValueError(f"size {height} x {width} is smaller than one patch of {patch} x {patch} pixels")
    with plain_defaults(), torch.inference_mode(False):
        imgs = torch.zeros(batch, 3, height, width)
        if not isinstance(network, LiFT):
            return (imgs,)
        h, w, channels = height // patch, width // patch, network.in_channels
        return imgs, torch.zeros((batch, h * w, channels) if network.pre_shape else (batch, channels, h, w))


def _name(network: Network) -> str:
    if isinstance(network, LiFT):
        return repr(network).partition("\n")[0].rstrip("(")
    return network.name if isinstance(network, FrozenViT) else str(network.model_type)
