"""Scale invariance of features, by linear CKA: the measure, runs, their curves."""

# ruff: noqa: F401 (what callers import)
from .metric import StreamingCKA, centres, linear_cka, sample
from .run import SIZES, scale_invariance
from .summary import draw_curves, table
