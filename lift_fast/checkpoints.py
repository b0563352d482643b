"""LiFT checkpoints: the published files and our own, as plain state dicts."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import devices
from ._files import atomic_path
from .defaults import plain_defaults
from .demonstration import lift_file
from .layers import LayerFinder
from .lift import LiFT
from .lift_state import architecture, fit_lift, lift_state_dict
from .tensor_files import described, read_tensor_file

# Of every BatchNorm of the published network.
_EPSILON = 1e-5


def load_lift(
    path: str | os.PathLike[str],
    *,
    patch_size: int,
    pre_shape: bool = True,
    post_shape: bool = True,
    map_location: str | torch.device = "cpu",
) -> LiFT:
    """Build the LiFT that a checkpoint describes, in evaluation mode.

    Published checkpoints are plain state dicts, sometimes with a ``module.`` prefix; that and the ``_orig_mod.`` of
    compiled modules are taken off in any order. Width, depth and the "no image" ablation are read off the shapes; the
    patch size leaves no trace in them, so it must be given.

    The result is float32 whatever PyTorch's default dtype and device are: weights may be float16, bfloat16, float32 or
    float64 in the file, nothing else, with values that float32 holds. Names and shapes are compared before anything is
    allocated.

    Args:
        path: a PyTorch file or ``.safetensors``; ``"lift_demo_vitt16"`` is the one that ships with the package
            (:mod:`lift_fast.demonstration`).
        patch_size: patch size of the backbone that the weights were trained for.
        pre_shape, post_shape: see :class:`lift_fast.LiFT`.
        map_location: device of the result; ``"meta"`` gives shapes without values.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is corrupt, holds no LiFT, or weights that are sparse, quantised, overlapping, of
            another dtype or not finite; names the file and the entry. For a device that does not exist.
    """
    try:
        device = devices.resolve("" if map_location is None else map_location)
    except ValueError as error:
        raise ValueError(
            f"map_location must be a device of this machine such as 'cpu' or 'cuda', got {map_location!r}"
        ) from error
    path = lift_file(path)
    state = lift_state_dict(read_tensor_file(path), path)
    options = architecture(state, path)
    # Without memory for the weights: the file's own take their place.
    with plain_defaults(), torch.device("meta"):
        try:
            lift = LiFT(options.pop("in_channels"), patch_size, pre_shape, post_shape, **options)
        except ValueError as error:
            raise ValueError(f"{path} holds no LiFT that can be built: {error}") from error
    fit_lift(state, lift, path)
    lift.load_state_dict({name: _own_copy(value) for name, value in state.items()}, assign=True)
    return lift.to(device).eval()


def _own_copy(value: Tensor) -> Tensor:
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return value.to(dtype, copy=True, memory_format=torch.contiguous_format)


def save_lift(lift: LiFT, path: str | os.PathLike[str]) -> None:
    """Write ``lift``'s state dict, atomically; ``.safetensors`` by that suffix, else a PyTorch file.

    The published code loads the latter unchanged; a compiled or parallel LiFT is written under the same names, and of
    parametrised weights (:mod:`torch.nn.utils.parametrize`) what they come to.

    Raises:
        TypeError: for what is no LiFT.
        ValueError: for what :func:`load_lift` could not give back: a LiFT on the device meta, with weights that are not
            finite, with edited layers or another epsilon of a BatchNorm; for a path that names no file.
        FileNotFoundError: if the folder does not exist.
        OSError: if the file cannot be written.
    """
    own = _unwrapped(lift)
    if not Path(path).name or Path(path).is_dir():
        raise ValueError(f"cannot write a LiFT to {str(path)!r}: that names no file")
    if any(value.is_meta for value in own.state_dict().values()):
        raise ValueError(f"cannot write {path}: the weights are on the device meta, which holds no values")
    try:
        state = _published_state(own)
    except ValueError as error:
        raise ValueError(f"cannot write {path}: {error}") from error
    if Path(path).suffix == ".safetensors":
        content = save(state)
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
    with atomic_path(path) as temporary:
        # Both libraries' own writers hide the system's error, such as a full disk, behind one of theirs.
        temporary.write_bytes(content)


def _unwrapped(lift: nn.Module) -> LiFT:
    """The LiFT inside compiled and parallel modules."""
    inside: Any = lift
    while isinstance(inside, nn.Module) and not isinstance(inside, LiFT):
        inside = getattr(inside, "_orig_mod", getattr(inside, "module", None))
    if not isinstance(inside, LiFT):
        raise TypeError(f"expected a LiFT, got {described(lift)}")
    return inside


def _published_state(lift: LiFT) -> dict[str, Tensor]:
    """The weights of ``lift`` under the published names and in their order.

    Raises:
        ValueError: for a LiFT that they do not describe; says what they have no place for.
    """
    layers = LayerFinder()(_uncompiled(lift))
    if layers is None or type(lift).forward is not LiFT.forward:
        raise ValueError(
            "the network was edited (layers, activations, pooling, or a forward of their own), and a checkpoint holds "
            "only the published one's weights; save its state_dict() with your own code"
        )
    for eps in layers.epsilons():
        if eps != _EPSILON:
            raise ValueError(f"a BatchNorm has eps {eps}, and a checkpoint has no place for another than {_EPSILON}")
    found: dict[Any, Any] = dict(lift.state_dict())
    for prefix, module in lift.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        start = f"{prefix}." if prefix else ""
        for name in module.parametrizations:
            found[start + name] = getattr(module, name)
        found = {name: value for name, value in found.items() if not str(name).startswith(f"{start}parametrizations.")}
    found = {name: value.detach().cpu().contiguous() for name, value in found.items()}
    state = lift_state_dict(found, "the network")
    with plain_defaults(), torch.device("meta"):
        options = architecture(state, "the network")
        published = LiFT(options.pop("in_channels"), lift.patch_size, **options)
    fit_lift(state, published, "the network")
    return {name: state[name] for name in published.state_dict()}


def _uncompiled(module: Any) -> Any:
    """A module of the same layers, compiled ones replaced by what was compiled."""
    module = getattr(module, "_orig_mod", module)
    # Parametrised modules refuse to be copied.
    twin = object.__new__(type(module))
    children = {name: None if child is None else _uncompiled(child) for name, child in module._modules.items()}
    twin.__dict__.update(module.__dict__, _modules=children)
    return twin
