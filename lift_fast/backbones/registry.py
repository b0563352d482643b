"""Names of backbones, sources of their weights, and the function that loads them."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .._text import said
from ..defaults import plain_defaults
from ..demonstration import BACKBONE as DEMONSTRATION
from ..demonstration import backbone_file
from ..tensor_files import misfits
from .checkpoints import Checkpoint, load_state, position_grid, read_checkpoint
from .network import VisionTransformer
from .pretrained import find_pretrained
from .vit import FrozenViT

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Names of timm's networks that are plain ones, and their width and heads.
_PLAIN = re.compile(r"vit_(?P<size>tiny|small|base)_patch(?P<patch>8|16)_224(\.dino)?")
_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
_VIT_MODULES = ("vision_transformer", "eva", "deit")
# Files of these projects use ImageNet's statistics, regardless of the model name.
_IMAGENET_LAYOUTS = ("dino", "moco_v3", "leopart", "selfpatch")


@dataclass(frozen=True)
class Backbone:
    """A named backbone: timm architecture (and pretrained tag), normalisation, position rule.

    ``file_only`` is the reason if there are no weights to download; ``arguments`` go to timm's constructor.
    """

    architecture: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    position_rule: str | None = None
    file_only: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


def _dino(architecture: str, **extra: Any) -> Backbone:
    return Backbone(architecture, *IMAGENET, "dino", **extra)


def _supervised(architecture: str, **extra: Any) -> Backbone:
    # The published LiFT features of supervised ViTs use DINO's network and so its position rule.
    return Backbone(architecture, *HALF, "dino", **extra)


_MOCO = "MoCo v3 weights are not in timm"
_LEOPART = "Leopart weights are not in timm"
_SELFPATCH = "SelfPatch weights are not in timm"
_NO_CLASS_TOKEN = {"class_token": False, "global_pool": "avg", "fc_norm": False}

OFFICIAL: dict[str, Backbone] = {
    "dino_vits16": _dino("vit_small_patch16_224.dino"),
    "dino_vits8": _dino("vit_small_patch8_224.dino"),
    "dino_vitb16": _dino("vit_base_patch16_224.dino"),
    "dino_vitb8": _dino("vit_base_patch8_224.dino"),
    "vit_small_patch16_224": _supervised("vit_small_patch16_224"),
    "vit_small_patch8_224": _supervised(
        "vit_small_patch8_224",
        file_only="timm publishes no supervised weights for it (its default weights are DINO's: use 'dino_vits8')",
    ),
    "vit_base_patch16_224": _supervised("vit_base_patch16_224"),
    "vit_base_patch8_224": _supervised("vit_base_patch8_224"),
    "mocov3_vits16": _dino("vit_small_patch16_224", file_only=_MOCO, arguments={"num_heads": 12}),
    "mocov3_vitb16": _dino("vit_base_patch16_224", file_only=_MOCO),
    "leopart_vits16": _dino("vit_small_patch16_224", file_only=_LEOPART),
    "leopart_vitb8": _dino("vit_base_patch8_224", file_only=_LEOPART),
    "selfpatch_vits16": _dino("vit_small_patch16_224", file_only=_SELFPATCH, arguments=_NO_CLASS_TOKEN),
    DEMONSTRATION: Backbone("vit_tiny_patch16_224", *IMAGENET, "timm", arguments={"depth": 6}),
}


class WeightsNotFoundError(RuntimeError):
    """Pretrained weights are not in the cache and cannot be downloaded."""


def load_backbone(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    random_weights: bool = False,
    facet: str = "key",
    layer: int | None = None,
    stride: int | None = None,
    head_order: str = "concatenated",
    position_rule: str | None = None,
    checkpoint_key: str | None = None,
    seed: int = 0,
    engine: str = "auto",
) -> FrozenViT:
    """Build a frozen backbone by name.

    Args:
        name: an official name (:data:`OFFICIAL`) or any timm VisionTransformer or Eva, with or without pretrained tag.
        weights: local checkpoint file (DINO, MoCo v3, Leopart, SelfPatch or timm layout); None is timm's pretrained
            weights from the cache, else downloaded. Those of ``"demo_vitt16"`` ship with the package
            (:mod:`lift_fast.demonstration`).
        random_weights: use random weights from ``seed``, for tests; PyTorch's global random state is unchanged.
        facet, layer, stride, head_order: see :class:`FrozenViT`.
        position_rule: ``"dino"`` or ``"timm"``; None is DINO's for the official names and for files in the layout of
            DINO, MoCo v3, Leopart or SelfPatch, timm's otherwise.
        checkpoint_key: entry of the checkpoint file to use, for example ``"student"``; None prefers the teacher.
        seed: of ``random_weights``.
        engine: ``"auto"``, ``"torch"``, ``"openvino"`` or ``"compile"``: see :class:`FrozenViT`.

    Returns:
        :class:`FrozenViT` on the CPU in float32, regardless of PyTorch's default dtype and device. ``mean`` and ``std``
        are ImageNet's for DINO, 0.5 for the official supervised names, those of the file's project if its layout
        identifies it, and the model's own config otherwise.

    Raises:
        ValueError: for an unknown name, an unsupported model, contradictory arguments, or a file that is damaged or
            does not fit, such as one of another patch size: weights are never resampled to fit.
        FileNotFoundError: if ``weights`` does not exist.
        EngineError: if an engine given by name does not run here.
        WeightsNotFoundError: if ``weights`` is None and no weights can be found or downloaded.
    """
    if random_weights and weights is not None:
        raise ValueError(f"random_weights=True and weights={str(weights)!r} exclude each other; give only one")
    spec = _lookup(name)
    mean, std, rule = spec.mean, spec.std, position_rule or spec.position_rule
    if random_weights:
        model = _random(spec, seed)
    elif weights is None and name == DEMONSTRATION:
        model = _from_file(name, spec, read_checkpoint(backbone_file()))
    elif weights is None:
        model = _pretrained(name, spec)
    else:
        checkpoint = read_checkpoint(weights, key=checkpoint_key)
        model = _from_file(name, spec, checkpoint)
        if checkpoint.layout in _IMAGENET_LAYOUTS:
            mean, std = IMAGENET
            rule = rule or "dino"
    return FrozenViT(
        model,
        facet=facet,
        layer=layer,
        stride=stride,
        head_order=head_order,
        position_rule=rule,
        mean=mean,
        std=std,
        name=name,
        random_weights=random_weights,
        engine=engine,
    )


def _lookup(name: str) -> Backbone:
    if not isinstance(name, str):
        raise ValueError(f"name must be a string such as 'dino_vits16', got {name!r}")
    if name in OFFICIAL:
        return OFFICIAL[name]
    import timm
    from timm.models import is_model_in_modules

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = [*OFFICIAL, *timm.list_models("*vit*"), *timm.list_models("*eva*")]
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "."
        raise ValueError(
            f"unknown backbone {name!r}{hint} Official names: {', '.join(OFFICIAL)}; any timm ViT works, too"
        )
    if not is_model_in_modules(architecture, _VIT_MODULES):
        raise ValueError(
            f"{name!r} is not a supported Vision Transformer; use an official name "
            f"({', '.join(OFFICIAL)}) or one of timm's VisionTransformer and Eva models"
        )
    if tag:
        tags = [m.partition(".")[2] for m in timm.list_models(f"{architecture}.*", pretrained=True)]
        if tag not in tags:
            raise ValueError(f"timm has no pretrained tag {tag!r} of {architecture}; it has {', '.join(tags)}")
    return Backbone(name)


def _create(spec: Backbone, **extra: Any) -> nn.Module:
    """Without head; the grid follows the image, so that timm's own forward works as the reference."""
    import timm

    with plain_defaults():
        arguments = {"num_classes": 0, "dynamic_img_size": True, **spec.arguments, **extra}
        model: nn.Module = timm.create_model(spec.architecture, **arguments)
    return model


