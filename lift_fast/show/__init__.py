"""Visualise features of several methods: similarity to a point, principal components as colours, saliency."""

from .maps import Shown, cell_position, load, pca_colours, similarity_map
from .page import build_page
from .sheet import VIEWS, draw_sheet

__all__ = ["VIEWS", "Shown", "build_page", "cell_position", "draw_sheet", "load", "pca_colours", "similarity_map"]
