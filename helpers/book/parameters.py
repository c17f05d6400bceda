"""The parameters of the notebooks: what each takes, and what a command line gives it.

    python helpers/book/parameters.py [NAME=VALUE ...]

checks a command line of `make run` before anything is installed: this file needs the standard library alone.
A parameter is a line of the one cell tagged `parameters`, and its comment says which values it takes:
``EPOCHS: int = 5  # passes over the data, at least 1``.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
TYPES = {"int": int, "float": float, "str": str}
NOUNS = {"int": "a whole number", "float": "a finite number", "str": "a text"}
LIMITS = {"at least": operator.ge, "at most": operator.le, "above": operator.gt}
LINE = re.compile(r"(\w+): (int|float|str) = (.+?)  # (.+)")


class ParameterError(ValueError):
    """A parameter that no notebook has, or a value that it cannot take."""


class Parameter(NamedTuple):
    """A line of a notebook's parameters cell."""

    name: str
    type: str  # int, float or str
    default: Any
    help: str  # says what is allowed: "..., at least 5", "..., above 0", "auto, sample or full: ..."

    def accept(self, value: Any) -> Any:
        """``value``, if the parameter takes it; an int will do for a float."""
        kind = TYPES[self.type]
        choices = re.match(r"((?:\w+, )*\w+ or \w+): ", self.help)
        limits = re.findall(r"(at least|at most|above) (-?[\d,.]*\d)", self.help) if kind is not str else []
        if not (
            (type(value) is kind or (kind is float and type(value) is int))
            and (kind is str or math.isfinite(value))
            and (not choices or value in re.split(", | or ", choices[1]))
            and all(LIMITS[words](value, float(number.replace(",", ""))) for words, number in limits)
        ):
            allowed = [choices[1] if choices else NOUNS[self.type], *map(" ".join, limits)]
            raise ParameterError(f"{self.name} must be {', '.join(allowed)}, got {value!r}")
        return value

    def parse(self, text: str) -> Any:
        """The value that ``text`` names."""
        try:
            value = TYPES[self.type](text)
        except ValueError:
            value = text  # accept says what is wrong with it
        return self.accept(value)


ONLY = Parameter("ONLY", "str", "", 'chapters to run, such as "05 07"; all if empty')
QUICK = Parameter("QUICK", "int", 0, "1 for small sizes, at least 0, at most 1")


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
    return cells[0] if cells else {"source": "", "metadata": {}}


def read_parameters(path: Path) -> dict[str, Parameter]:
    """The parameters that the notebook at ``path`` declares, by name."""
    found = {}
    for line in "".join(parameters_cell(path)["source"]).splitlines():
        try:
            name, kind, default, comment = LINE.fullmatch(line).groups()
            found[name] = Parameter(name, kind, ast.literal_eval(default), comment)
            found[name].accept(found[name].default)
        except (AttributeError, SyntaxError, ValueError):
            form = "`NAME: TYPE = VALUE  # what it takes`, with a value that it takes"
            raise ParameterError(f"{path.name}: a parameter must read {form}, got {line!r}") from None
    return found


def read_quick(path: Path) -> dict[str, Any]:
    """The small values with which the tests run the notebook at ``path``."""
    declared, quick = read_parameters(path), parameters_cell(path)["metadata"].get("quick", {})
    return {name: declared[name].accept(value) for name, value in quick.items()}


def plan(arguments: Sequence[str], source: Path = NOTEBOOKS) -> dict[Path, dict[str, Any]]:
    """The notebooks that NAME=VALUE ``arguments`` choose, each with the values that it takes from them.

    Raises:
        ParameterError: an argument is not NAME=VALUE, no notebook has it, or it does not take the value.
    """
    given = {}
    for argument in arguments:
        name, equals, given[name] = argument.partition("=")
        if not equals:
            raise ParameterError(f"a parameter must be given as NAME=VALUE, got {argument!r}")
    chapters = {path.name[:2]: path for path in find_notebooks(source)}
    only = [number.zfill(2) for number in given.pop("ONLY", "").split()]
    if not chapters.keys() >= set(only):
        raise ParameterError(f"ONLY must be chapters among {' '.join(chapters)}, got {' '.join(only)!r}")
    quick = QUICK.parse(given.pop("QUICK", "0"))
    paths = [path for number, path in chapters.items() if not only or number in only]
    values = {path: read_quick(path) if quick else {} for path in paths}
    for name, text in given.items():
        takers = {path: declared[name] for path in paths if name in (declared := read_parameters(path))}
        if not takers:
            where = f"chapter {' or '.join(only)}" if only else "any notebook"
            raise ParameterError(f"{name} is not a parameter of {where}, got {name}={text}")
        for path, parameter in takers.items():
            values[path][name] = parameter.parse(text)
    return values


def describe(paths: Sequence[Path]) -> str:
    """A table of all parameters: type, default, meaning, and the chapters that declare them."""
    chapters: dict[Parameter, list[str]] = {ONLY: ["make run"], QUICK: ["make run"]}
    for path in paths:
        for parameter in read_parameters(path).values():
            chapters.setdefault(parameter, []).append(path.name[:2])
    lines = [
        f"  {name:12}  {kind:5}  {default!r:6}  {text} [{', '.join(where)}]"
        for (name, kind, default, text), where in chapters.items()
    ]
    return "\n".join(["The parameters, with their defaults and the chapters that take them:", *lines])


def guarded(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """What ``command`` returns; 2 if it refuses a parameter: that is the last line, below a table of all."""
    try:
        return command(arguments)
    except ParameterError as error:
        print(f"{describe(find_notebooks())}\n\n{error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(guarded(lambda arguments: 0 * len(plan(arguments)), sys.argv[1:]))
