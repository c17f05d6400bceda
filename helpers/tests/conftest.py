"""What all tests share: the collection on the import path, and tests drawn at random without time limits."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# The tensors are small: threads would wait for one another, here and in the kernels that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# Timing is never a test. CI draws the same examples every time, so that a red run can be repeated.
settings.register_profile(
    "collection", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True
)
settings.load_profile("collection")

MARKERS = {
    "browser": "drives a Chromium",
    "notebooks": "runs pages",
    "distributed": "starts several processes that talk to each other",
}


def pytest_configure(config):
    """The markers: `make test PYTEST_ARGS="-m 'not notebooks'"` leaves out what takes longest."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


@pytest.fixture
def write_pages(tmp_path):
    """A function that writes a small notebook into a folder of its own, and returns its path."""
    import nbformat

    def write(stem, *sources, parameters="SEED: int = 0  # seed", quick=None, tag=None, folder="pages"):
        v4 = nbformat.v4
        cells = [v4.new_markdown_cell(f"# {stem}", id="title")]
        if parameters is not None:
            metadata = {"tags": ["parameters"], "quick": quick or {}}
            cells.append(v4.new_code_cell(parameters, id="parameters", metadata=metadata))
        for i, source in enumerate(sources):
            cells.append(v4.new_code_cell(source, id=f"code-{i}", metadata={"tags": [tag] if tag else []}))
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        path = tmp_path / folder / f"{stem}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
        return path

    return write
