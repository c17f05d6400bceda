"""Check parameters, and run, refresh and export the notebooks: what `make` calls.

    python helpers/book/run.py check   [NAME=VALUE ...]            are these parameters of the notebooks?
    python helpers/book/run.py run     [--quick] [NAME=VALUE ...]  run every notebook into build/notebooks/
    python helpers/book/run.py refresh [NOTEBOOK ...]              run the committed notebooks, in place
    python helpers/book/run.py html    [--executed]                export to build/html/

`check` needs the standard library alone, so it works before anything is installed; run this file by its
path for that. A parameter is an annotated line of the one cell tagged `parameters`:
``EPOCHS: int = 5  # what it does``.
"""

from __future__ import annotations

import argparse
import ast
import base64
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
EXECUTED = ROOT / "build" / "notebooks"
HTML = ROOT / "build" / "html"
MEASUREMENTS = ROOT / "data" / "measurements"

TYPES = {"int": int, "float": float, "str": str, "bool": bool}
TRUTH = {"true": True, "1": True, "false": False, "0": False}


class ParameterError(ValueError):
    """A parameter that no notebook has, or a value that it cannot take."""


class Parameter(NamedTuple):
    """A line of a notebook's parameters cell."""

    name: str
    type: str  # int, float, str or bool
    default: Any
    help: str


# Parameters ----------------------------------------------------------------------------------------------


def find_notebooks(folder: Path = NOTEBOOKS) -> list[Path]:
    """The chapters in ``folder``, in order."""
    return sorted(p for p in folder.glob("[0-9][0-9]_*.ipynb") if not p.name.endswith(".failed.ipynb"))


def read_json(path: Path) -> dict:
    """The notebook at ``path`` as plain dicts and lists, with the standard library alone."""
    return json.loads(path.read_text(encoding="utf-8"))


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def parameters_cell(path: Path) -> dict:
    cells = [cell for cell in code_cells(read_json(path)) if "parameters" in tags(cell)]
    if len(cells) != 1:
        raise ParameterError(f"{path.name} must have one code cell tagged parameters, it has {len(cells)}")
    return cells[0]


def has_type(value: Any, type_name: str) -> bool:
    """Whether ``value`` is of that type; an int will do for a float, a bool for nothing but bool."""
    kind = TYPES[type_name]
    return type(value) is kind or (kind is float and type(value) is int)


def read_parameters(path: Path) -> dict[str, Parameter]:
    """The parameters that the notebook at ``path`` declares, by name."""
    source = "".join(parameters_cell(path)["source"])
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        line = lines[node.end_lineno - 1]
        try:
            name, kind, default = node.target.id, node.annotation.id, ast.literal_eval(node.value)
            if not has_type(default, kind):
                raise ValueError
        except (AttributeError, KeyError, ValueError):
            raise ParameterError(
                f"{path.name}: a parameter must read `NAME: TYPE = VALUE  # what it does`, with a type of "
                f"{', '.join(TYPES)}, got {line!r}"
            ) from None
        # end_col_offset counts UTF-8 bytes.
        comment = line.encode()[node.end_col_offset :].decode().strip(" #")
        found[name] = Parameter(name, kind, default, comment)
    return found


def read_quick(path: Path) -> dict[str, Any]:
    """The small values with which the tests run the notebook at ``path``."""
    declared, quick = read_parameters(path), parameters_cell(path)["metadata"].get("quick", {})
    for name, value in quick.items():
        if name not in declared or not has_type(value, declared[name].type):
            raise ParameterError(f"{path.name}: quick has {name} = {value!r}, no parameter takes that")
    return quick


def parse_value(parameter: Parameter, text: str) -> Any:
    """``text`` as a value of the parameter's type."""
    kind = parameter.type
    try:
        value = TRUTH[text.lower()] if kind == "bool" else TYPES[kind](text)
        if kind == "float" and not math.isfinite(value):
            raise ValueError
    except (KeyError, ValueError):
        what = {"int": "a whole number", "float": "a finite number", "bool": "true or false"}[kind]
        raise ParameterError(f"{parameter.name} must be {what} ({kind}), got {text!r}") from None
    return value


