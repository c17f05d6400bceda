"""How figures are drawn: legible, sharp, small, and on one scale."""

import base64
import io
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from helpers.book import plots, stages
from helpers.book.drawings import HUES


@pytest.fixture
def shown(monkeypatch):
    """What `show` displays."""
    found = []
    monkeypatch.setattr(plots, "display", found.append)
    return found


def test_show(shown):
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.plot([0, 1], [0, 1], color=plots.COLOURS["fused"])
    plots.show(fig, "a line that rises")
    data, metadata = shown[0]._repr_mimebundle_()
    png = data["image/png"]
    with PIL.Image.open(io.BytesIO(base64.b64decode(png) if isinstance(png, str) else png)) as image:
        assert image.mode == "P"  # no more than 256 colours
        assert (image.width // 2, image.height // 2) == (
            metadata["image/png"]["width"],
            metadata["image/png"]["height"],
        )
        assert image.info["dpi"][0] == pytest.approx(200, abs=1)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels[0] == 255).all()  # opaque, and white
    blue = [0x00, 0x72, 0xB2]
    assert (abs(pixels.astype(int) - blue).max(1) <= 4).any()
    assert metadata["image/png"]["alt"] == "a line that rises"
    assert not plt.fignum_exists(fig.number)
    with pytest.raises(ValueError, match="alt must say"):
        plots.show(fig, "  ")


def contrast(colour):
    """Against white, by the Web Content Accessibility Guidelines."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return 1.05 / (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05)


def test_ink_is_legible():
    assert contrast("#ffffff") == pytest.approx(1) and contrast("#000000") == pytest.approx(21)
    assert contrast(plots.COLOURS["tutorial"]) < 4.5  # there is something to do
    for colour in (*plots.COLOURS.values(), *HUES):
        assert contrast(plots.ink(colour)) >= 4.5


def test_every_method_has_a_colour_of_its_own():
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)


@given(st.lists(st.floats(-100, 100), max_size=12), st.floats(0.1, 30))
def test_spread(heights, gap):
    found = plots.spread(heights, gap)
    order = sorted(range(len(heights)), key=heights.__getitem__)
    steps = [found[b] - found[a] for a, b in zip(order, order[1:], strict=False)]
    assert all(step >= gap - 1e-9 for step in steps)
    mirrored = plots.spread([-height for height in heights], gap)
    assert sorted(-mirrored) == pytest.approx(sorted(found), abs=1e-6)  # as far up as down
    apart = all(heights[b] - heights[a] >= gap for a, b in zip(order, order[1:], strict=False))
    assert not apart or found == pytest.approx(heights)


def test_labels_stand_at_the_ends_of_lines():
    fig, ax = plt.subplots()
    for label, end in (("low", 1), ("high", 3), ("higher", 3.01), ("_not this", 2)):
        ax.plot([0, 1], [0, end], label=label)
    plots.label_lines(ax)
    fig.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in ax.texts}
    assert set(boxes) == {"low", "high", "higher"}
    assert boxes["low"].y1 < boxes["high"].y0 + 1 and boxes["high"].y1 <= boxes["higher"].y0 + 1
    assert all(box.x0 > ax.transData.transform((1, 0))[0] for box in boxes.values())
    assert [text.get_color() for text in ax.texts] == [plots.ink(line.get_color()) for line in ax.lines[:3]]
    plt.close(fig)


def trace(peak):
    timeline = [(0.0, 0), (1.0, peak // 2), (2.0, peak), (3.0, 0)]
    marks, mark_times = {"end of forward": peak // 2}, {"end of forward": 1.5}
    return SimpleNamespace(timeline=timeline, peak=peak, marks=marks, mark_times=mark_times)


def test_memory_over_time():
    """On one scale, with the reference across both, and no label lies on a curve."""
    fig, axes = plt.subplots(2, 1)
    traces = {"fused": trace(100 * 2**20), "unfused": trace(200 * 2**20)}
    plots.memory_over_time(axes, traces, plots.COLOURS, reference=("limit", 300 * 2**20))
    assert axes[0].get_ylim() == axes[1].get_ylim() and axes[0].get_xlim() == axes[1].get_xlim()
    texts = [[text.get_text().strip() for text in ax.texts] for ax in axes]
    assert [set(found) for found in texts] == [{"limit", "backward"}] * 2
    assert axes[0].get_title("right") == "● end of forward 50.0 MiB   ▲ peak 100.0 MiB"
    assert axes[1].get_title("right") == "● end of forward 100.0 MiB   ▲ peak 200.0 MiB"
    fig.canvas.draw()
    for ax, curve in zip(axes, traces.values(), strict=True):
        right, top = ax.transData.transform((100, curve.peak / 2**20))
        assert all((box := text.get_window_extent()).y0 > top or box.x0 > right for text in ax.texts)
    for ax in axes:
        [level] = [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == "--"]
        assert level == [300.0, 300.0]
    assert axes[0].get_ylabel() == "MiB" and "%" in axes[1].get_xlabel()
    plt.close(fig)


def test_memory_by_stage():
    mib, (fig, axes) = 2**20, plt.subplots(2, 1)
    log = [
        ("early", 3 * mib),
        ("late", 2 * mib),
        ("short-lived", mib),
        ("late", -2 * mib),
        ("early", -3 * mib),
    ]
    steps = {"plain": SimpleNamespace(entries=log, start=2)}
    steps["less"] = SimpleNamespace(entries=log[1:4], start=1)
    found = stages.memory_by_stage(axes, steps)
    assert found == {
        "plain": {"early": 3 * mib, "late": 2 * mib, "short-lived": mib},
        "less": {"late": 2 * mib, "short-lived": mib},
    }
    assert axes[0].get_ylim() == axes[1].get_ylim() and axes[0].get_ylabel() == "MiB"
    legend = axes[1].get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["short-lived", "weight gradients", "vectors", "late", "early"]  # as they are stacked
    colours = {c.get_label(): tuple(c.get_facecolor()[0]) for c in axes[1].collections}
    assert [tuple(patch.get_facecolor()) for patch in legend.legend_handles] == [colours[n] for n in names]
    assert [text.get_text() for text in axes[0].texts if "peak" in text.get_text()] == ["peak 6 MiB"]
    plt.close(fig)
