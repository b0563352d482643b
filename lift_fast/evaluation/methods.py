"""The methods that evaluations compare: ways from an image to a map of descriptors, all on one frozen backbone.

=================  =====================================================================================
``backbone``       the backbone's own map
``bilinear``       that map enlarged 2x bilinearly, the baseline that needs no training
``lift``           LiFT's map, ``lift-N`` LiFT applied N times
``random-lift``    an untrained LiFT, the control
``double-size``    the backbone on the image enlarged 2x bilinearly
``stride-S``       the backbone with patches S pixels apart
``LABEL=FILE``     another LiFT checkpoint under its own label, for example one without image
``LABEL=m:f``      any ``nn.Module`` with LiFT's ``forward(imgs, x)``: what f of the Python module m returns
=================  =====================================================================================

All of them see the same backbone tokens, with interleaved heads, the order that LiFT weights are trained on.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lift_fast.backbones import FrozenViT
from lift_fast.evaluation.rules import IMAGE_BRANCHES, check_rule
from lift_fast.extractor import Rectangle, ViTLiFTExtractor

NAMES = ("backbone", "bilinear", "lift", "lift-N", "random-lift", "double-size", "stride-S", "LABEL=FILE", "LABEL=m:f")


class Features(NamedTuple):
    """Descriptors of a batch of images."""

    map: Tensor
    """``[B, C, h, w]``; LiFT's maps in the basis of their span (:meth:`lift_fast.LiFT.matching_map`)."""
    covered: Rectangle
    """(top, left, height, width): the pixels over which the cells lie side by side."""


class Batch:
    """Images of one size, with the backbone's tokens kept for every method that reads them."""

    def __init__(self, imgs: Tensor) -> None:
        """``imgs``: ``[B, 3, H, W]`` normalised images, on the device and in the dtype of the backbone."""
        self.imgs = imgs
        self._tokens: dict[FrozenViT, Tensor] = {}

    def tokens(self, backbone: FrozenViT) -> Tensor:
        """``[B, T, C]``, computed at most once."""
        if backbone not in self._tokens:
            self._tokens[backbone] = backbone(self.imgs)
        return self._tokens[backbone]


@dataclass(frozen=True)
class Method:
    """One way from images to descriptors."""

    name: str
    compute: Callable[[Batch], Features]
    weights: str | None = None
    """File of its LiFT, for the record."""
    network: nn.Module | None = None
    """The network after the backbone, ``forward(imgs, x)``."""

    def __call__(self, batch: Batch) -> Features:
        """Descriptors of a batch, without gradients."""
        with torch.no_grad():
            return self.compute(batch)


def build_methods(
    names: Sequence[str],
    backbone: FrozenViT,
    lift: str | os.PathLike[str] | nn.Module | None = None,
    seed: int = 0,
    image_branch: str = "published",
) -> list[Method]:
    """Methods by name, see :mod:`lift_fast.evaluation.methods`.

    Args:
        names: as in the table above; each at most once.
        backbone: with heads interleaved, on the device and in the dtype to compute in.
        lift: checkpoint or module behind ``lift`` and ``lift-N``.
        seed: of ``random-lift``.
        image_branch: what LiFT's image branch sees where the sides of images are not whole patches: ``"published"``, as
            in the published evaluation (:func:`published_offset`), or ``"aligned"``, the pixels of the tokens.

    Raises:
        ValueError: for an unknown or repeated name, an unknown ``image_branch``, ``lift`` without a LiFT, weights that
            do not fit the backbone, or a module of another form.
        FileNotFoundError: for a checkpoint that does not exist.
    """
    if backbone.head_order != "interleaved" and backbone.facet not in ("token", "final"):
        raise ValueError(
            f"the backbone's heads are {backbone.head_order}; LiFT weights are trained on head_order='interleaved'"
        )
    check_rule("image_branch", image_branch, IMAGE_BRANCHES)
    builder = _Builder(backbone, lift, seed, image_branch)
    methods = [builder.build(name) for name in names]
    labels = [method.name for method in methods]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"two methods are called {label!r}; give each label once")
    return methods


def published_offset(height: int, width: int, patch_size: int) -> int:
    """The first row and column that the published evaluation shows to LiFT's image branch: 2 or 0.

    Its strided convolutions drop up to 4 pixels at the border that do not fill a patch. Where more are left, they would
    give one cell too many, and the image branch alone loses two pixels on each side; the tokens still see the whole
    image from (0, 0) on. This works for remainders of 5 to 8 pixels and patches of 16 (56 pixels among them), and of 4
    for patches of 8. With others the published code fails, or, for 1 to 3 and patches of 8, the branch sees less than
    the tokens.
    """
    remainders = {8: range(4, 5), 16: range(5, 9)}.get(patch_size, range(0))
    return 2 if height % patch_size in remainders and width % patch_size in remainders else 0


