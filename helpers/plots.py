"""How the notebooks draw: one style, and figures that carry alt text."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
from IPython.display import Image, display

__all__ = ["COLOURS", "binary_unit", "memory_over_time", "show", "style"]

# Okabe & Ito's colour-blind-safe palette; a method keeps its colour on every page.
COLOURS = {
    "unfused": "#D55E00",
    "tutorial": "#CC79A7",
    "checkpoint": "#999999",
    "whole batch": "#56B4E9",
    "fused": "#0072B2",
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
        ax.text(at, 1.28 * top / size, "end of forward ", ha="right", va="top", fontsize=9)
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
