"""LiFT's state dict: the checks of its entries, and the network that their names and shapes describe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._text import listed, named
from .tensor_files import described, misfits, plain_tensor, read_tensor_file, uncompiled, weight_tensor

# Bounds the network that a file can make us build before its shapes are compared; published networks have at most one.
_MOST_EXTRA_BLOCKS = 64


def lift_state_dict(content: Mapping[object, object], source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a LiFT state dict, without ``module.`` and ``_orig_mod.`` in their names.

    Raises:
        ValueError: for entries that are not dense, finite, floating point tensors (counters: integers), or for a
            duplicate name; names ``source`` and the entry.
    """
    state: dict[str, Tensor] = {}
    for given, value in content.items():
        if not isinstance(given, str):
            raise ValueError(f"{source}: the name of an entry is {described(given)}; expected text such as outc.weight")
        if isinstance(value, Mapping):
            raise ValueError(
                f"{source}: entry {named(given)} is {described(value)}; expected a plain state dict of tensors; if "
                "that entry is a LiFT's state dict, save it alone"
            )
        name = plain_name(given)
        if name in state:
            raise ValueError(f"{source}: entry {named(name)} appears twice, also as {named(given)}")
        if name.endswith("num_batches_tracked"):
            state[name] = _counter(value, source, given)
            continue
        state[name] = weight_tensor(value, source, given)
        if name.endswith("running_var") and bool((state[name] < 0).any()):
            raise ValueError(f"{source}: entry {named(given)} holds negative variances")
    return state


def fit_lift(state: dict[str, Tensor], lift: Any, source: str | os.PathLike[str]) -> None:
    """Add missing counters of batches as 0; ValueError if names or shapes of ``state`` do not fit ``lift``."""
    own = lift.state_dict()
    for name in own:
        # Other tools leave the counters out; evaluation never reads them.
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.tensor(0, dtype=torch.int64, device="cpu"))
    different = misfits(state, own)
    if different:
        raise ValueError(f"{source} does not fit LiFT({lift.in_channels}, {lift.patch_size}): {different}")


def plain_name(name: str) -> str:
    """The published name of an entry: without leading ``module.`` and any ``_orig_mod.``."""
    name = uncompiled(name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def architecture(state: Mapping[str, Tensor], source: str | os.PathLike[str]) -> dict[str, Any]:
    """LiFT's arguments that follow from the shapes of a state dict; ValueError if it is not a LiFT's."""
    last, first = state.get("outc.weight"), state.get("image_convs_1.0.weight")
    if last is None:
        raise ValueError(
            f"{source} is not a LiFT checkpoint: outc.weight is missing; its entries begin with {listed(sorted(state))}"
        )
    for name, weight in (("outc.weight", last), ("image_convs_1.0.weight", first)):
        if weight is not None and (weight.dim() != 4 or weight.numel() == 0):
            raise ValueError(
                f"{source} is not a LiFT checkpoint: {name} has shape {list(weight.shape)}, expected four dimensions"
            )
    if last.shape[0] < 2:
        raise ValueError(
            f"{source} is not a LiFT checkpoint: outc.weight has {last.shape[0]} channels, expected at least 2"
        )
    if first is None:
        return {"in_channels": last.shape[0], "use_image": False}
    blocks = 2
    while blocks < 2 + _MOST_EXTRA_BLOCKS and f"image_convs_1.{3 * blocks + 1}.running_mean" in state:
        blocks += 1
    return {"in_channels": last.shape[0], "image_channels": first.shape[0], "extra_image_blocks": blocks - 2}


def _counter(value: object, source: str | os.PathLike[str], name: str) -> Tensor:
    """A BatchNorm's count of batches, from a tensor or, as other tools write it, from a plain number."""
    count = value
    if isinstance(value, Tensor):
        tensor = plain_tensor(value, source, name)
        count = tensor.item() if tensor.dim() == 0 and not tensor.is_complex() else None
    whole = isinstance(count, (int, float)) and not isinstance(count, bool) and 0 <= count < 2**63
    if not whole or count != int(count):  # type: ignore[call-overload]
        raise ValueError(f"{source}: entry {named(name)} is {described(value)}; expected a whole number of at least 0")
    return torch.tensor(int(count), dtype=torch.int64, device="cpu")  # type: ignore[call-overload]


def read_into(lift: Any, file: str | os.PathLike[str], config: str) -> None:
    """Read the weights of ``file`` into a LiFT described by ``config``; ValueError if the two contradict each other."""
    path = Path(file)
    state = lift_state_dict(read_tensor_file(path), path)
    encoder = lift.image_convs_1 if lift.use_image else None
    built = {
        "in_channels": lift.in_channels,
        "use_image": lift.use_image,
        "image_channels": encoder[0].out_channels if encoder else None,
        "extra_image_blocks": len(encoder) // 3 - 2 if encoder else None,
    }
    for name, value in {"use_image": True, **architecture(state, path)}.items():
        if built[name] is not None and built[name] != value:
            raise ValueError(f"{config} does not fit {path}: {name} is {built[name]!r}, but the weights have {value!r}")
    fit_lift(state, lift, path)
    lift.load_state_dict(state)
