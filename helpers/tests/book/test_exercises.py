"""The exercises: a worked solution passes its checker, and a wrong answer is told what is wrong with it.

A page's exercise is a code cell that ends in ``print(check_NAME(GAP))``. GAP is the reader's to fill, and the
folded solution, the one python block of the first <details> behind it that is no hint, defines GAP anew.
`wrong_answers.py` makes mistakes in that solution on purpose, and says which words the checker must find for
each.
"""

import ast
import functools
import re
import symtable
from typing import NamedTuple

import matplotlib
import pytest
import torch

from helpers.book.exercises import difference
from helpers.book.parameters import find_notebooks, read_json, read_quick, tags
from helpers.tests.book.wrong_answers import WRONG

PAGES = {path.name[:2]: path for path in find_notebooks()}
CALL = re.compile(r"^print\((check_\w+)\((\w+)\)\)\s*\Z", re.MULTILINE)
FOLDED = re.compile(r"<details>\s*<summary>Solution.*?</summary>(.*?)</details>", re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RIGHT = re.compile(r"exercise \d: right")


class Exercise(NamedTuple):
    """``check(gap)`` on a page, and the source that fills the gap."""

    page: str
    check: str
    gap: str
    solution: str


def find_exercises(page, cells):
    """The exercises among a notebook's cells, each with its folded solution."""
    found = []
    for i, cell in enumerate(cells):
        source = "".join(cell["source"])
        call = CALL.search(source) if cell["cell_type"] == "code" else None
        if call:
            behind = ("".join(c["source"]) for c in cells[i + 1 :] if c["cell_type"] == "markdown")
            folded = FOLDED.search("\n".join(behind))
            blocks = BLOCK.findall(folded[1]) if folded else []
            assert len(blocks) == 1, f"{page}: {call[1]} needs one python block in <details> behind it"
            found.append(Exercise(page, *call.groups(), blocks[0]))
    return found


EXERCISES = [e for page, path in PAGES.items() for e in find_exercises(page, read_json(path)["cells"])]
each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: f"{e.page}-{e.check}")


def mistakes(exercise):
    """(text in the solution, what to put in its place, what the checker must say), ..."""
    return WRONG.get(exercise.page, {}).get(exercise.check, [])


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """Pages set the default type and the number of threads; other tests want their own."""
    dtype, threads, random = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_rng_state(random)


def globals_in(source):
    """The global names that ``source`` binds, and those that it reads."""
    binds, reads, tables = set(), set(), [symtable.symtable(source, "page", "exec")]
    for table in tables:
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table.get_type() == "module" or symbol.is_global():
                binds |= {symbol.get_name()} if symbol.is_assigned() or symbol.is_imported() else set()
                reads |= {symbol.get_name()} if symbol.is_referenced() else set()
    return binds, reads


def needed(page):
    """The statements of a page that its exercises build on: here nothing is trained or measured."""
    statements = []
    for cell in read_json(PAGES[page])["cells"]:
        if cell["cell_type"] == "code":
            statements += map(ast.unparse, ast.parse("".join(cell["source"])).body)
            if "parameters" in tags(cell):
                statements += (f"{name} = {value!r}" for name, value in read_quick(PAGES[page]).items())
    kept, wanted = [], set()
    for e in EXERCISES:
        if e.page == page:
            answers = [e.solution] + [e.solution.replace(old, new) for old, new, _ in mistakes(e)]
            wanted |= {e.check, e.gap}.union(*(globals_in(answer)[1] for answer in answers))
    for statement in reversed(statements):
        binds, reads = globals_in(statement)
        if statement.startswith("torch.set_") or binds & wanted:
            kept.append(statement)
            wanted |= reads
    return "\n".join(reversed(kept))


@functools.cache
def names_of(page):
    """What a page's exercises find there, and its default type."""
    matplotlib.use("Agg")
    names = {"__name__": "__main__"}
    exec(compile(needed(page), page, "exec"), names)
    return names, torch.get_default_dtype()


def verdict(exercise, answer):
    """What the checker says to the page's own gap, or to ``answer``, source that defines it."""
    page, dtype = names_of(exercise.page)
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    names = dict(page)
    exec(compile(answer, exercise.check, "exec"), names)
    return names[exercise.check](names[exercise.gap])


@pytest.mark.parametrize("page", PAGES)
def test_two_to_four_exercises_a_page(page):
    text = "\n".join("".join(cell["source"]) for cell in read_json(PAGES[page])["cells"])
    headings = re.findall(r"^### Exercise (\d): ", text, re.MULTILINE)
    assert headings == [str(i + 1) for i in range(len(headings))] and 2 <= len(headings) <= 4
    assert len(headings) == sum(e.page == page for e in EXERCISES), "one has not the form that is found"


@each_exercise
def test_gap_is_not_attempted(exercise):
    assert "not attempted yet" in verdict(exercise, "")


@each_exercise
def test_solution_is_right(exercise):
    said = verdict(exercise, exercise.solution)
    assert RIGHT.fullmatch(said), said


@each_exercise
def test_wrong_answers_are_told_why(exercise):
    for old, new, reason in mistakes(exercise):
        count = exercise.solution.count(old)
        assert count == 1, f"{old!r} must stand in the solution once, and stands {count} times"
        said = verdict(exercise, exercise.solution.replace(old, new))
        assert reason in said and not RIGHT.fullmatch(said), f"{old!r} -> {new!r}: {said}"


@each_exercise
def test_two_mistakes_or_more_are_told_apart(exercise):
    reasons = {reason for *_, reason in mistakes(exercise)}
    assert len(reasons) >= 2, f"wrong_answers.py has only {len(reasons)} for {exercise.check}"


def test_no_wrong_answer_is_without_its_exercise():
    assert {(page, check) for page, checks in WRONG.items() for check in checks} <= {
        (e.page, e.check) for e in EXERCISES
    }


def test_a_whole_float_is_as_good_as_an_int():
    assert difference(5.0, 5) == "" and difference(torch.tensor(5), 5.0) == "" and difference(5.5, 5)
