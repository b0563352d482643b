"""A plain Vision Transformer in the native core: from pixels to tokens or keys in one call, on the CPU.

The modules' arithmetic with packed weights, in other orders: LayerNorm, bias, GELU, LayerScale and residual sums happen
where a matrix product leaves its results, attention never forms its whole table, and rows of tokens stay in a core's
cache from one attention to the next (csrc/cpu/vit.hpp). Between blocks tokens are float32, also for bfloat16 weights.
Results do not depend on the number of threads or on the batch.
"""

from __future__ import annotations

from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import _env, _native, devices, memory
from ..untouched import Unchanged, is_original, is_untouched
from ..witnesses import Witnesses
from .in_place import idle_parts, is_plain_inference, is_standard
from .projection import FacetProjection

_UNIT = 32
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# An entry of a module's parameters, read again at each call because a parameter may be replaced.
_Slot = tuple[dict[str, Any], str]


class _Part:
    """Packed weights of a block or a layer; networks that share the weights share it."""

    def __init__(self, sources: list[Tensor], packed: Tensor) -> None:
        self.witnesses = Witnesses(sources)
        self.packed = packed

    @property
    def place(self) -> tuple[int, int]:
        """Address and bytes, as the core takes them."""
        return _native.address(self.packed), self.packed.numel()


class _Network(NamedTuple):
    """Everything of a backbone that one call needs."""

    key: tuple[Any, ...]
    unchanged: Unchanged
    slots: list[_Slot]
    absent: list[bool]
    """Which of the slots are None."""
    witnesses: Witnesses
    sizes: tuple[int, int, int, int]
    head: _Part | None
    """None where the modules make the tokens of the first block."""
    blocks: list[_Part]
    tail: _Part | None
    isa: str


_Parts = WeakValueDictionary[tuple[Any, ...], _Part]


