"""LiFT checkpoints: the published files and our own, as plain state dicts."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ._files import atomic_path
from .demonstration import lift_file
from .lift import LiFT

_PREFIX = "module."


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, object]:
    """Read a checkpoint file without executing anything in it (``weights_only``), or a ``.safetensors`` file.

    Returns:
        The file's mapping, tensors on the CPU; a state dict or a training checkpoint that holds one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no readable checkpoint; names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        SafetensorError,
        zipfile.BadZipFile,
        ValueError,
        LookupError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, LookupError):
            # The reader stumbles over bytes that it takes for instructions; their numbers tell nobody anything.
            reason = "its content is of another kind"
        raise ValueError(
            f"{path} is no readable checkpoint ({reason}); expected a PyTorch or .safetensors file"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a state dict (names to tensors)")
    return dict(content)


def load_lift(
    path: str | os.PathLike[str],
    *,
    patch_size: int,
    pre_shape: bool = True,
    post_shape: bool = True,
    map_location: str | torch.device = "cpu",
) -> LiFT:
    """Build the LiFT that a checkpoint describes, in evaluation mode.

    Published checkpoints are plain state dicts, sometimes with a ``module.`` prefix. Width, depth and the "no image"
    ablation are read off the shapes; the patch size leaves no trace in them, so it must be given.

    Args:
        path: a PyTorch file or ``.safetensors``; ``"lift_demo_vitt16"`` is the one that ships with the package
            (:mod:`lift_fast.demonstration`).
        patch_size: patch size of the backbone that the weights were trained for.
        pre_shape, post_shape: see :class:`lift_fast.LiFT`.
        map_location: device of the result.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is corrupt, holds no LiFT or weights that are not finite; names the file.
    """
    path = lift_file(path)
    state = lift_state_dict(read_state_dict(path), path)
    try:
        in_channels, has_image = state["outc.weight"].shape[0], "image_convs_1.0.weight" in state
    except KeyError:
        found = ", ".join(sorted(state)[:4])
        raise ValueError(f"{path} holds no LiFT: outc.weight is missing; its entries begin with {found}") from None
    blocks = sum(name.startswith("image_convs_1.") and name.endswith("running_mean") for name in state)
    lift = LiFT(
        in_channels,
        patch_size,
        pre_shape,
        post_shape,
        use_image=has_image,
        image_channels=state["image_convs_1.0.weight"].shape[0] if has_image else 32,
        extra_image_blocks=max(0, blocks - 2),
    )
    try:
        lift.load_state_dict(state)
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit LiFT({in_channels}, {patch_size}): {details}") from None
    return lift.to(map_location).eval()


def lift_state_dict(content: Mapping[str, object], source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a LiFT state dict with any ``module.`` prefix taken off.

    Raises:
        ValueError: for entries that are no tensors or not finite; names ``source`` and the entry.
    """
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{source}: entry {name!r} is a {type(value).__name__}; expected a plain state dict of tensors"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{source}: entry {name!r} holds NaN or infinite values")
        state[name.removeprefix(_PREFIX)] = value
    return state


def save_lift(lift: LiFT, path: str | os.PathLike[str]) -> None:
    """Write ``lift``'s state dict, atomically; ``.safetensors`` by that suffix, else a PyTorch file.

    The published code loads the latter unchanged.

    Raises:
        FileNotFoundError: if the folder does not exist.
        OSError: if the file cannot be written.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in lift.state_dict().items()}
    if Path(path).suffix == ".safetensors":
        content = save(state)
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
    with atomic_path(path) as temporary:
        # Both libraries' own writers hide the system's error, such as a full disk, behind one of theirs.
        temporary.write_bytes(content)
