"""Local checkpoint files of frozen backbones: DINO, MoCo v3, Leopart, SelfPatch, and timm's own layout.

Layouts, from the projects' own training code:

* DINO (facebookresearch/dino): the plain state dict, or ``{"teacher", "student", "args", ...}`` with ``module.`` and
  ``backbone.`` prefixes and the projection under ``head.``.
* MoCo v3 (facebookresearch/moco-v3): ``{"state_dict"}`` with ``module.base_encoder.`` and ``module.momentum_encoder.``;
  its ViT-S has 12 heads, where DINO's and timm's have 6, which no tensor shape tells.
* Leopart (MkuuWaUjinga/leopart): Lightning module with ``model.`` and ``teacher.``, plus ``projection_head`` and
  ``prototypes``; published files are its bare state dict.
* SelfPatch (alinlab/SelfPatch): as DINO, with the heads ``ca_head``, ``c_head``, ``p_head``; its backbone has neither
  class token nor final norm.
"""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_ANCHOR = "patch_embed.proj.weight"
_CONTAINERS = ("teacher", "student", "state_dict", "model")
# Best first, among several copies of the backbone in one state dict.
_PREFIX_ORDER = ("", "base_encoder.", "model.", "backbone.", "teacher.", "student.", "momentum_encoder.")
# Parts that dense features never read. A file may hold them or not.
_HEADS = (
    "head.", "head_dist.", "fc.", "fc_norm.", "pre_logits.", "projection_head.", "prototypes.", "predictor.",
    "attn_pool.", "decoder_embed.", "decoder_blocks.", "decoder_norm.", "decoder_pred.", "decoder_pos_embed",
)  # fmt: skip
_SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """Backbone tensors of one file.

    ``layout`` is ``"dino"``, ``"moco_v3"``, ``"leopart"``, ``"selfpatch"`` or ``"plain"`` (DINO's plain state dict and
    timm's own cannot be told apart).
    """

    path: Path
    layout: str
    state: dict[str, Tensor]


def read_checkpoint(path: str | os.PathLike[str], *, key: str | None = None) -> Checkpoint:
    """Read a checkpoint file, find the backbone in it, strip prefixes, drop heads.

    Args:
        path: file written by ``torch.save`` (read with ``weights_only=True``) or ``.safetensors``.
        key: entry of the outer dictionary (``"teacher"``, ``"student"``, ...); None takes the first known one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, holds no ViT state dict, or holds values that are not finite.
    """
    path = Path(path)
    content = _read(path)
    outer, tensors = _unwrap(path, content, key)
    keys = [k for k in tensors if k == _ANCHOR or k.endswith("." + _ANCHOR)]
    if not keys:
        raise ValueError(
            f"{path} holds no ViT backbone: no entry ends in {_ANCHOR!r}. First entries: {_some(list(tensors))}"
        )
    prefix = min((k[: -len(_ANCHOR)] for k in keys), key=_rank)
    layout = _layout(outer, prefix, tensors)
    state = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    state = {k: v for k, v in state.items() if not k.startswith(_HEADS)}
    if prefix == "" and layout in ("leopart", "selfpatch"):
        state = {k: v for k, v in state.items() if not k.startswith(("ca_head.", "c_head.", "p_head."))}
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise ValueError(f"{path}: {bad} of {value.numel()} values of {name!r} are not finite (NaN or infinity)")
    return Checkpoint(path, layout, state)


