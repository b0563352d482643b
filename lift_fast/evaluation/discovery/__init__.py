"""Unsupervised object discovery: data sets of boxes, TokenCut's boxes, CorLoc."""

from .dataset import Box, BoxDataSet, Sample, read_coco, read_voc
from .run import (
    RULES,
    Discovery,
    Journal,
    Prediction,
    Prepared,
    corloc,
    discover,
    draw_discovery,
    evaluate,
    iou,
    judge,
    overlaps,
    prepare,
    read_as_stored,
    table,
)

__all__ = [
    "RULES",
    "Box",
    "BoxDataSet",
    "Discovery",
    "Journal",
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
    "read_as_stored",
    "read_coco",
    "read_voc",
    "table",
]
