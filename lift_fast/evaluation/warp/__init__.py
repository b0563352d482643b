"""Matching under known warps: protocol, runs, sheets."""

from .protocol import (
    WarpProtocol,
    evaluate_batch,
    make_view,
    normaliser,
    picture_name,
    project,
    random_homography,
    render,
)
from .run import evaluate
from .sheet import RIGHT, WRONG, Pair, choose, draw_sheet, match_pairs
from .summary import summarise, tables

__all__ = [
    "RIGHT",
    "WRONG",
    "Pair",
    "WarpProtocol",
    "choose",
    "draw_sheet",
    "evaluate",
    "evaluate_batch",
    "make_view",
    "match_pairs",
    "normaliser",
    "picture_name",
    "project",
    "random_homography",
    "render",
    "summarise",
    "tables",
]
