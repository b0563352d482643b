"""Scale invariance of features, by linear CKA: the measure, runs, their curves."""

from .run import (
    SIZES,
    StreamingCKA,
    centres,
    draw_curves,
    linear_cka,
    sample,
    scale_invariance,
    table,
)

__all__ = [
    "SIZES",
    "StreamingCKA",
    "centres",
    "draw_curves",
    "linear_cka",
    "sample",
    "scale_invariance",
    "table",
]
