"""The drawings of chapters 2 to 7 that would be long on the page: axes and a few numbers go in."""

from collections.abc import Sequence
from itertools import product

import matplotlib.pyplot as plt
from torch import Tensor

from helpers.book.plots import FILLS, arrow, box, note

HUES = ("#E69F00", "#882255", "#000000")  # safe for the colour-blind too, and of none of the methods


def number_grid(ax, grid: Tensor, title: str, corner=None, factors: Tensor | None = None, faint=()) -> None:
    """A 2-d tensor of numbers. Where a window of ``factors`` lies at ``corner``, show the products instead.

    ``corner`` is a (row, column), and ``faint`` has those that are shaded grey.
    """
    for r, c in product(*map(range, grid.shape)):
        colour, text = ("#eeeeee" if (r, c) in faint else "white"), f"{grid[r, c]:g}"
        if corner and 0 <= r - corner[0] < factors.shape[0] and 0 <= c - corner[1] < factors.shape[1]:
            colour, text = "#cfe3f1", f"{factors[r - corner[0], c - corner[1]]:g}·{grid[r, c]:g}"
        box(ax, c, r, 1, 1, text.replace("-", "−"), facecolor=colour, edgecolor="#444444", fontsize=8.5)
    ax.set(xlim=(-0.05, grid.shape[1] + 0.05), ylim=(grid.shape[0] + 0.05, -0.05), aspect="equal")
    ax.set_title(title.replace("-", "−"), fontsize=10)
    ax.axis("off")


def taps(ax, title: str, size: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
    """Which input position each output position of a one-dimensional convolution reads, by kernel tap."""
    out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    reached = stride * (out - 1) + dilation * (kernel - 1) + 1  # how many of the padded rows are read
    for k, colour, marker in zip(range(kernel), HUES, "os^", strict=False):
        at = [stride * i + dilation * k - padding for i in range(out)]
        ax.scatter(at, range(out), color=colour, marker=marker)
        note(ax, f"k={k}", (at[0], 0), (0, 7), colour, fontsize=8, ha="center")
    for a in range(-padding, size + padding):
        if not 0 <= a < size:
            ax.axvspan(a - 0.5, a + 0.5, color="#eeeeee", zorder=0)
        if a >= reached - padding:
            ax.axvspan(a - 0.5, a + 0.5, facecolor="none", edgecolor="#888888", hatch="///", linewidth=0)
    ax.set(title=title, xlim=(-padding - 0.6, size + padding - 0.4), ylim=(out - 0.4, -0.6 - out / 8))
    ax.set(xlabel="input position a", xticks=range(-padding, size + padding))
    ax.set(ylabel="output position i", yticks=range(out))


def norm_geometry(ax) -> None:
    """The vectors 1, ŷ and dz, the plane of the first two, and what of dz sticks out of it."""

    def at(a, b, c=0.0):
        """a along 1, b along ŷ, c upward, in an oblique view."""
        return a + 0.32 * b, 0.5 * b - 0.08 * a + c

    corners = [at(a, b) for a, b in ((-0.2, -0.3), (2.6, -0.3), (2.6, 2.2), (-0.2, 2.2))]
    ax.add_patch(plt.Polygon(corners, facecolor="#eeeeee", edgecolor="#bbbbbb"))
    origin, foot, tip = at(0, 0), at(1.5, 1.4), at(1.5, 1.4, 1.2)
    for start, end, colour, label, offset in (
        (origin, at(1.1, 0), "#555555", "1", (2, -12)),
        (origin, at(0, 1.1), "#555555", "ŷ", (2, 4)),
        (origin, tip, HUES[0], "dz", (3, 2)),
        (foot, tip, HUES[1], "σ/γ · dy", (5, -36)),
    ):
        arrow(ax, start, end, color=colour, linewidth=2)
        note(ax, label, end, offset, colour, fontsize=10)
    ax.plot(*zip(origin, foot, strict=True), color=HUES[0], linestyle=":")
    ax.set(title="dy is perpendicular to 1 and ŷ", xlim=(-0.5, 3.6), ylim=(-0.6, 2.1), aspect="equal")
    ax.axis("off")


def pair_diagram(ax, title: str, kept: str, steps: Sequence[str] = ("", "", "", "")) -> None:
    """Convolution and batch norm: forward above, backward below.

    ``kept``: which of "xyz" are kept until backward; ``steps``: what to put before the operations' names.
    """
    ax.set(title=title, xlim=(-0.2, 2.25), ylim=(-0.3, 1.55))
    for column, name in enumerate("xyz"):
        for row, text in ((1, name), (0, "d" + name)):
            look = {"facecolor": FILLS["y"] if text in kept else "white", "fontsize": 11}
            dashes = "--" if text == "y" not in kept else "-"
            box(ax, column - 0.1, row - 0.13, 0.2, 0.26, text, linestyle=dashes, **look)
    names = "conv", "batch norm", "batch norm\nbackward", "conv\nbackward"
    ways = (0, 1, 1), (1, 2, 1), (2, 1, 0), (1, 0, 0)
    for (start, end, row), text, step in zip(ways, names, steps, strict=True):
        arrow(ax, (start, row), (end, row), shrinkA=20, shrinkB=20)
        ax.text((start + end) / 2, row + 0.06, step + text, ha="center", va="bottom", fontsize=9)
    for column in (0, 1):  # x goes into the convolution's backward, y into batch norm's
        arrow(ax, (column + 0.12, 0.85), (column + 0.44, 0.39), linestyle=":", arrowstyle="-")
        arrow(ax, (column + 0.44, 0.39), (column + 0.46, 0.37))  # its head, which would be dotted, too
    ax.axis("off")


def tensor_row(ax, title: str, boxes: Sequence[tuple], kept: Sequence[str], colour: str) -> None:
    """Tensors of forward as boxes in their order: ``kept`` ones filled, x grey, others dashed.

    A box is (operation that makes it, name, channels: its width).
    """
    gap, left = 0.11 * sum(width for *_, width in boxes), 0.0
    for step, name, width in boxes:
        if step:
            arrow(ax, (left, 0), (left + gap, 0))
            ax.text(left + 0.46 * gap, 0.1, step, ha="center", va="bottom", fontsize=8)
            left += gap
        fill = colour if name in kept else "#e4e4e4" if name == "x" else "white"
        look = {"fontweight": "bold" if name in kept else "normal", "fontsize": 9, "facecolor": fill}
        box(ax, left, -0.36, width, 0.72, name, linestyle="--" if fill == "white" else "-", **look)
        left += width
    ax.set(xlim=(-0.1, left + 0.1), ylim=(-0.4, 0.4))
    ax.set_title(title, fontsize=10, pad=3)
    ax.axis("off")
