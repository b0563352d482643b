"""A frozen Vision Transformer that computes one facet of one layer, and only what the facet needs."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._text import shown
from ..checks import FLOATS, as_whole, check_dense
from ..defaults import plain_defaults
from ..images import check_cells
from ..precision import autocasts, without_autocast
from ..witnesses import Witnesses
from . import in_place, network, patches
from .engines import ENGINES, Engine
from .engines.graph import Position
from .in_place import StandardBlocks
from .native import NativeTransformer
from .position import RULES, Grid
from .projection import FACETS, HEAD_ORDERS, FacetProjection

_CACHED_GRIDS = 8
_Module = TypeVar("_Module", bound=nn.Module)
_Key = tuple[Grid, torch.device, torch.dtype]


def _fixed(name: str) -> property:
    def read(self: FrozenViT) -> str:
        value: str = getattr(self, f"_{name}")
        return value

    def refuse(self: FrozenViT, value: object) -> None:
        raise AttributeError(
            f"{name} of a backbone is fixed to {read(self)!r}; for another value build "
            f"FrozenViT(backbone.model, {name}={value!r}, ...), which shares the weights"
        )

    return property(read, refuse)


class FrozenViT(nn.Module):
    """Dense features of a frozen timm Vision Transformer.

    Blocks after ``layer`` never run. For the facets query, key and value, block ``layer`` runs only its first LayerNorm
    and the C rows of its qkv projection on the patch tokens: no attention, output projection, MLP or final norm.
    Gradients flow to the images but not to the weights, and the module stays in evaluation mode even if a parent calls
    ``train()``.

    The given model is not changed: the wrapper holds a copy of its modules that shares the weight storage. In-place
    updates of the given model (``load_state_dict``, optimiser steps) therefore take effect; moving it to another device
    or dtype does not. PyTorch does not count updates through ``.data`` or NumPy: call ``eval()`` after them.

    Args:
        model: a timm ``VisionTransformer`` (also distilled) or ``Eva`` with a convolutional, square patch embedding.
        facet: ``"key"``, ``"query"``, ``"value"``: output of the linear projection with bias, before q/k normalisation
            and rotary position embedding; ``"token"``: output of block ``layer``, never through the final norm (as in
            Amir et al., "Deep ViT Features as Dense Visual Descriptors"); ``"final"``: that output through the final
            norm (as DINO's own evaluations read it).
        layer: index of the block, negative from the end; None is the last.
        stride: pixels between patches, 1 to the patch size; None is the patch size. The weights are unchanged; absolute
            and rotary position embeddings follow the grid ``1 + (H - p) // s``.
        head_order: ``"concatenated"``: channel ``head * head_dim + d``. ``"interleaved"``: channel
            ``d * heads + head``, the order of these facets in Amir et al. and in published LiFT checkpoints.
        position_rule: ``"dino"`` or ``"timm"``, how absolute position embeddings are resampled to another grid
            (:mod:`lift_fast.backbones.position`); None is DINO's for DINO weights of timm, timm's otherwise.
        mean, std: normalisation of the images, three values each; None reads the model's ``pretrained_cfg``.
        name: of the model in error messages and ``repr``.
        random_weights: whether the weights are random, for callers that report it.
        engine: ``"torch"``; ``"openvino"`` (Intel and AMD processors; extra ``openvino``); ``"compile"``
            (``torch.compile``); ``"auto"`` is the fastest of the first two here. Results agree up to the dtype's
            rounding. Calls that need PyTorch, such as those with gradients, autocast or hooks, run there with every
            engine (docs/engines.md).

    Attributes:
        patch_size, stride, embed_dim (channels of the output), depth, layer (non-negative), facet, head_order,
        mean, std, name, random_weights, engine; ``model`` is the wrapped copy. ``device`` and ``dtype`` follow the
        weights. ``engine_used`` is what computed the last call (None before the first), ``engine_reason`` why.

    Raises:
        ValueError: for an unsupported model or an argument out of range.
        EngineError: if ``"openvino"`` or ``"compile"`` does not run on this machine or with this network.
        TypeError: if ``model`` is not an ``nn.Module``.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    facet = _fixed("facet")
    head_order = _fixed("head_order")
    position_rule = _fixed("position_rule")

    def __init__(
        self,
        model: nn.Module,
        *,
        facet: str = "key",
        layer: int | None = None,
        stride: int | None = None,
        head_order: str = "concatenated",
        position_rule: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        name: str | None = None,
        random_weights: bool = False,
        engine: str = "auto",
    ) -> None:
        super().__init__()
        patch = _check_model(model)
        self._engine = Engine(_choice("engine", engine, ENGINES))
        config = getattr(model, "pretrained_cfg", None) or {}
        self.name = name or config.get("architecture") or type(model).__name__
        self._facet = _choice("facet", facet, FACETS)
        self._head_order = _choice("head_order", head_order, HEAD_ORDERS)
        dino = config.get("tag") == "dino"
        self._position_rule = _choice("position_rule", position_rule or ("dino" if dino else "timm"), tuple(RULES))
        self.mean = _triple("mean", mean if mean is not None else config.get("mean"), (0.485, 0.456, 0.406))
        self.std = _triple("std", std if std is not None else config.get("std"), (0.229, 0.224, 0.225))
        self.random_weights = random_weights

        vit: Any = shared_copy(model)
        self.model = vit
        self.patch_size = patch
        self.depth = len(vit.blocks)
        self.layer = self._resolve_layer(layer)
        apart = patch if stride is None else as_whole(stride)
        if apart is None or not 1 <= apart <= patch:
            raise ValueError(f"stride must be an integer from 1 to the patch size {patch}, got {shown(stride)}")
        self.stride = apart
        self._projection: FacetProjection | None = None
        self.embed_dim = int(vit.embed_dim)
        if facet not in ("token", "final"):
            self._projection = FacetProjection(vit.blocks[self.layer], facet, head_order == "interleaved")
            self.embed_dim = self._projection.width
        self._native, self._standard = NativeTransformer(), StandardBlocks()
        self._positions: OrderedDict[_Key, tuple[Witnesses, Position]] = OrderedDict()
        super().train(False)
        self.require_engine()

    def require_engine(self) -> None:
        """Check that an engine given by name runs with the weights where they are now.

        Raises:
            EngineError: with the reason, if it does not.
        """
        self._engine.require(self)

    @property
    def engine(self) -> str:
        """The engine that was wished for."""
        return self._engine.wish

    @property
    def engine_used(self) -> str | None:
        """What computed the last call: ``"torch"``, ``"openvino"`` or ``"compile"``; None before the first."""
        return self._engine.used

    @property
    def engine_reason(self) -> str:
        """Why :attr:`engine_used` computed the last call."""
        return self._engine.reason

    @property
    def device(self) -> torch.device:
        """Current device of the patch projection, required for images."""
        return patches.weight_of(self.model.patch_embed).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the patch projection's weights, required for images outside autocast."""
        return patches.weight_of(self.model.patch_embed).dtype

    def grid(self, height: int, width: int) -> Grid:
        """Token grid ``(h, w)`` of an image of ``height x width`` pixels: ``1 + (H - p) // s``."""
        p, s = self.patch_size, self.stride
        return 1 + (height - p) // s, 1 + (width - p) // s

    def check_size(self, height: int, width: int) -> Grid:
        """:meth:`grid` of an image, checked.

        Raises:
            ValueError: for an image smaller than one patch, or with more tokens than
                :func:`lift_fast.images.max_pixels` allows.
        """
        p = self.patch_size
        if height < p or width < p:
            raise ValueError(f"imgs of {width} x {height} pixels are smaller than one patch of {p} x {p}")
        grid = self.grid(height, width)
        check_cells(*grid, f"imgs of {width} x {height} pixels at stride {self.stride} make a grid of")
        return grid

    def strided(self, stride: int) -> FrozenViT:
        """The same backbone on the same weights with patches ``stride`` pixels apart.

        Raises:
            ValueError: unless ``stride`` is an integer from 1 to the patch size.
        """
        same = ("facet", "layer", "head_order", "position_rule", "mean", "std", "name", "random_weights", "engine")
        other = FrozenViT(self.model, stride=stride, **{name: getattr(self, name) for name in same})
        other._native = self._native.sibling()
        return other

    def forward(self, imgs: Tensor) -> Tensor:
        """``[B, 3, H, W]`` normalised images to ``[B, h * w, embed_dim]`` tokens, row-major on :meth:`grid`.

        Pixels beyond the last whole patch (right and bottom) are ignored. Any memory format; the dtype of the weights
        (float32, bfloat16 or float16), or any of these under autocast. NaN pixels give NaN tokens.

        Raises:
            TypeError: if ``imgs`` is not a tensor.
            ValueError: for a wrong shape, dtype or device, an empty batch, and as :meth:`check_size`.
        """
        grid = self._check(imgs)
        out, ready = self._engine(self, imgs)
        return self._in_torch(imgs, grid, ready=ready) if out is None else out

    def _in_torch(self, imgs: Tensor, grid: Grid, position: Position | None = None, ready: Any = None) -> Tensor:
        """:meth:`forward` by PyTorch; with ``position`` by its modules alone, for tracers.

        ``ready`` is :meth:`in_native_core`, if it is known for this call.
        """
        model = self.model
        native = self._native(self, imgs, grid, ready) if position is None else None
        if native is None:
            tokens, rotary = self._embed(imgs, grid, position)
            native = self._native.blocks(self, tokens) if position is None else None
        if native is not None:
            return model.norm(native) if self.facet == "final" else native
        last = self.layer if self._projection is not None else self.layer + 1
        # A list, because a slice of the container would be a new container.
        blocks = list(model.blocks)[:last]
        if position is None and self._standard(blocks, tokens):
            tokens = in_place.run(blocks, tokens)
        else:
            for index, block in enumerate(blocks):
                tokens = self._run(block, index, tokens, rotary)
        if self._projection is None:
            tokens = tokens[:, model.num_prefix_tokens :]
            return (model.norm(tokens) if self.facet == "final" else tokens).contiguous()
        block = model.blocks[self.layer]
        return self._projection(
            block, tokens, model.num_prefix_tokens, lambda: self._run(block, self.layer, tokens, rotary)
        )

    def train(self, mode: bool = True) -> FrozenViT:
        """Stay in evaluation mode: the backbone is frozen even if a parent module trains.

        Forgets what was computed from the weights, as after edits through ``.data``, which leave no trace.
        """
        super().train(False)
        self._positions.clear()
        self._native.forget()
        self._engine.forget()
        return self

    def in_native_core(self) -> Any:
        """This network as the native core computes it in plain inference on the CPU; None if it cannot."""
        return self._native.ready(self)

    def _embed(self, imgs: Tensor, grid: Grid, position: Position | None = None) -> tuple[Tensor, Tensor | None]:
        x = patches.embed(self.model.patch_embed, imgs, self.stride, grid)
        prefix, added, rotary = self._position(grid) if position is None else position
        if added is not None:
            x = x + added
        if prefix is not None:
            x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
        # Without a class token the tokens are still a transposed view, which would slow down every residual sum.
        return self.model.norm_pre(self.model.pos_drop(x.contiguous())), rotary

    def _run(self, block: nn.Module, index: int, tokens: Tensor, rotary: Tensor | None) -> Tensor:
        if rotary is None:
            out: Tensor = block(tokens)
        else:
            out = block(tokens, rope=rotary[index] if getattr(self.model, "rope_mixed", False) else rotary)
        return out

    def _position(self, grid: Grid) -> Position:
        """Class and register tokens with their position, patch positions, rotary embedding for ``grid``."""
        if torch.compiler.is_compiling():
            return self._build_position(grid)
        weight, sources = patches.weight_of(self.model.patch_embed), self._position_sources()
        # With device and dtype, because the inner model may be moved directly.
        key = (grid, weight.device, weight.dtype)
        cached = self._positions.get(key)
        if cached is not None and cached[0].recognise(sources):
            self._positions.move_to_end(key)
            return cached[1]
        # Built outside inference mode, autocast and the program's defaults, because the cache outlives them.
        kind = weight.device.type
        with plain_defaults(), torch.inference_mode(False), torch.no_grad(), without_autocast(kind):
            position = self._build_position(grid)
            self._positions[key] = (Witnesses(sources), position)
        while len(self._positions) > _CACHED_GRIDS:
            self._positions.popitem(last=False)
        return position

    def _build_position(self, grid: Grid) -> Position:
        model = self.model
        tokens = [t for t in (getattr(model, n, None) for n in _PREFIX) if t is not None]
        prefix = torch.cat([t.detach() for t in tokens], dim=1) if tokens else None
        position = model.pos_embed
        if position is not None:
            count = 0 if model.no_embed_class else model.num_prefix_tokens
            position = position.detach()
            if count and prefix is not None:
                prefix = prefix + position[:, :count]
            old = _pretrained_grid(model, position.shape[1] - count)
            position = RULES[self.position_rule](position[:, count:], old, grid)
        return prefix, position, self._rotary(grid)

    def _rotary(self, grid: Grid) -> Tensor | None:
        rope = getattr(self.model, "rope", None)
        if rope is None:
            return None
        shape = list(grid)
        # Modules built for one fixed grid ignore the shape argument; this copy may be changed to another grid.
        if getattr(rope, "feat_shape", None) is not None and list(rope.feat_shape) != shape:
            rope.update_feat_shape(shape)
        out: Tensor = rope.get_embed(shape=shape)
        return out.detach()

    def _position_sources(self) -> list[Tensor]:
        model = self.model
        sources = [getattr(model, n, None) for n in (*_PREFIX, "pos_embed")]
        rope = getattr(model, "rope", None)
        # Only parameters: the buffers of rotary modules are caches that may change when read.
        learned = list(rope.parameters()) if isinstance(rope, nn.Module) else []
        return [t for t in (*sources, *learned) if t is not None]

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> FrozenViT:
        self._positions.clear()
        self._engine.forget()
        super()._apply(fn, *args, **kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_positions": OrderedDict()}

    def _resolve_layer(self, layer: int | None) -> int:
        if layer is None:
            return self.depth - 1
        whole = as_whole(layer)
        if whole is None or not -self.depth <= whole < self.depth:
            raise ValueError(
                f"layer must be an integer from {-self.depth} to {self.depth - 1} for {self.name} with "
                f"{self.depth} blocks, got {shown(layer)}"
            )
        return whole % self.depth

    def _check(self, imgs: Tensor) -> Grid:
        if not isinstance(imgs, Tensor):
            raise TypeError(f"imgs must be a tensor [B, 3, H, W], got {type(imgs).__name__}")
        if imgs.is_nested or imgs.layout != torch.strided:
            check_dense("imgs", imgs)
        if imgs.dim() != 4 or imgs.shape[1] != 3:
            raise ValueError(f"imgs must be [B, 3, H, W], got {list(imgs.shape)}")
        if imgs.shape[0] == 0:
            raise ValueError("imgs is an empty batch (B = 0); pass at least one image")
        grid = self.check_size(*imgs.shape[2:])
        if imgs.dtype not in FLOATS:
            raise ValueError(
                f"imgs must be floating point and normalised with mean {self.mean} and std {self.std}, got {imgs.dtype}"
            )
        weight = patches.weight_of(self.model.patch_embed)
        if imgs.device != weight.device:
            raise ValueError(f"imgs are on {imgs.device}, the backbone is on {weight.device}; move one of them")
        if imgs.dtype != weight.dtype and not autocasts(imgs.device.type):
            raise ValueError(
                f"imgs are {imgs.dtype}, the backbone is {weight.dtype}; convert one of them or use torch.autocast"
            )
        return grid

    def extra_repr(self) -> str:
        return (
            f"name={self.name!r}, facet={self.facet!r}, layer={self.layer}, patch_size={self.patch_size}, "
            f"stride={self.stride}, embed_dim={self.embed_dim}, random_weights={self.random_weights}"
        )


# In timm's order before the patch tokens.
_PREFIX = ("cls_token", "dist_token", "reg_token")


def _check_model(model: nn.Module) -> int:
    """Patch size of a supported model; an error otherwise."""
    supported = "supported are timm's VisionTransformer (also distilled) and Eva models with a plain patch embedding"
    if isinstance(model, type) or not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}; {supported}")
    kind = type(model)
    families, embedding = _supported(model)
    bases = [base for base in families if isinstance(model, base)]
    if not bases:
        raise ValueError(f"{kind.__name__} is not a supported Vision Transformer; {supported}")
    changed = [
        n
        for n in ("_pos_embed", "forward_features")
        if n in model.__dict__ or getattr(kind, n) is not getattr(bases[0], n)
    ]
    if changed:
        raise ValueError(f"{kind.__name__} changes {', '.join(changed)} of timm's {bases[0].__name__}; {supported}")
    embed: Any = model.patch_embed
    projection = getattr(embed, "proj", None)
    if not isinstance(embed, embedding) or not isinstance(projection, nn.Conv2d):
        raise ValueError(f"patch embedding {type(embed).__name__} of {kind.__name__} cannot be read; {supported}")
    if projection.in_channels != 3:
        raise ValueError(f"the model reads {projection.in_channels} channels; images have 3")
    height, width = projection.kernel_size
    if height != width:
        raise ValueError(f"patches must be square, got {height} x {width} pixels")
    return int(height)


def _supported(model: nn.Module) -> tuple[tuple[type[nn.Module], ...], type[nn.Module]]:
    """Classes of networks, a subclass before its base, and of their patch embedding; imports timm only for its own."""
    if isinstance(model, network.VisionTransformer):
        return (network.VisionTransformer,), network.PatchEmbed
    from timm.layers import PatchEmbed
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return (VisionTransformerDistilled, VisionTransformer, Eva), PatchEmbed


def shared_copy(model: _Module) -> _Module:
    """A copy of the modules that shares their storage, with separate, frozen parameters."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo.update({id(b): b.detach() for b in model.buffers()})
    # Weights that a pre-hook computes (pruning, the older spectral_norm) are plain attributes with a graph.
    attributes = [value for module in model.modules() for value in module.__dict__.values()]
    memo.update({id(t): t.detach() for t in attributes if isinstance(t, Tensor)})
    return copy.deepcopy(model, memo)


def _pretrained_grid(model: Any, tokens: int) -> Grid:
    grid = model.patch_embed.grid_size
    if grid is not None and grid[0] * grid[1] == tokens:
        return int(grid[0]), int(grid[1])
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{tokens} position embeddings do not form a square grid, and the model gives no other")
    return side, side


def _choice(argument: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _triple(argument: str, value: Sequence[float] | None, default: Sequence[float]) -> tuple[float, float, float]:
    values = tuple(float(v) for v in (default if value is None else value))
    if len(values) != 3:
        raise ValueError(f"{argument} must be three values (red, green, blue), got {value!r}")
    return values
