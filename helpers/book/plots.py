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

__all__ = [
    "COLOURS",
    "backward_step_by_step",
    "binary_unit",
    "ink",
    "kept_at_prices",
    "label_lines",
    "label_points",
    "matrices_of_algebra",
    "memory_by_stage",
    "memory_front",
    "memory_over_time",
    "show",
    "slab_strips",
    "spread",
    "style",
]

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


def binary_unit(nbytes: float) -> tuple[str, int, int]:
    """Name, bytes and decimals of the unit in which ``nbytes`` reads well: MiB, or GiB from 1 GiB on."""
    return ("GiB", 2**30, 2) if nbytes >= 2**30 else ("MiB", 2**20, 1)


def memory_over_time(axes, traces: dict, colours: dict, reference: tuple[str, float] | None = None) -> None:
    """Draw a `helpers.memory.MemoryTrace` in each of ``axes``, all on one scale.

    The two numbers are above the curve and the dashed line's label to its right, so no label hides a curve.
    Each step has the width of its panel: this is a picture of memory, and time depends on the machine.

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
    unit, size, digits = binary_unit(top)
    for ax, (title, trace) in zip(axes, traces.items(), strict=True):
        times, held = zip(*trace.timeline, strict=True)
        percent = 100 / times[-1]
        times = [percent * time for time in times]
        held = [b / size for b in held]
        ax.fill_between(times, held, step="post", color=colours[title], alpha=0.3, linewidth=0)
        ax.step(times, held, where="post", color=colours[title], linewidth=1.4)
        at, forward = percent * trace.mark_times["end of forward"], trace.marks["end of forward"] / size
        ax.axvline(at, color="#666666", linestyle=":", linewidth=1)
        ax.text(at, 1.36 * top / size, "forward ", ha="right", va="top", fontsize=9, color="#444444")
        ax.text(at, 1.36 * top / size, " backward", ha="left", va="top", fontsize=9, color="#444444")
        ax.plot(at, forward, "o", color="#222222", markersize=4)
        peak = trace.peak / size
        when = times[max(range(len(held)), key=held.__getitem__)]
        ax.plot(when, peak, "^", color="#222222", markersize=5)
        numbers = f"● end of forward {forward:,.{digits}f} {unit}   ▲ peak {peak:,.{digits}f} {unit}"
        ax.set_title(numbers, loc="right", fontsize=9, color="#222222")
        if reference or title != highest:
            label, level = reference or (f"peak,\n{highest}", traces[highest].peak)
            ax.axhline(level / size, color="#666666", linestyle="--", linewidth=1)
            place = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "fontsize": 9}
            ax.annotate(label, (1, level / size), (4, 0), va="center", annotation_clip=False, **place)
        ax.set_title(title, color=ink(colours[title]), fontweight="bold")
        ax.set(ylabel=unit, xlim=(0, 100), ylim=(0, 1.4 * top / size))
        ax.yaxis.set_major_formatter("{x:,.10g}")
        ax.label_outer()
    axes[-1].set_xlabel("time, % of the step")


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


def backward_step_by_step(axes, traces: dict, colours: list, unit: int) -> None:
    """Chapter 6: what is held after each allocation and release of backward, in units of ``unit`` bytes.

    Our own buffers are dark, the library's light. Changes of less than a fiftieth of a unit are left out.

    Args:
        traces: title -> trace whose rows have held, change, moment and own.
    """
    top = 1.25 * max(trace.peak for trace in traces.values()) / unit
    for ax, (title, trace), colour in zip(axes, traces.items(), colours, strict=True):
        shown, own = [], 0.0  # (held, own buffers, moment)
        for row in trace.rows:
            before, own = own, row.held / unit if row.own else own
            large = abs(row.change) > unit / 50 or abs(own - before) > 0.02
            if large and row.moment not in ("", "end"):
                shown.append((row.held / unit, own, row.moment))
        held, owns, moments = zip(*shown, strict=True)
        steps = range(len(shown))
        ax.fill_between(steps, held, step="post", color=colour, alpha=0.25, linewidth=0)
        ax.fill_between(steps, owns, step="post", color=colour, alpha=0.45, linewidth=0)
        ax.step(steps, held, where="post", color=colour, linewidth=1.2)
        for k in steps[1:]:
            if moments[k] != moments[k - 1]:
                ax.axvline(k - 0.5, color="#444444", linestyle=":", linewidth=1)
                place = {"textcoords": "offset points", "fontsize": 9, "va": "top"}
                ax.annotate(moments[k], (k - 0.5, 0.98 * top), (3, 0), **place)
        ax.set(xlim=(0, steps[-1]), ylim=(0, top), ylabel="buffers", xticks=[])
        peaks = f"{title}: peak {max(held):.1f}, of our own buffers {max(owns):.1f}"
        ax.set_title(peaks, color=ink(colour), fontweight="bold", fontsize=10)
    axes[-1].set_xlabel("allocations and releases of backward, one after the other")


def kept_at_prices(ax, title: str, tensors: dict[str, float], columns: dict[str, list[str]]) -> None:
    """Chapter 8: a row for each tensor, as high as it has channels; filled in the columns that keep it.

    Args:
        tensors: name -> channels, in the order of forward.
        columns: heading -> names of the tensors that are kept; the first is PyTorch, without a price.
    """
    total, top, centres = sum(tensors.values()), 0.0, []
    for name, channels in tensors.items():
        for i, kept in enumerate(columns.values()):
            fill = (COLOURS["remat"] if i else COLOURS["unfused"]) if name in kept else "white"
            look = {"facecolor": fill, "edgecolor": "#555555", "linewidth": 0.6}
            ax.add_patch(plt.Rectangle((i + 0.05, top), 0.9, channels, **look))
        centres.append(top + channels / 2)
        top += channels
    for name, height in zip(tensors, spread(centres, 0.04 * total), strict=True):
        ax.text(-0.1, height, name, ha="right", va="center", fontsize=8)
    for i, (heading, kept) in enumerate(columns.items()):
        below = sum(tensors[name] for name in kept)
        ax.text(i + 0.5, -0.015 * total, heading, ha="center", va="bottom", fontsize=8)
        ax.text(i + 0.5, 1.015 * total, f"{below:,}", ha="center", va="top", fontsize=8, fontweight="bold")
    ax.text(-0.1, 1.015 * total, "sum", ha="right", va="top", fontsize=8)
    ax.set(xlim=(-0.7, len(columns)), ylim=(1.09 * total, -0.08 * total))
    ax.set_title(title, fontsize=10)
    ax.axis("off")


def memory_front(ax, title: str, rows: list[dict], published: list[tuple[str, float, float]]) -> None:
    """Chapter 8: peak memory against step time. `remat` is a line over its prices, the others are points.

    Args:
        rows: of a record of bench, the unfused network first; a thin bar is the range of the rounds' ratios.
        published: (label, memory, time) of others, on other machines: hollow.
    """
    looks = {"unfused": ("s", "unfused"), "remat": ("o", "remat")}
    looks |= {"checkpoint": ("^", "checkpoint"), "compile": ("D", "tutorial")}
    labels, line = [], []
    for row in rows:
        kind, _, price = row["name"].partition(", ")
        marker, colour = looks[kind]
        memory, time = row["tensor_peak"] / rows[0]["tensor_peak"], row["time_ratio"]
        ax.plot([memory] * 2, row["time_range"], color=COLOURS[colour], linewidth=0.8, alpha=0.5)
        ax.plot(memory, time, marker, color=COLOURS[colour], markersize=5)
        if kind == "remat":
            line.append((memory, time, price))
        else:
            labels.append((row["name"].replace("unfused", "PyTorch"), memory, time, colour))
    ax.plot(*zip(*[at[:2] for at in line], strict=True), color=COLOURS["remat"], linewidth=1)
    ends = dict.fromkeys((line[0], min(line), line[-1]))
    labels = [(price, memory, time, "remat") for memory, time, price in ends] + labels
    for name, memory, time in published:
        ax.plot(memory, time, "o", markerfacecolor="white", color=COLOURS["other"], markersize=6)
        labels.append((name, memory, time, "other"))
    ax.axhline(1, color="#bbbbbb", linewidth=0.7, zorder=0)
    ax.set_title(title, fontsize=10)
    ax.set(xlim=(0, 1.12))
    ax.margins(y=0.12)
    label_points(ax, labels)


def label_points(ax, labels: list[tuple[str, float, float, str]]) -> None:
    """Write each (text, x, y, method) next to its point, where there is most room. Call it last."""
    ax.figure.draw_without_rendering()
    taken = [ax.transData.transform(at) for line in ax.get_lines() for at in line.get_xydata()]
    boxes, level = [], ax.transData.transform((1, 1))[1]  # of the line at a ratio of 1
    ways = [(7, 0, "left"), (-7, 0, "right"), (0, 9, "center"), (0, -9, "center")]
    ways += [(dx, dy, side) for dy in (9, -9) for dx, side in ((8, "left"), (-8, "right"))]
    ways += [(0, 18, "center"), (0, -18, "center")]
    for text, x, y, method in labels:
        best = None
        for dx, dy, side in ways:
            look = {"textcoords": "offset points", "fontsize": 8, "color": ink(COLOURS[method])}
            drawn = ax.annotate(text, (x, y), (dx, dy), ha=side, va="center", **look)
            box = drawn.get_window_extent()
            hits = sum(box.overlaps(other) for other in boxes) + 0.2 * sum(box.contains(*p) for p in taken)
            hits += 2 * (box.x0 < ax.bbox.x0 or box.x1 > ax.bbox.x1) + 0.3 * (box.y0 < level < box.y1)
            if best is None or hits < best[0]:
                if best is not None:
                    best[1].remove()
                best = hits, drawn, box
            else:
                drawn.remove()
        boxes.append(best[2])


def memory_by_stage(axes, steps: dict[str, tuple[list[tuple[str, int]], int]]) -> dict[str, dict[str, int]]:
    """Chapter 9: what one training step holds, stacked by name; one panel a step, all on one scale.

    Each name is written once, in the first panel or, of backward's own tensors, in the last, unless it is
    next to nothing there.

    Args:
        steps: title -> (the bytes that come and go, in order, each with its name; where backward starts).

    Returns:
        title -> name -> bytes at the moment of the peak.
    """
    names = dict.fromkeys(name for log, _ in steps.values() for name, _ in log)
    last = [name for name in ("vectors", "weight gradients", "backward") if name in names]
    names = [name for name in names if name not in last] + last
    shades = plt.get_cmap("viridis")([0.9 - 0.75 * i / max(1, len(names) - 4) for i in range(len(names))])
    own = {"vectors": "#999999", "weight gradients": "#444444", "backward": COLOURS["unfused"]}
    colours = [own.get(name, to_hex(shade)) for name, shade in zip(names, shades, strict=True)]
    curves, at_peak = {}, {}
    for title, (log, _) in steps.items():
        held, rows = dict.fromkeys(names, 0), []
        for name, nbytes in log:
            held[name] += nbytes
            rows.append(tuple(held.values()))
        top = max(rows, key=sum)
        at_peak[title] = {name: b for name, b in zip(names, top, strict=True) if b}
        curves[title] = [[b / 2**20 for b in column] for column in zip(*rows, strict=True)], rows.index(top)
    top = max(sum(parts.values()) for parts in at_peak.values()) / 2**20
    for ax, (title, (columns, peak)) in zip(axes, curves.items(), strict=True):
        ax.stackplot(range(len(columns[0])), columns, colors=colours, step="post", linewidth=0)
        height, start = sum(column[peak] for column in columns), steps[title][1]
        ax.axvline(start, color="#666666", linestyle=":", linewidth=1)
        ax.text(start, 1.45 * top, "forward ", ha="right", va="top", fontsize=9)
        ax.text(start, 1.45 * top, " backward", va="top", fontsize=9)
        ax.plot(peak, height, "v", color="#222222", markersize=5)
        note = {"textcoords": "offset points", "fontweight": "bold", "ha": "center"}
        ax.annotate(f"peak {height:,.0f} MiB", (peak, height), (0, 8), **note)
        ax.set(title=title, ylabel="MiB", xlim=(0, len(columns[0])), ylim=(0, 1.45 * top))
    axes[-1].set_xlabel("allocations and releases in the order of the step")
    for i, name in enumerate(names):  # once
        place = -1 if name == "backward" else 0
        ax, (columns, _) = axes[place], list(curves.values())[place]
        wide = [at for at, b in enumerate(columns[i]) if b > 0.97 * max(columns[i])]
        at = wide[len(wide) // 2]
        middle = sum(column[at] for column in columns[:i]) + columns[i][at] / 2
        if columns[i][at] > 0.08 * top and len(wide) > 0.1 * len(columns[i]):
            dark = luminance(colours[i]) < 0.3
            ax.text(
                at, middle, name, ha="center", va="center", fontsize=9, color="white" if dark else "black"
            )
        elif columns[i][at] > 0.01 * top:
            ha, offset = ("center", (0, 40)) if name == "weight gradients" else ("right", (-80, 24))
            note = {"textcoords": "offset points", "ha": ha, "fontsize": 9}
            ax.annotate(
                name, (at, middle), offset, arrowprops={"arrowstyle": "-", "color": "#333333"}, **note
            )
    return at_peak


def matrices_of_algebra(ax) -> None:
    """Chapter 10: the large matrices that the algebra reads, and the small ones that it makes of them."""
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
