"""The parameters of the notebooks: what each takes, and what a command line gives it.

    python helpers/book/parameters.py [NAME=VALUE ...]

checks a command line of `make run` before anything is installed: this file needs the standard library alone.
A parameter is a line of the one cell tagged `parameters`, and its comment says which values it takes:
``EPOCHS: int = 5  # passes over the data, at least 1``.
"""

import ast
import json
import operator
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
TYPES = {"int": (int, "a whole number"), "float": (float, "a finite number"), "str": (str, "a text")}
MUCH = 1e18  # PyTorch takes whole numbers of 64 bits
LIMITS = {"at least": operator.ge, "at most": operator.le, "above": operator.gt}
LINE = re.compile(r"^(\w+): (int|float|str) = (.+?)  # (.+)$", re.MULTILINE)


class ParameterError(ValueError):
    """A parameter that no notebook has, or a value that it cannot take."""


class Parameter(NamedTuple):
    """A line of a notebook's parameters cell."""

    name: str
    type: str  # int, float or str
    default: Any
    help: str  # says what is allowed: "..., at least 5", "..., above 0", "auto, sample or full: ..."

    def parse(self, text: str) -> Any:
        """The value that ``text`` names, if the parameter takes it."""
        kind, noun = TYPES[self.type]
        choices = re.match(r"(?:\w+, )*\w+ or \w+(?=: )", self.help)
        limits = re.findall(r"(at least|at most|above) (-?[\d,.]*\d)", self.help)
        value: Any = text
        try:
            value = kind(text)
            within = [LIMITS[words](value, float(number.replace(",", ""))) for words, number in limits]
            fits = all(within) and (kind is str or abs(value) < MUCH)
            noun += f" below {MUCH:.0e}" * (kind is int and abs(value) >= MUCH)
        except ValueError:
            fits = False
        if not fits or (choices and text not in re.split(", | or ", choices[0])):
            allowed = ", ".join([choices[0] if choices else noun, *map(" ".join, limits)])
            raise ParameterError(f"{self.name} must be {allowed}, got {value!r}")
        return value


ONLY = Parameter("ONLY", "str", "", 'chapters to run, such as "05 07"; all if empty')
QUICK = Parameter("QUICK", "int", 0, "1 for small sizes, at least 0, at most 1")


def find_notebooks(folder: Path = NOTEBOOKS) -> list[Path]:
    """The chapters in ``folder``, in order; none that a run left unfinished."""
    return sorted(path for path in folder.glob("[0-9][0-9]_*.ipynb") if "." not in path.stem)


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
    lines = LINE.findall("".join(parameters_cell(path)["source"]))
    return {name: Parameter(name, kind, ast.literal_eval(value), help) for name, kind, value, help in lines}


def read_quick(path: Path) -> dict[str, Any]:
    """The small values with which the tests run the notebook at ``path``."""
    return parameters_cell(path)["metadata"].get("quick", {})


def plan(arguments: Sequence[str], source: Path = NOTEBOOKS) -> dict[Path, dict[str, Any]]:
    """The notebooks that NAME=VALUE ``arguments`` choose, each with the values that it takes from them.

    A `ParameterError` if an argument is not NAME=VALUE, no notebook has it, or it does not take the value.
    """
    given = {}
    for argument in arguments:
        name, equals, given[name] = argument.partition("=")
        if not equals:
            raise ParameterError(f"a parameter must be given as NAME=VALUE, got {argument!r}")
    found = find_notebooks(source)
    chapters = {path.name[:2]: path for path in found}
    if len(chapters) < len(found):
        raise ParameterError(f"a chapter must be one notebook, got {', '.join(path.name for path in found)}")
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


def explain(error: ParameterError) -> str:
    """A table of all parameters, with the chapters that declare them, and below it the error."""
    chapters: dict[Parameter, list[str]] = {ONLY: ["make run"], QUICK: ["make run"]}
    for path in find_notebooks():
        for parameter in read_parameters(path).values():
            chapters.setdefault(parameter, []).append(path.name[:2])
    lines = [
        f"  {name:12}  {kind:5}  {default!r:6}  {text} [{', '.join(where)}]"
        for (name, kind, default, text), where in chapters.items()
    ]
    title = "The parameters, with their defaults and the chapters that take them:"
    return "\n".join([title, *lines, "", str(error)])


if __name__ == "__main__":
    try:
        plan(sys.argv[1:])
    except ParameterError as error:
        sys.exit(explain(error))
