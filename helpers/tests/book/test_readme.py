"""The README: its numbers and its figure are the committed run's, and what it names exists."""

import base64
import re

import pytest
import torchvision

from helpers import predict_memory
from helpers.book import bench
from helpers.book.parameters import NOTEBOOKS, code_cells, find_notebooks, read_json, read_parameters, tags

ROOT = NOTEBOOKS.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = read_json(NOTEBOOKS / "08_one_price.ipynb")
PLACES = r"(?:helpers|notebooks|data|\.github|\.ci)/"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def missing(text):
    """Relative links and paths in ``text`` that lead nowhere."""
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
    paths = re.findall(rf"`({PLACES}[\w./-]*)`", text)
    made_later = "data/MNIST/"
    return [p for p in links + paths if not p.startswith(made_later) and not (ROOT / p).exists()]


def test_the_figure_is_the_committed_run():
    [figure] = [
        output["data"]["image/png"]
        for cell in code_cells(PAGE)
        if "readme-figure" in tags(cell)
        for output in cell["outputs"]
    ]
    [(alt, path)] = re.findall(r"!\[(.*?)\]\((.*?)\)", README)
    assert len(alt) > 40
    assert (ROOT / path).read_bytes() == base64.b64decode(figure)


RECORD = read_json(ROOT / "data" / "measurements" / "front_cpu.json")
ROWS = re.findall(r"^\| (\w+) \| (0\..+?) \| (0\..+?) \| (0\..+?) \|$", README, re.MULTILINE)
PRICES = (0, 150, 600)


def test_times_are_the_committed_record():
    about = f"({RECORD['device']}, torch {RECORD['torch']}, {RECORD['date']};"
    assert about in README, "copy the new record's ratios into the README"
    assert len(ROWS) == 4
    for name, *cells in ROWS:
        [rows] = [rows for title, rows in RECORD["tables"].items() if title.startswith(f"{name}, 16x")]
        times = {row["name"]: row["time_ratio"] for row in rows}
        for cell, price in zip(cells, PRICES, strict=True):
            assert cell.split(" / ")[2] == f"{times[f'remat, {price}']:.2f}"


def test_memory_is_predicted():
    """The rows count tensors, so they can be computed again; one of the four, to save time."""
    name, *cells = ROWS[1]
    model, shape = torchvision.models.get_model(name, weights=None), (16, 3, 160, 160)
    plain = predict_memory(model, shape)
    for cell, price in zip(cells, PRICES, strict=True):
        forward, peak = predict_memory(model, shape, max_cost=price)
        assert cell.split(" / ")[:2] == [f"{forward / plain.forward:.2f}", f"{peak / plain.peak:.2f}"]


def test_links_and_paths_lead_somewhere():
    assert missing(README) == []
    assert missing((ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")) == []
    assert missing("[a](notebooks/99_x.ipynb) `helpers/gone.py` [b](https://x.org/y) `data/MNIST/raw/`") == [
        "notebooks/99_x.ipynb",
        "helpers/gone.py",
    ]


def test_every_notebook_is_listed_once():
    rows = re.findall(r"^\| \[\d+\. [^]]+\]\(notebooks/(\w+)\.ipynb\) \|", README, re.MULTILINE)
    assert rows == [path.stem for path in find_notebooks()]


def test_targets_and_parameters_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^TARGETS := (.*)$", makefile, re.MULTILINE)[1].split()
    own = re.search(r"^OWN := (.*)$", makefile, re.MULTILINE)[1].split()
    parameters = ["ONLY", "QUICK", *own, *bench.PARAMETERS]
    parameters += [name for path in find_notebooks() for name in read_parameters(path)]
    commands = re.findall(r"\bmake ([a-z]+)((?: +[A-Z_]+=\S+)*)", "\n".join(blocks("sh")))
    commands += re.findall(r"`(?:\S+=\S+ )?make ([a-z]+)((?: +[A-Z_]+=\S+)*)`", README)
    assert len(commands) >= 10
    for target, assignments in commands:
        assert target in targets
        for name in re.findall(r"([A-Z_]+)=", assignments):
            assert name in parameters


@pytest.mark.parametrize("source", blocks("python"))
def test_code_runs(source):
    exec(compile(source, "README.md", "exec"), {})
