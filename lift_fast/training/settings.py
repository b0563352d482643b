"""Settings of a training run: one dataclass, validated before anything is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lift_fast._text import shown

LOSSES = ("cosine", "l1", "l2")
TARGETS = ("double-size", "half-stride")
FITS = ("squash", "crop")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
FACETS = ("key", "query", "value", "token")

_CHOICES = {"loss": LOSSES, "target": TARGETS, "fit": FITS, "precision": PRECISIONS, "facet": FACETS}
# Whole numbers by their least value.
_FROM_ZERO = ("extra_image_blocks", "seed", "workers")
_FROM_ONE = (
    *("image_channels", "image_size", "batch_size", "epochs", "max_steps", "limit"),
    *("save_every_steps", "save_every_epochs"),
)


@dataclass(frozen=True)
class TrainingSettings:
    """One training run. The defaults are the paper's.

    Raises:
        ValueError: naming a value that is out of range.
    """

    data: Path
    """Folder of images, searched with its subfolders."""
    out: Path
    """Folder for ``lift.pth``, ``last.pth`` and ``log.csv``; created if missing."""
    model: str = "dino_vits16"
    """Backbone, a name for :func:`lift_fast.load_backbone`."""
    weights: Path | None = None
    """Local checkpoint of the backbone."""
    checkpoint_key: str | None = None
    """Entry of that checkpoint with the state dict; None finds it."""
    random_weights: bool = False
    """Random backbone weights, for tests."""
    facet: str = "key"
    """``"key"``, ``"query"``, ``"value"`` or ``"token"``."""
    layer: int | None = None
    """Block of the backbone, may be negative; None is the last."""
    loss: str = "cosine"
    """``"cosine"``, ``"l1"`` or ``"l2"``."""
    target: str = "double-size"
    """What LiFT predicts: ``"double-size"``, features of the image at twice the size, as published;
    ``"half-stride"``, features of the same image with overlapping patches, half a patch apart, for backbones whose
    features get worse on enlarged images."""
    use_image: bool = True
    """False trains the "no image" ablation."""
    image_channels: int = 32
    """Width of LiFT's image encoders."""
    extra_image_blocks: int = 0
    """Further 3x3 convolution blocks in LiFT's image encoder."""
    image_size: int = 448
    """Side of the square images in pixels, a multiple of four patches."""
    fit: str = "squash"
    """``"squash"``: both sides to ``image_size``, as the published training does; ``"crop"``: the shorter side, then
    the centred square."""
    jitter: float = 0.2
    """Colour jitter of brightness, contrast, saturation and hue, 0 to 0.5; 0 switches it off."""
    batch_size: int | None = None
    """Images in one optimiser step over all processes; None is 256, or 64 for patch 8 and below."""
    epochs: int = 5
    """Passes over the images, in whole batches; the images left over differ by epoch."""
    max_steps: int | None = None
    """Stop after this many optimiser steps in total."""
    learning_rate: float = 1e-3
    """Of Adam; constant."""
    seed: int = 0
    """Of LiFT's initial weights, the order of the images and the colour jitter."""
    limit: int | None = None
    """Train on only the first images, by sorted name."""
    held_out: float = 0.0
    """Fraction of the images that :func:`split` holds out, for an evaluation."""
    workers: int | None = None
    """Processes that read images, for each training process; 0 reads in the training process, None chooses. At most
    :func:`most_workers`, because each takes half a gigabyte."""
    device: str | None = None
    """``"cpu"``, ``"cuda"``, ...; None is CUDA if there is one."""
    precision: str = "auto"
    """Of backbone and network: ``"float32"``, ``"bfloat16"``, ``"float16"`` (with a gradient scaler), or ``"auto"``:
    bfloat16 if the hardware supports it, else float32. Weights and optimiser of LiFT are always float32."""
    compile: bool = False
    """Compile backbone and network with ``torch.compile``."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over all processes instead of each process's share of the batch."""
    save_every_steps: int | None = None
    """Also save each time after this many steps."""
    save_every_epochs: int = 1
    """Save each time after this many epochs."""
    tensorboard: bool = False
    """Also write TensorBoard events to ``out``."""

    def __post_init__(self) -> None:
        # The command line reads the defaults of this class for its help, which must not wait for PyTorch.
        from lift_fast.checks import as_whole, check_whole

        for name in ("data", "out", "weights"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, (str, os.PathLike)):
                    raise ValueError(f"{name} must be a path, got {value!r}")
                object.__setattr__(self, name, Path(value))
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        for name in (*_FROM_ZERO, *_FROM_ONE):
            value = getattr(self, name)
            if value is None and self._default(name) is None:
                continue
            most = {"workers": most_workers(), "seed": 2**63 - 1}.get(name, math.inf)
            # A Python int, as the saved state requires.
            object.__setattr__(self, name, check_whole(name, value, int(name in _FROM_ONE), most))
        # The backbone checks whether the block exists.
        object.__setattr__(self, "layer", layer if (layer := as_whole(self.layer)) is not None else self.layer)
        # Written so that NaN fails too.
        if not 0 <= self.jitter <= 0.5:
            raise ValueError(f"jitter must lie in 0 to 0.5, got {self.jitter!r}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be a fraction from 0 to below 1, got {self.held_out!r}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate!r}")

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON and checkpoints."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def _default(cls, name: str) -> Any:
        return next(field.default for field in fields(cls) if field.name == name)


def most_workers() -> int:
    """Most workers of one training process: 64, or four for each core if that is more."""
    return max(64, 4 * (os.cpu_count() or 1))


# Settings that may differ when a run is resumed: paths, speed and length.
_FREE = frozenset(
    {
        *("data", "out", "weights", "checkpoint_key", "epochs", "max_steps", "workers", "device", "compile"),
        *("save_every_steps", "save_every_epochs", "tensorboard", "picture_times"),
    }
)
# Absent from states of earlier versions.
_LATER = frozenset({"picture_sizes"})
_MEANING = {"picture_sizes": " (other files under the same names)"}


def contradictions(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences of a resumed run from the saved one: ``"name: saved ..., now ..."``."""
    return [
        f"{name}{_MEANING.get(name, '')}: saved {shown(saved.get(name))}, now {shown(now[name])}"
        for name in now
        if name not in _FREE and saved.get(name) != now[name] and not (name in _LATER and name not in saved)
    ]
