"""LiFT's layers, and finding them in a network for its inference plan.

The plan replaces only the published graph. For an edited network (another activation, a bias, a further layer, another
stride, an instance's own ``forward``) :class:`LayerFinder` returns None, and :class:`lift_fast.LiFT` runs its graph.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .untouched import Unchanged, is_untouched


class DoubleConv(nn.Module):
    """Two 3x3 convolutions without bias, each followed by BatchNorm and ReLU; keeps the grid."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.double_conv(x)
        return out


class Up(nn.Module):
    """Transposed 2x2 convolution (doubles the grid, halves the channels), concatenation with the image, DoubleConv."""

    def __init__(self, in_channels: int, out_channels: int, fine_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
        self.conv_1 = DoubleConv(in_channels // 2 + fine_channels, out_channels // 2)

    def forward(self, x: Tensor, fine: Tensor | None) -> Tensor:
        x = self.up(x)
        if fine is not None:
            x = torch.cat([x, fine], dim=1)
        out: Tensor = self.conv_1(x)
        return out


def conv_block(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    """3x3 convolution, BatchNorm, ReLU."""
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, stride=stride),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


class Layers(NamedTuple):
    """A network's convolutions and BatchNorms in the order of the plan.

    The order: the image encoders' convolutions, each with its BatchNorm; the transposed convolution; the double
    convolution's, each with its BatchNorm; the output's convolution.
    """

    convs: list[Any]
    norms: list[Any]
    image_blocks: int
    """Convolution blocks of the first image encoder."""
    holders: list[tuple[dict[str, Any], str]]
    """Dictionary and key of each weight and buffer, in the order of :func:`.ops.lift_forward.plan.build_plan`."""

    def weights(self) -> list[Any]:
        """Weights and buffers in the order of ``holders``; None for those that a layer lacks."""
        try:
            # From the layers' dictionaries: attributes would cost 0.5 us each.
            return [holder[name] for holder, name in self.holders]
        except KeyError:
            # A layer was parametrised in the meantime.
            return [getattr(layer, name) for layer, name in _owners(self.convs, self.norms)]

    def epsilons(self) -> list[float]:
        return [norm.eps for norm in self.norms]


class LayerFinder:
    """Finds the layers of one LiFT and caches them: later look-ups take 4 us instead of 40.

    Copies and pickles start without cache.
    """

    def __init__(self) -> None:
        self._known: tuple[Unchanged, tuple[Any, Any], Layers] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerFinder, ()

    def forget(self) -> None:
        """Drop the cached layers."""
        self._known = None

    def __call__(self, lift: Any) -> Layers | None:
        """The layers of ``lift``; None if its graph is not the published one."""
        if torch.compiler.is_compiling():
            return _find(lift)
        # Without the network itself, which would make a reference cycle.
        roots, own = list(lift._modules.values()), (lift.patch_size, lift.use_image)
        known = self._known
        if known is not None and known[1] == own and known[0].still(roots):
            return known[2]
        # Taken first, so that an edit by another thread while the layers are found is noticed.
        try:
            seen = _look(lift)
        except (AttributeError, KeyError):
            return None
        layers = _find(lift)
        if layers is None or not seen.still(roots):
            return None
        self._known = seen, own, layers
        return layers


def _find(lift: Any) -> Layers | None:
    try:
        return _published(_parts(lift), lift.patch_size)
    except AttributeError:
        return None


def is_plain_output(layer: Any) -> bool:
    """Whether ``layer`` computes what the published ``outc`` does, a 1x1 convolution, and nothing hooks it."""
    if not _computes_as(layer, nn.Conv2d) or not is_untouched(layer):
        return False
    return tuple(getattr(layer, name) for name in _SETTINGS) == _OUT


def _look(lift: Any) -> Unchanged:
    """A record of the network, to notice later edits."""
    double = _parts(lift).double
    roots = list(lift._modules.values())
    modules = [module for root in roots if root is not None for module in root.modules()]
    kinds = ((nn.Conv2d, _settings), (nn.ConvTranspose2d, _up_settings), (nn.MaxPool2d, _pool_settings))
    settings: list[Any] = [
        (read, [module.__dict__ for module in modules if isinstance(module, kind)]) for kind, read in kinds
    ]
    # The plan has no place for the bias of these convolutions.
    settings.append((itemgetter("bias"), [conv._parameters for conv in double[::3]]))
    return Unchanged(roots, settings)


class _Parts(NamedTuple):
    outer: tuple[Any, Any, Any, Any]
    """``up1``, its ``conv_1`` and ``up``, and ``outc``."""
    first: list[Any]
    """Members of the first image encoder."""
    second: list[Any]
    double: list[Any]
    """Members of the double convolution."""
    pool: tuple[Any, ...]
    """The scale adapter, if there is an image encoder."""

    def all(self) -> list[Any]:
        return [*self.outer, *self.first, *self.second, *self.double, *self.pool]


def _published(parts: _Parts, patch_size: int) -> Layers | None:
    """The layers if they are those of the published graph, else None."""
    (_, _, up, out), first, second, double, pool = parts
    blocks, modules = len(first) // 3, parts.all()
    expected: list[Any] = [Up, DoubleConv, nn.ConvTranspose2d, nn.Conv2d, *_BLOCK * (blocks + 3 if blocks else 2)]
    if blocks:
        expected.append(nn.Identity if patch_size == 8 else nn.MaxPool2d)
    if len(modules) != len(expected) or not all(map(_computes_as, modules, expected)):
        return None
    if any(conv.bias is not None for conv in double[::3]):
        return None
    convs = [*first[::3], *second[::3], up, double[0], double[3], out]
    # The first two blocks each halve the grid, further ones keep it; the second encoder halves it once more.
    image = [*[_DOWN, _DOWN, *[_KEEP] * (blocks - 2)][:blocks], _DOWN] if blocks else []
    settings = [tuple(getattr(conv, name) for name in _SETTINGS) for conv in convs]
    if settings != [*image, _UP, _KEEP, _KEEP, _OUT] or up.output_padding != (0, 0):
        return None
    if blocks and patch_size != 8:
        adapter = pool[0]
        if (adapter.kernel_size, adapter.stride, adapter.padding, adapter.dilation, adapter.ceil_mode) != _POOL:
            return None
    norms = [*first[1::3], *second[1::3], double[1], double[4]]
    # Compilers trace attributes, not dictionaries.
    holders = _holders(convs, norms) if not torch.compiler.is_compiling() else [({}, "weight")]
    return Layers(convs, norms, blocks, holders)


def _computes_as(module: Any, kind: Any) -> bool:
    """Whether ``module`` is a ``kind``, or of a derived class (parametrised, sharded) that computes the same in
    evaluation mode."""
    own = type(module)
    if "forward" in module.__dict__:
        # Set on the instance, as hooking tools do.
        return False
    if own is kind:
        return True
    if kind is nn.BatchNorm2d and (own is nn.SyncBatchNorm or getattr(own, "batch_norm_in_evaluation", False)):
        return True
    methods = ("forward", "_conv_forward") if hasattr(kind, "_conv_forward") else ("forward",)
    return isinstance(module, kind) and all(getattr(own, name) is getattr(kind, name) for name in methods)


_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_settings, _up_settings = itemgetter(*_SETTINGS), itemgetter(*_SETTINGS, "output_padding")
_pool_settings = itemgetter("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_DOWN, _KEEP, _UP, _OUT = (
    ((size, size), (stride, stride), (padding, padding), (1, 1), 1, "zeros")
    for size, stride, padding in ((3, 2, 1), (3, 1, 1), (2, 2, 0), (1, 1, 0))
)
_NORM = ("weight", "bias", "running_mean", "running_var")
_BLOCK = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
_POOL = (2, 2, 0, 1, False)


def _parts(lift: Any) -> _Parts:
    """The modules that compute; AttributeError if one is missing or of another kind."""
    up1 = lift.up1
    outer, double = (up1, up1.conv_1, up1.up, lift.outc), _members(up1.conv_1.double_conv)
    if not lift.use_image:
        return _Parts(outer, [], [], double, ())
    image = _members(lift.image_convs_1), _members(lift.image_convs_2)
    return _Parts(outer, *image, double, (lift.scale_adapter,))


def _members(sequence: Any) -> list[Any]:
    if type(sequence) is not nn.Sequential or "forward" in sequence.__dict__:
        raise AttributeError(f"a {type(sequence).__name__} in place of a Sequential")
    return list(sequence)


def _owners(convs: list[Any], norms: list[Any]) -> list[tuple[Any, str]]:
    """The layer and the name of each weight and buffer, in the order of the plan."""
    encoders = len(norms) - 2
    found: list[tuple[Any, str]] = []
    for conv, norm in zip(convs, norms[:encoders], strict=False):
        found += (conv, "weight"), (conv, "bias"), *((norm, name) for name in _NORM)
    found += (convs[encoders], "weight"), (convs[encoders], "bias")
    for conv, norm in zip(convs[encoders + 1 :], norms[encoders:], strict=False):
        found += (conv, "weight"), *((norm, name) for name in _NORM)
    return [*found, (convs[-1], "weight"), (convs[-1], "bias")]


def _holders(convs: list[Any], norms: list[Any]) -> list[tuple[dict[str, Any], str]]:
    return [
        (layer._buffers if name.startswith("running") else layer._parameters, name)
        for layer, name in _owners(convs, norms)
    ]
