"""Scale invariance of features, by linear CKA: the measure, runs, their curves."""

from .metric import StreamingCKA, centres, linear_cka, sample
from .run import SIZES, scale_invariance
from .summary import draw_curves, table

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
