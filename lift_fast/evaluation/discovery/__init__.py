"""Unsupervised object discovery: data sets of boxes, TokenCut's boxes, CorLoc."""

# ruff: noqa: F401 (what callers import)
from .dataset import Box, BoxDataSet, Sample, read_coco, read_voc
from .protocol import Discovery, Prediction, Prepared, discover, iou, overlaps, prepare, score_box
from .run import evaluate
from .sheet import draw_discovery
from .summary import corloc, table