def assign(paths: Sequence[Path], arguments: Iterable[str]) -> dict[Path, dict[str, Any]]:
    """The values of NAME=VALUE ``arguments`` for each notebook: those that it declares.

    Raises:
        ParameterError: an argument is not NAME=VALUE, no notebook declares it, or its type is wrong.
    """
    declared = {path: read_parameters(path) for path in paths}
    values: dict[Path, dict[str, Any]] = {path: {} for path in paths}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise ParameterError(f"a parameter must be given as NAME=VALUE, got {argument!r}")
        takers = [path for path in paths if name in declared[path]]
        if not takers:
            raise ParameterError(f"{name} is not a parameter of any notebook, got {argument!r}")
        for path in takers:
            values[path][name] = parse_value(declared[path][name], text)
    return values


def describe(paths: Sequence[Path]) -> str:
    """A table of all parameters: type, default, meaning, and the chapters that declare them."""
    chapters: dict[Parameter, list[str]] = {}
    for path in paths:
        for parameter in read_parameters(path).values():
            chapters.setdefault(parameter, []).append(path.name[:2])
    rows = [(p.name, p.type, repr(p.default), p.help, ", ".join(where)) for p, where in chapters.items()]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = [
        f"  {name:<{widths[0]}}  {kind:<{widths[1]}}  {default:<{widths[2]}}  {text} [{where}]"
        for name, kind, default, text, where in rows
    ]
    return "\n".join(["The parameters, with their defaults and the chapters that take them:", *lines])


# Running -------------------------------------------------------------------------------------------------


class NotebookFailure(Exception):
    """A notebook stopped at an error; the message names the notebook, the cell and the error."""


def this_python() -> type:
    """A kernel manager that starts this interpreter, whatever kernels are installed outside."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    # The kernel logs what goes wrong around a cell (its shutdown at Ctrl-C, say), not in it: out of the way.
    command = [sys.executable, "-m", "ipykernel_launcher", "--log-level=50", "-f", "{connection_file}"]

    class ThisPython(AsyncKernelManager):
        @property
        def kernel_spec(self):
            return KernelSpec(argv=command, display_name="Python 3", language="python")

    return ThisPython


def client_options(on_cell: Callable[[], object] | None, at: dict[str, Any]) -> dict[str, Any]:
    """Options for nbclient; ``at["cell"]`` is kept at the cell that runs."""

    def start(cell, cell_index):
        at["cell"] = cell

    def end(cell, cell_index, execute_reply):
        if on_cell is not None:
            on_cell()

    return {
        "kernel_manager_class": this_python(),
        "on_cell_execute": start,
        "on_cell_executed": end,
        "store_widget_state": False,
        "coalesce_streams": True,
        "timeout": None,
    }


def failure(path: Path, at: dict[str, Any], error: Exception, kept: str) -> NotebookFailure:
    """Say where in the notebook at ``path`` the error happened, and what is kept of it."""
    ids = [cell.get("id") for cell in code_cells(read_json(path))]
    cell_id = at["cell"].get("id") if "cell" in at else None
    where = f"cell {cell_id} (code cell {ids.index(cell_id) + 1})" if cell_id in ids else "its parameters"
    name, value = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
    return NotebookFailure(f"{path.name} failed in {where}: {name}: {value}{kept}")


def run_notebook(
    path: Path,
    folder: Path,
    values: dict[str, Any] | None = None,
    on_cell: Callable[[], object] | None = None,
) -> Path:
    """Run the notebook at ``path`` with these parameters into ``folder``, and return the executed one.

    Nothing named like a notebook is in ``folder`` before the run is over. One that fails is kept there as
    NAME.failed.ipynb.

    Raises:
        NotebookFailure: a cell raised an error, or the kernel died.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import CellControlSignal, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    folder = folder.resolve()
    partial, out = folder / ".partial" / path.name, folder / path.name
    partial.parent.mkdir(parents=True, exist_ok=True)
    at: dict[str, Any] = {}
    try:
        papermill.execute_notebook(
            path.resolve(),
            partial,
            values,
            kernel_name="python3",
            progress_bar=False,
            cwd=ROOT,
            **client_options(on_cell, at),
        )
        # The metadata came from the committed notebook, and the outputs did not.
        notebook = nbformat.read(partial, as_version=4)
        notebook["metadata"]["collection"] = provenance(path, notebook, values)
        write_notebook(partial, notebook)
        os.replace(partial, out)
    except (PapermillExecutionError, DeadKernelError, CellControlSignal) as error:
        kept = folder / f"{path.stem}.failed.ipynb"
        os.replace(partial, kept)
        raise failure(path, at, error, f"\n  as far as it came: {os.path.relpath(kept)}") from error
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)
    return out


