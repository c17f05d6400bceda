"""The runner: parameters, failures, interrupts, refreshed notebooks and exported pages."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from helpers.book import run as runner
from helpers.book.run import Parameter, ParameterError, assign, code_hash, read_json, read_parameters, run

ROOT = Path(__file__).resolve().parents[3]
ALL_TYPES = """\
N: int = -3  # how many µ
RATE: float = 1  # of learning
DATA: str = "a=b # c"  # with a hash
FLAG: bool = False  # on or off"""


def texts(path):
    """What the cells of an executed notebook printed."""
    cells = runner.code_cells(read_json(path))
    return "".join("".join(o.get("text", "")) for cell in cells for o in cell["outputs"])


# Parameters ----------------------------------------------------------------------------------------------


def test_read_parameters(write_pages):
    assert list(read_parameters(write_pages("01_a", parameters=ALL_TYPES)).values()) == [
        Parameter("N", "int", -3, "how many µ"),
        Parameter("RATE", "float", 1, "of learning"),
        Parameter("DATA", "str", "a=b # c", "with a hash"),
        Parameter("FLAG", "bool", False, "on or off"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "N = 3",
        "N: int",
        "N: int = 'x'",
        "N: int = True",
        "N: list = []",
        "N: int = M",
        "import os",
        "a.N: int = 1",
    ],
)
def test_malformed_parameters_cell(write_pages, line):
    with pytest.raises(ParameterError, match="01_a.ipynb: a parameter must read"):
        read_parameters(write_pages("01_a", parameters=line))


def test_one_parameters_cell(write_pages):
    with pytest.raises(
        ParameterError, match="01_a.ipynb must have one code cell tagged parameters, it has 0"
    ):
        read_parameters(write_pages("01_a", "1", parameters=None))
    with pytest.raises(ParameterError, match="it has 2"):
        read_parameters(write_pages("02_b", "N: int = 1", tag="parameters"))


@pytest.mark.parametrize(
    "argument, value",
    [
        ("N=7", 7), ("N=-7", -7), ("RATE=2", 2.0), ("RATE=1e-3", 1e-3), ("DATA=", ""), ("DATA=x=y", "x=y"),
        ("FLAG=true", True), ("FLAG=0", False), ("FLAG=False", False),
    ],
)  # fmt: skip
def test_right_values(write_pages, argument, value):
    path = write_pages("01_a", parameters=ALL_TYPES)
    [(name, found)] = assign([path], [argument])[path].items()
    assert name == argument.partition("=")[0] and found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("N=1.5", "N must be a whole number .*got '1.5'"),
        ("N=", "N must be a whole number .*got ''"),
        ("RATE=fast", "RATE must be a finite number .*got 'fast'"),
        ("RATE=nan", "RATE must be a finite number .*got 'nan'"),
        ("FLAG=maybe", "FLAG must be true or false .*got 'maybe'"),
        ("n=1", "n is not a parameter of any notebook, got 'n=1'"),
        ("N", "a parameter must be given as NAME=VALUE, got 'N'"),
    ],
)
def test_wrong_values(write_pages, argument, message):
    with pytest.raises(ParameterError, match=message):
        assign([write_pages("01_a", parameters=ALL_TYPES)], ["DATA=fine", argument])


def test_a_parameter_goes_to_the_notebooks_that_declare_it(write_pages):
    a, b = (
        write_pages("01_a", parameters="A: int = 1\nC: int = 1"),
        write_pages("02_b", parameters="B: int = 1\nC: int = 1"),
    )
    assert assign([a, b], ["A=2", "C=3"]) == {a: {"A": 2, "C": 3}, b: {"C": 3}}
    table = runner.describe([a, b])
    assert re.search(r"A +int +1 .*\[01\]", table) and re.search(r"C +int +1 .*\[01, 02\]", table)