def _random(spec: Backbone, seed: int) -> nn.Module:
    # torch.manual_seed would also reseed every CUDA generator.
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return _create(spec)


def _pretrained(name: str, spec: Backbone) -> nn.Module:
    if spec.file_only is not None:
        raise WeightsNotFoundError(
            f"no weights to download for {name!r}: {spec.file_only}. Give the checkpoint file (weights=FILE, on the "
            "command line --weights FILE), or use random weights for a test (random_weights=True, --random-weights)"
        )
    try:
        file = find_pretrained(spec.architecture)
    except LookupError as error:
        raise WeightsNotFoundError(
            f"no pretrained weights for {name!r}: {error}. Connect to the network once, or give a local checkpoint "
            "file (weights=FILE, on the command line --weights FILE), or use random weights for a test "
            "(random_weights=True, --random-weights)"
        ) from error
    try:
        plain = _plain(spec, read_checkpoint(file)) if name in OFFICIAL else None
        if plain is not None:
            return plain
        with torch.random.fork_rng(devices=[]):
            return _create(spec, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    except Exception as error:
        raise ValueError(
            f"the cached weights {file} cannot be loaded; delete them and try again: {said(error)}"
        ) from error


def _plain(spec: Backbone, checkpoint: Checkpoint) -> nn.Module | None:
    """The network without timm, whose import takes longer than many a run; None unless the file has just its entries.

    In float32 on the CPU, with position embeddings on the file's own grid.
    """
    known = _PLAIN.fullmatch(spec.architecture)
    if known is None or not {"num_heads", "depth"}.issuperset(spec.arguments):
        return None
    width, heads = _SIZES[known["size"]]
    heads = spec.arguments.get("num_heads", 12 if checkpoint.layout == "moco_v3" and width == 384 else heads)
    grid = position_grid(checkpoint, 1, width)
    if grid is None:
        return None
    # On meta: the file's weights are assigned.
    with plain_defaults(), torch.device("meta"):
        model = VisionTransformer(width, spec.arguments.get("depth", 12), heads, int(known["patch"]), grid)
    state = checkpoint.state
    if misfits(state, model.state_dict()) or not all(value.is_floating_point() for value in state.values()):
        return None
    own = {
        name: value.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for name, value in state.items()
    }
    model.load_state_dict(own, assign=True)
    return model


def _from_file(name: str, spec: Backbone, checkpoint: Checkpoint) -> nn.Module:
    plain = _plain(spec, checkpoint) if name in OFFICIAL else None
    if plain is not None:
        return plain
    arguments: dict[str, Any] = {}
    if checkpoint.layout == "moco_v3" and checkpoint.state["patch_embed.proj.weight"].shape[:1] == (384,):
        arguments["num_heads"] = 12
    if checkpoint.layout == "selfpatch":
        arguments.update(_NO_CLASS_TOKEN)
    with torch.random.fork_rng(devices=[]):
        model: Any = _create(spec, **arguments)
        # Built for the file's own grid, the network keeps the trained position embeddings.
        grid = position_grid(checkpoint, model.num_prefix_tokens, model.embed_dim)
        if grid is not None and grid != model.patch_embed.grid_size and model.pos_embed is not None:
            model = _create(spec, img_size=grid[0] * model.patch_embed.patch_size[0], **arguments)
    if checkpoint.layout == "selfpatch":
        model.norm = nn.Identity()
    load_state(model, checkpoint, name)
    network: nn.Module = model
    return network
