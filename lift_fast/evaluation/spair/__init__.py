"""SPair-71k, semantic correspondence: reader, protocol, runs."""

# ruff: noqa: F401 (what callers import)
from .dataset import Filters, Pair, Selection, SPair, SPairError
from .protocol import Frame, Protocol, fit, is_right, match_points, square
from .run import draw_pairs, drawn, evaluate
from .summary import summarise, tables