def test_quick_values_must_fit(write_pages):
    assert runner.read_quick(write_pages("01_a", quick={"SEED": 4})) == {"SEED": 4}
    for quick in ({"SED": 4}, {"SEED": "4"}, {"SEED": True}, {"SEED": 4.0}):
        with pytest.raises(ParameterError, match="01_a.ipynb: quick has"):
            runner.read_quick(write_pages("01_a", quick=quick))


def check(*arguments):
    # -I -S: no packages but the standard library's.
    command = [sys.executable, "-I", "-S", "helpers/book/run.py", "check", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_check_needs_the_standard_library_alone():
    name = next(iter(read_parameters(runner.find_notebooks()[0])))
    assert check().returncode == 0
    wrong = check("NO_SUCH_PARAMETER=1")
    assert wrong.returncode == 2 and wrong.stderr.startswith(
        "NO_SUCH_PARAMETER is not a parameter of any notebook"
    )
    assert re.search(rf"^  {name} ", wrong.stderr, re.M) and "Traceback" not in wrong.stderr


def test_wrong_parameter_comes_before_any_run(write_pages, tmp_path):
    source = write_pages("01_a", f"open({str(tmp_path / 'ran')!r}, 'w')").parent
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "01_a.ipynb").write_text("the last run's")
    with pytest.raises(ParameterError):
        run(["SED=1"], source=source, folder=tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "out" / "01_a.ipynb").read_text() == "the last run's"


# make ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path):
    """The Makefile, the runner and the notebooks, with an interpreter that notes how it is called."""
    folder = tmp_path / "a clone's"
    (folder / "helpers" / "book").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(ROOT / "requirements.txt", folder)
    shutil.copy(ROOT / "helpers" / "book" / "run.py", folder / "helpers" / "book")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    stub = tmp_path / "python"
    stub.write_text(
        f"""#!{sys.executable}
import os, subprocess, sys
args = sys.argv[1:]
if args[0] == "-c" or args[1:2] == ["check"]:
    sys.exit(subprocess.run([{sys.executable!r}, *args]).returncode)
with open({str(tmp_path / "calls")!r}, "a") as f:
    f.write(repr((os.path.basename(sys.argv[0]), args)) + "\\n")
if args[:2] == ["-m", "venv"]:
    os.makedirs(".venv/bin", exist_ok=True)
    if not os.path.exists(".venv/bin/python"):
        os.symlink({str(stub)!r}, ".venv/bin/python")
if args[:2] == ["-m", "pip"] and os.path.exists("break"):
    sys.exit(1)
"""
    )
    stub.chmod(0o755)

    def make(*arguments, python=stub):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        done = subprocess.run(
            ["make", f"PYTHON={python}", *arguments], cwd=folder, env=env, capture_output=True, text=True
        )
        noted = [eval(line)[1] for line in calls.read_text().splitlines()] if calls.exists() else []
        return done, noted

    make.folder = folder
    return make


VENV, PIP = ["-m", "venv", ".venv"], ["-m", "pip", "install", "--requirement", "requirements.txt"]


def test_make_installs_once(clone):
    done, calls = clone("run")
    assert done.returncode == 0, done.stderr
    assert calls == [VENV, PIP, ["helpers/book/run.py", "run"]]
    assert clone("run")[1] == [["helpers/book/run.py", "run"]]
    os.utime(clone.folder / "requirements.txt", (time.time() + 60,) * 2)
    assert clone("html")[1] == [VENV, PIP, ["helpers/book/run.py", "html"]]


def test_make_takes_up_a_broken_installation(clone):
    (clone.folder / "break").touch()
    done, calls = clone("run")
    assert done.returncode == 2 and calls == [VENV, PIP]
    (clone.folder / "break").unlink()
    assert clone("run")[1] == [VENV, PIP, ["helpers/book/run.py", "run"]]


