"""How the notebooks draw: one style, and figures that carry alt text."""

from __future__ import annotations

import io
import math

import matplotlib.pyplot as plt
from IPython.display import Image, display

__all__ = [
    "COLOURS",
    "backward_over_time",
    "binary_unit",
    "box_chain",
    "heat_map",
    "matrices_of_algebra",
    "memory_against_time",
    "memory_over_time",
    "show",
    "slab_strips",
    "style",
]

# Okabe & Ito's colour-blind-safe palette; a method keeps its colour on every page.
COLOURS = {
    "unfused": "#D55E00",
    "tutorial": "#CC79A7",
    "checkpoint": "#999999",
    "whole batch": "#56B4E9",
    "fused": "#0072B2",
    "norm-act-conv": "#009E73",
    "in-place norm": "#E69F00",
    "algebra": "#000000",
    "other": "#666666",
}

style = {
    "figure.figsize": (7.2, 3.2),
    "figure.dpi": 100,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "legend.frameon": False,
    "savefig.bbox": "tight",
}
plt.rcParams.update(style)


def show(fig, alt: str) -> None:
    """Display `fig` as a PNG whose alt text is `alt`, then close it.

    The text travels in the output's metadata, where the HTML export and screen readers find it.
    """
    if not alt.strip():
        raise ValueError("alt must say in words what the figure shows, got an empty string")
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(fig)
    display(Image(data=buffer.getvalue(), format="png", alt=alt))


BEHIND_TEXT = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}


def binary_unit(nbytes: float) -> tuple[str, int, int]:
    """Name, bytes and decimals of the unit in which ``nbytes`` reads well: MiB, or GiB from 1 GiB on."""
    return ("GiB", 2**30, 2) if nbytes >= 2**30 else ("MiB", 2**20, 1)


def memory_over_time(axes, traces: dict, colours: dict, reference: tuple[str, float] | None = None) -> None:
    """Draw a `helpers.memory.MemoryTrace` in each of ``axes``, all on one scale, with labels on the curves.

    Args:
        axes: as many axes as traces, one above the other.
        traces: title -> trace with a timeline and a mark "end of forward".
        colours: title -> colour.
        reference: a label and a number of bytes to draw as a dashed line across all axes.

    Raises:
        ValueError: a trace has no timeline or no such mark.
    """
    for title, trace in traces.items():
        if not trace.timeline or "end of forward" not in trace.marks:
            raise ValueError(f'traces: {title!r} needs a timeline and a mark "end of forward"')
    top = max([trace.peak for trace in traces.values()] + ([reference[1]] if reference else []))
    duration = max(trace.timeline[-1][0] for trace in traces.values())
    unit, size, digits = binary_unit(top)
    for ax, (title, trace) in zip(axes, traces.items(), strict=True):
        times, held = zip(*trace.timeline, strict=True)
        held = [b / size for b in held]
        ax.fill_between(times, held, step="post", color=colours[title], alpha=0.3, linewidth=0)
        ax.step(times, held, where="post", color=colours[title], linewidth=1.2)
        at, forward = trace.mark_times["end of forward"], trace.marks["end of forward"] / size
        ax.axvline(at, color="#444444", linestyle=":", linewidth=1)
        side = "left" if at < 0.2 * duration else "right"
        ax.text(at, 1.28 * top / size, " end of forward ", ha=side, va="top", fontsize=9)
        ax.plot(at, forward, "o", color="#222222", markersize=4)
        ax.annotate(
            f"{forward:.{digits}f} {unit}",
            (at, forward),
            (-5, 5),
            textcoords="offset points",
            ha="right",
            bbox=BEHIND_TEXT,
        )
        peak = trace.peak / size
        when = times[max(range(len(held)), key=held.__getitem__)]
        ax.plot(when, peak, "^", color="#222222", markersize=4)
        ax.annotate(
            f"peak {peak:.{digits}f} {unit}",
            (when, peak),
            (4, 5),
            textcoords="offset points",
            bbox=BEHIND_TEXT,
        )
        if reference:
            label, level = reference[0], reference[1] / size
            ax.axhline(level, color="#444444", linestyle="--", linewidth=1)
            ax.annotate(label, (0, level), (4, 3), textcoords="offset points", fontsize=9)
        ax.set_title(title, color=colours[title], fontweight="bold")
        ax.set(ylabel=unit, xlim=(0, 1.02 * duration), ylim=(0, 1.3 * top / size))
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.label_outer()
    axes[-1].set_xlabel("time in the step, ms")


