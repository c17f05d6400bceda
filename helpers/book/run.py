"""Run, refresh and export the notebooks: what `make` calls.

    python -m helpers.book.run run     [NAME=VALUE ...]   run the notebooks into build/notebooks/
    python -m helpers.book.run refresh [NOTEBOOK ...]     run the committed notebooks, in place
    python -m helpers.book.run html    [--executed]       export them to build/html/, or those of the last run
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import papermill
import torch
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from torchvision.models import list_models

from helpers.book.data import load_mnist
from helpers.book.pages import PageError, export
from helpers.book.parameters import (
    NOTEBOOKS,
    ParameterError,
    code_cells,
    find_notebooks,
    guarded,
    plan,
    read_json,
    read_parameters,
    tags,
)
from helpers.book.training import check_batch_size, pick_device

ROOT = NOTEBOOKS.parent
BUILD = ROOT / "build"
EXECUTED = BUILD / "notebooks"
MEASUREMENTS = ROOT / "data" / "measurements"


class NotebookFailure(Exception):
    """A notebook stopped at an error; the message names the notebook, the cell and the error."""


def run_notebook(path: Path, folder: Path, values: dict[str, Any] | None = None) -> Path:
    """Run the notebook at ``path`` with these parameters into ``folder``, and return the executed one.

    Nothing named like a chapter is in ``folder`` before the run is over. One that fails is kept there as
    NAME.failed.ipynb, and raises a `NotebookFailure`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = (f".{path.stem}", path.stem, f"{path.stem}.failed")
    partial, out, kept = (folder.resolve() / f"{name}.ipynb" for name in names)
    try:
        papermill.execute_notebook(
            path.resolve(),
            partial,
            values,
            kernel_name="python3",
            cwd=ROOT,
            progress_bar={"desc": path.stem, "leave": False, "disable": None},  # None: without a terminal
            store_widget_state=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=50"],  # the kernel's own words, at Ctrl-C for example
        )
        # The metadata came from the committed notebook, and the outputs did not.
        notebook = nbformat.read(partial, as_version=4)
        notebook.metadata["collection"] = provenance(path, notebook, values or {})
        nbformat.write(notebook, partial)
        os.replace(partial, out)
    except (PapermillExecutionError, DeadKernelError) as error:
        os.replace(partial, kept)
        started = [c for c in code_cells(read_json(kept)) if c["metadata"]["papermill"]["start_time"]]
        ids = [cell["id"] for cell in started if "injected-parameters" not in tags(cell)]
        name, value = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
        raise NotebookFailure(
            f"{path.name} failed in cell {ids[-1]} (code cell {len(ids)}): {name}: {value}\n"
            f"  as far as it came: {os.path.relpath(kept)}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return out


def headlines(notebook: dict) -> list[str]:
    """The text that cells tagged headline printed or showed."""
    outputs = [output for c in code_cells(notebook) if "headline" in tags(c) for output in c["outputs"]]
    texts = [output.get("text") or output["data"].get("text/plain", "") for output in outputs]
    return ["".join(text).rstrip() for text in texts if "<Figure" not in text]


def check_here(values: dict[Path, dict[str, Any]]) -> None:
    """Refuse what this machine does not have: a device, a network of torchvision, images of MNIST."""
    for path, given in values.items():
        value = {p.name: p.default for p in read_parameters(path).values()} | given
        networks = value.get("NETWORKS", "resnet50").split()
        try:
            pick_device(value.get("DEVICE", "auto"))
            if value.get("DATA", "full") != "full":  # the whole set has yet to be downloaded
                train_split, _ = load_mnist(value["DATA"], value["TRAIN_IMAGES"], value["TEST_IMAGES"])
                check_batch_size(train_split, value["BATCH_SIZE"])
        except (OSError, ValueError) as error:
            raise ParameterError(error) from None
        if not networks or not set(networks) <= set(list_models()):
            raise ParameterError(f"NETWORKS must be in torchvision.models.list_models(), got {networks}")


def run(arguments: Sequence[str], source: Path = NOTEBOOKS, folder: Path = EXECUTED) -> int:
    """Run the notebooks of ``source`` into ``folder``, one at a time; 1 if any failed, else 0.

    Raises:
        ParameterError: from `plan` and `check_here`, before anything runs.
    """
    values = plan(arguments, source)
    check_here(values)
    if any(given.get("DATA") == "full" for given in values.values()):
        code = subprocess.run([sys.executable, "-m", "helpers.book.data", "download"], cwd=ROOT).returncode
        if code:
            return code

    for stale in folder.glob("*.ipynb"):
        stale.unlink()
    failed, texts, start = [], [], time.perf_counter()
    for path in values:
        begin, verdict = time.perf_counter(), "done"
        try:
            texts += headlines(read_json(run_notebook(path, folder, values[path])))
        except NotebookFailure as error:
            failed.append(error)
            verdict = "FAILED"
        print(f"{path.stem:<28} {verdict:<6} {time.perf_counter() - begin:6.1f} s", flush=True)
    for text in texts:
        print(f"\n{text}")
    took, fine = datetime.timedelta(seconds=round(time.perf_counter() - start)), len(values) - len(failed)
    print(f"\n{fine} of {len(values)} notebooks ran in {took}: {os.path.relpath(folder)}", flush=True)
    for error in failed:
        print(f"\n{error}", file=sys.stderr)
    return 1 if failed else 0


# The committed notebooks ---------------------------------------------------------------------------------


def code_hash(notebook: dict) -> str:
    """SHA-256 of the code cells' sources, in order: outputs belong to this code and no other."""
    sources = ["".join(cell["source"]) + "\0" for cell in code_cells(notebook)]
    return hashlib.sha256("".join(sources).encode()).hexdigest()


def provenance(path: Path, notebook: dict, values: dict[str, Any]) -> dict[str, str]:
    """What made the outputs of ``notebook``: the one at ``path``, run with ``values``."""
    defaults = {p.name: p.default for p in read_parameters(path).values()}
    device = pick_device({"DEVICE": "cpu", **defaults, **values}["DEVICE"])
    return {
        "code_sha256": code_hash(notebook),
        **{name: version(name) for name in ("torch", "torchvision")},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "date": datetime.date.today().isoformat(),
    }


def refresh_notebook(path: Path, figures: Path = MEASUREMENTS, folder: Path = BUILD / "refreshed") -> None:
    """Run the notebook at ``path`` with its defaults, in ``folder``, and write the outputs back into it.

    All else in the file stays, and the whole file if a cell fails. PNGs of cells tagged readme-figure go to
    ``figures``, under the notebook's name.
    """
    notebook = nbformat.read(path, as_version=4)
    executed = nbformat.read(run_notebook(path, folder), as_version=4)
    for cell, made in zip(code_cells(notebook), code_cells(executed), strict=True):
        cell.outputs, cell.execution_count = made.outputs, made.execution_count
        cell.metadata.pop("execution", None)
    # The same on every machine, so that a refresh changes what it means to change.
    language = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
    notebook.metadata["language_info"] = {**language, "pygments_lexer": "ipython3"}
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["collection"] = executed.metadata["collection"]
    nbformat.write(notebook, path)
    for cell in code_cells(notebook):
        for output in cell.outputs if "readme-figure" in tags(cell) else []:
            figures.mkdir(parents=True, exist_ok=True)
            (figures / f"{path.stem}.png").write_bytes(base64.b64decode(output.data["image/png"]))


def refresh(arguments: Sequence[str]) -> int:
    """Refresh the notebooks named by path, or all of them; 1 if any failed, else 0."""
    failed = False
    for path in map(Path, arguments or find_notebooks()):
        begin = time.perf_counter()
        try:
            refresh_notebook(path)
            print(f"{path.stem:<28} done   {time.perf_counter() - begin:6.1f} s", flush=True)
        except (NotebookFailure, OSError) as error:
            print(f"{error}\n  {path} is as it was", file=sys.stderr, flush=True)
            failed = True
    return int(failed)


def html(arguments: Sequence[str], source: Path = NOTEBOOKS, folder: Path = BUILD / "html") -> int:
    """Export the notebooks of ``source`` as pages in ``folder``; 1 if there are none or one fails, else 0."""
    source = EXECUTED if "--executed" in arguments else source
    try:
        names = export(find_notebooks(source), folder)
    except PageError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(names)} pages are in {os.path.relpath(folder)}: open {os.path.relpath(folder / names[0])}")
    return 0


COMMANDS = {"run": run, "refresh": refresh, "html": html}


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        return guarded(COMMANDS[argv[0]], argv[1:])
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