class _Builder:
    def __init__(
        self, backbone: FrozenViT, lift: str | os.PathLike[str] | nn.Module | None, seed: int, image_branch: str
    ) -> None:
        self.backbone, self.lift, self.seed, self.image_branch = backbone, lift, seed, image_branch
        self._main: ViTLiFTExtractor | None = None

    def build(self, name: str) -> Method:
        label, equals, source = name.partition("=")
        if equals:
            return self._labelled(label, source)
        simple: dict[str, Callable[[Batch], Features]] = {
            "backbone": partial(_plain, self.backbone),
            "bilinear": self._bilinear,
            "double-size": self._double_size,
        }
        if name in simple:
            return Method(name, simple[name])
        if name == "random-lift":
            return self._lifted(name, self._extractor(random_lift=True, seed=self.seed), 1, None)
        if match := re.fullmatch(r"lift(?:-([1-9][0-9]?))?", name):
            if self.lift is None:
                raise ValueError(f"{name} needs a LiFT; give its checkpoint, or leave the method out")
            module = isinstance(self.lift, nn.Module)
            if self._main is None:
                self._main = self._extractor(**{"lift" if module else "lift_path": self.lift})
            weights = None if isinstance(self.lift, nn.Module) else os.fspath(self.lift)
            return self._lifted(name, self._main, int(match[1] or 1), weights)
        if match := re.fullmatch(r"stride-([1-9][0-9]*)", name):
            return Method(name, partial(_plain, self.backbone.strided(int(match[1]))))
        raise ValueError(f"unknown method {name!r}; there are {', '.join(NAMES)}")

    def _bilinear(self, batch: Batch) -> Features:
        coarse = _plain(self.backbone, batch)
        enlarged = F.interpolate(coarse.map, scale_factor=2, mode="bilinear", align_corners=False)
        return Features(enlarged, coarse.covered)

    def _double_size(self, batch: Batch) -> Features:
        large = Batch(F.interpolate(batch.imgs, scale_factor=2, mode="bilinear", align_corners=False))
        fine = _plain(self.backbone, large)
        top, left, height, width = fine.covered
        return Features(fine.map, (top // 2, left // 2, height // 2, width // 2))

    def _extractor(self, **lift: Any) -> ViTLiFTExtractor:
        return ViTLiFTExtractor(
            model=self.backbone,
            channel=None,
            patch=None,
            stride=None,
            layer=None,
            facet=self.backbone.facet,
            device=self.backbone.device,
            dtype=self.backbone.dtype,
            silent=True,
            **lift,
        )

    def _lifted(self, name: str, extractor: ViTLiFTExtractor, times: int, weights: str | None) -> Method:
        def compute(batch: Batch) -> Features:
            tokens, (height, width) = batch.tokens(self.backbone), batch.imgs.shape[2:]
            start = 0
            if self.image_branch == "published" and self.backbone.stride == self.backbone.patch_size:
                start = published_offset(height, width, self.backbone.patch_size)
            found = extractor.lift_map(batch.imgs[:, :, start:, start:], tokens, times)
            return Features(found, extractor.covered(height, width))

        return Method(name, compute, weights, extractor.lift)

    def _labelled(self, label: str, source: str) -> Method:
        if not re.fullmatch(r"[\w.+-]+", label):
            raise ValueError(f"a label is letters, digits and . + - _, got {label!r} in {label}={source}")
        module, colon, attribute = source.partition(":")
        if colon and re.fullmatch(r"[A-Za-z_][\w.]*", module) and not os.path.exists(source):
            network = _load_module(module, attribute).to(self.backbone.device, self.backbone.dtype)
            network.eval().requires_grad_(False)

            def compute(batch: Batch) -> Features:
                out = network(batch.imgs, batch.tokens(self.backbone))
                maps = _as_map(source, out, self.backbone.grid(*batch.imgs.shape[2:]))
                return Features(maps, _covered(self.backbone, batch.imgs))

            return Method(label, compute, source, network)
        return self._lifted(label, self._extractor(lift_path=source), 1, source)


def _plain(backbone: FrozenViT, batch: Batch) -> Features:
    grid = backbone.grid(*batch.imgs.shape[2:])
    return Features(batch.tokens(backbone).transpose(1, 2).unflatten(2, grid), _covered(backbone, batch.imgs))


def _covered(backbone: FrozenViT, imgs: Tensor) -> Rectangle:
    h, w = backbone.grid(*imgs.shape[2:])
    start = (backbone.patch_size - backbone.stride) // 2
    return start, start, backbone.stride * h, backbone.stride * w


def _load_module(module: str, attribute: str) -> nn.Module:
    """Call ``attribute`` of ``module``, which may lie in the current folder."""
    name = f"{module}:{attribute}"
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        network = found()
    except Exception as error:
        raise ValueError(f"{name} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{name}() returned a {type(network).__name__}; expected an nn.Module with forward(imgs [B, 3, H, W], "
            "x [B, T, C])"
        )
    return network


def _as_map(source: str, out: object, grid: tuple[int, int]) -> Tensor:
    """A foreign module's output as ``[B, C, h, w]``: maps as they are, tokens on a whole multiple of the grid."""
    if isinstance(out, Tensor) and out.dim() == 4:
        return out
    if isinstance(out, Tensor) and out.dim() == 3:
        factor = round((out.shape[1] / (grid[0] * grid[1])) ** 0.5)
        if factor >= 1 and factor**2 * grid[0] * grid[1] == out.shape[1]:
            return out.transpose(1, 2).unflatten(2, (factor * grid[0], factor * grid[1]))
    shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
    raise ValueError(
        f"{source} returned {shape}; expected [B, C, h, w], or tokens [B, n * n * {grid[0] * grid[1]}, C] for a grid "
        f"of {grid[0]} x {grid[1]}"
    )