def count_runs(path: Path, values: dict[str, Any]) -> int:
    """How many cells `run_notebook` executes: those with code, and papermill's own that sets the values."""
    return sum(bool("".join(cell["source"]).strip()) for cell in code_cells(read_json(path))) + bool(values)


def headlines(notebook: dict) -> list[str]:
    """The text that cells tagged headline printed or showed."""
    texts = []
    for cell in code_cells(notebook):
        for output in cell["outputs"] if "headline" in tags(cell) else []:
            data = output.get("data", {})
            if output.get("name") == "stdout":
                texts.append("".join(output["text"]))
            elif "text/plain" in data and "image/png" not in data:
                texts.append("".join(data["text/plain"]))
    return texts


def run(
    arguments: Sequence[str], quick: bool = False, source: Path = NOTEBOOKS, folder: Path = EXECUTED
) -> int:
    """Run every notebook of ``source`` into ``folder``, one at a time; 1 if any failed, else 0.

    Raises:
        ParameterError: from `assign`, before anything runs.
    """
    from tqdm import tqdm

    paths = find_notebooks(source)
    values = assign(paths, arguments)
    if quick:
        values = {path: {**read_quick(path), **values[path]} for path in paths}
    defaults = {path: {p.name: p.default for p in read_parameters(path).values()} for path in paths}
    data = {{**defaults[path], **values[path]}.get("DATA") for path in paths}
    if "full" in data:
        code = subprocess.run([sys.executable, "-m", "helpers.book.data", "download"], cwd=ROOT).returncode
        if code:
            return code

    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / ".partial", ignore_errors=True)
    for stale in folder.glob("*.ipynb"):
        stale.unlink()
    failed, texts, start = [], [], time.perf_counter()
    with tqdm(
        total=sum(count_runs(path, values[path]) for path in paths), unit=" cells", disable=None
    ) as bar:
        for path in paths:
            bar.set_description(path.stem)
            begin = time.perf_counter()
            try:
                out = run_notebook(path, folder, values[path], bar.update)
                texts += headlines(read_json(out))
                verdict = "done"
            except NotebookFailure as error:
                failed.append(error)
                verdict = "FAILED"
            tqdm.write(f"{path.stem:<28} {verdict:<6} {time.perf_counter() - begin:6.1f} s")
            sys.stdout.flush()
    for text in texts:
        print(f"\n{text.rstrip()}")
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    print(
        f"\n{len(paths) - len(failed)} of {len(paths)} notebooks ran in {minutes} min {seconds} s: ", end=""
    )
    print(os.path.relpath(folder), flush=True)
    for error in failed:
        print(f"\n{error}", file=sys.stderr)
    return 1 if failed else 0


# The committed notebooks ---------------------------------------------------------------------------------


def code_hash(notebook: dict) -> str:
    """SHA-256 of the code cells' sources, in order: outputs belong to this code and no other."""
    digest = hashlib.sha256()
    for cell in code_cells(notebook):
        digest.update("".join(cell["source"]).encode() + b"\0")
    return digest.hexdigest()


def write_notebook(path: Path, notebook: dict) -> None:
    """Write ``notebook`` to ``path`` whole or not at all."""
    import nbformat

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def provenance(path: Path, notebook: dict, values: dict[str, Any] | None = None) -> dict[str, str]:
    """What the outputs of ``notebook`` were made with, by this interpreter; ``path`` declares its parameters.

    A notebook without the parameter DEVICE runs on the CPU.
    """
    import torch

    sys.path.insert(0, str(ROOT))
    from helpers.book.training import pick_device

    defaults = {p.name: p.default for p in read_parameters(path).values()}
    device = pick_device({**defaults, **(values or {})}.get("DEVICE", "cpu"))
    return {
        "code_sha256": code_hash(notebook),
        **{name: importlib.metadata.version(name) for name in ("torch", "torchvision")},
        "python": ".".join(map(str, sys.version_info[:3])),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "date": datetime.date.today().isoformat(),
    }