def test_make_passes_parameters(clone):
    path = runner.find_notebooks()[0]
    name, parameter = next(iter(read_parameters(path).items()))
    value = {"int": "3", "float": "0.5", "str": 'it\'s $x, "two" words', "bool": "true"}[parameter.type]
    done, calls = clone("run", "QUICK=1", f"{name}={value}")
    assert done.returncode == 0 and calls[-1] == ["helpers/book/run.py", "run", "--quick", f"{name}={value}"]
    # bench has parameters of its own, so they are its to check.
    odd = 'ANY=it\'s "two" words; $x'
    assert clone("bench", odd)[1] == [["-m", "helpers.book.bench", odd]]
    assert clone("html", "EXECUTED=1")[1] == [["helpers/book/run.py", "html", "--executed"]]


def test_make_checks_parameters_before_it_installs(clone):
    done, calls = clone("run", "NO_SUCH_PARAMETER=1")
    assert done.returncode == 2 and calls == [] and not (clone.folder / ".venv").exists()
    assert "NO_SUCH_PARAMETER is not a parameter of any notebook" in done.stderr


def test_make_refuses_an_old_python(clone, tmp_path):
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\ncase "$1 $2" in "-c ") ;; -V*) echo Python 3.9.1 ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    done, calls = clone("run", python=old)
    assert done.returncode == 2 and calls == []
    assert f"Python 3.10 or later is needed, {old} is Python 3.9.1" in done.stderr
    done, calls = clone("run", python=tmp_path / "none")
    assert f"There is no Python at {tmp_path / 'none'}" in done.stderr and calls == []


def test_make_lists_every_target(clone):
    done, calls = clone()
    targets = re.findall(r"^make (\w+)", done.stdout, re.M)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert set(targets) == set(phony) - {"help", "check", "python"} and calls == []


# Running -------------------------------------------------------------------------------------------------


def test_run(write_pages, tmp_path, capsys):
    source = write_pages("01_a", "print('seed', SEED)", quick={"SEED": 5}).parent
    write_pages("02_b", "print('the table')", "7 * 6", tag="headline", parameters="OTHER: str = 'x'")
    out = tmp_path / "out"
    assert run(["SEED=8"], source=source, folder=out) == 0
    said = capsys.readouterr().out
    assert re.search(r"01_a +done +[\d.]+ s\n02_b +done", said) and "2 of 2 notebooks ran" in said
    assert "\nthe table\n\n42\n" in said and "seed" not in said
    assert texts(out / "01_a.ipynb") == "seed 8\n"
    assert sorted(p.name for p in out.iterdir()) == ["01_a.ipynb", "02_b.ipynb"]
    assert run([], quick=True, source=source, folder=out) == 0
    assert texts(out / "01_a.ipynb") == "seed 5\n"
    assert run(["SEED=9"], quick=True, source=source, folder=out) == 0
    assert texts(out / "01_a.ipynb") == "seed 9\n"
    assert run([], source=source, folder=out) == 0
    assert texts(out / "01_a.ipynb") == "seed 0\n"


