"""Is a model the same function under `remat`, and what does it gain there?

    print(compare(model, images, max_cost=0))
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from helpers.memory import MemoryTrace
from helpers.remat.mode import remat

__all__ = ["Comparison", "compare"]

MIB = 2**20


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Of each pair the first is plain PyTorch, the second `remat`.

    Attributes:
        max_cost: the price.
        equal: whether all tensors that the model returns are equal to the bit, in this order alike.
        difference: the largest relative difference of a gradient between the two (norm of the difference by
            the norm of plain's); 0 where both are.
        rounding: the same of plain PyTorch against the model in float64, or, where that does not run, against plain
            once more.
        exact: whether ``rounding`` is against float64.
        held: bytes at the end of forward, above what stood before.
        peak: the most bytes at any moment of the step.
        seconds: of a step, the median of the rounds.
    """

    max_cost: float
    equal: bool
    difference: float
    rounding: float
    exact: bool
    held: tuple[int, int]
    peak: tuple[int, int]
    seconds: tuple[float, float]

    def __str__(self) -> str:
        against = "float64" if self.exact else "plain again"
        lines = [
            f"remat(max_cost={self.max_cost:g}): forward {'equal' if self.equal else 'NOT EQUAL'} to plain PyTorch's",
            f"largest difference of a gradient {self.difference:.1e}; plain's own against {against} {self.rounding:.1e}",
            f"{'':20}{'plain':>10}{'remat':>10}{'ratio':>8}",
        ]
        rows = ("held, MiB", self.held, MIB), ("peak, MiB", self.peak, MIB), ("time, ms", self.seconds, 1e-3)
        for name, (plain, ours), unit in rows:
            ratio = ours / plain if plain else math.nan
            lines.append(f"{name:20}{plain / unit:10,.1f}{ours / unit:10,.1f}{ratio:8.2f}")
        return "\n".join(lines)
