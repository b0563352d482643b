"""A network as a module that takes and returns tensors only, in plain PyTorch operations while it is exported."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones import FrozenViT
from ..backbones.vit import shared_copy
from ..defaults import plain_defaults
from ..extractor import ViTLiFTExtractor
from ..layers import is_plain_output
from ..lift import LiFT
from ..ops.lift_forward.plan import span_basis
from ..precision import without_autocast

Network = LiFT | FrozenViT | ViTLiFTExtractor


class _BasisLiFT(nn.Module):
    """A LiFT whose :meth:`matching_map` has the basis in a last layer of its own, in place of a decomposition at each
    call.

    Raises:
        ValueError: if the network's last layer is no plain 1x1 convolution.
    """

    def __init__(self, lift: LiFT) -> None:
        super().__init__()
        outc = lift.outc
        if not is_plain_output(outc):
            raise ValueError(
                "matching_map needs a 1x1 convolution as outc (stride 1, no padding or groups, no hooks or forward of "
                f"its own), this network has {outc}"
            )
        self.lift = lift
        weight = outc.weight.flatten(1)
        _, r = span_basis(weight, weight.new_zeros(len(weight)) if outc.bias is None else outc.bias)
        self.coordinates = nn.Conv2d(weight.shape[1], len(r), 1)
        self.coordinates.load_state_dict({"weight": r[:, :-1, None, None], "bias": r[:, -1]})
        self.requires_grad_(False)

    def forward(self, imgs: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.lift(imgs, x)
        return out

    def matching_map(self, imgs: Tensor, x: Tensor) -> Tensor:
        h, w = self.lift._check(imgs, x, None)
        decoded = self.lift._decode(self.lift._align(imgs, h, w), self.lift._as_map(x, h, w))
        out: Tensor = self.coordinates(decoded)
        return out


class ImageGraph(nn.Module):
    """``imgs [B, 3, H, W]`` through a backbone or an extractor."""

    def __init__(self, network: nn.Module, matching: bool, iterations: int, normalize: bool) -> None:
        super().__init__()
        self.network, self._matching, self._iterations, self._normalize = network, matching, iterations, normalize

    def forward(self, imgs: Tensor) -> Tensor:
        network: Any = self.network
        if self._matching:
            out: Tensor = network.matching_map(imgs, self._iterations)
            return F.normalize(out, dim=1) if self._normalize else out
        if isinstance(network, ViTLiFTExtractor):
            return network.extract_descriptors_iterative_lift(imgs, self._iterations)
        out = network(imgs)
        return out


class LiftGraph(nn.Module):
    """``imgs [B, 3, H, W]`` and ``tokens``, as LiFT takes them, through LiFT."""

    def __init__(self, network: nn.Module, matching: bool, normalize: bool) -> None:
        super().__init__()
        self.network, self._matching, self._normalize = network, matching, normalize

    def forward(self, imgs: Tensor, tokens: Tensor) -> Tensor:
        network: Any = self.network
        if not self._matching:
            out: Tensor = network(imgs, tokens)
            return out
        out = network.matching_map(imgs, tokens)
        return F.normalize(out, dim=1) if self._normalize else out


def build_graph(network: Network, matching: bool, iterations: int, normalize: bool) -> ImageGraph | LiftGraph:
    """A frozen copy of ``network`` on the CPU in float32 and in evaluation mode; shares what is so already.

    Raises:
        ValueError: for weights that are not finite, lie on the meta device or belong to another layer than a matching
            map can be made of.
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device, without values to export; load the weights first")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all()):
            raise ValueError(f"{name} has values that are not finite (NaN or infinity)")
    with plain_defaults(), torch.inference_mode(False), torch.no_grad(), without_autocast("cpu"):
        twin = shared_copy(network).to("cpu", torch.float32).eval()
        if isinstance(twin, LiFT):
            return LiftGraph(_BasisLiFT(twin) if matching else twin, matching, normalize)
        if matching and isinstance(twin, ViTLiFTExtractor) and isinstance(twin.lift, LiFT):
            twin.lift = _BasisLiFT(twin.lift)
        return ImageGraph(twin, matching, iterations, normalize)


def describe(network: Network, output: str, iterations: int, normalize: bool) -> dict[str, Any]:
    """What a program that runs the graph needs to know, as JSON values."""
    about: dict[str, Any] = {"output": output, "normalized": normalize}
    if isinstance(network, LiFT):
        return about | {"network": "lift", "patch_size": network.patch_size}
    if isinstance(network, ViTLiFTExtractor):
        backbone = network.backbone
        about |= {"network": "extractor", "iterations": iterations if network.lift is not None else 0}
    else:
        backbone = network
        about |= {"network": "backbone"}
    names = ("name", "mean", "std", "patch_size", "stride", "facet", "layer", "head_order")
    about |= {"model" if name == "name" else name: getattr(backbone, name) for name in names}
    return about | {"random_weights": network.random_weights}
