"""Local checkpoint files of frozen backbones: DINO, MoCo v3, Leopart, SelfPatch, and timm's own layout.

Layouts, from the training code of the projects:

* DINO (facebookresearch/dino): the plain state dict, or ``{"teacher", "student", "args", ...}`` with ``module.`` and
  ``backbone.`` prefixes and the projection under ``head.``.
* MoCo v3 (facebookresearch/moco-v3): ``{"state_dict"}`` with ``module.base_encoder.`` and ``module.momentum_encoder.``;
  its ViT-S has 12 heads, where DINO's and timm's have 6; the tensor shapes are the same.
* Leopart (MkuuWaUjinga/leopart): Lightning module with ``model.`` and ``teacher.``, plus ``projection_head`` and
  ``prototypes``; published files are its bare state dict.
* SelfPatch (alinlab/SelfPatch): as DINO, with the heads ``ca_head``, ``c_head``, ``p_head``; its backbone has neither
  class token nor final norm.
* DINOv2 (facebookresearch/dinov2): published files are bare; training files have prefixes such as
  ``teacher.backbone.`` and blocks in chunks, ``blocks.CHUNK.BLOCK.``, where BLOCK counts across chunks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._text import listed, named, said
from ..tensor_files import described, misfits, plain_tensor, read_tensor_file, uncompiled, weight_tensor

_ANCHOR = "patch_embed.proj.weight"
_CONTAINERS = ("teacher", "student", "state_dict", "model")
# Preference among several copies of the backbone in one state dict, best first.
_PREFIX_ORDER = ("", "base_encoder.", "model.", "backbone.", "teacher.", "student.", "momentum_encoder.")
_CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.")
# Names of register tokens in files.
_REGISTERS = ("reg_token", "register_tokens", "storage_tokens")
# Parts that dense features never use; optional in files.
_HEADS = (
    "head.", "head_dist.", "fc.", "fc_norm.", "pre_logits.", "projection_head.", "prototypes.", "predictor.",
    "attn_pool.", "decoder_embed.", "decoder_blocks.", "decoder_norm.", "decoder_pred.", "decoder_pos_embed",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Backbone tensors of one file.

    ``layout`` is ``"dino"``, ``"moco_v3"``, ``"leopart"``, ``"selfpatch"`` or ``"plain"`` (the plain state dict of DINO
    or timm, which look the same).
    """

    path: Path
    layout: str
    state: dict[str, Tensor]


def read_checkpoint(path: str | os.PathLike[str], *, key: str | None = None) -> Checkpoint:
    """Read a checkpoint file, find the backbone in it, strip prefixes, drop heads.

    Args:
        path: file written by ``torch.save`` (read with ``weights_only=True``) or ``.safetensors``.
        key: entry of the outer dictionary (``"teacher"``, ``"student"``, ...); None is the first known one.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file cannot be read or contains no ViT state dict; for tensors that are sparse, quantised,
            overlapping, not finite, or not float16, bfloat16, float32 or float64.
    """
    path = Path(path)
    outer, tensors = _unwrap(path, read_tensor_file(path), key)
    keys = [k for k in tensors if k == _ANCHOR or k.endswith("." + _ANCHOR)]
    if not keys:
        raise ValueError(
            f"{path} contains no ViT backbone: no entry ends in {_ANCHOR!r}. First entries: {listed(tensors)}"
        )
    prefix = min((k[: -len(_ANCHOR)] for k in keys), key=_rank)
    layout = _layout(outer, prefix, tensors)
    state = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    state = {k: v for k, v in state.items() if not k.startswith(_HEADS)}
    if prefix == "" and layout in ("leopart", "selfpatch"):
        state = {k: v for k, v in state.items() if not k.startswith(("ca_head.", "c_head.", "p_head."))}
    state = _unchunked(path, state)
    for name, value in state.items():
        tensor = plain_tensor(value, path, name)
        # Index tables are integers.
        state[name] = weight_tensor(value, path, name) if _is_weight(tensor) else tensor
    return Checkpoint(path, layout, state)


def load_state(model: nn.Module, checkpoint: Checkpoint, name: str = "the model") -> None:
    """Copy the whole ``checkpoint`` into a timm ViT, called ``name`` in messages; on an error the model is unchanged.

    timm's filter for the model's family converts the names. Heads may be missing on either side. Only position
    embeddings are resampled, to another grid.

    Raises:
        ValueError: naming the file and the patch sizes, widths, depths or register tokens that differ, else the first
            entries that are missing, unexpected or of another shape.
    """
    path = checkpoint.path
    _check_architecture(model, checkpoint, name)
    try:
        state = _timm_names(model, checkpoint.state)
    except Exception as error:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {said(error)} ({describe(checkpoint.state)})"
        ) from error
    state = {k: v for k, v in state.items() if not k.startswith(_HEADS)}
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(_HEADS)}
    different = misfits(state, own)
    if different:
        raise ValueError(
            f"{path} does not fit the model; entries {different}. "
            f"The file contains {describe(checkpoint.state)}: choose the model name that matches it"
        )
    mixed = [k for k, v in own.items() if state[k].is_floating_point() != v.is_floating_point()]
    if mixed:
        raise ValueError(f"{path} does not fit the model; integer and floating point differ in: {listed(mixed)}")
    model.load_state_dict(state, strict=False)


