"""How the notebooks draw: one style, and figures that carry alt text.

Write on the curves rather than in a legend: `label_lines`. A figure says the same on paper, in the dark and
to the colour-blind: it stands on white, a method has one colour everywhere, and colour alone tells nothing.
"""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
import PIL.Image
from IPython.display import Image, display
from matplotlib.colors import to_hex, to_rgb

__all__ = ["COLOURS", "binary_unit", "ink", "label_lines", "memory_over_time", "show", "spread", "style"]

# Okabe & Ito's colour-blind-safe palette; a method keeps its colour on every page.
COLOURS = {
    "unfused": "#D55E00",
    "tutorial": "#CC79A7",
    "checkpoint": "#999999",
    "whole batch": "#56B4E9",
    "fused": "#0072B2",
    "in place": "#009E73",
    "other": "#666666",
}

style = {
    "figure.figsize": (7.2, 3.2),
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.edgecolor": "#555555",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "legend.frameon": False,
    "savefig.bbox": "tight",
}
plt.rcParams.update(style)

DENSITY = 2  # pixels of a PNG for each pixel on the page: sharp on the screens of today, and on paper


def show(fig, alt: str) -> None:
    """Display `fig` as a PNG whose alt text is `alt`, then close it.

    The text travels in the output's metadata, where the HTML export and screen readers find it. The PNG has
    twice the pixels that it is shown with, and 256 colours at most: so it is sharp, and small all the same.
    """
    if not alt.strip():
        raise ValueError("alt must say in words what the figure shows, got an empty string")
    dpi = DENSITY * fig.dpi
    full, packed = io.BytesIO(), io.BytesIO()
    fig.savefig(full, format="png", dpi=dpi)
    plt.close(fig)
    with PIL.Image.open(full) as image:
        few = image.convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
    few.save(packed, format="png", optimize=True, dpi=(dpi, dpi))
    width, height = (size // DENSITY for size in few.size)
    display(Image(data=packed.getvalue(), format="png", width=width, height=height, alt=alt))


def luminance(colour: str) -> float:
    """Relative luminance by the Web Content Accessibility Guidelines, from 0 for black to 1 for white."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def ink(colour: str) -> str:
    """``colour``, darkened until text in it is legible on white (contrast 4.5, level AA)."""
    while 1.05 / (luminance(colour) + 0.05) < 4.5:
        colour = to_hex([0.95 * c for c in to_rgb(colour)])
    return colour


def spread(heights: list[float], gap: float) -> list[float]:
    """The heights nearest to the given ones (least squares) that keep their order and stay ``gap`` apart."""
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
    points = 72 / ax.figure.dpi
    at = [points * ax.transData.transform(end)[1] for end in ends]
    for line, end, was, is_now in zip(lines, ends, at, spread(at, 1.25 * fontsize), strict=True):
        ax.annotate(
            line.get_label(),
            end,
            (6, is_now - was),
            textcoords="offset points",
            va="center",
            fontsize=fontsize,
            color=ink(line.get_color()),
            annotation_clip=False,
        )


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
        reference: a label and a number of bytes to draw as a dashed line across all axes. Without one, the
            highest peak is drawn across the other axes.

    Raises:
        ValueError: a trace has no timeline or no such mark.
    """
    for title, trace in traces.items():
        if not trace.timeline or "end of forward" not in trace.marks:
            raise ValueError(f'traces: {title!r} needs a timeline and a mark "end of forward"')
    highest = max(traces, key=lambda title: traces[title].peak)
    top = max(traces[highest].peak, reference[1] if reference else 0)
    duration = max(trace.timeline[-1][0] for trace in traces.values())
    unit, size, digits = binary_unit(top)
    for ax, (title, trace) in zip(axes, traces.items(), strict=True):
        times, held = zip(*trace.timeline, strict=True)
        held = [b / size for b in held]
        ax.fill_between(times, held, step="post", color=colours[title], alpha=0.3, linewidth=0)
        ax.step(times, held, where="post", color=colours[title], linewidth=1.4)
        at, forward = trace.mark_times["end of forward"], trace.marks["end of forward"] / size
        ax.axvline(at, color="#666666", linestyle=":", linewidth=1)
        ax.text(at, 1.33 * top / size, "forward ", ha="right", va="top", fontsize=9, color="#444444")
        ax.text(at, 1.33 * top / size, " backward", ha="left", va="top", fontsize=9, color="#444444")
        ax.plot(at, forward, "o", color="#222222", markersize=4)
        ax.annotate(
            f"{forward:.{digits}f} {unit}",
            (at, forward),
            (-5, 5) if at > 0.2 * duration else (5, -12),
            textcoords="offset points",
            ha="right" if at > 0.2 * duration else "left",
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
            fontweight="bold",
            bbox=BEHIND_TEXT,
        )
        if reference or title != highest:
            label, level = reference or (f"peak, {highest}", traces[highest].peak)
            level /= size
            ax.axhline(level, color="#666666", linestyle="--", linewidth=1)
            ax.annotate(label, (duration, level), (0, 3), textcoords="offset points", ha="right", fontsize=9)
        ax.set_title(title, color=ink(colours[title]), fontweight="bold")
        ax.set(ylabel=unit, xlim=(0, 1.02 * duration), ylim=(0, 1.35 * top / size))
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.label_outer()
    axes[-1].set_xlabel("time in the step, ms")
