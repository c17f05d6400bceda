"""Kernels and tools of the collection.

remat trains a model in less memory, and compare shows what it does for yours. predict_memory, largest_batch
and max_cost_for predict memory without using it. FusedConvBN2d is the layer of chapters 2 to 6, and the other
functions are its parts. MemoryTrace measures a step.
"""

from .batch_norm import batch_norm_backward, batch_norm_forward, batch_stats, update_running_stats
from .conv import conv2d_backward
from .fused import FusedConvBN2d, FusedConvBN2dFunction, Settings
from .memory import MemoryTrace
from .predict import Prediction, largest_batch, max_cost_for, predict_memory
from .remat import Record, remat
from .remat.compare import Comparison, compare

__all__ = [
    "Comparison",
    "FusedConvBN2d",
    "FusedConvBN2dFunction",
    "MemoryTrace",
    "Prediction",
    "Record",
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
