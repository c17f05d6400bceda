"""Kernels and tools of the collection; every public name is importable from here."""

from helpers.batch_norm import batch_norm_backward, batch_norm_forward, batch_stats, update_running_stats
from helpers.conv import conv2d_backward
from helpers.fuse import FusionReport, fuse_conv_bn, unfuse
from helpers.fused import (
    BatchNorm,
    FusedBlock2d,
    FusedBlockFunction,
    FusedConvBN2d,
    FusedConvBN2dFunction,
    fused_block2d,
    fused_conv_bn2d,
)
from helpers.predict import Prediction, largest_batch, max_cost_for, predict_memory
from helpers.remat import remat
from helpers.remat.compare import Comparison, compare

__all__ = [
    "BatchNorm",
    "Comparison",
    "FusedBlock2d",
    "FusedBlockFunction",
    "FusedConvBN2d",
    "FusedConvBN2dFunction",
    "FusionReport",
    "Prediction",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_stats",
    "compare",
    "conv2d_backward",
    "fuse_conv_bn",
    "fused_block2d",
    "fused_conv_bn2d",
    "largest_batch",
    "max_cost_for",
    "predict_memory",
    "remat",
    "unfuse",
    "update_running_stats",
]
