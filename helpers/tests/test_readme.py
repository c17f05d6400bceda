"""The README: its numbers and its figure are the committed run's, and what it names exists."""

import base64
import re

import pytest
import torchvision

from helpers import predict_memory
from helpers.run import (
    NOTEBOOKS,
    ROOT,
    code_cells,
    find_notebooks,
    headlines,
    read_json,
    read_parameters,
    tags,
)

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = read_json(NOTEBOOKS / "05_mnist_memory.ipynb")
PLACES = r"(?:helpers|notebooks|data|\.github|\.ci)/"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def missing(text):
    """Relative links and paths in ``text`` that lead nowhere."""
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
    paths = re.findall(rf"`({PLACES}[\w./-]*)`", text)
    made_later = "data/MNIST/"
    return [p for p in links + paths if not p.startswith(made_later) and not (ROOT / p).exists()]


def test_the_table_is_the_committed_run():
    [headline] = headlines(PAGE)
    [table] = blocks("text")
    assert table.rstrip() == headline.rstrip(), "copy the headline cell's output into the README"
    assert f"Measured on {PAGE['metadata']['collection']['date']}" in README


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


def test_the_ratios_are_the_committed_record():
    record = read_json(ROOT / "data" / "measurements" / "bench_cpu.json")
    about = f"({record['device']}, torch {record['torch']}, {record['date']};"
    assert about in " ".join(README.split()), "copy the new record's ratios into the README"
    rows = re.findall(
        r"^\| (.+?) \| (.+?) \| (0\.\d\d) \| (0\.\d\d) \| (\S+) \((\S+) to (\S+)\) \|$", README, re.MULTILINE
    )
    assert len(rows) >= 3
    for title, method, *numbers in rows:
        [row] = [row for row in record["tables"][f"{title}, float32"] if row["name"] == method]
        measured = (row["peak_ratio"], row["forward_ratio"], row["time_ratio"], *row["time_range"])
        assert numbers == [f"{value:.2f}" for value in measured]


def test_what_remat_holds_is_predicted():
    """The rows count tensors, so they can be had again; two of the four, to save time."""
    rows = re.findall(r"^\| (\w+) \| (.+?) \| (.+?) \| (.+?) \|$", README, re.MULTILINE)
    rows = {name: cells for name, *cells in rows if all(re.fullmatch(r"0\.\d\d / 0\.\d\d", c) for c in cells)}
    assert len(rows) == 4
    for name in ("resnet50", "mobilenet_v2"):
        model, shape = torchvision.models.get_model(name, weights=None), (16, 3, 160, 160)
        plain = predict_memory(model, shape)
        for cell, max_cost in zip(rows[name], (0, 150, 600), strict=True):
            forward, peak = predict_memory(model, shape, max_cost=max_cost)
            assert cell == f"{forward / plain.forward:.2f} / {peak / plain.peak:.2f}"


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
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    own = re.search(r"^OWN := (.*)$", makefile, re.MULTILINE)[1].split()
    parameters = own + [name for path in find_notebooks() for name in read_parameters(path)]
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