# Drawings and charts of single pages: what they show matters to a reader, how they are drawn does not -------


def slab_strips(ax, frames: list[tuple[str, list[str], int | None, str]]) -> None:
    """Chapter 6: x, dz and dx as strips of slabs, a picture for each of ``frames``.

    A frame is (title, what each slab of dx holds, the slab that is worked on or None, a line below).
    """
    fill = {"x": "#dddddd", "dz": "#b5d3e7", "y": "#f0b48a", "dx": "#7fc4a5", "": "white"}
    for column, (title, cells, active, below) in enumerate(frames):
        left = 7.2 * column
        ax.text(left, 5.2, title, fontweight="bold")
        ax.text(left, -0.1, below, fontsize=9)
        for top, name, held in ((3.6, "x", ["x"] * 5), (2.2, "dz", ["dz"] * 5), (0.8, "dx", cells)):
            ax.text(left - 0.25, top + 0.5, name, ha="right", va="center")
            for k, what in enumerate(held):
                line = {"linewidth": 2.4, "zorder": 3} if k == active else {"linewidth": 0.8, "zorder": 2}
                rectangle = plt.Rectangle((left + k, top), 1, 1, facecolor=fill[what], **line)
                ax.add_patch(rectangle).set_edgecolor("#222222")
                text = what if name == "dx" else ""
                ax.text(left + k + 0.5, top + 0.5, text, ha="center", va="center", zorder=4)
    ax.set(xlim=(-1.1, 7.2 * len(frames) - 1.8), ylim=(-0.5, 6), aspect="equal")
    ax.axis("off")


def backward_over_time(axes, traces: dict, colours: dict, unit: int) -> None:
    """Chapter 6: what backward holds, in units of ``unit`` bytes; our own buffers dark, the library's light.

    Args:
        traces: title -> trace with marks "end of forward" and "end", and rows with ms, held and own.
    """
    top = 1.25 * max(trace.peak for trace in traces.values()) / unit
    longest = max(t.mark_times["end"] - t.mark_times["end of forward"] for t in traces.values())
    for ax, (title, trace) in zip(axes, traces.items(), strict=True):
        zero, colour, own = trace.mark_times["end of forward"], colours[title], []
        times, held = zip(*[(row.ms - zero, row.held / unit) for row in trace.rows], strict=True)
        for row in trace.rows:
            own.append(row.held / unit if row.own else own[-1] if own else 0)
        ax.fill_between(times, held, step="post", color=colour, alpha=0.25, linewidth=0)
        ax.fill_between(times, own, step="post", color=colour, alpha=0.45, linewidth=0)
        ax.step(times, held, where="post", color=colour, linewidth=1.2)
        for name, start in trace.mark_times.items():
            if name not in ("end of forward", "end"):
                ax.axvline(start - zero, color="#444444", linestyle=":", linewidth=1)
                beside = {"textcoords": "offset points", "fontsize": 9, "va": "top", "rotation": 90}
                ax.annotate(name, (start - zero, 0.97 * top), (3, 0), **beside)
        peak = max(range(len(held)), key=held.__getitem__)
        ax.plot(times[peak], held[peak], "^", color="#222222", markersize=5)
        ax.annotate(f"peak {held[peak]:.1f}", (times[peak], held[peak]), (6, 2), textcoords="offset points")
        ax.set(xlim=(0, 1.03 * longest), ylim=(0, top), ylabel="buffers")
        ax.set_title(title, color=colour, fontweight="bold")
        ax.label_outer()
    axes[-1].set_xlabel("time in backward, ms")


def box_chain(ax, title: str, names: list[str], steps: list[str], kept: str, brackets: list, colour) -> None:
    """Chapter 7: tensors as boxes, operations as arrows; those ``kept`` are shaded, functions bracketed."""
    ax.set(xlim=(-0.6, len(names) - 0.4), ylim=(-0.75, 0.6))
    ax.set_title(title, fontsize=10)
    ax.axis("off")
    for i, name in enumerate(names):
        fill = "#f0b48a" if name in kept else "white"
        look = {"boxstyle": "square,pad=0.35", "facecolor": fill, "edgecolor": "#333333"}
        ax.text(i, 0, name, ha="center", va="center", bbox=look)
    for i, step in enumerate(steps):
        ax.annotate("", (i + 0.78, 0), (i + 0.22, 0), arrowprops={"arrowstyle": "-|>", "color": "#333333"})
        ax.text(i + 0.5, 0.12, step, ha="center", va="bottom", fontsize=8)
    for start, end in brackets:
        ax.plot([start, start, end, end], [-0.45, -0.55, -0.55, -0.45], color=colour, linewidth=2)


