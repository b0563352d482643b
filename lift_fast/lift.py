"""The LiFT module: doubles the resolution of a frozen ViT's features with the help of the image.

Source: "LiFT: A Surprisingly Simple Lightweight Feature Transform for Dense ViT Descriptors", ECCV 2024, section 3.
State-dict keys, their order and shapes are those of the published checkpoints.
"""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import memory
from ._exporting import crop, is_exporting, resize_patches
from .checks import FLOATS, check_dense, check_flag, check_whole
from .layers import LayerFinder, Up, conv_block
from .lift_state import read_into
from .ops.lift_forward.cache import forget_plan
from .ops.lift_forward.op import lift_forward
from .ops.lift_forward.plan import Architecture, span_basis
from .precision import autocasts, without_autocast

# Weights, epsilons and architecture: the arguments of lift_fast.ops.lift_forward.plan.build_plan.
_Network = tuple[list[Tensor], list[float], Architecture]
_NONE = type(None)
# One layer of such a network has weights of some hundred megabytes; larger numbers are mistakes.
_MOST_CHANNELS, _MOST_BLOCKS = 1 << 14, 64
_REPOSITORY_TAGS = ["lift", "feature-upsampling", "vision-transformer", "dense-correspondence"]


class LiFT(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="lift_fast",
    tags=_REPOSITORY_TAGS,
    license="mit",
):
    """Lightweight Feature Transform: ``[B, T, C]`` backbone tokens to ``[B, 4T, C]`` tokens on the doubled grid.

    In evaluation mode without gradients the forward pass runs a folded, composed plan of the same function
    (:mod:`lift_fast.ops.lift_forward`), built once from the weights and rebuilt when one of them changes; set
    ``fused = False`` to force the plain graph. Training, evaluation with gradients, and programs that ``torch.export``
    or ``torch.onnx.export`` record always have the plain graph.
    PyTorch's version counters do not see changes of a weight through ``.data``: call ``eval()`` or
    :func:`lift_fast.clear_plans` after them.
    A network whose layers were edited (another activation, a bias, a stride, a further layer, a layer's own
    ``forward``) or hooked runs its plain graph, as does one under the transforms of ``torch.func``.
    A new module has PyTorch's default dtype and device, as every ``nn.Module``; the result of
    :func:`lift_fast.load_lift` does not depend on them.

    Args:
        in_channels: C, channels of the backbone's features, at least 2.
        patch_size: pixels per token along one side. 8 and 16 are the published networks; for any other size the
            image is resized (bilinear, antialiased) to 16 pixels per token and treated as patch 16.
        pre_shape: ``x`` is given as tokens ``[B, T, C]`` instead of a map ``[B, C, h, w]``.
        post_shape: return tokens ``[B, 4T, C]`` instead of a map ``[B, C, 2h, 2w]``.
        use_image: False builds the "no image" ablation: no image encoders, and a smaller state dict.
        image_channels: channels of the image encoders (32 in the paper).
        extra_image_blocks: further 3x3 convolution blocks, stride 1, at the end of the first image encoder
            (the ViT-B variant for detectors has one).

    Raises:
        ValueError: for a value out of range.
    """

    fused: bool

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        pre_shape: bool = True,
        post_shape: bool = True,
        *,
        use_image: bool = True,
        image_channels: int = 32,
        extra_image_blocks: int = 0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels = check_whole("in_channels", in_channels, 2, _MOST_CHANNELS)
        self.patch_size = patch_size = check_whole("patch_size", patch_size, 1, _MOST_CHANNELS)
        image_channels = check_whole("image_channels", image_channels, 1, _MOST_CHANNELS)
        extra_image_blocks = check_whole("extra_image_blocks", extra_image_blocks, 0, _MOST_BLOCKS)
        self.pre_shape, self.post_shape = check_flag("pre_shape", pre_shape), check_flag("post_shape", post_shape)
        self.use_image = use_image = check_flag("use_image", use_image)
        self.fused = True
        self._find_layers = LayerFinder()

        # Registered in the order of the published network: the same seed gives the same initial weights.
        width = image_channels if use_image else 0
        self.up1 = Up(in_channels + width, in_channels, width)
        self.outc = nn.Conv2d(in_channels // 2, in_channels, kernel_size=1)
        if use_image:
            blocks = conv_block(3, width, stride=2) + conv_block(width, width, stride=2)
            for _ in range(extra_image_blocks):
                blocks += conv_block(width, width, stride=1)
            self.image_convs_1 = nn.Sequential(*blocks)
            self.scale_adapter = nn.Identity() if patch_size == 8 else nn.MaxPool2d(2, 2)
            self.image_convs_2 = nn.Sequential(*conv_block(width, width, stride=2))

    def forward(self, imgs: Tensor, x: Tensor) -> Tensor:
        """Upsample backbone features by two.

        Args:
            imgs: ``[B, 3, H, W]`` normalised images, floating point. If H or W is not a multiple of the patch size,
                the image branch sees what the backbone saw: the whole patches from the top left corner.
            x: ``[B, T, C]`` tokens without class token if ``pre_shape`` (row-major, ``T = (H // p) * (W // p)``),
                else ``[B, C, H // p, W // p]``; dtype and device of ``imgs``.

        Returns:
            ``[B, 4T, C]`` if ``post_shape``, else ``[B, C, 2h, 2w]``, in the dtype of ``x`` (of autocast, if active).
            The memory is token-major (NHWC) on the fused path.

        Raises:
            ValueError: for shapes, dtypes or devices that do not fit each other or the module; for weights that are
                not finite when the plan is built.
        """
        network = self._network()
        h, w = self._check(imgs, x, network)
        if network is None or _wants_gradients(imgs, x, network):
            out = self._forward_plain(self._align(imgs, h, w), self._as_map(x, h, w))
            return out.flatten(2).transpose(1, 2) if self.post_shape else out
        tokens = self._forward_fused(imgs, x, h, w, network)
        return tokens.view(x.shape[0], 4 * h * w, -1) if self.post_shape else tokens.permute(0, 3, 1, 2)

    def matching_map(self, imgs: Tensor, x: Tensor, normalize: bool = False) -> Tensor:
        """The descriptors of :meth:`forward` in half the channels, for matching: exact, not a compression.

        LiFT's C-channel descriptors ``W v + b`` span no more than c + 1 dimensions, c = C // 2. With the thin QR
        decomposition ``[W | b] = Q R`` this gives their coordinates ``R [v; 1]`` in the orthonormal basis Q: inner
        products, norms and cosines between them, and so matches, are those of the wide descriptors up to rounding.
        Compare them only with coordinates of the same network: a change of ``outc`` changes the basis.

        Runs on the same path as :meth:`forward`. After the plain graph (training, gradients, ``fused = False``) the
        descriptors are projected onto the same basis, computed from the current weights in float64 at each call. The
        basis is a constant for gradients; gradients of inner products and norms still equal the wide descriptors'.

        Args:
            imgs, x: as :meth:`forward`.
            normalize: divide each descriptor by max(its norm, 1e-12).

        Returns:
            ``[B, c + 1, 2h, 2w]``, a map whatever ``post_shape`` says, as :func:`lift_fast.dense_match` takes it; in
            the dtype of ``x`` (of autocast, if active), NHWC memory on the fused path. For
            :func:`lift_fast.nearest`: ``.flatten(2).transpose(1, 2)``.

        Raises:
            ValueError: as :meth:`forward`.
        """
        network, normalize = self._network(), check_flag("normalize", normalize)
        h, w = self._check(imgs, x, network)
        if network is not None and not _wants_gradients(imgs, x, network):
            return self._forward_fused(imgs, x, h, w, network, basis=True, normalize=normalize).permute(0, 3, 1, 2)
        wide = self._forward_plain(self._align(imgs, h, w), self._as_map(x, h, w))
        if wide.is_meta:
            return memory.new_empty(wide, (wide.shape[0], self.in_channels // 2 + 1, *wide.shape[2:]))
        if not isinstance(self.outc, nn.Conv2d):
            raise ValueError(f"matching_map needs a convolution as outc, this network has a {type(self.outc).__name__}")
        # Half precision would round a second time.
        dtype = torch.promote_types(wide.dtype, torch.float32)
        with without_autocast(wide.device.type):
            weight, bias = self.outc.weight.flatten(1), self.outc.bias
            basis, _ = span_basis(weight, weight.new_zeros(len(weight)) if bias is None else bias)
            narrow = F.conv2d(wide.to(dtype), basis.to(dtype).t()[:, :, None, None])
            return (F.normalize(narrow, dim=1) if normalize else narrow).to(wide.dtype)

    def _as_map(self, x: Tensor, h: int, w: int) -> Tensor:
        """``x`` as ``[B, C, h, w]``."""
        return x.transpose(1, 2).unflatten(2, (h, w)) if self.pre_shape else x

    def _forward_fused(
        self,
        imgs: Tensor,
        x: Tensor,
        h: int,
        w: int,
        network: _Network,
        basis: bool = False,
        normalize: bool = False,
    ) -> Tensor:
        """The result of the inference plan: ``[B, 2h, 2w, C]``, c + 1 channels with ``basis``."""
        kind = x.device.type
        if kind == "meta":
            channels = self.in_channels // 2 + 1 if basis else self.in_channels
            return memory.new_empty(x, (x.shape[0], 2 * h, 2 * w, channels))
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            imgs, x = imgs.to(dtype), x.to(dtype)
        # The no-image network does not read the images: pass an empty tensor instead of resizing them.
        aligned = self._align(imgs, h, w) if self.use_image else imgs.new_empty((imgs.shape[0], 3, 0, 0))
        x_map = x.view(x.shape[0], h, w, self.in_channels) if self.pre_shape else x.permute(0, 2, 3, 1)
        weights, epsilons, architecture = network
        return lift_forward(aligned, x_map, weights, epsilons, architecture, basis=basis, normalize=normalize)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> LiFT:
        """Load a LiFT written by :meth:`save_pretrained` from a folder or a hub, in evaluation mode.

        Raises:
            ValueError: if config.json or the weights are not valid or contradict each other; names file and field.
        """
        try:
            lift: LiFT = super().from_pretrained(pretrained_model_name_or_path, **options)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            # AttributeError: the JSON is not an object.
            if isinstance(error, AttributeError) and "'items'" not in str(error):
                raise
            raise ValueError(
                f"config.json of {pretrained_model_name_or_path} is not a JSON object ({error}); expected one with "
                "LiFT's arguments, such as in_channels"
            ) from error
        return lift

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> LiFT:
        config = f"config.json of {model_id}"
        known = {name: options[name] for name in cls._hub_mixin_init_parameters if name in options}
        missing = [name for name in ("in_channels", "patch_size") if name not in known]
        if missing:
            raise ValueError(f"{config} is missing or lacks {' and '.join(missing)}")
        try:
            # Check the arguments before the weights are downloaded, without memory.
            with torch.device("meta"):
                cls(**known)
        except ValueError as error:
            raise ValueError(f"{config}: {error}") from error
        lift: LiFT = super()._from_pretrained(model_id=model_id, **options)
        return lift

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        read_into(model, model_file, os.path.join(os.path.dirname(model_file), "config.json"))
        return model.to(map_location).eval()

    # read_into reads both kinds of file.
    _load_as_pickle = _load_as_safetensor

    def train(self, mode: bool = True) -> LiFT:
        """Switch between training and evaluation mode; the inference plan is rebuilt afterwards."""
        # Changes through ``.data`` count no versions; they usually happen between train() and eval().
        self._find_layers.forget()
        weights = self._plan_sources()[0]
        if weights:
            forget_plan(weights)
        return super().train(mode)

    @property
    def architecture(self) -> Architecture:
        return _architecture(len(self.image_convs_1) // 3 if self.use_image else 0, self.patch_size)

    def _forward_plain(self, imgs: Tensor, x: Tensor) -> Tensor:
        """The published graph. ``imgs`` is aligned (8 or 16 pixels per token), ``x`` is ``[B, C, h, w]``."""
        out: Tensor = self.outc(self._decode(imgs, x))
        return out

    def _decode(self, imgs: Tensor, x: Tensor) -> Tensor:
        """:meth:`_forward_plain` before its last layer: ``[B, c, 2h, 2w]``."""
        fine = None
        if self.use_image:
            fine = self.scale_adapter(self.image_convs_1(imgs))
            x = torch.cat([x, self.image_convs_2(fine)], dim=1)
        out: Tensor = self.up1(x, fine)
        return out

    def _align(self, imgs: Tensor, h: int, w: int) -> Tensor:
        """The pixels that the backbone saw, resized to 16 pixels per token for patch sizes other than 8 and 16."""
        p = self.patch_size
        # While compiling, the branch would specialise the graph to this size.
        if p in (8, 16) and not torch.compiler.is_compiling() and imgs.shape[2:] == (p * h, p * w):
            return imgs
        # A backbone's patches begin at the top left corner.
        if is_exporting():
            imgs = crop(imgs, 0, 0, p * h, p * w)
            return imgs if p in (8, 16) or not self.use_image else resize_patches(imgs.float(), p, 16).to(imgs.dtype)
        imgs = imgs[:, :, : p * h, : p * w]
        if p in (8, 16) or not self.use_image:
            return imgs
        # The antialiased filter supports neither half precision on the CPU nor bfloat16 on every device.
        resized = F.interpolate(imgs.float(), size=(16 * h, 16 * w), mode="bilinear", antialias=True)
        return resized.to(imgs.dtype)

    def _network(self) -> _Network | None:
        """The arguments of the plan; None if the plain graph must run whatever the inputs."""
        if not self.fused or self.training or is_exporting():
            return None
        # The transforms of torch.func support plain operations only.
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return None
        layers = self._find_layers(self)
        if layers is None:
            return None
        for norm in layers.norms:
            if norm.training:
                return None
        weights = layers.weights()
        # A BatchNorm without weights or statistics, a convolution without bias.
        if _NONE in map(type, weights):
            return None
        # Compilers warn about caches.
        architecture = _architecture if torch.compiler.is_compiling() else _known_architecture
        return weights, layers.epsilons(), architecture(layers.image_blocks, self.patch_size)

    def _plan_sources(self) -> tuple[list[Tensor], list[float]]:
        """Weights and buffers in the order of the plan, and each BatchNorm's epsilon; empty for an edited graph."""
        layers = self._find_layers(self)
        return ([], []) if layers is None else (layers.weights(), layers.epsilons())

    def _check(self, imgs: Tensor, x: Tensor, network: _Network | None) -> tuple[int, int]:
        """Check the inputs against each other and the module; returns the coarse grid (h, w)."""
        p, channels = self.patch_size, self.in_channels
        if not isinstance(imgs, Tensor) or not isinstance(x, Tensor):
            raise ValueError(f"LiFT expects tensors imgs and x, got {type(imgs).__name__} and {type(x).__name__}")
        if imgs.is_nested or x.is_nested or imgs.layout != torch.strided or x.layout != torch.strided:
            check_dense("imgs", imgs)
            check_dense("x", x)
        size = imgs.shape
        if len(size) != 4 or size[1] != 3:
            raise ValueError(f"imgs must be [B, 3, H, W], got {list(size)}")
        if imgs.dtype not in FLOATS or x.dtype not in FLOATS:
            raise ValueError(
                f"imgs and x must be float32, bfloat16, float16 or float64, got {imgs.dtype} and {x.dtype}; "
                "normalise the images first (ViTLiFTExtractor.preprocess does)"
            )
        batch, _, height, width = size
        h, w = height // p, width // p
        if h == 0 or w == 0:
            raise ValueError(f"imgs of {height} x {width} pixels are smaller than one patch of {p} x {p}")
        if self.pre_shape:
            expected, layout = [batch, h * w, channels], "[B, T, C]"
        else:
            expected, layout = [batch, channels, h, w], "[B, C, h, w]"
        if list(x.shape) != expected:
            raise ValueError(
                f"x must be {layout} = {expected} for imgs of {height} x {width} pixels, patch size {p} (a grid of "
                f"{h} x {w} tokens without class token) and in_channels={channels}, got {list(x.shape)}"
            )
        if batch == 0:
            raise ValueError("LiFT got an empty batch (B = 0); pass at least one image")
        weight = next(self.parameters()) if network is None else network[0][-2]
        device, dtype = x.device, x.dtype
        if imgs.device != device or device != weight.device:
            raise ValueError(
                f"imgs are on {imgs.device}, x on {device}, LiFT's weights on {weight.device}; move all to one"
            )
        if (imgs.dtype != dtype or dtype != weight.dtype) and not autocasts(device.type):
            raise ValueError(
                f"imgs are {imgs.dtype}, x is {x.dtype}, LiFT's weights are {weight.dtype}; "
                "convert them to one dtype or use torch.autocast"
            )
        return h, w

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, patch_size={self.patch_size}, use_image={self.use_image}"


def _architecture(image_blocks: int, patch_size: int) -> Architecture:
    return Architecture(image_blocks, pool=image_blocks > 0 and patch_size != 8)


_known_architecture = cache(_architecture)


def _wants_gradients(imgs: Tensor, x: Tensor, network: _Network) -> bool:
    # Forward-mode differentiation works without gradients enabled, and the operator would ignore tangents. PyTorch has
    # no public name for this query.
    if getattr(forward_ad, "_current_level", -1) >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    return imgs.requires_grad or x.requires_grad or any(weight.requires_grad for weight in network[0])
