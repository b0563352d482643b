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
from .in_place import is_plain_inference, is_standard
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
    witnesses: Witnesses
    sizes: tuple[int, int, int, int]
    head: _Part | None
    """None where the modules make the tokens of the first block."""
    blocks: list[_Part]
    tail: _Part | None
    isa: str


_parts: WeakValueDictionary[tuple[Any, ...], _Part] = WeakValueDictionary()


class NativeTransformer:
    """Runs a ``FrozenViT`` in the native core and keeps its packed weights; copies and pickles do not."""

    def __init__(self) -> None:
        self._network: _Network | None = None

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

    def __call__(self, vit: Any, imgs: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Result of ``FrozenViT.forward`` for checked ``imgs``; None if the call or the network is not plain."""
        if not _is_plain(imgs):
            return None
        network = self._ready(vit)
        if network is None or (torch.is_grad_enabled() and any(p.requires_grad for p in _tensors(network.slots))):
            return None
        return _run(network, vit, imgs, grid)

    def _ready(self, vit: Any) -> _Network | None:
        network = self._network
        isa, runs = _env.cpu_isa(), devices.native_runs()[0]
        if (
            network is not None
            and runs
            and network.key == _key(vit, isa)
            and network.unchanged.still(_roots(vit, network.head is not None))
            and network.witnesses.recognise(_tensors(network.slots))
        ):
            return network
        self._network = None
        if self.why_not(vit):
            return None
        # Built outside inference mode, because it outlives this call.
        with torch.inference_mode(False), torch.no_grad():
            self._network = _build(vit, isa)
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
    wanted = [(3 * heads * dim, width), (width, heads * dim), (hidden, width), (width, hidden)]
    for block in blocks:
        layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        if [tuple(layer.weight.shape) for layer in layers] != wanted:
            return "its layers do not fit together"
    modules = [m for block in blocks for m in block.modules()]
    # Weights computed by hooks that are gone are plain attributes.
    if any(name in m.__dict__ for m in modules for name in ("weight", "bias", "gamma")):
        return "some of its weights are no parameters"
    tensors = [p for m in modules for p in m._parameters.values() if p is not None]
    if any(type(t) not in (Tensor, nn.Parameter) or t.device.type != "cpu" or t.dtype != vit.dtype for t in tensors):
        return "its weights differ in dtype or device, or are no plain tensors"
    return ""


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
    )


def _sizes(block: Any) -> tuple[int, int, int, int]:
    attention = block.attn
    inner = attention.qkv.out_features // 3
    return attention.qkv.in_features, attention.num_heads, inner // attention.num_heads, block.mlp.fc1.out_features


def _build(vit: Any, isa: str) -> _Network:
    model, blocks = vit.model, list(vit.model.blocks)
    norms = [norm for block in blocks[: vit.layer + 1] for norm in (block.norm1, block.norm2)]
    settings = [
        (itemgetter("fused_attn", "num_heads"), [block.attn.__dict__ for block in blocks[: vit.layer + 1]]),
        (itemgetter("approximate"), [block.mlp.act.__dict__ for block in blocks[: vit.layer + 1]]),
        (itemgetter("eps", "normalized_shape"), [norm.__dict__ for norm in norms]),
    ]
    starts = _starts_plainly(vit)
    if starts:
        settings.append((itemgetter("stride", "padding", "dilation", "groups"), [model.patch_embed.proj.__dict__]))
    roots = _roots(vit, starts)
    unchanged = Unchanged(roots, settings)
    slots = [(m._parameters, n) for r in roots for m in r.modules() for n, p in m._parameters.items() if p is not None]
    witnesses = Witnesses(_tensors(slots))
    dtype, sizes = vit.dtype, _sizes(blocks[0])
    projection, last = vit._projection, vit.layer + (vit._projection is None)
    head = None
    if starts:
        patch = model.patch_embed.proj
        head = _linear((None, patch.weight.flatten(1), patch.bias), 0.0, dtype, isa, "head", [patch])
    packed = [_block(block, sizes, dtype, isa) for block in blocks[:last]]
    tail = None
    if projection is not None:
        block = blocks[vit.layer]
        weight, bias = _rows(projection, block.attn.qkv)
        order = ("tail", projection.facet, projection.interleaved, projection.heads)
        tail = _linear((block.norm1, weight, bias), block.norm1.eps, dtype, isa, order, [block.attn.qkv])
    return _Network(_key(vit, isa), unchanged, slots, witnesses, sizes, head, packed, tail, isa)


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


def _block(block: Any, sizes: tuple[int, int, int, int], dtype: torch.dtype, isa: str) -> _Part:
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

    return _shared((isa, dtype, sizes, epsilons), weights, weights, pack)


def _linear(
    parts: tuple[Any, Tensor, Tensor | None],
    epsilon: float,
    dtype: torch.dtype,
    isa: str,
    kind: Any,
    layers: list[Any],
) -> _Part:
    norm, matrix, bias = parts
    core, name = _native.require(), _DTYPES[dtype]
    outputs, inputs = matrix.shape
    weights = [None if norm is None else norm.weight, None if norm is None else norm.bias, matrix, bias]
    sources = [
        *weights[:2],
        *([matrix, bias] if layers is None else [p for layer in layers for p in (layer.weight, layer.bias)]),
    ]

    def pack(addresses: list[int]) -> Tensor:
        packed = memory.empty(core.vit_linear_bytes(inputs, outputs, name, isa), dtype=torch.uint8, device="cpu")
        core.vit_pack_linear(addresses, epsilon, inputs, outputs, name, _native.address(packed), packed.numel(), isa)
        return packed

    return _shared((isa, dtype, kind, epsilon), sources, weights, pack)


def _shared(key: tuple[Any, ...], sources: list[Any], weights: list[Any], pack: Any) -> _Part:
    """The part packed from these weights, by another network or now."""
    given = [t for t in sources if t is not None]
    key = (*key, *(0 if t is None else t.data_ptr() for t in sources))
    part = _parts.get(key)
    if part is None or not part.witnesses.recognise(given):
        single = [None if t is None else t.detach().to(torch.float32).contiguous() for t in weights]
        part = _Part(given, pack([0 if t is None else _native.address(t) for t in single]))
        _parts[key] = part
    return part


def _tensors(slots: list[_Slot]) -> list[Tensor]:
    return [entries[name] for entries, name in slots]


def _run(network: _Network, vit: Any, imgs: Tensor, grid: tuple[int, int]) -> Tensor:
    batch, _, height, width = imgs.shape
    channels, count = network.sizes[0], grid[0] * grid[1]
    wide = channels if network.tail is None else vit.embed_dim
    if network.head is None:
        tokens, images = vit._embed(imgs, grid)[0], None
        first = tokens.shape[1] - count
    else:
        prefix, position, _ = vit._position(grid)
        first = 0 if prefix is None else prefix.shape[1]
        tokens = imgs = imgs.contiguous()
        if position is None:
            position = imgs.new_zeros(count, channels)
        places = [None if t is None else t.to(torch.float32).contiguous() for t in (prefix, position)]
        sizes = (height, width, vit.patch_size, vit.stride, *grid)
        images = (_native.address(imgs), *sizes, *(0 if t is None else _native.address(t) for t in places), first)
    out = memory.new_empty(tokens, (batch, count, wide))
    _native.require().vit(
        0 if images else _native.address(tokens),
        images,
        network.head.place if network.head else (0, 0),
        [block.place for block in network.blocks],
        network.tail.place if network.tail else (0, 0),
        wide,
        _native.address(out),
        batch,
        first + count,
        first,
        network.sizes,
        _DTYPES[vit.dtype],
        torch.get_num_threads(),
        network.isa,
    )
    return out
