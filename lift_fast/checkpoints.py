"""LiFT checkpoints: published files and those of this package, as plain state dicts."""

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

# Epsilon of every BatchNorm in the published network.
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

    Published checkpoints are plain state dicts, sometimes with a ``module.`` prefix. It and the ``_orig_mod.`` of
    compiled modules are removed in any order. Width, depth and the "no image" ablation follow from the shapes; the
    patch size does not, so it must be given.

    The result is float32 whatever PyTorch's default dtype and device are. Weights in the file must be float16,
    bfloat16, float32 or float64, with values in the range of float32. Names and shapes are compared before anything is
    allocated.

    Args:
        path: a PyTorch or ``.safetensors`` file; ``"lift_demo_vitt16"`` is the one that ships with the package
            (:mod:`lift_fast.demonstration`).
        patch_size: patch size of the backbone for which the weights were trained.
        pre_shape, post_shape: see :class:`lift_fast.LiFT`.
        map_location: device of the result; ``"meta"`` gives shapes without values.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is corrupt, is not a LiFT checkpoint, or has weights that are sparse, quantised,
            overlapping, of another dtype or not finite; names the file and the entry. Also for an unknown device.
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
    # On meta: the file's weights are assigned.
    with plain_defaults(), torch.device("meta"):
        try:
            lift = LiFT(options.pop("in_channels"), patch_size, pre_shape, post_shape, **options)
        except ValueError as error:
            raise ValueError(f"{path} does not describe a valid LiFT: {error}") from error
    fit_lift(state, lift, path)
    lift.load_state_dict({name: _own_copy(value) for name, value in state.items()}, assign=True)
    return lift.to(device).eval()


def _own_copy(value: Tensor) -> Tensor:
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return value.to(dtype, copy=True, memory_format=torch.contiguous_format)


def save_lift(lift: LiFT, path: str | os.PathLike[str]) -> None:
    """Write ``lift``'s state dict, atomically; ``.safetensors`` by that suffix, else a PyTorch file.

    The published code loads the latter unchanged. A compiled or parallel LiFT is written under the same names, and
    parametrised weights (:mod:`torch.nn.utils.parametrize`) by their values.

    Raises:
        TypeError: if ``lift`` is not a LiFT.
        ValueError: if :func:`load_lift` could not restore it: on the device meta, with weights that are not finite,
            with edited layers or another epsilon of a BatchNorm. Also for a path that names no file.
        FileNotFoundError: if the folder does not exist.
        OSError: if the file cannot be written.
    """
    own = _unwrapped(lift)
    if not Path(path).name or Path(path).is_dir():
        raise ValueError(f"cannot write a LiFT to {str(path)!r}: the path names no file")
    if any(value.is_meta for value in own.state_dict().values()):
        raise ValueError(f"cannot write {path}: the weights are on the device meta, which has no values")
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
        # The writers of both libraries replace system errors, such as a full disk, with their own.
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
    """The weights of ``lift`` under the published names, in their order; ValueError if a checkpoint cannot be made."""
    layers = LayerFinder()(_uncompiled(lift))
    if layers is None or type(lift).forward is not LiFT.forward:
        raise ValueError(
            "the network was edited (layers, activations, pooling or a forward method), but a checkpoint can hold only "
            "the published network; save its state_dict() with your own code"
        )
    for eps in layers.epsilons():
        if eps != _EPSILON:
            raise ValueError(f"a BatchNorm has eps {eps}, but a checkpoint can only hold networks with {_EPSILON}")
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
    """A module of the same layers, with the originals of compiled ones."""
    module = getattr(module, "_orig_mod", module)
    # Parametrised modules cannot be copied.
    twin = object.__new__(type(module))
    children = {name: None if child is None else _uncompiled(child) for name, child in module._modules.items()}
    twin.__dict__.update(module.__dict__, _modules=children)
    return twin