def memory_against_time(ax, points: dict[str, tuple[float, float]], colours: dict) -> list[str]:
    """Chapter 7: each method as a point, with its name beside it; the frontier dashed, its names bold.

    Args:
        points: name -> (memory, time), both as ratios.

    Returns:
        The names on the frontier: no other method has less memory and less time at once.
    """
    best = sorted(
        (
            name
            for name, (m, t) in points.items()
            if not any(a <= m and b <= t and (a, b) != (m, t) for a, b in points.values())
        ),
        key=points.__getitem__,
    )
    line = zip(*(points[name] for name in best), strict=True)
    ax.plot(*line, color="#333333", linewidth=1, linestyle="--", zorder=1)
    times = [time for _, time in points.values()]
    gap, height = (max(times) - min(times)) / 16, -1.0
    for name in sorted(points, key=lambda name: points[name][1]):
        (memory, time), colour = points[name], colours[name]
        height = max(time, height + gap)  # labels keep their distance
        ax.plot(memory, time, "o", markersize=8, color=colour)
        ax.plot([memory, 1.06, 1.08], [time, height, height], color="#bbbbbb", linewidth=0.6, zorder=0)
        ax.text(1.09, height, name, va="center", fontsize=9, fontweight="bold" if name in best else None)
    ax.set(xlabel="peak memory, ratio to unfused", ylabel="step time, ratio to unfused", xlim=(0, 1.08))
    return best


def matrices_of_algebra(ax) -> None:
    """Chapter 8: the large matrices that the algebra reads, and the small ones that stand for them."""
    small, large, middle = "#cfe3f2", "#f0b48a", {"ha": "center", "va": "center"}
    rows = (  # bottom, height, the rows' name, what is large and what is small
        (2.1, 1.2, "$C_{out}$", "dz", "G", "G = dz x̃ᵀ"),
        (0.9, 0.5, "$C_{in}$", "x̃", "R", "R = x̃ x̃ᵀ"),
        (-0.8, 1.2, "$C_{out}$", "y and dy: never made", "W", "y − μ = W x̃"),
    )
    for bottom, height, count, long, short, meaning in rows:
        line = {"linestyle": "--", "edgecolor": "#999999"} if short == "W" else {"edgecolor": "#333333"}
        fill = "white" if short == "W" else large
        ax.add_patch(plt.Rectangle((0, bottom), 5, height, facecolor=fill, **line))
        ax.add_patch(plt.Rectangle((6.6, bottom), 0.5, height, facecolor=small, edgecolor="#333333"))
        ax.text(2.5, bottom + height / 2, long, **middle)
        ax.text(6.85, bottom + height / 2, short, **middle)
        ax.text(7.25, bottom + height / 2, meaning, va="center")
        ax.text(-0.1, bottom + height / 2, count, ha="right", va="center")
        if short != "W":
            arrow = {"arrowstyle": "-|>", "color": "#333333"}
            ax.annotate("", (6.5, bottom + height / 2), (5.1, bottom + height / 2), arrowprops=arrow)
            ax.text(5.8, bottom + height / 2 + 0.08, "times x̃ᵀ", ha="center", fontsize=9)
    ax.text(2.5, 3.4, "m pixels", ha="center", va="bottom")
    ax.set(xlim=(-0.7, 9), ylim=(-0.95, 3.75))
    ax.axis("off")


def heat_map(ax, values: list[list[float]], rows: list[int], columns: list[int], dots: list[list]) -> None:
    """Chapter 8: ratios as colours on a logarithmic scale, white at 1; numbers, and dots where told."""
    ax.imshow([[math.log2(v) for v in row] for row in values], "RdBu_r", aspect="auto", vmin=-1.5, vmax=1.5)
    for i, row in enumerate(values):
        for k, value in enumerate(row):
            colour, dot = "black" if 0.5 < value < 2 else "white", " ●" if dots[i][k] else ""
            ax.text(k, i, f"{value:.2f}{dot}", ha="center", va="center", fontsize=8, color=colour)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.set(xlabel="output channels", ylabel="input channels")
    ax.spines[:].set_visible(False)