def _check_architecture(model: Any, checkpoint: Checkpoint, name: str) -> None:
    """Compare architectures before timm's filter, which would silently resize patch embeddings."""
    state, path = checkpoint.state, checkpoint.path
    projection, weight = getattr(model.patch_embed, "proj", None), state[_ANCHOR]
    if not isinstance(projection, nn.Conv2d):
        # Not a plain ViT; FrozenViT reports it.
        return
    height, width = projection.kernel_size
    if weight.dim() == 2:
        # Old files have a linear layer.
        side = round((weight.shape[1] / projection.in_channels) ** 0.5)
        sides = side, side
    elif weight.dim() == 4:
        sides = weight.shape[2], weight.shape[3]
    else:
        raise ValueError(
            f"{path} does not fit {name}: entry {_ANCHOR!r} has shape {list(weight.shape)[:8]}, expected "
            "[width, colours, patch, patch]"
        )
    position = state.get("pos_embed")
    if position is not None and (position.dim() != 3 or position.shape[2] != weight.shape[0]):
        raise ValueError(
            f"{path} does not fit {name}: entry 'pos_embed' has shape {list(position.shape)[:8]}, expected "
            f"[1, tokens, {weight.shape[0]}]"
        )
    registers = getattr(model, "reg_token", None)
    for what, found, wanted in (
        ("patch size", sides[0], height),
        ("patch size", sides[1], width),
        ("width", weight.shape[0], projection.out_channels),
        ("depth", _depth(state), len(model.blocks)),
        ("number of register tokens", _registers(state), 0 if registers is None else registers.shape[1]),
    ):
        if found != wanted:
            raise ValueError(
                f"{path} does not fit {name}: its {what} is {found}, {name} has {wanted}. The file contains "
                f"{describe(state)}: choose the model name that matches it"
            )


def describe(state: Mapping[str, Tensor]) -> str:
    """The architecture of a backbone state dict, for messages."""
    depth, registers = _depth(state), _registers(state)
    tokens = f", {registers} register tokens" if registers else ""
    weight = state.get(_ANCHOR)
    if weight is None or weight.dim() != 4:
        return f"a backbone with {depth} blocks{tokens}"
    return f"a ViT of width {weight.shape[0]}, patch size {weight.shape[-1]}, {depth} blocks{tokens}"


def position_grid(checkpoint: Checkpoint, prefix_tokens: int, width: int) -> tuple[int, int] | None:
    """Square grid of the file's position embeddings of that width, or None.

    The file may also contain position embeddings of the model's ``prefix_tokens`` class and register tokens.
    """
    position = checkpoint.state.get("pos_embed")
    if position is None or position.dim() != 3 or position.shape[0] != 1 or position.shape[2] != width:
        return None
    for count in (prefix_tokens, 0, 1):
        side = round(max(position.shape[1] - count, 0) ** 0.5)
        if side > 0 and side * side == position.shape[1] - count:
            return side, side
    return None


def _depth(state: Mapping[str, Tensor]) -> int:
    return len({k.split(".")[1] for k in state if k.startswith("blocks.")})


def _registers(state: Mapping[str, Tensor]) -> int:
    found = next((state[k] for k in _REGISTERS if k in state), None)
    return 0 if found is None else found.shape[1] if found.dim() == 3 else 1


def _is_weight(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _unchunked(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename blocks in chunks to their own numbers."""
    if not any(_CHUNKED.match(name) for name in state):
        return state
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        found = _CHUNKED.match(name)
        own = name if found is None else f"blocks.{found[1]}.{name[found.end() :]}"
        if own in plain:
            raise ValueError(f"{path}: entry {named(own)} exists twice, in two chunks of blocks")
        plain[own] = value
    return plain


def _unwrap(path: Path, content: Mapping[Any, Any], key: str | None) -> tuple[str | None, dict[str, Tensor]]:
    nested = [k for k, v in content.items() if isinstance(v, Mapping)]
    if key is not None and key not in nested:
        raise ValueError(f"{path} has no entry {key!r} holding a state dict; it has {listed(nested)}")
    outer = key if key is not None else next((k for k in _CONTAINERS if k in nested), None)
    inner = content if outer is None else content[outer]
    tensors: dict[str, Tensor] = {}
    for name, value in inner.items():
        if not isinstance(value, Tensor):
            continue
        if not isinstance(name, str):
            raise ValueError(f"{path}: the name of a tensor is {described(name)}; expected text such as {_ANCHOR}")
        if uncompiled(name) in tensors:
            raise ValueError(f"{path}: entry {named(uncompiled(name))} exists twice, also as {named(name)}")
        tensors[uncompiled(name)] = value
    if not tensors:
        raise ValueError(f"{path} contains no tensors; its entries are {listed(inner)}")
    return outer, tensors


def _rank(prefix: str) -> tuple[bool, int, int]:
    matches = [i for i, p in enumerate(_PREFIX_ORDER) if p and prefix.endswith(p)]
    # The student may have a "backbone." prefix of the same rank as the teacher's.
    student = "student" in prefix.split(".")
    return student, (0 if prefix == "" else min(matches, default=len(_PREFIX_ORDER))), len(prefix)


def _layout(outer: str | None, prefix: str, tensors: Mapping[str, Tensor]) -> str:
    if "base_encoder." in prefix or "momentum_encoder." in prefix:
        return "moco_v3"
    bare = f"{prefix}cls_token" not in tensors and f"{prefix}norm.weight" not in tensors
    # SigLIP has no class token either, but a final norm.
    if any("ca_head." in k for k in tensors) or (bare and f"{prefix}blocks.0.attn.qkv.weight" in tensors):
        return "selfpatch"
    if any("prototypes." in k or "projection_head." in k for k in tensors):
        return "leopart"
    return "dino" if outer in ("teacher", "student") else "plain"


def _timm_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    from timm.models import eva, vision_transformer

    convert: Any = eva.checkpoint_filter_fn if isinstance(model, eva.Eva) else vision_transformer.checkpoint_filter_fn
    return dict(convert(dict(state), model))
