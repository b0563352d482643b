"""DAVIS 2017, semi-supervised: reader, label propagation, measures."""

from lift_fast.tracking.labels import LabelPropagation

from . import frames
from .dataset import Davis, DavisError, Video
from .metrics import boundary_f, jaccard, statistics
from .protocol import Network, PropagationOptions, predict
from .run import Job, Predictions, predict_dataset
from .scores import MEASURES, SequenceScores, mean_measures, score_folder, score_sequence, write_csv

__all__ = [
    "MEASURES",
    "Davis",
    "DavisError",
    "Job",
    "LabelPropagation",
    "Network",
    "Predictions",
    "PropagationOptions",
    "SequenceScores",
    "Video",
    "boundary_f",
    "frames",
    "jaccard",
    "mean_measures",
    "predict",
    "predict_dataset",
    "score_folder",
    "score_sequence",
    "statistics",
    "write_csv",
]
