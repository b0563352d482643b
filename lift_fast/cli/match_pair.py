"""Match one pair of images as the options of ``lift-fast match`` say, and write its sheet and its numbers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lift_fast._files import atomic_path

from .errors import writing
from .kept import FEATURES, marks, settings_of
from .match_verify import OPTIONS, record
from .options import describe

if TYPE_CHECKING:
    from PIL import Image

    from lift_fast.extractor import ViTLiFTExtractor
    from lift_fast.image_matching import ImageMatches
    from lift_fast.map_cache import MapCache

SETTINGS = (*FEATURES, "step", "mutual", "normalize", *OPTIONS)
"""The options that change matches, stored with them."""
# Pillow's format and options for each ending. Lines one pixel wide do not survive JPEG's halved colour.
SHEETS: dict[str, tuple[str, dict[str, Any]]] = {
    # Of zlib's levels the first: 0.09 s instead of 0.39 s, and a tenth larger.
    ".png": ("PNG", {"compress_level": 1}),
    ".jpg": ("JPEG", {"quality": 92, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 92, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 92}),
    ".pdf": ("PDF", {"quality": 92, "resolution": 150}),
}


def match(
    arguments: argparse.Namespace, extractor: ViTLiFTExtractor, a: Path, b: Path, cache: MapCache | None = None
) -> ImageMatches:
    """:func:`lift_fast.match_images` with the options."""
    from lift_fast import match_images

    return match_images(
        a,
        b,
        extractor=extractor,
        size=arguments.size,
        mutual=arguments.mutual,
        step=arguments.step,
        normalize=arguments.normalize,
        lift_iter=arguments.iterations,
        timing=True,
        max_side=arguments.max_side,
        verify=arguments.verify,
        threshold=arguments.threshold,
        seed=arguments.seed if arguments.verify else 0,
        camera=arguments.focal,
        cache=cache,
    )


def summary(arguments: argparse.Namespace, matches: ImageMatches) -> str:
    """What was matched and found, on one line."""
    verdict = "" if matches.verification is None else matches.verification.verdict
    # A warning that says it is printed besides.
    return caption(arguments, matches) + (f"   {verdict}" if verdict not in matches.warning else "")


def caption(arguments: argparse.Namespace, matches: ImageMatches) -> str:
    """The sheet's line of what was matched; the verdict has a line of its own there."""
    loaded = [_by((image.height, image.width)) for image in (matches.picture_a, matches.picture_b)]
    return (
        f"{describe(arguments)}   A {loaded[0]}, B {loaded[1]} pixels, "
        f"maps of {_by(matches.grid_a)} and {_by(matches.grid_b)} cells   "
        f"{int(matches.valid.sum())} of {matches.valid.numel()} matches "
        f"{'lead back to within a cell' if arguments.mutual else 'found'}   "
        f"matched in {sum(matches.seconds.values()):.2f} s"
    )


def origin(
    arguments: argparse.Namespace, extractor: ViTLiFTExtractor, matches: ImageMatches, images: Sequence[Path]
) -> dict[str, Any]:
    """Arrays that say how and from which files the matches were made; ``dtype`` is one of the settings."""
    import numpy as np

    return {
        **marks(settings_of(arguments, SETTINGS), images),
        "orientation": np.array(matches.orientations),
        "engine": np.array(str(extractor.backbone.engine_used)),
    }


def write(
    arguments: argparse.Namespace,
    matches: ImageMatches,
    sheet: Path | None,
    numbers: Path,
    origins: Mapping[str, Any],
) -> dict[str, Any]:
    """Write both files or neither, the numbers with those of :func:`origin`; return the figures for ``--json``."""
    import numpy as np

    start = time.perf_counter()
    arrays = matches.numpy()
    with writing(sheet or numbers), atomic_path(numbers) as temporary:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays, **origins)  # type: ignore[arg-type]  # numpy's stubs miss keyword arrays
        if sheet is not None:
            drawing = matches.draw(lines=arguments.lines, caption=caption(arguments, matches))
            with atomic_path(sheet) as drawn:
                save_sheet(drawing, drawn)
    valid = arrays["valid"]
    return {
        "out": None if sheet is None else str(sheet),
        "npz": str(numbers),
        "model": arguments.model,
        "lift": arguments.lift,
        "dtype": arguments.dtype,
        "engine": str(origins["engine"]),
        "random_weights": matches.random_weights,
        **{
            name: arrays[name].tolist()
            for name in ("size_a", "size_b", "loaded_size_a", "loaded_size_b", "grid_a", "grid_b")
        },
        "points": int(valid.size),
        "valid": int(valid.sum()),
        "mean_similarity": float(arrays["similarity"][valid].mean()) if valid.any() else None,
        "mean_confidence": float(arrays["confidence"].mean()),
        "warning": matches.warning,
        "trust": None if matches.trust is None else asdict(matches.trust),
        "verification": record(matches.verification),
        "seconds": {**matches.seconds, "draw": time.perf_counter() - start},
    }


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Save in the format of the path's ending, one of :data:`SHEETS`."""
    format, options = SHEETS[path.suffix.lower()]
    sheet.save(path, format=format, **options)


def _by(size: Any) -> str:
    """(height, width) as text, width first."""
    return f"{size[1]} x {size[0]}"
