"""The pages: each runs from top to bottom, and the outputs in the file belong to the code beside them."""

import re
from pathlib import Path

import nbformat
import pytest

from helpers.book.parameters import code_cells, find_notebooks, read_parameters, read_quick, tags
from helpers.book.run import code_hash, run_notebook

PAGES = find_notebooks()
assert PAGES
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def outputs(notebook):
    return [(cell, output) for cell in code_cells(notebook) for output in cell["outputs"]]


def problems(notebook):
    """What is wrong with a committed page, one line a finding."""
    found = []
    code = code_cells(notebook)
    ids = [cell["id"] for cell in notebook["cells"]]
    if len(set(ids)) != len(ids):
        found.append(f"ids are not unique: {sorted(i for i in set(ids) if ids.count(i) > 1)}")
    made = notebook["metadata"].get("collection", {})
    if made.get("code_sha256") != code_hash(notebook):
        found.append("the outputs belong to other code: run `make notebooks`")
    counts = [cell["execution_count"] for cell in code if cell["source"].strip()]
    if counts != list(range(1, len(counts) + 1)):
        found.append(f"cells were not run once, in order: {counts}")
    for cell in notebook["cells"]:
        if cell["metadata"].keys() & {"execution", "papermill", "ExecuteTime"}:
            found.append(f"cell {cell['id']} says when it ran")
        if "raises-exception" in tags(cell):
            found.append(f"cell {cell['id']} is tagged raises-exception")
    if "papermill" in notebook["metadata"]:
        found.append("the page says when it ran")
    for cell, output in outputs(notebook):
        where, data = f"cell {cell['id']}", output.get("data", {})
        if output["output_type"] == "error":
            found.append(f"{where} failed: {output['ename']}")
        if output.get("name") == "stderr":
            found.append(f"{where} wrote to stderr: {output['text'][:200]!r}")
        text = str(output.get("text", "")) + "".join(str(v) for k, v in data.items() if k.startswith("text/"))
        for local in re.findall(r"(?<![\w.:/])/(?:home|tmp|root|work|Users|opt|usr|var|private)/\S*", text):
            found.append(f"{where} shows a path of the machine: {local}")
        for kind in data:
            if kind.startswith("image/") and not output["metadata"].get(kind, {}).get("alt", "").strip():
                found.append(f"{where} shows an {kind} without alt text")
        if "<img" in text and not re.search(r"<img[^>]*\balt=[\"'][^\"']", text):
            found.append(f"{where} shows an <img> without alt text")
    return found


@pytest.mark.notebooks
@each_page
def test_runs_with_quick_parameters(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:Guards may run slower")  # PyTorch's advice on Python 3.13.0
    quick = read_quick(path)
    executed = nbformat.read(run_notebook(path, tmp_path, quick), as_version=4)
    warnings = [(cell["id"], o["text"]) for cell, o in outputs(executed) if o.get("name") == "stderr"]
    assert not warnings
    assert all(cell["execution_count"] for cell in code_cells(executed) if cell["source"].strip())


@each_page
def test_a_page_outside_the_clone_says_what_is_missing(path, monkeypatch):
    [setup] = [cell for cell in nbformat.read(path, as_version=4).cells if cell.id == "setup"]
    monkeypatch.setattr(Path, "cwd", lambda: Path("/"))
    with pytest.raises(AssertionError, match="clone the collection and `make lab`"):
        exec(setup.source, {})


@each_page
def test_committed_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not problems(notebook)


@each_page
def test_parameters_are_explained_and_used(path):
    code = code_cells(nbformat.read(path, as_version=4))
    [lines] = [cell["source"].splitlines() for cell in code if "parameters" in tags(cell)]
    rest = "\n".join(cell["source"] for cell in code if "parameters" not in tags(cell))
    declared, quick = read_parameters(path), read_quick(path)
    assert list(declared) == [line.partition(":")[0] for line in lines]
    assert {name: declared[name].parse(str(value)) for name, value in quick.items()} == quick
    for parameter in declared.values():
        assert parameter.parse(str(parameter.default)) == parameter.default
        assert re.search(rf"\b{parameter.name}\b", rest), f"{parameter.name} is never used"
        bounded = parameter.type == "str" or re.search(r"(at least|above) \d", parameter.help)
        assert bounded, f"the comment of {parameter.name} must say which numbers are allowed"


@each_page
def test_the_file_is_small_and_its_links_lead_somewhere(path):
    assert path.stat().st_size <= 400 * 1024
    for cell in nbformat.read(path, as_version=4).cells:
        assert re.fullmatch(r"[a-z][a-z0-9-]{1,63}", cell.id), f"{cell.id} is not a readable id"
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", cell.source * (cell.cell_type == "markdown")):
            assert (path.parent / target).exists(), f"cell {cell.id} links to {target}, which is not there"


# That `problems` finds each of its problems ---------------------------------------------------------------


def page():
    v4 = nbformat.v4
    stream = v4.new_output("stream", name="stdout", text="fine, 1/2, https://example.org/home/x\n")
    picture = v4.new_output("display_data", {"image/png": "eA=="}, metadata={"image/png": {"alt": "a line"}})
    cells = [
        v4.new_code_cell("print('fine')", id="first", execution_count=1, outputs=[stream]),
        v4.new_markdown_cell("prose", id="prose"),
        v4.new_code_cell("draw()", id="second", execution_count=2, outputs=[picture]),
    ]
    notebook = v4.new_notebook(cells=cells)
    notebook.metadata["collection"] = {"code_sha256": code_hash(notebook)}
    return notebook


def test_a_good_page_has_no_problems():
    assert problems(page()) == []


def stderr(n):
    n.cells[0].outputs[0].name = "stderr"


def error(n):
    n.cells[0].outputs = [nbformat.v4.new_output("error", ename="KeyError", evalue="x", traceback=[])]


FAULTS = {
    "belong to other code": lambda n: n.cells[0].update(source="print('changed')"),
    "run once, in order": lambda n: n.cells[2].update(execution_count=3),
    "ids are not unique": lambda n: n.cells[2].update(id="first"),
    "second failed|first failed: KeyError": error,
    "wrote to stderr": stderr,
    "path of the machine: /tmp/x": lambda n: n.cells[0].outputs[0].update(text="in /tmp/x"),
    "path of the machine: /home/me/a.py": lambda n: (
        n.cells[2].outputs[0].data.update({"text/plain": "'/home/me/a.py"})
    ),
    "image/png without alt": lambda n: n.cells[2].outputs[0].update(metadata={}),
    "<img> without alt": lambda n: n.cells[2].outputs[0].data.update({"text/html": "<img src='x'>"}),
    "cell second says when": lambda n: n.cells[2].metadata.update(execution={}),
    "page says when": lambda n: n.metadata.update(papermill={}),
    "raises-exception": lambda n: n.cells[2].metadata.update(tags=["raises-exception"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_page_has_its_problem(fault):
    notebook = page()
    FAULTS[fault](notebook)
    [problem] = problems(notebook)
    assert re.search(fault, problem)
