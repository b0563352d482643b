"""SPair-71k, semantic correspondence: reader, protocol, runs."""

from .dataset import Filters, Pair, Selection, SPair, SPairError
from .protocol import Frame, Protocol, fit, is_right, match_points, square
from .run import draw_pairs, drawn, evaluate
from .summary import summarise, tables

__all__ = [
    "Filters",
    "Frame",
    "Pair",
    "Protocol",
    "SPair",
    "SPairError",
    "Selection",
    "draw_pairs",
    "drawn",
    "evaluate",
    "fit",
    "is_right",
    "match_points",
    "square",
    "summarise",
    "tables",
]
