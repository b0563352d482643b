"""Results that an earlier run left: they are kept if the same settings and images would make them again."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lift_fast._text import one_line, quoted
from lift_fast.demonstration import LIFT

from .errors import UsageError
from .options import takes_demonstration_lift

FEATURES = (
    *("model", "weights", "random_weights", "lift", "random_lift", "iterations", "facet", "layer", "stride", "size"),
    *("max_side", "dtype", "seed"),
)
"""The options of :func:`lift_fast.cli.options.add_model_options` that change descriptors beyond the rounding of
``dtype``, which device, engine and threads do not."""
_WAY_OUT = "give another --out, or --overwrite"


def settings_of(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The named options as JSON values, with the LiFT in use."""
    chosen = {name: getattr(arguments, name) for name in names}
    if takes_demonstration_lift(arguments):
        chosen["lift"] = LIFT
    settings: dict[str, Any] = json.loads(json.dumps(chosen))
    return settings


def marks(settings: Mapping[str, Any], sources: Sequence[Path], lengths: Sequence[int] | None = None) -> dict[str, Any]:
    """What :func:`check_kept` compares, as arrays for a result's .npz file; ``lengths`` of the files, in bytes, if they
    may have changed since they were read."""
    import numpy as np

    one = len(sources) == 1
    names = [source.name for source in sources]
    lengths = [source.stat().st_size for source in sources] if lengths is None else lengths
    return {
        "settings": np.array(json.dumps(settings)),
        "source": np.array(names[0] if one else names),
        "source_bytes": np.array(lengths[0] if one else lengths),
    }


def check_kept(target: Path, settings: Mapping[str, Any], sources: Sequence[Path], command: str, what: str) -> None:
    """Check that an existing result has these settings and these images, and that ``command`` wrote it.

    The name of an image's result depends on the other images. Its large arrays, ``what``, are not read.
    """
    import numpy as np

    try:
        with np.load(target) as data:
            saved = dict(json.loads(str(data["settings"])))
            # Files of earlier versions have no source_bytes.
            origins = (
                list(zip(np.atleast_1d(data["source"]), np.atleast_1d(data["source_bytes"]), strict=True))
                if "source_bytes" in data
                else []
            )
    except OSError as error:
        raise UsageError(f"{quoted(target)} cannot be read: {one_line(error)}; {_WAY_OUT}") from error
    except Exception as error:
        raise UsageError(f"{quoted(target)} was not written by lift-fast {command}; {_WAY_OUT}") from error
    differing = [name for name in settings if name in saved and not _same(name, saved[name], settings[name])]
    seeded = settings["random_weights"] or settings["random_lift"] or settings.get("verify")
    if not seeded and "seed" in differing:
        differing.remove("seed")
    if differing:
        names = ", ".join(name.replace("_", "-") for name in differing)
        raise UsageError(f"{quoted(target)} was made with other settings ({names}); {_WAY_OUT}")
    for (name, length), source in zip(origins, sources, strict=False):
        if not source.is_file() or (str(name), int(length)) == (source.name, now := source.stat().st_size):
            continue
        was = quoted(name) if name != source.name else f"another {quoted(name)} ({length} bytes, now {now})"
        raise UsageError(
            f"{quoted(target)} contains the {what} of {was}, not of {quoted(source)}; {_WAY_OUT} to recompute all"
        )


def _same(name: str, one: Any, other: Any) -> bool:
    """Whether two values of a setting are equivalent; a file may be given by any of its paths."""
    if name in ("weights", "lift") and isinstance(one, str) and isinstance(other, str):
        return os.path.realpath(one) == os.path.realpath(other)
    return bool(one == other)
