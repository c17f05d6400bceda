"""How the notebooks draw: one style, and figures that carry alt text.

Write on the curves rather than in a legend: `label_lines`. A figure says the same on paper, in the dark and
to the colour-blind: it stands on white, a method has one colour everywhere, and colour alone tells nothing.
"""

from __future__ import annotations

import io
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from IPython.display import Image, display
from matplotlib.colors import to_hex, to_rgb

# Okabe & Ito's colour-blind-safe palette; a method keeps its colour on every page.
COLOURS = {
    "unfused": "#D55E00",
    "tutorial": "#CC79A7",
    "checkpoint": "#999999",
    "whole batch": "#56B4E9",
    "fused": "#0072B2",
    "remat": "#009E73",
    "in-place norm": "#E69F00",
    "algebra": "#000000",
    "other": "#666666",
}
# Tensors are filled with light colours, which black text can be read on.
FILLS = {"x": "#dddddd", "dz": "#b5d3e7", "y": "#f0b48a", "dx": "#7fc4a5", "": "white"}
LINE = "#333333"
MIB = 2**20

plt.rcParams.update({
    "figure.figsize": (7.2, 3.2), "figure.dpi": 100, "figure.facecolor": "white", "savefig.bbox": "tight",
    "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555555",
    "xtick.color": "#555555", "ytick.color": "#555555",
    "xtick.labelcolor": "#222222", "ytick.labelcolor": "#222222",
})  # fmt: skip
DENSITY = 2  # pixels of a PNG for each pixel on the page: sharp on the screens of today, and on paper


def show(fig, alt: str) -> None:
    """Display `fig` as a PNG whose alt text is `alt`, then close it.

    The text travels in the output's metadata, where the HTML export and screen readers find it. The PNG has
    twice the pixels that it is shown with, and 256 colours at most: so it is sharp, and small all the same.
    """
    if not alt.strip():
        raise ValueError("alt must say in words what the figure shows, got an empty string")
    dpi, full, packed = DENSITY * fig.dpi, io.BytesIO(), io.BytesIO()
    fig.savefig(full, format="png", dpi=dpi)
    plt.close(fig)
    with PIL.Image.open(full) as image:
        few = image.convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
    few.save(packed, format="png", optimize=True, dpi=(dpi, dpi))
    width, height = (size // DENSITY for size in few.size)
    display(Image(data=packed.getvalue(), format="png", width=width, height=height, alt=alt))


def luminance(colour) -> float:
    """Relative luminance by the Web Content Accessibility Guidelines, from 0 for black to 1 for white."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def ink(colour: str) -> str:
    """``colour``, darkened until text in it is legible on white (contrast 4.5, level AA)."""
    while 1.05 / (luminance(colour) + 0.05) < 4.5:
        colour = to_hex([0.95 * c for c in to_rgb(colour)])
    return colour


def spread(heights: list[float], gap: float) -> list[float]:
    """The heights nearest to the given ones (least squares) that keep their order and are ``gap`` apart."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    piles: list[tuple[float, int]] = []  # labels that touch: the mean of what they want, and how many
    for k, i in enumerate(order):
        mean, count = heights[i] - k * gap, 1
        while piles and piles[-1][0] > mean:
            below, n = piles.pop()
            mean, count = (below * n + mean * count) / (n + count), n + count
        piles.append((mean, count))
    found = [mean for mean, count in piles for _ in range(count)]
    return [height for _, height in sorted((i, found[k] + k * gap) for k, i in enumerate(order))]


def label_lines(ax, fontsize: float = 9) -> None:
    """Write the label of each line of ``ax`` at its right end, in its colour: no legend to look up.

    Call it last, when the limits are set. Labels that would touch are moved apart.
    """
    ax.figure.draw_without_rendering()  # the layout is settled
    lines = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in lines]
    at = [72 / ax.figure.dpi * ax.transData.transform(end)[1] for end in ends]  # in points
    for line, end, was, is_now in zip(lines, ends, at, spread(at, 1.25 * fontsize), strict=True):
        note(ax, line.get_label(), end, (6, is_now - was), line.get_color(), va="center", fontsize=fontsize)


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


def passes(ax, at: float, height: float) -> None:
    """A dotted line where forward ends and backward begins."""
    ax.axvline(at, color="#666666", linestyle=":", linewidth=1)
    ax.text(at, height, "forward ", ha="right", va="top", fontsize=9, color="#444444")
    ax.text(at, height, " backward", ha="left", va="top", fontsize=9, color="#444444")


