"""Kernels and tools of the collection; every public name is importable from here."""

from .batch_norm import batch_norm_backward, batch_norm_forward, batch_stats, update_running_stats
from .conv import conv2d_backward
from .fused import FusedConvBN2d, FusedConvBN2dFunction, Settings
from .predict import Prediction, largest_batch, max_cost_for, predict_memory
from .remat import remat
from .remat.compare import Comparison, compare

__all__ = [
    "Comparison",
    "FusedConvBN2d",
    "FusedConvBN2dFunction",
    "Prediction",
    "Settings",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_stats",
    "compare",
    "conv2d_backward",
    "largest_batch",
    "max_cost_for",
    "predict_memory",
    "remat",
    "update_running_stats",
]
