"""Chapter 9: what one training step holds over time, by stage of the network, counted without computing."""

import weakref
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor, nn

from helpers import predict, predict_memory
from helpers.book.plots import MIB, begins, note


class StageLog(predict.Held):
    """Also logs (name, bytes) for each storage that comes, and (name, -bytes) when it goes.

    In forward the name is the size of the images; in backward "weight gradients", or "short-lived".
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weight_shapes = {p.shape for p in model.parameters()}
        self.entries, self.start = [], 0  # start: how many there were when backward began

    def ignore(self, *tensors: Tensor) -> None:  # called before forward, and again before backward
        super().ignore(*tensors)
        self.start = len(self.entries)

    def count(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if storage._cdata not in self.known:  # not a view of something that is counted already
            name, nbytes = self.name(t), storage.nbytes()
            self.entries.append((name, nbytes))
            weakref.finalize(storage, self.entries.append, (name, -nbytes))
        super().count(t)

    def name(self, t: Tensor) -> str:
        if self.start:
            return "weight gradients" if t.shape in self.weight_shapes else "short-lived"
        return f"{t.shape[2]}×{t.shape[3]}" if t.dim() == 4 and t.shape[2] > 1 else "vectors"


def log_step(model: nn.Module, shape: tuple[int, ...], max_cost: float | None) -> StageLog:
    """The log of the step that `helpers.predict_memory` predicts."""
    log = StageLog(model)
    with patch.object(predict, "Held", return_value=log):
        predict_memory(model, shape, max_cost=max_cost)
    return log


def memory_by_stage(axes, steps: dict[str, StageLog]) -> dict[str, dict[str, int]]:
    """What each step holds, stacked by name; one panel a step, all on one scale.

    Returns title -> name -> bytes at the moment of the peak.
    """
    last = {"vectors": "#999999", "weight gradients": "#444444", "short-lived": "#AA3377"}
    stages = dict.fromkeys(name for log in steps.values() for name, _ in log.entries if name not in last)
    shades = plt.get_cmap("viridis")(np.linspace(0.9, 0.15, len(stages)))
    colours = dict(zip(stages, shades, strict=True)) | last
    at_peak, top = {}, 0
    for ax, (title, log) in zip(axes, steps.items(), strict=True):
        held = np.cumsum([[nbytes * (of == name) for of, nbytes in log.entries] for name in colours], axis=1)
        moment = held.sum(0).argmax()
        at_peak[title] = {name: n for name, n in zip(colours, held[:, moment].tolist(), strict=True) if n}
        look = {"colors": colours.values(), "labels": colours, "step": "post", "linewidth": 0}
        drawn = ax.stackplot(range(len(log.entries)), held / MIB, **look)
        begins(ax, log.start, "backward begins")
        peak = held[:, moment].sum() / MIB
        ax.plot(moment, peak, "v", color="#222222", markersize=5)
        look = {"fontweight": "bold", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
        note(ax, f"peak {peak:,.0f} MiB", (moment, peak), (0, 8), ha="center", **look)
        ax.set(title=title, ylabel="MiB", xlim=(0, len(log.entries)))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:,.0f}")
        top = max(top, 1.35 * peak)  # room for both labels
    plt.setp(axes, ylim=(0, top))
    axes[1].legend(drawn[::-1], [*colours][::-1], fontsize=8, loc="upper right", labelspacing=0.2)
    axes[-1].set_xlabel("allocations and releases in the order of the step")
    return at_peak