def memory_over_time(axes, traces: dict, colours: dict, reference: tuple[str, float] | None = None) -> None:
    """Draw a `helpers.memory.MemoryTrace` in each of ``axes``, all on one scale.

    The two numbers are above the curve and the dashed line's label to its right, so no label hides a curve.
    Each step has the width of its panel: this is a picture of memory, and time depends on the machine.

    ``traces``: title -> trace with a timeline and a mark "end of forward".
    ``reference`` is a label and a number of bytes to draw as a dashed line across all axes. Without one, the
    highest peak is drawn across the other axes.
    """
    highest = max(traces, key=lambda title: traces[title].peak)
    label, level = reference or (f"peak,\n{highest}", traces[highest].peak)
    top, level = max(level, traces[highest].peak) / MIB, level / MIB
    for ax, (title, trace) in zip(axes, traces.items(), strict=True):
        times, held = np.array(trace.timeline).T
        times, held, forward = 100 * times / times[-1], held / MIB, trace.marks["end of forward"] / MIB
        at = 100 * trace.mark_times["end of forward"] / trace.timeline[-1][0]
        ax.fill_between(times, held, step="post", color=colours[title], alpha=0.3, linewidth=0)
        ax.step(times, held, where="post", color=colours[title], linewidth=1.4)
        passes(ax, at, 1.36 * top)
        ax.plot(at, forward, "o", color="#222222", markersize=4)
        ax.plot(times[held.argmax()], trace.peak / MIB, "^", color="#222222", markersize=5)
        numbers = f"● end of forward {forward:,.1f} MiB   ▲ peak {trace.peak / MIB:,.1f} MiB"
        ax.set_title(numbers, loc="right", fontsize=9, color="#222222")
        if reference or title != highest:
            ax.axhline(level, color="#666666", linestyle="--", linewidth=1)
            note(ax, label, (1, level), (4, 0), xycoords=ax.get_yaxis_transform(), va="center")
        ax.set_title(title, color=ink(colours[title]), fontweight="bold")
        ax.set(ylabel="MiB", xlim=(0, 100), ylim=(0, 1.4 * top))
        ax.yaxis.set_major_formatter("{x:,.10g}")
        ax.label_outer()
    axes[-1].set_xlabel("time, % of the step")


# Drawings and charts of single pages: what they show matters to a reader, how they are drawn does not -------


def slab_strips(ax, frames: list[tuple[str, list[str], int | None, str]]) -> None:
    """Chapter 6: x, dz and dx as strips of slabs, a picture for each of ``frames``.

    A frame is (title, what each slab of dx holds, the slab that is worked on or None, a line below).
    """
    for column, (title, cells, active, below) in enumerate(frames):
        left = 7.2 * column
        ax.text(left, 5.2, title, fontweight="bold")
        ax.text(left, -0.1, below, fontsize=9)
        for bottom, name, held in ((3.6, "x", ["x"] * 5), (2.2, "dz", ["dz"] * 5), (0.8, "dx", cells)):
            ax.text(left - 0.25, bottom + 0.5, name, ha="right", va="center")
            for k, what in enumerate(held):
                look = {"linewidth": 2.4, "zorder": 3} if k == active else {"linewidth": 0.8, "zorder": 2}
                text = what if name == "dx" else ""
                box(ax, left + k, bottom, 1, 1, text, facecolor=FILLS[what], **look)
    ax.set(xlim=(-1.1, 7.2 * len(frames) - 1.8), ylim=(-0.5, 6), aspect="equal")
    ax.axis("off")


def backward_step_by_step(axes, traces: dict, colours: list, unit: int) -> None:
    """Chapter 6: what is held after each allocation and release of backward, in units of ``unit`` bytes.

    Our own buffers are dark, the library's light. Changes of less than a fiftieth of a unit are left out.
    ``traces``: title -> trace whose rows have held, change, moment and own.
    """
    top = 1.25 * max(trace.peak for trace in traces.values()) / unit
    for ax, (title, trace), colour in zip(axes, traces.items(), colours, strict=True):
        shown, own = [], 0.0  # (held, own buffers, moment)
        for row in trace.rows:
            before, own = own, row.held / unit if row.own else own
            if max(abs(row.change) / unit, abs(own - before)) > 0.02 and row.moment not in ("", "end"):
                shown.append((row.held / unit, own, row.moment))
        held, owns, moments = zip(*shown, strict=True)
        steps = range(len(shown))
        for values, alpha in ((held, 0.25), (owns, 0.45)):
            ax.fill_between(steps, values, step="post", color=colour, alpha=alpha, linewidth=0)
        ax.step(steps, held, where="post", color=colour, linewidth=1.2)
        for k in steps[1:]:
            if moments[k] != moments[k - 1]:
                ax.axvline(k - 0.5, color="#444444", linestyle=":", linewidth=1)
                note(ax, moments[k], (k - 0.5, 0.98 * top), (3, 0), va="top")
        ax.set(xlim=(0, steps[-1]), ylim=(0, top), ylabel="buffers", xticks=[])
        peaks = f"{title}: peak {max(held):.1f}, of our own buffers {max(owns):.1f}"
        ax.set_title(peaks, color=ink(colour), fontweight="bold", fontsize=10)
    axes[-1].set_xlabel("allocations and releases of backward, one after the other")