class NativeTransformer:
    """Runs a ``FrozenViT`` in the native core and keeps its packed weights; copies and pickles do not."""

    def __init__(self, parts: _Parts | None = None) -> None:
        self._network: _Network | None = None
        self._parts: _Parts = WeakValueDictionary() if parts is None else parts

    def sibling(self) -> NativeTransformer:
        """For a backbone on the same weights, with which it shares the packed ones."""
        return NativeTransformer(self._parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeTransformer, ()

    def why_not(self, vit: Any, dtype: torch.dtype | None = None) -> str:
        """Why the native core cannot run ``vit`` in plain inference on the CPU; "" if it can."""
        runs, reason = devices.native_runs()
        if not runs:
            return reason
        kind = dtype or vit.dtype
        if kind not in _DTYPES:
            return f"the native core computes in float32 and bfloat16, not in {kind}"
        if instructions(kind) == "baseline":
            return "the native core runs backbones on processors with AVX2 or more"
        if kind is torch.bfloat16 and _has_tiles():
            return "this processor multiplies bfloat16 in tiles (AMX), which the native core does not use"
        return _differs(vit)

    def __call__(self, vit: Any, imgs: Tensor, grid: tuple[int, int], ready: _Network | None = None) -> Tensor | None:
        """``[B, h * w, C]`` of checked ``imgs``, before a final norm.

        None if the call or the network is not plain, or if the modules must make the first block's tokens. ``ready`` is
        :meth:`ready`, if it is known for this call.
        """
        network = self._for(vit, imgs, ready)
        return None if network is None or network.head is None else _from_images(network, vit, imgs, grid)

    def blocks(self, vit: Any, tokens: Tensor) -> Tensor | None:
        """The same from the first block's ``tokens``, which the modules have made; None if they are no plain ones."""
        network = self._for(vit, tokens)
        if network is None or tokens.dim() != 3 or tokens.shape[2] != network.sizes[0] or tokens.dtype != vit.dtype:
            return None
        return _from_tokens(network, vit, tokens)

    def forget(self) -> None:
        """Pack the weights anew at the next call."""
        self._network, self._parts = None, WeakValueDictionary()

    def _for(self, vit: Any, tensor: Tensor, ready: _Network | None = None) -> _Network | None:
        """What computes this call; None if PyTorch must."""
        if not _is_plain(tensor):
            return None
        network = self.ready(vit) if ready is None else ready
        wants = torch.is_grad_enabled() and network is not None
        if network is None or (wants and any(p is not None and p.requires_grad for p in _tensors(network.slots))):
            return None
        return network

    def ready(self, vit: Any) -> _Network | None:
        """``vit`` as it is now, its weights packed; None if the native core cannot run it."""
        network = self._network
        isa, runs = _env.cpu_isa(), devices.native_runs()[0]
        if (
            network is not None
            and runs
            and network.key == _key(vit, isa)
            and network.unchanged.still(_roots(vit, network.head is not None))
        ):
            tensors = _tensors(network.slots)
            if [t is None for t in tensors] == network.absent and network.witnesses.recognise(_present(tensors)):
                return network
        self._network = None
        if self.why_not(vit):
            return None
        # Built outside inference mode, because it outlives this call.
        with torch.inference_mode(False), torch.no_grad():
            self._network = _build(vit, isa, self._parts)
        return self._network


def instructions(dtype: torch.dtype) -> str:
    """The instruction set with which the native core would run a backbone in ``dtype``."""
    wish = _env.cpu_isa()
    available: list[str] = _native.require().vit_isas(_DTYPES[dtype])
    return available[0] if wish == "auto" else wish


@cache
def _has_tiles() -> bool:
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(known and known())


def _is_plain(imgs: Tensor) -> bool:
    return (
        type(imgs) is Tensor
        and imgs.dtype in _DTYPES
        and is_plain_inference(imgs)
        # Of what the core reads at its address, these are other values.
        and not imgs.is_neg()
        # Counters count PyTorch's operations.
        and not is_in_torch_dispatch_mode()
    )


def _key(vit: Any, isa: str) -> tuple[Any, ...]:
    return isa, vit.dtype, vit.facet, vit.layer, vit.head_order


def _roots(vit: Any, start: bool) -> list[Any]:
    model = vit.model
    blocks = list(model.blocks)[: vit.layer + 1]
    return [*blocks, model.patch_embed, model.pos_drop, model.norm_pre] if start else blocks


def _differs(vit: Any) -> str:
    """What makes the network other than a plain one; "" if nothing does."""
    model, blocks = vit.model, list(vit.model.blocks)[: vit.layer + 1]
    if getattr(model, "rope", None) is not None:
        return "it has rotary position embeddings"
    for index, block in enumerate(blocks):
        if not is_standard(block):
            return f"block {index} is a {type(block).__name__} that is not timm's plain one, or edited or hooked"
        attention, mlp = block.attn, block.mlp
        idle = (attention.q_norm, attention.k_norm, attention.norm, mlp.norm)
        if any(type(norm) is not nn.Identity for norm in idle):
            return f"block {index} normalises queries, keys, or what enters its last layers"
        if mlp.act.approximate != "none":
            return f"block {index} approximates GELU by tanh"
        if not all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2)):
            return f"block {index} has no LayerNorm"
    sizes = {_sizes(block) for block in blocks}
    if len(sizes) != 1:
        return "its blocks differ in size"
    width, heads, dim, hidden = sizes.pop()
    if width % _UNIT or hidden % _UNIT or width != vit.model.embed_dim or vit.embed_dim % _UNIT:
        return f"its {width} channels and the {hidden} of its MLPs are no multiples of {_UNIT}"
    inner = heads * dim
    layers = [("attn.qkv", 3 * inner, width), ("attn.proj", width, inner), ("mlp.fc1", hidden, width)]
    layers.append(("mlp.fc2", width, hidden))
    vectors = ((width,), None)
    for block in blocks:
        for name, outputs, inputs in layers:
            layer = block.get_submodule(name)
            if _shape(layer.weight) != (outputs, inputs) or _shape(layer.bias) not in ((outputs,), None):
                return "its layers do not fit together"
        for part in (block.norm1, block.norm2):
            shapes = (tuple(part.normalized_shape), _shape(part.weight) or (width,), _shape(part.bias) or (width,))
            if shapes != ((width,),) * 3:
                return "its norms do not fit its channels"
        if any(_shape(getattr(scale, "gamma", None)) not in vectors for scale in (block.ls1, block.ls2)):
            return "its scales do not fit its channels"
    modules = [m for block in blocks for m in block.modules()]
    # Weights computed by hooks that are gone are plain attributes.
    if any(name in m.__dict__ for m in modules for name in ("weight", "bias", "gamma")):
        return "some of its weights are no parameters"
    if not all(_is_plain_weight(p, vit.dtype) for m in modules for p in m._parameters.values() if p is not None):
        return "its weights differ in dtype or device, or are no plain tensors"
    return ""


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _is_plain_weight(weight: Tensor, dtype: torch.dtype) -> bool:
    known = type(weight) in (Tensor, nn.Parameter) and weight.layout is torch.strided and not weight.is_neg()
    return known and weight.device.type == "cpu" and weight.dtype == dtype


