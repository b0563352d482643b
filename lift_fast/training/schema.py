"""Validate ``last.pth`` before a run resumes from it: every entry, its type and shape, and their consistency."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lift_fast._text import listed, named
from lift_fast.tensor_files import described, plain_tensor, weight_tensor

FORMAT = 1
_PARTS = ("optimizer", "scaler", "progress", "random", "description")
# Options that depend on the machine, not on the run.
_FREE_OPTIONS = frozenset({"params", "fused", "foreach", "capturable", "differentiable"})
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_MOST_RANDOM_BYTES = 1 << 16


def check_parts(content: Mapping[Any, Any], path: Path, part: str) -> None:
    """Check the format, the names of the parts (``part`` is the network), and that the description is plain values.

    Raises:
        ValueError: naming the file and the entry.
    """
    number = content.get("format")
    if isinstance(number, bool) or not isinstance(number, int) or number != FORMAT:
        found = named(str(number)) if _is_plain(number) else described(number)
        raise ValueError(f"{path} is not a training state of this version (format {found}, expected {FORMAT})")
    parts = (part, *_PARTS)
    missing = [name for name in parts if name not in content]
    unknown = [name for name in content if name not in parts and name != "format"]
    for names, what in ((missing, "missing"), (unknown, "unknown")):
        if names:
            raise ValueError(f"{path} is not a valid training state: {listed(names)} {what}")
    for name in parts:
        _mapping(content[name], path, name)
    for name, value in content["description"].items():
        if not isinstance(name, str) or not _is_plain(value):
            _refuse(path, "description", name, value, "a setting's name and plain value")


def check_state(
    content: dict[str, Any], path: Path, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, batches: int
) -> None:
    """Check all parts but network and description against the resuming run: its optimiser and batches per epoch.

    Raises:
        ValueError: naming the file and the entry.
    """
    _check_progress(content["progress"], path, batches)
    _check_scaler(content["scaler"], path, scaler)
    _check_optimizer(content["optimizer"], path, optimizer, content["progress"]["step"], scaler.is_enabled())
    _check_random(content["random"], path)


def _check_progress(progress: Mapping[Any, Any], path: Path, batches: int) -> None:
    _names(progress, path, "progress", ("epoch", "batch", "step", "losses", "epoch_sum", "unreadable"))
    for name, least in (("epoch", 0), ("batch", 0), ("step", 1)):
        if not _is_whole(progress[name], least):
            _refuse(path, "progress", name, progress[name], f"a whole number of at least {least}")
    epoch, batch, step = progress["epoch"], progress["batch"], progress["step"]
    if batch > batches or step != epoch * batches + batch:
        raise ValueError(
            f"{path}: progress.epoch {named(str(epoch))}, batch {named(str(batch))} and step {named(str(step))} do "
            f"not agree: an epoch has {batches} batches"
        )
    losses, unreadable = progress["losses"], progress["unreadable"]
    if not isinstance(losses, list) or len(losses) != epoch or not all(map(_is_finite, losses)):
        _refuse(path, "progress", "losses", losses, f"a list of {epoch} finite numbers, one for each epoch")
    if not _is_finite(progress["epoch_sum"]):
        _refuse(path, "progress", "epoch_sum", progress["epoch_sum"], "a finite number")
    if not isinstance(unreadable, dict) or not all(
        isinstance(text, str) and _is_whole(count, 1) for text, count in unreadable.items()
    ):
        _refuse(path, "progress", "unreadable", unreadable, "messages and how often each occurred")


def _check_scaler(state: Mapping[Any, Any], path: Path, scaler: torch.amp.GradScaler) -> None:
    fresh = scaler.state_dict()
    _names(state, path, "scaler", tuple(fresh))
    for name, value in fresh.items():
        if name == "scale":
            if not _is_finite(state[name]) or state[name] <= 0:
                _refuse(path, "scaler", name, state[name], "a positive number")
        elif name == "_growth_tracker":
            if not _is_whole(state[name], 0) or state[name] > fresh["growth_interval"]:
                _refuse(path, "scaler", name, state[name], f"a whole number of at most {fresh['growth_interval']}")
        elif type(state[name]) is not type(value) or state[name] != value:
            _refuse(path, "scaler", name, state[name], repr(value))


def _check_optimizer(
    state: Mapping[Any, Any], path: Path, optimizer: torch.optim.Optimizer, step: int, scaled: bool
) -> None:
    _names(state, path, "optimizer", ("state", "param_groups"))
    groups, (fresh,) = state["param_groups"], optimizer.state_dict()["param_groups"]
    if not isinstance(groups, list) or len(groups) != 1:
        _refuse(path, "optimizer", "param_groups", groups, "a list of one group")
    group = _mapping(groups[0], path, "optimizer.param_groups")
    if not _same_option(group.get("params"), tuple(fresh["params"])):
        _refuse(path, "optimizer", "param_groups.params", group.get("params"), f"the {len(fresh['params'])} parameters")
    for name, expected in fresh.items():
        # Versions of PyTorch have different options and add missing ones themselves.
        if name in group and name not in _FREE_OPTIONS and not _same_option(group[name], expected):
            _refuse(path, "optimizer", f"param_groups.{name}", group[name], repr(expected))
    if "lr" not in group:
        raise ValueError(f"{path}: optimizer.param_groups lacks lr")
    moments = _mapping(state["state"], path, "optimizer.state")
    # Float16 skips steps that overflow: the first ones, or all in a short run.
    if not moments and scaled:
        return
    parameters = optimizer.param_groups[0]["params"]
    if set(moments) != set(range(len(parameters))):
        _refuse(path, "optimizer", "state", moments, f"the moments of {len(parameters)} parameters")
    for index, parameter in enumerate(parameters):
        where = f"optimizer.state.{index}"
        entry = _mapping(moments[index], path, where)
        _names(entry, path, where, _MOMENTS)
        for name in _MOMENTS[1:]:
            tensor = weight_tensor(entry[name], path, f"{where}.{name}")
            if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
                _refuse(path, where, name, tensor, f"{parameter.dtype} of shape {list(parameter.shape)}")
        if bool((entry["exp_avg_sq"] < 0).any()):
            raise ValueError(f"{path}: {where}.exp_avg_sq contains negative values")
        count = weight_tensor(entry["step"], path, f"{where}.step")
        number = count.item() if count.dim() == 0 else math.nan
        # float32 counts to 2**24; an overflowing float16 step counts only in the run.
        if not (1 <= number <= step if scaled else number == float(count.new_tensor(step))) or number % 1:
            _refuse(path, where, "step", count, f"the run's steps, {step}")


def _check_random(state: Mapping[Any, Any], path: Path) -> None:
    _names(state, path, "random", ("python", "numpy", "torch", "cuda"))
    # A separate generator of each kind validates its state.
    _try(lambda: _check_python(state["python"]), path, "python")
    _try(lambda: np.random.RandomState().set_state(numpy_state(state["numpy"])), path, "numpy")
    expected = torch.get_rng_state().shape
    words = _bytes(state["torch"], path, "torch")
    if words.shape != expected:
        _refuse(path, "random", "torch", words, f"{expected[0]} bytes")
    _try(lambda: torch.Generator(device="cpu").set_state(words), path, "torch")
    if not isinstance(state["cuda"], list):
        _refuse(path, "random", "cuda", state["cuda"], "a list of states, one for each GPU")
    for held in state["cuda"]:
        words = _bytes(held, path, "cuda")
        if torch.cuda.is_available():
            _try(partial(torch.Generator(device="cuda").set_state, words), path, "cuda")


def _check_python(saved: Any) -> None:
    random.Random().setstate(saved)
    if saved[2] is not None and not _is_finite(saved[2]):
        raise ValueError("the number kept for the next draw is not finite")


def numpy_state(saved: Any) -> tuple[Any, ...]:
    """Arguments of ``numpy.random.set_state`` from the saved values; ValueError or TypeError if they are malformed."""
    name, keys, position, has_gauss, gauss = saved
    if not isinstance(keys, Tensor) or keys.shape != (624,) or keys.dtype != torch.int64:
        raise ValueError("624 whole numbers were expected")
    if bool(((keys < 0) | (keys >= 2**32)).any()) or not 0 <= position <= 624:
        raise ValueError("a number is out of range")
    return name, keys.numpy().astype(np.uint32), position, has_gauss, gauss


def _bytes(value: Any, path: Path, name: str) -> Tensor:
    tensor = plain_tensor(value, path, f"random.{name}")
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not 0 < tensor.numel() <= _MOST_RANDOM_BYTES:
        _refuse(path, "random", name, tensor, "the bytes of a random generator's state")
    return tensor.contiguous()


def _try(restore: Callable[[], object], path: Path, name: str) -> None:
    try:
        restore()
    except Exception as error:
        raise ValueError(f"{path}: random.{name} is not a valid state of that random generator") from error


def _mapping(value: Any, path: Path, name: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: entry {name} is {described(value)}; expected a dictionary")
    return value


def _names(value: Mapping[Any, Any], path: Path, where: str, expected: tuple[str, ...]) -> None:
    missing = [name for name in expected if name not in value]
    unknown = [name for name in value if name not in expected]
    for names, what in ((missing, "lacks"), (unknown, "has an unknown entry")):
        if names:
            raise ValueError(f"{path}: {where} {what} {listed(names)}")


def _refuse(path: Path, where: str, name: object, value: object, expected: str) -> None:
    found = named(str(value)) if _is_plain(value) else described(value)
    raise ValueError(f"{path}: entry {where}.{named(name)[1:-1]} is {found}; expected {expected}")


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _same_option(value: object, expected: object) -> bool:
    if isinstance(expected, tuple):
        return isinstance(value, (tuple, list)) and all(map(_is_plain, value)) and list(value) == list(expected)
    return _is_plain(value) and value == expected


def _is_plain(value: object) -> bool:
    # Python does not print numbers of thousands of digits.
    if isinstance(value, int):
        return abs(value) < 2**63
    return value is None or isinstance(value, (float, str))