def kept_at_prices(ax, title: str, tensors: dict[str, float], columns: dict[str, list[str]]) -> None:
    """Chapter 8: a row for each tensor, as high as it has channels; filled in the columns that keep it.

    ``tensors``: name -> channels, in the order of forward. ``columns``: heading -> names of those kept;
    the first is PyTorch, without a price.
    """
    total = sum(tensors.values())
    tops = np.cumsum([0, *tensors.values()])
    small = {"va": "center", "fontsize": 8}
    for i, (heading, kept) in enumerate(columns.items()):
        for (name, channels), top in zip(tensors.items(), tops, strict=False):
            fill = COLOURS["remat" if i else "unfused"] if name in kept else "white"
            box(ax, i + 0.05, top, 0.9, channels, facecolor=fill, edgecolor="#555555", linewidth=0.6)
        ax.text(i + 0.5, -0.035 * total, heading, ha="center", **small)
        below = f"{sum(tensors[name] for name in kept):,}"
        ax.text(i + 0.5, 1.035 * total, below, ha="center", fontweight="bold", **small)
    for name, height in zip(tensors, spread(list((tops[:-1] + tops[1:]) / 2), 0.04 * total), strict=True):
        ax.text(-0.1, height, name, ha="right", **small)
    ax.text(-0.1, 1.035 * total, "sum", ha="right", **small)
    ax.set(xlim=(-0.7, len(columns)), ylim=(1.09 * total, -0.08 * total))
    ax.set_title(title, fontsize=10)
    ax.axis("off")


def memory_front(ax, title: str, rows: list[dict], published: list[tuple[str, float, float]]) -> None:
    """Chapter 8: peak memory against step time. `remat` is a line over its prices, the others are points.

    ``rows`` are of a record of bench, the unfused network first; a thin bar is the rounds' range.
    ``published``: (label, memory, time) of others, on other machines: hollow.
    """
    markers = {"unfused": "s", "remat": "o", "checkpoint": "^", "compile": "D"}
    labels, line = [], []
    for row in rows:
        kind, _, price = row["name"].partition(", ")
        colour = COLOURS["tutorial" if kind == "compile" else kind]
        at = row["tensor_peak"] / rows[0]["tensor_peak"], row["time_ratio"]
        ax.plot([at[0]] * 2, row["time_range"], color=colour, linewidth=0.8, alpha=0.5)
        ax.plot(*at, markers[kind], color=colour, markersize=5)
        if kind == "remat":
            line.append((at, price))
        else:
            labels.append((row["name"].replace("unfused", "PyTorch"), at, colour))
    ax.plot(*zip(*[at for at, _ in line], strict=True), color=COLOURS["remat"], linewidth=1)
    ends = dict.fromkeys((line[0], min(line), line[-1]))
    labels = [(price, at, COLOURS["remat"]) for at, price in ends] + labels
    for name, *at in published:
        ax.plot(*at, "o", markerfacecolor="white", color=COLOURS["other"], markersize=6)
        labels.append((name, at, COLOURS["other"]))
    ax.axhline(1, color="#bbbbbb", linewidth=0.7, zorder=0)
    ax.set_title(title, fontsize=10)
    ax.set(xlim=(0, 1.12))
    ax.margins(y=0.12)
    label_points(ax, labels)


