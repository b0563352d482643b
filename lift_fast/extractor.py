"""Drop-in extractor: a frozen ViT, optionally followed by LiFT.

Constructor and methods are those of ``ViTLiFTExtractor`` in the published LiFT code; additions are keyword-only.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from . import devices, images
from ._exporting import crop, is_exporting
from ._text import shown
from .backbones import FrozenViT, load_backbone
from .backbones.vit import shared_copy
from .checks import FLOATS, as_whole, check_dense, check_whole
from .defaults import plain_defaults
from .demonstration import BACKBONE, LIFT
from .images import LoadSize
from .precision import resolve_dtype

Rectangle = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""


class _Default(int):
    """An integer default, distinct from the same number passed by the caller."""


class _DefaultDevice(str):
    """As :class:`_Default`, of the published class."""


_CHANNEL, _PATCH, _STRIDE, _LAYER = _Default(768), _Default(8), _Default(8), _Default(11)
_DEVICE = _DefaultDevice("cuda")


class ViTLiFTExtractor(nn.Module):
    """Dense descriptors of images: ViT tokens, doubled in resolution by LiFT if ``lift_path`` or ``lift`` is given.

    ``channel``, ``patch``, ``stride`` and ``layer`` describe the backbone. If they are omitted or None, they are read
    from it: ``ViTLiFTExtractor("dino_vits16")`` has patch and stride 16, where the published class runs with stride 8.
    The default ``channel`` of 768 does not fit the default ``dino_vits8`` and is not enforced. A value that you pass
    must agree with the backbone.

    With a stride below the patch size, each token represents the ``stride x stride`` pixels in the middle of its patch.
    LiFT then sees only the pixels that the grid covers (from ``(patch - stride) // 2``), enlarged to its patch size.

    Args:
        model_type: name for :func:`lift_fast.backbones.load_backbone`.
        lift_path: LiFT checkpoint, or the name of the one that ships with the package
            (:data:`lift_fast.demonstration.LIFT`); None runs the backbone alone.
        channel, patch, stride, layer: see above; ``layer`` may be negative.
        facet: ``"key"``, ``"query"``, ``"value"``, ``"token"`` or ``"final"`` (:class:`FrozenViT`).
        model: use this timm ViT or :class:`FrozenViT` instead of building ``model_type``; it is not moved or changed. A
            FrozenViT keeps its own facet, layer, stride and head order.
        device: of both networks; None is CUDA if available, else the CPU. If it is omitted where PyTorch sees no CUDA
            device, the CPU is used, with a warning; a device that you pass is never replaced.
        silent: do not print what was loaded.
        lift: a LiFT module instead of ``lift_path``; it is moved to ``device``, frozen and set to evaluation mode.
        random_lift: use a LiFT with random weights, for tests.
        weights, random_weights, checkpoint_key, seed: see :func:`load_backbone`; ``seed`` also seeds ``random_lift``.
        dtype: of weights and descriptors, as a torch dtype or its name (``"float32"``); None is float32, and ``"auto"``
            bfloat16 where the device computes it (:func:`lift_fast.precision.resolve_dtype`).
        fused: False forces LiFT's plain graph.
        head_order: channel order of key, query and value: ``"concatenated"`` (head after head) or ``"interleaved"``
            (as in the published extractor). None is interleaved with a LiFT, because published LiFT weights were
            trained on that order, and concatenated for the backbone alone. Cosines between descriptors of the same
            order do not depend on it.
        engine: what computes the backbone: ``"auto"``, ``"torch"``, ``"openvino"`` or ``"compile"``
            (:class:`FrozenViT`). None is ``"auto"``, and that of a given FrozenViT.

    Attributes:
        backbone, lift, channel, patch (also ``p``), stride, layer, facet, mean, std, device, dtype, model_type,
        lift_path; ``load_size`` and ``num_patches``: pixels ``(H, W)`` and backbone grid ``(h, w)`` of the last batch.

    Raises:
        ValueError: for contradictory or invalid arguments.
        EngineError: if an engine given by name does not run on this machine, or not with this network, device or dtype.
        WeightsNotFoundError, FileNotFoundError: as :func:`load_backbone`.
        RuntimeError: if a CUDA device is passed and not available.
    """

    def __init__(
        self,
        model_type: str = "dino_vits8",
        lift_path: str | os.PathLike[str] | None = None,
        channel: int | None = _CHANNEL,
        patch: int | None = _PATCH,
        stride: int | None = _STRIDE,
        layer: int | None = _LAYER,
        facet: str = "key",
        model: nn.Module | None = None,
        device: str | torch.device | None = _DEVICE,
        silent: bool = False,
        *,
        lift: nn.Module | None = None,
        random_lift: bool = False,
        weights: str | os.PathLike[str] | None = None,
        random_weights: bool = False,
        checkpoint_key: str | None = None,
        seed: int = 0,
        dtype: torch.dtype | str | None = None,
        fused: bool = True,
        head_order: str | None = None,
        engine: str | None = None,
    ) -> None:
        super().__init__()
        given = [n for n, v in (("lift_path", lift_path), ("lift", lift), ("random_lift", random_lift or None)) if v]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give only one")
        if head_order is None:
            head_order = "interleaved" if given else "concatenated"
        if isinstance(device, _DefaultDevice) and not torch.cuda.is_available():
            warnings.warn(
                "PyTorch sees no CUDA device, so ViTLiFTExtractor computes on the CPU; pass device=None (CUDA if there "
                "is one) or device='cpu'",
                stacklevel=2,
            )
            device = "cpu"
        place = devices.resolve(device)
        dtype = resolve_dtype(dtype, place)
        whole = as_whole(seed)
        if whole is None or not -(1 << 63) <= whole < 1 << 64:
            raise ValueError(f"seed must be an integer of at most 64 bits, got {shown(seed)}")
        seed = whole

        options: dict[str, Any] = {"facet": facet, "layer": _typed(layer), "stride": _typed(stride)}
        chosen: dict[str, Any] = {} if engine is None else {"engine": engine}
        if model is None:
            backbone = load_backbone(
                model_type,
                weights=weights,
                random_weights=random_weights,
                checkpoint_key=checkpoint_key,
                seed=seed,
                head_order=head_order,
                **options,
                **chosen,
            )
        elif weights is not None or random_weights:
            raise ValueError("weights and random_weights do not apply to model=, which has its own; remove them")
        elif isinstance(model, FrozenViT):
            backbone = _agree(model, {**options, **chosen})
        else:
            backbone = FrozenViT(model, head_order=head_order, **options, **chosen)
        _expect("channel", _typed(channel), backbone.embed_dim, backbone.name)
        _expect("patch", _typed(patch), backbone.patch_size, backbone.name)

        self.model_type = backbone.name if model is not None else model_type
        self.lift_path = lift_path
        self.channel = backbone.embed_dim
        self.patch = self.p = backbone.patch_size
        self.stride = backbone.stride
        self.layer = backbone.layer
        self.facet = backbone.facet
        self.mean, self.std = backbone.mean, backbone.std
        self.load_size: tuple[int, int] | None = None
        self.num_patches: tuple[int, int] | None = None
        self.backbone = backbone.to(place, dtype)
        # Once more, because the engine may not run there or in that dtype.
        self.backbone.require_engine()
        self.lift = self._prepare_lift(lift, random_lift, seed, fused)
        self._random_lift = random_lift
        self.eval()
        if not silent:
            self._report()

    @property
    def device(self) -> torch.device:
        """Current device of the backbone."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the backbone's weights and of the descriptors."""
        return self.backbone.dtype

    @property
    def random_weights(self) -> bool:
        """Whether backbone or LiFT were built with random weights, so that the descriptors are meaningless.

        A LiFT passed as a module is not checked.
        """
        return self.backbone.random_weights or self._random_lift

    def preprocess(
        self, image_path: images.ImageFile | Image.Image, load_size: LoadSize = None, *, out: Tensor | None = None
    ) -> tuple[Tensor, Image.Image]:
        """Read, resize and normalise an image.

        Args:
            image_path: file, bytes of one or a binary file object, or a Pillow image.
            load_size: pixels of the shorter side, ``(height, width)``, or None for the image's own size.
            out: ``[1, 3, H, W]``, floating point: where the result is written, such as a part of a batch.

        Returns:
            ``([1, 3, H, W] float32 on the CPU, or out; the resized RGB image)``.

        Raises:
            FileNotFoundError, TypeError, ValueError: as :func:`lift_fast.images.read_image`; ValueError also as
                :func:`lift_fast.images.resize` and :func:`lift_fast.images.to_rgb`.
        """
        image = image_path if isinstance(image_path, Image.Image) else images.read_image(image_path)
        image = images.resize(images.to_rgb(image), load_size)
        if image is image_path:
            # A copy, so that later changes of the caller's image do not reach it.
            image = image.copy()
        return images.to_tensor(image, self.mean, self.std, out=out), image

    def check_size(self, height: int, width: int, lift_iter: int = 1) -> tuple[int, int]:
        """Grid ``(h, w)`` of the descriptors of an image of ``height x width`` pixels after ``lift_iter`` LiFTs.

        Raises:
            ValueError: if the image is smaller than a patch, or the grid has more cells than
                :func:`lift_fast.images.max_pixels` allows.
        """
        lift_iter = check_lift_iter(lift_iter)
        h, w = self.backbone.check_size(height, width)
        if self.lift is None:
            return h, w
        # Bounded, because 4**lift_iter may not fit into memory.
        h, w = h << min(lift_iter, 32), w << min(lift_iter, 32)
        images.check_cells(h, w, f"lift_iter={lift_iter} on {width} x {height} pixels makes a grid of at least")
        return h, w

    def forward(self, batch: Tensor) -> Tensor:
        """Same as :meth:`extract_descriptors`."""
        return self.extract_descriptors(batch)

    def extract_descriptors(self, batch: Tensor) -> Tensor:
        """``[B, 3, H, W]`` normalised images to ``[B, T, C]`` descriptors, row-major on :meth:`grid`.

        The batch is moved to the extractor's device and dtype. With LiFT ``T`` is four times the backbone's.

        Raises:
            TypeError, ValueError: as :meth:`FrozenViT.forward`.
        """
        return self.extract_descriptors_iterative_lift(batch, lift_iter=1)

    @overload
    def extract_descriptors_iterative_lift(
        self, batch: Tensor, lift_iter: int = ..., return_inter: Literal[False] = ...
    ) -> Tensor: ...

    @overload
    def extract_descriptors_iterative_lift(
        self, batch: Tensor, lift_iter: int = ..., *, return_inter: Literal[True]
    ) -> dict[str, Tensor]: ...

    def extract_descriptors_iterative_lift(
        self, batch: Tensor, lift_iter: int = 1, return_inter: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """Apply LiFT ``lift_iter`` times, each time to its own output with the image enlarged 2x (bilinear).

        Args:
            batch: ``[B, 3, H, W]`` normalised images.
            lift_iter: number of applications; step n returns ``4**n`` times the backbone's tokens. 0 is the backbone
                alone. No effect without LiFT.
            return_inter: return every stage.

        Returns:
            ``[B, T, C]``; with ``return_inter`` a dictionary of ``"back"`` (backbone), ``"lift_1"``, ``"lift_2"``, ...

        Raises:
            TypeError, ValueError: as :meth:`FrozenViT.forward`; ValueError for a negative ``lift_iter``, and as
                :meth:`check_size`.
        """
        lift_iter = check_lift_iter(lift_iter)
        batch, tokens = self._backbone_tokens(batch, lift_iter)
        stages = {"back": tokens}
        for step, seen in enumerate(self._seen_by_steps(batch, lift_iter), start=1):
            tokens = stages[f"lift_{step}"] = self.lift(seen, tokens)  # type: ignore[misc]
        return stages if return_inter else tokens

    def matching_map(self, batch: Tensor, lift_iter: int = 1) -> Tensor:
        """Descriptors for :func:`lift_fast.dense_match`, with half the channels after LiFT.

        Backbone, then ``lift_iter`` applications of LiFT, the last in the basis of :meth:`LiFT.matching_map`: the same
        matches as with :meth:`descriptor_map`, up to rounding, at half the memory.

        Args:
            batch: ``[B, 3, H, W]`` normalised images.
            lift_iter: number of applications; 0 is the backbone alone. No effect without LiFT.

        Returns:
            ``[B, C // 2 + 1, h, w]``; the backbone's ``[B, C, h, w]`` without LiFT, and all C channels for a ``lift``
            without ``matching_map``. h and w are the backbone's :attr:`num_patches`, doubled by each application.

        Raises:
            TypeError, ValueError: as :meth:`extract_descriptors_iterative_lift`.
        """
        lift_iter = check_lift_iter(lift_iter)
        return self.lift_map(*self._backbone_tokens(batch, lift_iter), lift_iter)

    def descriptor_map(self, batch: Tensor) -> Tensor:
        """:meth:`extract_descriptors` as ``[B, C, h, w]`` (a view with NHWC memory)."""
        tokens = self.extract_descriptors(batch)
        out: Tensor = tokens.transpose(1, 2).unflatten(2, self.grid(batch.shape[-2], batch.shape[-1]))
        return out

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Grid ``(h, w)`` of :meth:`extract_descriptors` for images of ``height x width`` pixels."""
        h, w = self.backbone.grid(height, width)
        return (h, w) if self.lift is None else (2 * h, 2 * w)

    def covered(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Pixels that the grid's cells cover: ``(top, left, height, width)``.

        The whole image if its sides are whole patches; with a stride below the patch size, without a border of half
        their difference. Maps are stretched over these pixels, not over the image.
        """
        h, w = self.backbone.grid(height, width)
        start = (self.patch - self.stride) // 2
        return start, start, self.stride * h, self.stride * w

    def _backbone_tokens(self, batch: Tensor, lift_iter: int) -> tuple[Tensor, Tensor]:
        """The batch on the extractor's device in its dtype, and the backbone's ``[B, T, C]``."""
        if isinstance(batch, Tensor) and (batch.is_nested or batch.layout != torch.strided):
            check_dense("batch", batch)
        if isinstance(batch, Tensor) and batch.dtype in FLOATS:
            if batch.is_meta and self.device.type != "meta":
                raise ValueError(f"batch is on the meta device, without values to move to {self.device}")
            batch = batch.to(self.device, self.dtype)
            if batch.dim() == 4:
                self.check_size(batch.shape[-2], batch.shape[-1], lift_iter)
        tokens = self.backbone(batch)
        self.load_size = (batch.shape[-2], batch.shape[-1])
        self.num_patches = self.backbone.grid(*self.load_size)
        return batch, tokens

    def lift_map(self, batch: Tensor, tokens: Tensor, lift_iter: int = 1) -> Tensor:
        """:meth:`matching_map` of a batch whose ``tokens [B, T, C]`` the backbone has computed.

        ``batch`` is ``[B, 3, H, W]`` on the extractor's device and in its dtype.
        """
        h, w = self.backbone.grid(batch.shape[-2], batch.shape[-1])
        if self.lift is None or lift_iter == 0:
            return tokens.transpose(1, 2).unflatten(2, (h, w))
        narrow = getattr(self.lift, "matching_map", None)
        for step, seen in enumerate(self._seen_by_steps(batch, lift_iter), start=1):
            if step == lift_iter and narrow is not None:
                out: Tensor = narrow(seen, tokens)
                return out
            tokens = self.lift(seen, tokens)
        return tokens.transpose(1, 2).unflatten(2, (h << lift_iter, w << lift_iter))

    def _seen_by_steps(self, batch: Tensor, lift_iter: int) -> Iterator[Tensor]:
        """The image that each application of LiFT sees; nothing without LiFT."""
        if self.lift is None or lift_iter == 0:
            return
        seen = self._seen_by_lift(batch, self.backbone.grid(*batch.shape[-2:]), whole_patches=lift_iter > 1)
        for step in range(lift_iter):
            if step:
                seen = F.interpolate(seen, scale_factor=2, mode="bilinear", align_corners=False)
            yield seen

    def _seen_by_lift(self, batch: Tensor, grid: tuple[int, int], whole_patches: bool) -> Tensor:
        p, s, (h, w) = self.patch, self.stride, grid
        if s == p:
            if not whole_patches:
                return batch
            # LiFT crops to whole patches itself; before an enlargement the crop must come first for the grids to agree.
            return self._cropped(batch, 0, p * h, p * w)
        covered = self._cropped(batch, (p - s) // 2, s * h, s * w)
        # The CPU has no antialiased filter in half precision. It equals the plain one, as this enlarges, and some
        # inference engines lack it.
        resized = F.interpolate(covered.float(), size=(p * h, p * w), mode="bilinear", antialias=not is_exporting())
        return resized.to(batch.dtype)

    @staticmethod
    def _cropped(batch: Tensor, start: int, height: int, width: int) -> Tensor:
        if is_exporting():
            return crop(batch, start, start, height, width)
        return batch[:, :, start : start + height, start : start + width]

    def _prepare_lift(self, lift: nn.Module | None, random_lift: bool, seed: int, fused: bool) -> nn.Module | None:
        if self.lift_path is not None:
            from .checkpoints import load_lift

            lift = load_lift(self.lift_path, patch_size=self.patch)
        elif random_lift:
            from .lift import LiFT

            with plain_defaults(), torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(seed)
                lift = LiFT(self.channel, self.patch)
        if lift is None:
            return None
        source = "lift" if self.lift_path is None else str(self.lift_path)
        for name, wanted in (("in_channels", self.channel), ("patch_size", self.patch)):
            has = getattr(lift, name, wanted)
            if has != wanted:
                raise ValueError(
                    f"{source} has {name}={has}, but {self.backbone.name} (facet {self.facet!r}) needs {wanted}; "
                    "use LiFT weights trained for this backbone"
                )
        if not (getattr(lift, "pre_shape", True) and getattr(lift, "post_shape", True)):
            raise ValueError(f"{source} must take and return tokens (pre_shape=True, post_shape=True)")
        lift = lift.to(self.device, self.dtype).eval().requires_grad_(False)
        if not fused:
            lift.fused = False  # type: ignore[assignment]
        return lift

    def _report(self) -> None:
        note = " (random weights)" if self.backbone.random_weights else ""
        print(f"Loaded backbone: {self.model_type}{note}")
        if self.lift is None:
            print("No LiFT: backbone only")
        else:
            name = Path(self.lift_path).name if self.lift_path is not None else type(self.lift).__name__
            print(f"Loaded LiFT: {name}{' (random weights)' if self._random_lift else ''}")


@lru_cache(maxsize=1)
def demonstration_extractor() -> ViTLiFTExtractor:
    """The demonstration pair, on CUDA if available, with ``dtype="auto"``; one for all calls."""
    return ViTLiFTExtractor(BACKBONE, LIFT, device=None, silent=True, dtype="auto")


def check_lift_iter(lift_iter: int) -> int:
    """``lift_iter`` as an int; ValueError unless it is a whole number >= 0. The size of the map is not checked."""
    times: int = check_whole("lift_iter", lift_iter, 0, math.inf)
    return times


def _typed(value: int | None) -> int | None:
    return None if isinstance(value, _Default) else value


def _expect(argument: str, value: int | None, actual: int, name: str) -> None:
    if value is not None and value != actual:
        raise ValueError(
            f"{argument}={value} does not fit {name}, whose {argument} is {actual}; omit it or pass None to use the "
            "backbone's"
        )


def _agree(model: FrozenViT, options: dict[str, Any]) -> FrozenViT:
    """A copy of a ready backbone, which keeps its settings; contradictory arguments are errors."""
    if options["layer"] is not None and options["layer"] < 0:
        options = {**options, "layer": options["layer"] % model.depth}
    for argument, value in options.items():
        if value is not None and value != getattr(model, argument):
            raise ValueError(
                f"{argument}={value!r} does not fit the given FrozenViT, which has {argument}="
                f"{getattr(model, argument)!r}; build it with that {argument}, or pass its value here"
            )
    return shared_copy(model)