def test_kernel_is_this_interpreter_at_the_root(write_pages, tmp_path, monkeypatch):
    # A kernel of the same name outside must not be taken.
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps({"argv": ["/nonexistent"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    monkeypatch.chdir(tmp_path)
    path = write_pages("01_a", "import sys, os; print(sys.executable, os.getcwd())")
    assert texts(runner.run_notebook(path, tmp_path / "out")) == f"{sys.executable} {ROOT}\n"


def test_failing_notebook(write_pages, tmp_path, capsys):
    source = write_pages("01_good", "print('first')", tag="headline").parent
    write_pages("02_bad", "print('begun')", "1 / 0", "print('never')")
    write_pages("03_dead", "import os; os._exit(3)")
    write_pages("04_good", "print('last')", tag="headline")
    out = tmp_path / "out"
    out.mkdir()
    (out / "02_bad.ipynb").write_text("of an earlier run")
    (out / "09_gone.failed.ipynb").write_text("of an earlier run")
    assert run(["SEED=1"], source=source, folder=out) == 1
    said, wrong = capsys.readouterr()
    assert "first" in said and "last" in said and "2 of 4 notebooks ran" in said
    assert "02_bad.ipynb failed in cell code-1 (code cell 3): ZeroDivisionError: division by zero" in wrong
    assert "03_dead.ipynb failed in cell code-0 (code cell 2): DeadKernelError" in wrong
    assert sorted(p.name for p in out.iterdir()) == [
        "01_good.ipynb", "02_bad.failed.ipynb", "03_dead.failed.ipynb", "04_good.ipynb",
    ]  # fmt: skip
    assert "begun" in texts(out / "02_bad.failed.ipynb") and "never" not in texts(out / "02_bad.failed.ipynb")
    assert [p.name for p in runner.find_notebooks(out)] == ["01_good.ipynb", "04_good.ipynb"]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_leaves_no_whole_looking_notebook(write_pages, tmp_path, kind):
    begun, out = tmp_path / "begun", tmp_path / "out"
    source = write_pages("01_a", "print('done')").parent
    write_pages(
        "02_b", "import os, time", f"open({str(begun)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    write_pages("03_c", "print('never')")
    out.mkdir()
    (out / "02_b.ipynb").write_text("of an earlier run")
    code = f"""
import functools, signal, sys
from pathlib import Path
from helpers.book import run
signal.signal(signal.SIGINT, signal.default_int_handler)
run.run = functools.partial(run.run, source=Path({str(source)!r}), folder=Path({str(out)!r}))
sys.exit(run.main(["run"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        while not (begun.exists() and begun.read_text()):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(kind)
        said = process.communicate(timeout=300)[1]
    finally:
        process.kill()
        if kind == signal.SIGKILL and begun.exists():
            os.kill(int(begun.read_text()), signal.SIGKILL)  # the kernel that was left behind
    assert process.returncode == (130 if kind == signal.SIGINT else -kind)
    assert (
        [p.name for p in out.glob("*.ipynb")]
        == ["01_a.ipynb"]
        == [p.name for p in runner.find_notebooks(out)]
    )
    if kind == signal.SIGINT:
        assert "interrupted" in said and "Traceback" not in said
        assert not (out / ".partial").exists()
        with pytest.raises(ProcessLookupError):
            os.kill(int(begun.read_text()), 0)


def test_full_data_is_downloaded_first(write_pages, tmp_path, monkeypatch):
    source = write_pages("01_a", "print(DATA)", parameters='DATA: str = "auto"  # which').parent
    calls = []

    class Done:
        returncode = 1

    monkeypatch.setattr(runner.subprocess, "run", lambda command, cwd: calls.append(command) or Done)
    assert run(["DATA=full"], source=source, folder=tmp_path / "out") == 1
    assert calls == [[sys.executable, "-m", "helpers.book.data", "download"]]
    assert not (tmp_path / "out").exists()  # nothing ran without the data
    monkeypatch.setattr(Done, "returncode", 0)
    assert run(["DATA=full"], source=source, folder=tmp_path / "out") == 0
    assert texts(tmp_path / "out" / "01_a.ipynb") == "full\n" and len(calls) == 2
    assert run([], source=source, folder=tmp_path / "out") == 0
    assert len(calls) == 2


# Refreshed notebooks and pages ---------------------------------------------------------------------------


def test_hash_follows_the_code_alone(write_pages):
    notebook = read_json(write_pages("01_a", "x = 1", "y = 2"))
    first = code_hash(notebook)
    notebook["cells"][0]["source"] = "other prose"
    notebook["cells"][2]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "1"}]
    notebook["cells"][2]["source"] = ["x =", " 1"]  # how the file may hold it
    assert code_hash(notebook) == first
    for change in ("x = 2", "x = 1\n", ""):
        notebook["cells"][2]["source"] = change
        assert code_hash(notebook) != first
    notebook["cells"][2]["source"], notebook["cells"][3]["source"] = "x = 1y", " = 2"
    assert code_hash(notebook) != first


FIGURE = """\
import matplotlib.pyplot as plt
from helpers.book.plots import show
fig, ax = plt.subplots(figsize=(1, 1))
show(fig, alt="an empty frame")"""


def test_refresh(write_pages, tmp_path):
    path = write_pages(
        "01_a", "import sys; sys.path.insert(0, '.')", FIGURE, "print(SEED)", tag="readme-figure"
    )
    notebook = nbformat.read(path, 4)
    notebook.metadata["mine"] = "kept"
    notebook.cells[2].metadata["execution"] = {"iopub.status.busy": "2020-01-01T00:00:00Z"}
    nbformat.write(notebook, path)
    runner.refresh_notebook(path, tmp_path / "figures")
    first = path.read_text()
    after = nbformat.read(path, 4)
    nbformat.validate(after)
    assert [cell.id for cell in after.cells] == [cell.id for cell in notebook.cells]
    assert [cell.source for cell in after.cells] == [cell.source for cell in notebook.cells]
    assert [cell.execution_count for cell in after.cells if cell.cell_type == "code"] == [1, 2, 3, 4]
    assert all("execution" not in cell.metadata for cell in after.cells)
    assert after.cells[3].outputs[0].metadata["image/png"]["alt"] == "an empty frame"
    assert texts(path) == "0\n" and after.metadata["mine"] == "kept"
    made = after.metadata["collection"]
    assert made["code_sha256"] == code_hash(after)
    assert set(made) == {"code_sha256", "torch", "torchvision", "python", "device", "date"}
    assert (tmp_path / "figures" / "01_a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in path.parent.iterdir()) == ["01_a.ipynb"]
    runner.refresh_notebook(path, tmp_path / "figures")
    assert path.read_text() == first  # nothing changes but what the code changes


def test_refresh_that_fails_leaves_the_file(write_pages, capsys):
    bad = write_pages("01_a", "print('changed')", "raise KeyError('key')")
    good = write_pages("02_b", "print('fine')")
    before = bad.read_bytes()
    assert runner.refresh([str(bad), str(good)]) == 1
    assert "01_a.ipynb failed in cell code-1 (code cell 3): KeyError: 'key'" in capsys.readouterr().err
    assert bad.read_bytes() == before and texts(good) == "fine\n"
    assert runner.refresh([str(bad.parent / "03_none.ipynb")]) == 2


def test_html(write_pages, tmp_path, capsys):
    path = write_pages("01_a", "print('out' + 'put')")
    notebook = nbformat.read(path, 4)
    notebook.cells[0].source = "# 1. Alpha\n\nAbout $a$."
    nbformat.write(notebook, path)
    runner.refresh_notebook(path)
    assert runner.html(path.parent, tmp_path / "html") == 0
    assert "2 pages are in" in capsys.readouterr().out
    page = (tmp_path / "html" / "01_a.html").read_text()
    assert "Alpha" in page and "output" in page and "<math>" in page
    assert runner.html(tmp_path / "empty", tmp_path / "html") == 1
    assert "`make run` comes first" in capsys.readouterr().err
    notebook.cells[0].source = r"$\nosuchcommand$"
    nbformat.write(notebook, path)
    assert runner.html(path.parent, tmp_path / "html") == 1
    assert "01_a.ipynb, cell title: the formula '\\\\nosuchcommand' does not" in capsys.readouterr().err


def test_an_executed_notebook_says_with_what(write_pages, tmp_path):
    """Its metadata comes from the committed notebook, whose outputs are not shown any more."""
    parameters = "DEVICE: str = 'nowhere'  # where"
    path = write_pages("01_a", "print(DEVICE)", parameters=parameters)
    notebook = nbformat.read(path, 4)
    notebook.metadata["collection"] = {"torch": "0.1", "device": "abacus", "date": "1970-01-01"}
    nbformat.write(notebook, path)
    out = nbformat.read(runner.run_notebook(path, tmp_path / "out", {"DEVICE": "cpu"}), 4)
    made = out.metadata["collection"]
    assert made["device"] == "cpu" and made["torch"] == importlib.metadata.version("torch")
    assert made["code_sha256"] == code_hash(out) and made["date"] > "2020"
