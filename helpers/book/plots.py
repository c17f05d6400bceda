"""How the notebooks draw: one style, and figures that carry alt text.

Write on the curves rather than in a legend: `label_lines`. A figure says the same on paper, in the dark and
to the colour-blind: it stands on white, a method has one colour everywhere, and colour alone tells nothing.
"""

import io

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from IPython.display import Image, display
from matplotlib.colors import to_hex, to_rgb

# Okabe & Ito's colour-blind-safe palette, with one of Tol's; a method keeps its colour on every page.
COLOURS = {
    "unfused": "#D55E00",
    "tutorial": "#CC79A7",
    "checkpoint": "#888888",
    "whole batch": "#56B4E9",
    "fused": "#0072B2",
    "remat": "#009E73",
    "compile": "#882255",
    "algebra": "#000000",
    "other": "#666666",
}
# Tensors are filled with light colours, which black text can be read on.
FILLS = {"dz": "#b5d3e7", "y": "#f0b48a", "dx": "#7fc4a5"}
LINE = "#333333"
MIB = 2**20

plt.rcParams.update({
    "figure.figsize": (7.2, 3.2), "figure.dpi": 100, "figure.facecolor": "white", "savefig.bbox": "tight",
    "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555555",
    "xtick.color": "#555555", "ytick.color": "#555555", "mathtext.default": "regular",
    "xtick.labelcolor": "#222222", "ytick.labelcolor": "#222222",
})  # fmt: skip


def show(fig, alt: str) -> None:
    """Display `fig` as a PNG whose alt text is `alt`, then close it.

    The text travels in the output's metadata, where the HTML export and screen readers find it. The PNG has
    twice the pixels that it is shown with, and 256 colours at most: sharp on screens and on paper, and small.
    """
    if not alt.strip():
        raise ValueError("alt must say in words what the figure shows, got an empty string")
    full, packed, dpi = io.BytesIO(), io.BytesIO(), 2 * fig.dpi
    fig.savefig(full, format="png", dpi=dpi)
    plt.close(fig)
    with PIL.Image.open(full) as image:
        few = image.convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
    few.save(packed, format="png", optimize=True, dpi=(dpi, dpi))
    display(Image(data=packed.getvalue(), format="png", retina=True, alt=alt))


def ink(colour: str) -> str:
    """A shade of ``colour`` that is dark enough for text on white (contrast 4.5, level AA)."""
    return to_hex([0.65 * c for c in to_rgb(colour)])


def spread(heights: list[float], gap: float) -> np.ndarray:
    """The heights in their order; those closer than ``gap`` are moved apart, as far up as down."""
    order, steps = np.argsort(heights, kind="stable"), gap * np.arange(len(heights))
    wanted = np.array(heights)[order] - steps  # it falls where two are too close
    up, down = np.maximum.accumulate(wanted), np.minimum.accumulate(wanted[::-1])[::-1]
    return ((up + down) / 2 + steps)[np.argsort(order)]


def label_lines(ax) -> None:
    """Write the label of each line of ``ax`` at its right end, in its colour: no legend to look up.

    Call it last, when the limits are set. Labels that would touch are moved apart.
    """
    ax.figure.draw_without_rendering()  # the layout is settled
    lines = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in lines]
    at = [72 / ax.figure.dpi * ax.transData.transform(end)[1] for end in ends]  # in points
    for line, end, was, is_now in zip(lines, ends, at, spread(at, 11), strict=True):
        note(ax, line.get_label(), end, (8, is_now - was), line.get_color(), va="center")


def note(ax, text: str, at, offset, colour: str = LINE, **look):
    """Text next to a point, ``offset`` points away, in a legible shade of the colour."""
    look = {"fontsize": 9, "annotation_clip": False} | look
    return ax.annotate(text, at, offset, textcoords="offset points", color=ink(colour), **look)


def box(ax, left, bottom, width, height, text="", fontsize=10, fontweight="normal", **look) -> None:
    """A rectangle with text in its middle."""
    ax.add_patch(plt.Rectangle((left, bottom), width, height, **{"edgecolor": LINE, **look}))
    middle = left + width / 2, bottom + height / 2
    ax.text(*middle, text, ha="center", va="center", fontsize=fontsize, fontweight=fontweight, zorder=4)


def arrow(ax, start, end, **look) -> None:
    look = {"arrowstyle": "-|>", "color": LINE, "shrinkA": 0, "shrinkB": 0} | look
    ax.annotate("", end, start, arrowprops=look)


def begins(ax, at: float, text: str) -> None:
    """A dotted line where something begins."""
    ax.axvline(at, color="#666666", linestyle=":", linewidth=1)
    note(ax, text, (at, 1), (3, 0), xycoords=ax.get_xaxis_transform(), va="top")


