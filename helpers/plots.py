"""How the notebooks draw: one style, and figures that carry alt text."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
from IPython.display import Image, display

__all__ = ["COLOURS", "show", "style"]

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