def refresh_notebook(path: Path, figures: Path = MEASUREMENTS) -> None:
    """Run the notebook at ``path`` with its defaults and write the outputs back into it.

    Cell ids and metadata stay; metadata["collection"] says what code and which versions made the outputs.
    PNGs of cells tagged readme-figure go to ``figures`` under the notebook's name.

    Raises:
        NotebookFailure: a cell raised an error, or the kernel died. The file is as it was.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError

    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell["outputs"], cell["execution_count"] = [], None
        cell["metadata"].pop("execution", None)
    at: dict[str, Any] = {}
    try:
        where = {"metadata": {"path": str(ROOT)}}
        NotebookClient(notebook, record_timing=False, resources=where, **client_options(None, at)).execute()
    except (CellExecutionError, DeadKernelError, CellControlSignal) as error:
        raise failure(path, at, error, "\n  the file is as it was") from error
    notebook["metadata"]["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    # The same on every machine, so that a refresh changes what it means to change.
    notebook["metadata"]["language_info"] = {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "pygments_lexer": "ipython3",
    }
    notebook["metadata"]["collection"] = provenance(path, notebook)
    write_notebook(path, notebook)

    pngs = [
        output["data"]["image/png"]
        for cell in code_cells(notebook)
        if "readme-figure" in tags(cell)
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    for i, png in enumerate(pngs):
        figures.mkdir(parents=True, exist_ok=True)
        (figures / f"{path.stem}{f'_{i + 1}' if i else ''}.png").write_bytes(base64.b64decode(png))


def refresh(names: Sequence[str]) -> int:
    """Refresh the notebooks named by path, or all of them; 1 if any failed, else 0."""
    paths = [Path(name) for name in names] or find_notebooks()
    for path in paths:
        if not path.is_file():
            print(f"{path} is not a file", file=sys.stderr)
            return 2
    code = 0
    for path in paths:
        begin = time.perf_counter()
        try:
            refresh_notebook(path)
            print(f"{path.stem:<28} done   {time.perf_counter() - begin:6.1f} s", flush=True)
        except NotebookFailure as error:
            print(error, file=sys.stderr, flush=True)
            code = 1
    return code


def html(source: Path = NOTEBOOKS, folder: Path = HTML) -> int:
    """Export the notebooks of ``source`` as pages in ``folder``; 1 if there are none or one fails, else 0."""
    sys.path.insert(0, str(ROOT))
    from helpers.book.pages import PageError, export

    paths = find_notebooks(source)
    if not paths:
        print(f"there are no notebooks in {source}: `make run` comes first", file=sys.stderr)
        return 1
    try:
        names = export(paths, folder, base=NOTEBOOKS if source == EXECUTED else source)
    except PageError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(names)} pages are in {os.path.relpath(folder)}: open {os.path.relpath(folder / names[0])}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check, run, refresh and export the notebooks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("check", "run"):
        command = commands.add_parser(name)
        command.add_argument("parameters", nargs="*", metavar="NAME=VALUE")
    command.add_argument("--quick", action="store_true", help="the small values that the tests use")
    commands.add_parser("refresh").add_argument("notebooks", nargs="*")
    commands.add_parser("html").add_argument("--executed", action="store_true", help="those of the last run")
    options = parser.parse_args(argv)
    try:
        if options.command == "check":
            assign(find_notebooks(), options.parameters)
            return 0
        if options.command == "run":
            return run(options.parameters, options.quick)
        if options.command == "refresh":
            return refresh(options.notebooks)
        return html(EXECUTED if options.executed else NOTEBOOKS)
    except ParameterError as error:
        print(f"{error}\n{describe(find_notebooks())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the notebook that ran is not kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