def label_points(ax, labels: list[tuple[str, tuple[float, float], str]]) -> None:
    """Write each (text, point, colour) where it covers least; from afar a thin line leads there."""
    ax.figure.draw_without_rendering()
    paths = [line.get_transform().transform_path(line.get_path()) for line in ax.get_lines()]
    taken = np.concatenate([path.interpolated(50).vertices for path in paths])
    boxes, pixels = [], ax.figure.dpi / 72
    for text, at, colour in labels:
        leader = {"arrowstyle": "-", "color": ink(colour), "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        label = note(ax, text, at, (0, 0), colour, fontsize=8, ha="center", va="center", arrowprops=leader)
        size, places = label.get_window_extent(), []
        for distance, angle in product((7, 12, 18, 26, 36), np.arange(0, 2 * np.pi, np.pi / 8)):
            way = np.array((np.cos(angle), np.sin(angle)))
            shift = way * (distance + np.array((size.width, size.height)) / pixels / 2)
            there = size.translated(*(pixels * shift)).padded(1)
            hits = 3 * ((taken > there.min) & (taken < there.max)).all(1).sum() + distance / 4
            outside = sum(not ax.bbox.containsx(x) for x in (there.x0 - 6, there.x1))  # clear of the axis
            hits += 99 * (sum(map(there.overlaps, boxes)) + outside)
            places.append((hits, shift, there, distance > 12))
        _, shift, there, is_far = min(places, key=lambda place: place[0])
        label.set_position(shift)
        label.arrow_patch.set_visible(is_far)
        boxes.append(there)


def memory_by_stage(axes, steps: dict[str, tuple[list[tuple[str, int]], int]]) -> dict[str, dict[str, int]]:
    """Chapter 9: what one training step holds, stacked by name; one panel a step, all on one scale.

    ``steps``: title -> (the bytes that come and go, in order, each with its name; where backward starts).
    Returns title -> name -> bytes at the moment of the peak.
    """
    own = {"vectors": "#999999", "weight gradients": "#444444", "backward": COLOURS["unfused"]}
    names = list(dict.fromkeys(name for log, _ in steps.values() for name, _ in log))
    stages = [name for name in names if name not in own]
    colours = dict(zip(stages, plt.get_cmap("viridis")(np.linspace(0.9, 0.15, len(stages))), strict=True))
    colours |= {name: colour for name, colour in own.items() if name in names}
    curves = {  # of each name, in the order in which they are stacked
        title: np.cumsum([[nbytes * (of == name) for of, nbytes in log] for name in colours], axis=1)
        for title, (log, _) in steps.items()
    }
    top, at_peak = 1.45 * max(curve.sum(0).max() for curve in curves.values()) / MIB, {}
    for ax, (title, (log, start)) in zip(axes, steps.items(), strict=True):
        curve, peak = curves[title] / MIB, curves[title].sum(0).argmax()
        parts = zip(colours, curves[title][:, peak].tolist(), strict=True)
        at_peak[title] = {name: held for name, held in parts if held}
        look = {"colors": list(colours.values()), "step": "post", "linewidth": 0}
        drawn = ax.stackplot(range(len(log)), curve, labels=colours, **look)
        passes(ax, start, top)
        height = curve[:, peak].sum()
        ax.plot(peak, height, "v", color="#222222", markersize=5)
        look = {"fontweight": "bold", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
        note(ax, f"peak {height:,.0f} MiB", (peak, height), (0, 8), ha="center", **look)
        ax.set(title=title, ylabel="MiB", xlim=(0, len(log)), ylim=(0, top))
    axes[0].legend(drawn[::-1], [*colours][::-1], fontsize=8, loc="upper right", labelspacing=0.2)
    axes[-1].set_xlabel("allocations and releases in the order of the step")
    return at_peak


def matrices_of_algebra(ax) -> None:
    """Chapter 10: the large matrices that the algebra reads, and the small ones that it makes of them."""
    rows = (  # bottom, height, the rows' name, what is large and what is small
        (2.1, 1.2, "$C_{out}$", "dz", "G", "G = dz x̃ᵀ"),
        (0.9, 0.5, "$C_{in}$", "x̃", "R", "R = x̃ x̃ᵀ"),
        (-0.8, 1.2, "$C_{out}$", "y and dy: never made", "W", "y − μ = W x̃"),
    )
    for bottom, height, count, long, short, meaning in rows:
        never, middle = short == "W", bottom + height / 2
        look = {"linestyle": "--", "edgecolor": "#999999"} if never else {}
        box(ax, 0, bottom, 5, height, long, facecolor="white" if never else FILLS["y"], **look)
        box(ax, 6.6, bottom, 0.5, height, short, facecolor="#cfe3f2")
        ax.text(7.25, middle, meaning, va="center")
        ax.text(-0.1, middle, count, ha="right", va="center")
        if not never:
            arrow(ax, (5.1, middle), (6.5, middle))
            ax.text(5.8, middle + 0.08, "times x̃ᵀ", ha="center", fontsize=9)
    ax.text(2.5, 3.4, "m pixels", ha="center", va="bottom")
    ax.set(xlim=(-0.7, 9), ylim=(-0.95, 3.75))
    ax.axis("off")
