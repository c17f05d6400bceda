"""Run, refresh and export the notebooks: what `make` calls. See `python -m helpers.book.run --help`."""

import argparse
import base64
import datetime
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import papermill
import torch
from papermill.exceptions import PapermillExecutionError

from helpers.book.data import load_mnist
from helpers.book.networks import check_networks
from helpers.book.pages import PageError, export
from helpers.book.parameters import (
    NOTEBOOKS,
    ParameterError,
    code_cells,
    explain,
    find_notebooks,
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

# What a kernel says about itself, at Ctrl-C for example, is not for the screen; tornado's logger reports a
# flush that came after the kernel had closed its sockets.
KERNEL_ARGUMENTS = [
    "--log-level=50",
    "--IPKernelApp.exec_lines=__import__('logging').getLogger('tornado').setLevel('CRITICAL')",
]


class NotebookFailure(Exception):
    """A notebook stopped at an error; the message names the notebook, the cell and the error."""


def settings(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Every parameter of the notebook at ``path``: what is ``given``, else its default."""
    return {name: parameter.default for name, parameter in read_parameters(path).items()} | given


def code_hash(notebook: dict) -> str:
    """SHA-256 of the code cells' sources, in order: outputs belong to this code and no other."""
    sources = ["".join(cell["source"]) + "\0" for cell in code_cells(notebook)]
    return hashlib.sha256("".join(sources).encode()).hexdigest()


def run_notebook(path: Path, folder: Path, given: dict[str, Any] | None = None) -> Path:
    """Run the notebook at ``path`` with these parameters into ``folder``, and return the executed one.

    It is called NAME.unfinished.ipynb there until its last cell is done; a `NotebookFailure` if one fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = folder.resolve() / path.name
    unfinished = out.with_suffix(".unfinished.ipynb")
    try:
        notebook = papermill.execute_notebook(
            path.resolve(),
            unfinished,
            given,
            kernel_name="python3",
            cwd=ROOT,
            progress_bar={"desc": path.stem, "leave": False, "disable": None},  # None: without a terminal
            coalesce_streams=True,
            extra_arguments=KERNEL_ARGUMENTS,
        )
    except (PapermillExecutionError, RuntimeError) as error:  # the latter from a kernel that is dead
        cells = code_cells(read_json(unfinished))
        started = [cell for cell in cells if cell["metadata"]["papermill"]["start_time"]]
        where = f"in cell {started[-1]['id']}, In [{len(started)}]" if started else "before its first cell"
        name, value = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
        so_far = f"\n  as far as it came: {os.path.relpath(unfinished)}"
        raise NotebookFailure(f"{path.name} failed {where}: {name}: {value}{so_far}") from error
    device = pick_device(settings(path, given or {}).get("DEVICE", "cpu"))
    notebook.metadata["collection"] = {  # what made these outputs
        "code_sha256": code_hash(notebook),
        "torch": version("torch"),
        "torchvision": version("torchvision"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "date": datetime.date.today().isoformat(),
    }
    nbformat.write(notebook, unfinished)
    return unfinished.replace(out)


def check_here(values: dict[Path, dict[str, Any]]) -> None:
    """Refuse what this machine does not have: a device, a network of torchvision, images of MNIST.

    The whole of MNIST is downloaded, if it is wanted and missing.
    """
    for path, given in values.items():
        value = settings(path, given)
        try:
            pick_device(value.get("DEVICE", "auto"))
            if "DATA" in value:
                train_split, _ = load_mnist(value["DATA"], value["TRAIN_IMAGES"], value["TEST_IMAGES"])
                check_batch_size(train_split, value["BATCH_SIZE"])
            if "NETWORKS" in value:
                check_networks(value["NETWORKS"], value["IMAGES"], value["SIZE"])
        except (OSError, RuntimeError, ValueError) as error:
            raise ParameterError(error) from None


def run(arguments: Sequence[str], source: Path = NOTEBOOKS, folder: Path = EXECUTED) -> str | None:
    """Run the notebooks of ``source`` into ``folder``, one at a time; the errors of those that failed.

    What cells tagged headline printed is printed at the end: the tables that a run is for. Before anything
    runs, `plan` and `check_here` may raise a `ParameterError`.
    """
    values = plan(arguments, source)
    check_here(values)
    for stale in folder.glob("*.ipynb"):
        stale.unlink(missing_ok=True)  # another run may be as far
    errors, tables, start = [], [], time.perf_counter()
    for path, given in values.items():
        begin, verdict = time.perf_counter(), "done"
        try:
            cells = code_cells(read_json(run_notebook(path, folder, given)))
            outputs = [output for cell in cells if "headline" in tags(cell) for output in cell["outputs"]]
            tables += ["".join(output.get("text", "")) for output in outputs]
        except NotebookFailure as error:
            errors.append(str(error))
            verdict = "FAILED"
        print(f"{path.stem:<28} {verdict:<6} {time.perf_counter() - begin:6.1f} s", flush=True)
    print("", *tables, sep="\n")
    fine, took = len(values) - len(errors), time.perf_counter() - start
    print(f"{fine} of {len(values)} notebooks ran in {took:.0f} s: {os.path.relpath(folder)}", flush=True)
    return "\n".join(errors) or None


def refresh(notebooks: Sequence[Path], figures: Path = MEASUREMENTS) -> None:
    """Run these notebooks, or all of them, with their defaults, and write the outputs back.

    All else in the files stays, and the whole file if a cell fails. PNGs of cells tagged readme-figure go to
    ``figures``, under the notebook's name.
    """
    for path in notebooks or find_notebooks():
        notebook = nbformat.read(path, as_version=4)
        executed = nbformat.read(run_notebook(path, BUILD / "refreshed"), as_version=4)
        notebook.metadata["collection"] = executed.metadata["collection"]
        for cell, made in zip(code_cells(notebook), code_cells(executed), strict=True):
            cell.outputs, cell.execution_count = made.outputs, made.execution_count
            for output in cell.outputs if "readme-figure" in tags(cell) else []:
                (figures / f"{path.stem}.png").write_bytes(base64.b64decode(output.data["image/png"]))
        nbformat.write(notebook, path)
        print(f"{path.stem} is refreshed", flush=True)


def html(executed: bool, source: Path = NOTEBOOKS, folder: Path = BUILD / "html") -> None:
    """Export the notebooks of ``source``, or those of the last run, as pages in ``folder``."""
    names = export(find_notebooks(EXECUTED if executed else source), folder)
    print(f"{len(names)} pages are in {os.path.relpath(folder)}: open {os.path.relpath(folder / names[0])}")


COMMANDS = {"run": run, "refresh": refresh, "html": html}


def main(argv: Sequence[str]) -> str | None:
    """What went wrong, or None; --help, and what there is not, end the program."""
    parser = argparse.ArgumentParser(prog="python -m helpers.book.run")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="run the notebooks into build/notebooks/")
    command.add_argument("arguments", nargs="*", metavar="NAME=VALUE", help="parameters, as of make run")
    command = commands.add_parser("refresh", help="run committed notebooks, in place")
    command.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", type=Path, help="all by default")
    command = commands.add_parser("html", help="export the notebooks as pages to build/html/")
    command.add_argument("--executed", action="store_true", help="those of the last run")
    given = vars(parser.parse_args(argv))
    for path in given.get("notebooks", []):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    try:
        return COMMANDS[given.pop("command")](**given)
    except ParameterError as error:
        return explain(error)
    except (NotebookFailure, PageError) as error:
        return str(error)
    except KeyboardInterrupt:
        return "\ninterrupted"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for encodings without ×
    sys.exit(main(sys.argv[1:]))  # words go to stderr, with the status 1