def _starts_plainly(vit: Any) -> bool:
    """Whether tokens are patches times a matrix plus a bias and their position."""
    model = vit.model
    embed = model.patch_embed
    projection = getattr(embed, "proj", None)
    return (
        type(projection) is nn.Conv2d
        and (projection.padding, projection.dilation, projection.groups) == ((0, 0), (1, 1), 1)
        and is_original(embed)
        and type(embed.norm) is nn.Identity
        and type(model.norm_pre) is nn.Identity
        and type(model.pos_drop) in (nn.Identity, nn.Dropout)
        and is_untouched(embed, projection, embed.norm, model.norm_pre, model.pos_drop)
        and not model.pos_drop.training
        and "weight" in projection._parameters
        and "bias" in projection._parameters
        and _shape(projection.weight) == (vit.model.embed_dim, 3, vit.patch_size, vit.patch_size)
        and _shape(projection.bias) in ((vit.model.embed_dim,), None)
        and all(_is_plain_weight(p, vit.dtype) for p in projection._parameters.values() if p is not None)
    )


def _sizes(block: Any) -> tuple[int, int, int, int]:
    attention = block.attn
    inner = attention.qkv.out_features // 3
    return attention.qkv.in_features, attention.num_heads, inner // attention.num_heads, block.mlp.fc1.out_features


def _build(vit: Any, isa: str, parts: _Parts) -> _Network:
    model, blocks = vit.model, list(vit.model.blocks)
    norms = [norm for block in blocks[: vit.layer + 1] for norm in (block.norm1, block.norm2)]
    settings = [
        (itemgetter("fused_attn", "num_heads"), [block.attn.__dict__ for block in blocks[: vit.layer + 1]]),
        (itemgetter("approximate"), [block.mlp.act.__dict__ for block in blocks[: vit.layer + 1]]),
        (itemgetter("eps", "normalized_shape"), [norm.__dict__ for norm in norms]),
        (itemgetter("training"), [part.__dict__ for block in blocks[: vit.layer + 1] for part in idle_parts(block)]),
    ]
    starts = _starts_plainly(vit)
    if starts:
        settings.append((itemgetter("stride", "padding", "dilation", "groups"), [model.patch_embed.proj.__dict__]))
        settings.append((itemgetter("training"), [model.pos_drop.__dict__]))
    roots = _roots(vit, starts)
    unchanged = Unchanged(roots, settings)
    slots = [(m._parameters, n) for r in roots for m in r.modules() for n in m._parameters]
    tensors = _tensors(slots)
    witnesses = Witnesses(_present(tensors))
    dtype, sizes = vit.dtype, _sizes(blocks[0])
    projection, last = vit._projection, vit.layer + (vit._projection is None)
    head = None
    if starts:
        patch = model.patch_embed.proj
        head = _linear((None, patch.weight.flatten(1), patch.bias), 0.0, dtype, isa, parts, "head", [patch])
    packed = [_block(block, sizes, dtype, isa, parts) for block in blocks[:last]]
    tail = None
    if projection is not None:
        block = blocks[vit.layer]
        weight, bias = _rows(projection, block.attn.qkv)
        order = ("tail", projection.facet, projection.interleaved, projection.heads)
        tail = _linear((block.norm1, weight, bias), block.norm1.eps, dtype, isa, parts, order, [block.attn.qkv])
    absent = [t is None for t in tensors]
    return _Network(_key(vit, isa), unchanged, slots, absent, witnesses, sizes, head, packed, tail, isa)


