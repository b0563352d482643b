"""Unsupervised object discovery: data sets of boxes, TokenCut's boxes, CorLoc."""

from .dataset import Box, BoxDataSet, Sample, read_coco, read_voc
from .protocol import Discovery, Prediction, Prepared, discover, iou, judge, overlaps, prepare
from .run import evaluate
from .sheet import draw_discovery
from .summary import corloc, table

__all__ = [
    "Box",
    "BoxDataSet",
    "Discovery",
    "Prediction",
    "Prepared",
    "Sample",
    "corloc",
    "discover",
    "draw_discovery",
    "evaluate",
    "iou",
    "judge",
    "overlaps",
    "prepare",
    "read_coco",
    "read_voc",
    "table",
]