def load_state(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy ``checkpoint`` into a timm ViT, all of it or nothing.

    Names are converted by timm's own filter of the model's family. Heads may be missing on either side.

    Raises:
        ValueError: naming the file and the first missing, unexpected or misshapen entries.
    """
    path = checkpoint.path
    try:
        state = _timm_names(model, checkpoint.state)
    except Exception as error:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {error} ({describe(checkpoint.state)})"
        ) from error
    state = {k: v for k, v in state.items() if not k.startswith(_HEADS)}
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(_HEADS)}
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k}: file {list(state[k].shape)}, model {list(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    problems = [
        f"{len(entries)} {kind} ({_some(entries)})"
        for kind, entries in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if entries
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit the model; entries {'; '.join(problems)}. "
            f"The file holds {describe(checkpoint.state)}: choose the model name that matches it"
        )
    model.load_state_dict(state, strict=False)


def describe(state: Mapping[str, Tensor]) -> str:
    """Architecture of a backbone state dict in words, for messages."""
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    weight = state.get(_ANCHOR)
    if weight is None or weight.dim() != 4:
        return f"a backbone with {depth} blocks"
    return f"a ViT of width {weight.shape[0]}, patch size {weight.shape[-1]}, {depth} blocks"


def position_grid(checkpoint: Checkpoint, prefix_tokens: int) -> tuple[int, int] | None:
    """Square grid of the file's position embeddings, None if it has none or they are not square.

    ``prefix_tokens`` is the number of class and register tokens for which the file may hold position embeddings too.
    """
    position = checkpoint.state.get("pos_embed")
    if position is None:
        return None
    for count in (prefix_tokens, 0, 1):
        side = round(max(position.shape[1] - count, 0) ** 0.5)
        if side > 0 and side * side == position.shape[1] - count:
            return side, side
    return None


def _read(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a checkpoint file (.pth, .pt, .bin, .ckpt or .safetensors)")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # DINO's and SelfPatch's full checkpoints carry their command line, a plain record of values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) and "global" in str(error).lower():
            raise ValueError(
                f"{path} holds Python objects beside tensors, which are not loaded because they could run code. If you "
                "trust the file, load it once with torch.load(..., weights_only=False) and save its state dict alone. "
                f"PyTorch says: {str(error).splitlines()[-1].strip() or error}"
            ) from error
        raise ValueError(f"{path} is no readable checkpoint (.pth or .safetensors): {_first_line(error)}") from error
    except Exception as error:
        raise ValueError(f"{path} is no readable checkpoint (.pth or .safetensors): {_first_line(error)}") from error


def _unwrap(path: Path, content: Any, key: str | None) -> tuple[str | None, dict[str, Tensor]]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors")
    nested = [k for k, v in content.items() if isinstance(v, Mapping)]
    if key is not None and key not in nested:
        raise ValueError(f"{path} has no entry {key!r} holding a state dict; it has {_some([str(k) for k in nested])}")
    outer = key if key is not None else next((k for k in _CONTAINERS if k in nested), None)
    inner = content if outer is None else content[outer]
    tensors = {str(k): v for k, v in inner.items() if isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors; its entries are {_some([str(k) for k in inner])}")
    return outer, tensors


def _rank(prefix: str) -> tuple[int, int]:
    matches = [i for i, p in enumerate(_PREFIX_ORDER) if p and prefix.endswith(p)]
    return (0 if prefix == "" else min(matches, default=len(_PREFIX_ORDER))), len(prefix)


def _layout(outer: str | None, prefix: str, tensors: Mapping[str, Tensor]) -> str:
    if "base_encoder." in prefix or "momentum_encoder." in prefix:
        return "moco_v3"
    bare = f"{prefix}cls_token" not in tensors and f"{prefix}norm.weight" not in tensors
    # SigLIP and its like have no class token either, but a final norm.
    if any("ca_head." in k for k in tensors) or (bare and f"{prefix}blocks.0.attn.qkv.weight" in tensors):
        return "selfpatch"
    if any("prototypes." in k or "projection_head." in k for k in tensors):
        return "leopart"
    return "dino" if outer in ("teacher", "student") else "plain"


def _timm_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    from timm.models import eva, vision_transformer

    convert: Any = eva.checkpoint_filter_fn if isinstance(model, eva.Eva) else vision_transformer.checkpoint_filter_fn
    return dict(convert(dict(state), model))


def _some(entries: list[str]) -> str:
    more = f", ... {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return ", ".join(entries[:_SHOWN]) + more


def _first_line(error: BaseException) -> str:
    # The reader stumbles over bytes that it takes for instructions; their numbers tell nobody anything.
    if isinstance(error, LookupError):
        return "its content is of another kind"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
