"""Matching under known warps: protocol, runs, sheets."""

# ruff: noqa: F401 (what callers import)
from .protocol import (
    WarpProtocol,
    evaluate_batch,
    image_name,
    make_view,
    normaliser,
    project,
    random_homography,
    render,
)
from .run import evaluate
from .sheet import RIGHT, WRONG, Pair, choose, draw_sheet, match_pairs
from .summary import summarise, tables