def _rows(projection: FacetProjection, layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the facet in the order of its channels."""
    start = projection.row * projection.width
    parts = [None if p is None else p[start : start + projection.width] for p in (layer.weight, layer.bias)]
    if projection.interleaved:
        parts = [
            None if p is None else p.unflatten(0, (projection.heads, -1)).transpose(0, 1).flatten(0, 1) for p in parts
        ]
    weight, bias = parts
    assert weight is not None
    return weight, bias


def _block(block: Any, sizes: tuple[int, int, int, int], dtype: torch.dtype, isa: str, parts: _Parts) -> _Part:
    attention, mlp = block.attn, block.mlp
    scales = [getattr(scale, "gamma", None) for scale in (block.ls1, block.ls2)]
    first = (block.norm1, attention.qkv, attention.proj)
    second = (block.norm2, mlp.fc1, mlp.fc2)
    weights = [
        *(p for layer in first for p in (layer.weight, layer.bias)),
        scales[0],
        *(p for layer in second for p in (layer.weight, layer.bias)),
        scales[1],
    ]
    epsilons = (block.norm1.eps, block.norm2.eps)
    core, name = _native.require(), _DTYPES[dtype]

    def pack(addresses: list[int]) -> Tensor:
        packed = memory.empty(core.vit_block_bytes(sizes, name, isa), dtype=torch.uint8, device="cpu")
        core.vit_pack_block(addresses, epsilons, sizes, name, _native.address(packed), packed.numel(), isa)
        return packed

    return _shared(parts, (isa, dtype, sizes, epsilons), weights, weights, pack)


def _linear(
    layer: tuple[Any, Tensor, Tensor | None],
    epsilon: float,
    dtype: torch.dtype,
    isa: str,
    parts: _Parts,
    kind: Any,
    layers: list[Any],
) -> _Part:
    norm, matrix, bias = layer
    core, name = _native.require(), _DTYPES[dtype]
    outputs, inputs = matrix.shape
    weights = [None if norm is None else norm.weight, None if norm is None else norm.bias, matrix, bias]
    sources = [*weights[:2], *(p for source in layers for p in (source.weight, source.bias))]

    def pack(addresses: list[int]) -> Tensor:
        packed = memory.empty(core.vit_linear_bytes(inputs, outputs, name, isa), dtype=torch.uint8, device="cpu")
        core.vit_pack_linear(addresses, epsilon, inputs, outputs, name, _native.address(packed), packed.numel(), isa)
        return packed

    return _shared(parts, (isa, dtype, kind, epsilon), sources, weights, pack)


def _shared(parts: _Parts, key: tuple[Any, ...], sources: list[Any], weights: list[Any], pack: Any) -> _Part:
    """The part packed from these weights, by another network or now."""
    given = [t for t in sources if t is not None]
    key = (*key, *(0 if t is None else t.data_ptr() for t in sources))
    part = parts.get(key)
    if part is None or not part.witnesses.recognise(given):
        single = [None if t is None else t.detach().to(torch.float32).contiguous() for t in weights]
        part = _Part(given, pack([0 if t is None else _native.address(t) for t in single]))
        parts[key] = part
    return part


def _tensors(slots: list[_Slot]) -> list[Tensor | None]:
    return [entries.get(name) for entries, name in slots]


def _present(tensors: list[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _from_images(network: _Network, vit: Any, imgs: Tensor, grid: tuple[int, int]) -> Tensor | None:
    channels, count = network.sizes[0], grid[0] * grid[1]
    prefix, position, _ = vit._position(grid)
    first = 0 if prefix is None else prefix.shape[1]
    if position is None:
        position = imgs.new_zeros(1, count, channels)
    # PyTorch would stretch others over the tokens.
    if _shape(position) != (1, count, channels) or _shape(prefix) not in ((1, first, channels), None):
        return None
    imgs = imgs.contiguous()
    places = [None if t is None else t.to(torch.float32).contiguous() for t in (prefix, position)]
    sizes = (*imgs.shape[2:], vit.patch_size, vit.stride, *grid)
    images = (_native.address(imgs), *sizes, *(0 if t is None else _native.address(t) for t in places), first)
    return _run(network, vit, imgs, 0, images, first + count, first)


def _from_tokens(network: _Network, vit: Any, tokens: Tensor) -> Tensor | None:
    first, count = vit.model.num_prefix_tokens, tokens.shape[1]
    if not 0 <= first < count:
        return None
    tokens = tokens.contiguous()
    return _run(network, vit, tokens, _native.address(tokens), None, count, first)


def _run(
    network: _Network, vit: Any, given: Tensor, x: int, images: tuple[int, ...] | None, tokens: int, skipped: int
) -> Tensor:
    wide = network.sizes[0] if network.tail is None else vit.embed_dim
    out = memory.new_empty(given, (given.shape[0], tokens - skipped, wide))
    _native.require().vit(
        x,
        images,
        network.head.place if images and network.head else (0, 0),
        [block.place for block in network.blocks],
        network.tail.place if network.tail else (0, 0),
        wide,
        _native.address(out),
        given.shape[0],
        tokens,
        skipped,
        network.sizes,
        _DTYPES[vit.dtype],
        torch.get_num_threads(),
        network.isa,
    )
    return out
