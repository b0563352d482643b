"""DAVIS 2017, semi-supervised: reader, label propagation, measures."""

# ruff: noqa: F401 (what callers import)
from . import frames
from .dataset import Davis, DavisError, Video
from .metrics import boundary_f, jaccard, statistics
from .protocol import LabelPropagation, Network, PropagationOptions, predict
from .run import Job, Predictions, predict_dataset
from .scores import MEASURES, SequenceScores, mean_measures, score_folder, score_sequence, write_csv