def memory_over_time(axes, traces: dict, colours: dict, reference: tuple[str, float]) -> None:
    """Draw a `helpers.memory.MemoryTrace` in each of ``axes``, all on one scale.

    No label hides a curve. Each step has the width of its panel, since time depends on the machine.

    ``traces``: title -> trace with a timeline and a mark "end of forward".
    ``reference``: a label and a number of bytes, drawn as a dashed line across all axes.
    """
    label, level = reference[0], reference[1] / MIB
    top = 1.4 * max(level, *(trace.peak / MIB for trace in traces.values()))
    for ax, (title, trace) in zip(axes, traces.items(), strict=True):
        times, held = np.array(trace.timeline).T / [[trace.timeline[-1][0] / 100], [MIB]]
        at = 100 * trace.mark_times["end of forward"] / trace.timeline[-1][0]
        forward, peak = trace.marks["end of forward"] / MIB, trace.peak / MIB
        ax.fill_between(times, held, step="post", color=colours[title], alpha=0.3, linewidth=0)
        ax.step(times, held, where="post", color=colours[title], linewidth=1.4)
        begins(ax, at, "backward")
        ax.plot(at, forward, "o", color="#222222", markersize=4)
        first = (held > held.max() - 0.01).argmax()  # a later moment may be higher by a vector
        ax.plot(times[first], peak, "^", color="#222222", markersize=5)
        ax.axhline(level, color="#666666", linestyle="--", linewidth=1)
        note(ax, label, (1, level), (4, 0), xycoords=ax.get_yaxis_transform(), va="center")
        ax.set_title(title, color=ink(colours[title]), fontweight="bold")
        numbers = f"● end of forward {forward:,.1f} MiB   ▲ peak {peak:,.1f} MiB"
        ax.set_title(numbers, loc="right", fontsize=9, color="#222222")
        ax.set(ylabel="MiB", xlim=(0, 100), ylim=(0, top))
        ax.yaxis.set_major_formatter("{x:,.10g}")
        ax.label_outer()
    axes[-1].set_xlabel("time, % of the step")


def backward_step_by_step(axes, traces: dict, colours: list, unit: int) -> None:
    """Chapter 6: what is held after each allocation and release of backward, in units of ``unit`` bytes.

    Our own buffers are dark, the library's light. Changes of less than a fiftieth of a unit are left out.
    ``traces``: title -> trace whose rows have held, change, moment and in_library.
    """
    top = 1.25 * max(trace.peak for trace in traces.values()) / unit
    for ax, (title, trace), colour in zip(axes, traces.items(), colours, strict=True):
        shown, ours = [], 0.0  # (held, in our own buffers, moment)
        for row in trace.rows:
            before, ours = ours, ours if row.in_library else row.held / unit
            if max(abs(row.change) / unit, abs(ours - before)) > 0.02 and row.moment not in ("", "end"):
                shown.append((row.held / unit, ours, row.moment))
        held, buffers, moments = zip(*shown, strict=True)
        steps = range(len(shown))
        for values, alpha in ((held, 0.25), (buffers, 0.45)):
            ax.fill_between(steps, values, step="post", color=colour, alpha=alpha, linewidth=0)
        ax.step(steps, held, where="post", color=colour, linewidth=1.2)
        for k in steps[1:]:
            if moments[k] != moments[k - 1]:
                begins(ax, k - 0.5, moments[k])
        ax.set(xlim=(0, steps[-1]), ylim=(0, top), ylabel="buffers", xticks=[])
        peaks = f"{title}: peak {max(held):.1f}, of our own buffers {max(buffers):.1f}"
        ax.set_title(peaks, color=ink(colour), fontweight="bold", fontsize=10)
    axes[-1].set_xlabel("allocations and releases of backward, one after the other")


def label_prices(ax, by_price: dict[str, tuple[float, float]]) -> None:
    """Chapter 8: name the first point of a line over prices, the lowest and the last."""
    colour, (start, *_, end) = COLOURS["remat"], by_price
    last = by_price[end]
    lowest = min(by_price, key=by_price.get)
    beside = last[0] < 1.1 * by_price[lowest][0]  # the last point is nearly above the lowest
    over = beside and by_price[lowest][1] > last[1]
    note(ax, start, by_price[start], (6, -3), colour, fontsize=8)
    note(ax, lowest, by_price[lowest], (-6, 1 if over else -5), colour, fontsize=8, ha="right")
    at, side = (-6 if beside else 6, -7 if over else -2), "right" if beside else "left"
    note(ax, end, last, at, colour, fontsize=8, ha=side)
