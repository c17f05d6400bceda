"""The house: parameters, installation, failures, interrupts, refreshed notebooks and exported pages."""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from packaging.requirements import Requirement

from helpers.book import run as runner
from helpers.book.install import progress
from helpers.book.pages import PageError
from helpers.book.parameters import (
    Parameter,
    ParameterError,
    code_cells,
    find_notebooks,
    plan,
    read_json,
    read_parameters,
)
from helpers.book.run import code_hash, run

ROOT = Path(__file__).resolve().parents[3]
ALL_TYPES = """\
N: int = 3  # how many µ, at least -2, at most 1,000
RATE: float = 1  # of learning, above 0
DATA: str = "a=b # c"  # with a hash
SET: str = "full"  # auto, sample or full: which"""


def texts(path):
    """What the cells of an executed notebook printed."""
    outputs = [output for cell in code_cells(read_json(path)) for output in cell["outputs"]]
    return "".join("".join(output.get("text", "")) for output in outputs)


# Parameters ----------------------------------------------------------------------------------------------


def test_read_parameters(write_pages):
    assert list(read_parameters(write_pages("01_a", parameters=ALL_TYPES)).values()) == [
        Parameter("N", "int", 3, "how many µ, at least -2, at most 1,000"),
        Parameter("RATE", "float", 1, "of learning, above 0"),
        Parameter("DATA", "str", "a=b # c", "with a hash"),
        Parameter("SET", "str", "full", "auto, sample or full: which"),
    ]
    assert read_parameters(write_pages("02_b", parameters=None)) == {}


@pytest.mark.parametrize(
    "argument, value",
    [
        ("N=7", 7), ("N=-2", -2), ("N=1000", 1000), ("RATE=2", 2.0), ("RATE=1e-3", 1e-3), ("DATA=", ""),
        ("DATA=x=y", "x=y"), ("SET=auto", "auto"), ("SET=sample", "sample"),
    ],
)  # fmt: skip
def test_right_values(write_pages, argument, value):
    path = write_pages("01_a", parameters=ALL_TYPES)
    [(name, found)] = plan([argument], path.parent)[path].items()
    assert name == argument.partition("=")[0] and found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("N=1.5", "N must be a whole number, at least -2, at most 1,000, got '1.5'"),
        ("N=", "N must be a whole number, .*got ''"),
        ("N=-3", "N must be a whole number, at least -2, .*got -3"),
        ("N=1001", "N must be a whole number, .*at most 1,000, got 1001"),
        (f"N={'9' * 20}", "N must be a whole number below 1e+18, .*at most 1,000, got 9"),
        ("RATE=0", "RATE must be a finite number, above 0, got 0.0"),
        ("RATE=fast", "RATE must be a finite number, above 0, got 'fast'"),
        ("RATE=nan", "RATE must be a finite number, above 0, got nan"),
        ("RATE=inf", "RATE must be a finite number, above 0, got inf"),
        ("SET=some", "SET must be auto, sample or full, got 'some'"),
        ("n=1", "n is not a parameter of any notebook, got n=1"),
        ("N", "a parameter must be given as NAME=VALUE, got 'N'"),
        ("QUICK=2", "QUICK must be a whole number, at least 0, at most 1, got 2"),
        ("ONLY=03", "ONLY must be chapters among 01, got '03'"),
    ],
)
def test_wrong_values(write_pages, argument, message):
    path = write_pages("01_a", parameters=ALL_TYPES)
    with pytest.raises(ParameterError, match=re.escape(message).replace(r"\.\*", ".*")):
        plan(["DATA=fine", argument], path.parent)


def test_a_parameter_goes_to_the_chosen_notebooks_that_declare_it(write_pages):
    lines = [f"{name}: int = 1  # its\nC: int = 1  # one for all" for name in "AB"]
    a = write_pages("01_a", parameters=lines[0], quick={"A": 5, "C": 5})
    b = write_pages("02_b", parameters=lines[1])
    source = a.parent
    assert plan(["A=2", "C=3"], source) == {a: {"A": 2, "C": 3}, b: {"C": 3}}
    assert plan(["C=3", "QUICK=1"], source) == {a: {"A": 5, "C": 3}, b: {"C": 3}}
    assert plan(["ONLY=02", "B=4"], source) == plan(["ONLY=2", "B=4"], source) == {b: {"B": 4}}
    assert list(plan(["ONLY=02 01"], source)) == [a, b]
    with pytest.raises(ParameterError, match="A is not a parameter of chapter 02, got A=2"):
        plan(["ONLY=02", "A=2"], source)
    write_pages("02_mine")
    with pytest.raises(
        ParameterError, match="^a chapter must be one notebook, got 01_a.*, 02_b.*, 02_mine.ipynb"
    ):
        plan(["ONLY=02"], source)


def test_checking_needs_the_standard_library_alone():
    def check(*arguments):  # -I -S: no packages but the standard library's
        command = [sys.executable, "-I", "-S", "helpers/book/parameters.py", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert check().returncode == 0
    wrong = check("NO_SUCH_PARAMETER=1")
    table, error = wrong.stderr.rstrip().rsplit("\n", 1)
    assert wrong.returncode == 1 and error.startswith("NO_SUCH_PARAMETER is not a parameter of any notebook")
    assert re.search(r"^  SEED +int +0 .*\[01, 02, .*\]$", table, re.M) and "Traceback" not in table


HERE = """\
DEVICE: str = "auto"  # where
NETWORKS: str = "resnet18"  # which
IMAGES: int = 2  # images
SIZE: int = 32  # pixels
DATA: str = "sample"  # which
BATCH_SIZE: int = 9  # images
TRAIN_IMAGES: int = 99  # images
TEST_IMAGES: int = 9  # images"""


@pytest.mark.parametrize(
    "wrong",
    [
        *("SED=1", "DEVICE=abacus", "BATCH_SIZE=100", "TRAIN_IMAGES=60000"),
        *(f"NETWORKS={names}" for names in ("resnet51", "", "resnet18 vit_b_16", "r3d_18", "googlenet")),
    ],
)
def test_a_wrong_parameter_is_refused_before_any_run(write_pages, tmp_path, wrong):
    source = write_pages("01_a", f"open({str(tmp_path / 'ran')!r}, 'w')", parameters=HERE).parent
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "01_a.ipynb").write_text("the last run's")
    with pytest.raises(ParameterError, match=wrong.partition("=")[0]):
        run([wrong], source, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "out" / "01_a.ipynb").read_text() == "the last run's"


# make ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path):
    """The Makefile, what it needs, and the notebooks, with an interpreter that notes how it is called."""
    folder = tmp_path / "a clone's"
    for name in ("Makefile", "requirements.txt", ".requirements.lock"):
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder)
    (folder / "helpers" / "book").mkdir(parents=True)
    for name in ("parameters.py", "install.py"):
        shutil.copy(ROOT / "helpers" / "book" / name, folder / "helpers" / "book")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    stub, script = tmp_path / "python", tmp_path / "stub.py"
    stub.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
    script.write_text(
        f"""\
import os, subprocess, sys
args = sys.argv[1:]
if args[0] == "-c" or args[0].startswith("helpers/"):
    sys.exit(subprocess.run([{sys.executable!r}, *args]).returncode)
with open({str(tmp_path / "calls")!r}, "a") as f:
    f.write(repr(args) + "\\n")
if args[:2] == ["-m", "venv"]:
    os.makedirs(".venv/bin", exist_ok=True)
    if not os.path.exists(".venv/bin/python"):
        os.symlink({str(stub)!r}, ".venv/bin/python")
if args[:2] == ["-m", "pip"]:
    print("Collecting torch\\n" * 40 + "the end")
    sys.exit(os.path.exists("break"))
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
        return done, [eval(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    make.folder = folder
    return make


VENV, RUN = ["-m", "venv", ".venv"], ["-m", "helpers.book.run", "run"]
PIP, LOCK = (["-m", "pip", "install", "--requirement", f] for f in ("requirements.txt", ".requirements.lock"))


def test_make_installs_once_and_quietly(clone):
    done, calls = clone("run")
    assert done.returncode == 0 and calls == [VENV, PIP, RUN]
    assert done.stdout + done.stderr == (
        "Installing requirements.txt into .venv/ (PyTorch is large: some minutes)\n"
    )
    assert "Collecting torch" in (clone.folder / "build" / "install.log").read_text()
    assert clone("run")[1] == [RUN]
    assert clone("run", "LOCKED=1")[1] == [VENV, LOCK, RUN]
    assert clone("run", "LOCKED=1")[1] == [RUN]
    os.utime(clone.folder / "requirements.txt", (time.time() + 60,) * 2)
    assert clone("html")[1] == [VENV, PIP, ["-m", "helpers.book.run", "html"]]


def test_make_takes_up_a_broken_installation(clone):
    (clone.folder / "break").touch()
    done, calls = clone("run")
    assert done.returncode == 2 and calls == [VENV, PIP]
    assert "the end\nThe installation failed; all that pip said is in" in done.stderr
    assert done.stderr.count("Collecting") < 20
    (clone.folder / "break").unlink()
    assert clone("run")[1] == [VENV, PIP, RUN]


def test_progress_counts_what_pip_says():
    log = """\
Collecting torch>=2.9 (from -r requirements.txt (line 1))
  Downloading torch-2.9.0-cp311-cp311-manylinux_2_28_x86_64.whl.metadata (30 kB)
Collecting tqdm
  Using cached tqdm-4.66.6-py3-none-any.whl (78 kB)
Downloading torch-2.9.0-cp311-cp311-manylinux_2_28_x86_64.whl (899.8 MB)
"""
    assert progress("", 1) == f"[{' ' * 30}] 0 of 0 packages fetched, 1 installed"
    assert progress(log, 1) == f"[{'#' * 22}{' ' * 8}] 2 of 2 packages fetched, 1 installed"


def test_make_passes_parameters(clone):
    value = 'NETWORKS=it\'s $x, "two" words'
    done, calls = clone("run", "QUICK=1", "ONLY=05 09", value)
    assert done.returncode == 0 and calls[-1] == [*RUN, value, "ONLY=05 09", "QUICK=1"]
    # bench has parameters of its own, so it checks them.
    odd = 'ANY=it\'s "two" words; $x'
    assert clone("bench", odd)[1] == [["-m", "helpers.book.bench", odd]]
    assert clone("html", "EXECUTED=1")[1] == [["-m", "helpers.book.run", "html", "--executed"]]


def test_make_checks_parameters_before_it_installs(clone):
    done, calls = clone("run", "BLOCKS=2")
    assert done.returncode == 2 and calls == [] and not (clone.folder / ".venv").exists()
    assert "\n\nBLOCKS must be a whole number, at least 3, got 2\n" in done.stderr


def test_make_refuses_parameters_where_none_is_read(clone):
    done, calls = clone("html", "EPOCHS=3")
    assert done.returncode == 2 and calls == []
    assert "EPOCHS: only make run and make bench take parameters" in done.stderr
    done, calls = clone("run", "EPOCHS")
    assert done.returncode == 2 and calls == []
    assert "EPOCHS: there is no such target; a parameter is NAME=VALUE" in done.stderr
    for wrong in ("LOCKED=yes", "EXECUTED=no"):
        done, calls = clone("html", wrong)
        assert done.returncode == 2 and calls == []
        assert f"LOCKED and EXECUTED must be 0 or 1, got {wrong.partition('=')[2]}" in done.stderr


def test_make_refuses_an_old_python(clone, tmp_path):
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\ncase "$1 $2" in "-c ") ;; -V*) echo Python 3.9.1 ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    done, calls = clone("run", python=old)
    assert done.returncode == 2 and calls == []
    assert f"Python 3.10 or later is needed, {old} is Python 3.9.1" in done.stderr
    done, calls = clone("run", python="")
    assert "PYTHON is empty: name an interpreter" in done.stderr and calls == []
    done, calls = clone("run", python=tmp_path / "none")
    assert f"There is no Python at {tmp_path / 'none'}" in done.stderr and calls == []


def test_make_lists_every_target(clone):
    done, calls = clone()
    targets = re.findall(r"^make (\w+)", done.stdout, re.M)
    phony = re.search(r"^TARGETS := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert set(targets) == set(phony) - {"help", "check", "python"} and calls == []


def test_lock_fits_requirements_and_outputs():
    lines = {
        name: [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
        for name in ("requirements.txt", ".requirements.lock")
    }
    locked = dict(line.split("==") for line in lines[".requirements.lock"])
    assert list(locked) == sorted(locked)
    for line in lines["requirements.txt"]:
        requirement = Requirement(line.partition("#")[0])
        assert requirement.specifier and requirement.specifier.contains(locked[requirement.name])
    for path in find_notebooks():
        made = read_json(path)["metadata"]["collection"]
        assert {name: made[name] for name in ("torch", "torchvision")}.items() <= locked.items()


# Running -------------------------------------------------------------------------------------------------


@pytest.mark.notebooks
def test_run(write_pages, tmp_path, capsys):
    source = write_pages("01_a", "print('seed', SEED)", quick={"SEED": 5}).parent
    write_pages("02_b", "print('the table')", tag="headline", parameters="OTHER: str = 'x'  # x")
    out = tmp_path / "out"
    assert run(["SEED=8"], source, out) is None
    said = capsys.readouterr().out
    assert re.search(r"01_a +done +[\d.]+ s\n02_b +done", said) and "2 of 2 notebooks ran" in said
    assert "\nthe table\n" in said and "seed" not in said
    assert texts(out / "01_a.ipynb") == "seed 8\n"
    assert sorted(p.name for p in out.iterdir()) == ["01_a.ipynb", "02_b.ipynb"]
    assert run(["QUICK=1", "ONLY=01"], source, out) is None
    assert texts(out / "01_a.ipynb") == "seed 5\n"
    assert sorted(p.name for p in out.iterdir()) == ["01_a.ipynb"]


@pytest.mark.notebooks
def test_kernel_is_this_interpreter_at_the_root(write_pages, tmp_path, monkeypatch):
    # A kernel of the same name outside must not be taken.
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps({"argv": ["/nonexistent"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.chdir(tmp_path)
    path = write_pages("01_a", "import sys, os; print(sys.executable, os.getcwd())")
    assert texts(runner.run_notebook(path, tmp_path / "out")) == f"{sys.executable} {ROOT}\n"


@pytest.mark.notebooks
def test_failing_notebook(write_pages, tmp_path, capsys):
    source = write_pages("01_good", "print('first')", tag="headline").parent
    write_pages("02_bad", "print('begun')", "1 / 0", "print('never')")
    write_pages("03_dead", "import os; os._exit(3)")
    write_pages("04_good", "print('last')", tag="headline")
    out = tmp_path / "out"
    out.mkdir()
    (out / "02_bad.ipynb").write_text("of an earlier run")
    (out / "09_gone.unfinished.ipynb").write_text("of an earlier run")
    wrong, said = run(["SEED=1"], source, out), capsys.readouterr().out
    assert "first" in said and "last" in said and "2 of 4 notebooks ran" in said
    assert "02_bad.ipynb failed in cell code-1, In [4]: ZeroDivisionError: division by zero\n" in wrong
    assert "03_dead.ipynb failed in cell code-0, In [3]: DeadKernelError" in wrong
    assert sorted(p.name for p in out.iterdir()) == [
        "01_good.ipynb", "02_bad.unfinished.ipynb", "03_dead.unfinished.ipynb", "04_good.ipynb",
    ]  # fmt: skip
    as_far = texts(out / "02_bad.unfinished.ipynb")
    assert "begun" in as_far and "never" not in as_far
    assert [p.name for p in find_notebooks(out)] == ["01_good.ipynb", "04_good.ipynb"]


def test_a_kernel_that_does_not_start_costs_its_notebook(write_pages, tmp_path, monkeypatch):
    path, start = write_pages("01_a"), papermill.execute_notebook

    def execute_notebook(*args, **how):
        return start(*args, **how | {"extra_arguments": ["--f=/"]})

    monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)
    words = "^01_a.ipynb failed before its first cell: RuntimeError"
    with pytest.raises(runner.NotebookFailure, match=words):
        runner.run_notebook(path, tmp_path / "out")


# A kernel whose control thread flushes after the main thread has closed the sockets: a busy machine does it.
LATE_FLUSH = """
import threading, time
from ipykernel.iostream import OutStream
flush = OutStream.flush
def late(self):
    if threading.current_thread().name == "Control":
        time.sleep(1)
        raise OSError("Socket operation on non-socket")
    flush(self)
OutStream.flush = late
"""


@pytest.mark.notebooks
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_leaves_no_whole_looking_notebook(write_pages, tmp_path, kind):
    begun, out = tmp_path / "begun", tmp_path / "out"
    source = write_pages("01_a", LATE_FLUSH, "print('done')").parent
    wait = f"open({str(begun)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    write_pages("02_b", "import os, time", wait)
    out.mkdir()
    (out / "02_b.ipynb").write_text("of an earlier run")
    code = f"""
import functools, signal, sys
from pathlib import Path
from helpers.book import run
signal.signal(signal.SIGINT, signal.default_int_handler)
run.COMMANDS["run"] = functools.partial(run.run, source=Path({str(source)!r}), folder=Path({str(out)!r}))
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
    assert process.returncode == (1 if kind == signal.SIGINT else -kind)
    assert [p.name for p in find_notebooks(out)] == ["01_a.ipynb"]
    if kind == signal.SIGINT:
        assert "interrupted" in said and "Traceback" not in said
        with pytest.raises(ProcessLookupError):
            for _ in range(600):  # the system may take a moment to remove a process that is dead
                os.kill(int(begun.read_text()), 0)
                time.sleep(0.1)


def test_full_data_is_downloaded_first(write_pages, tmp_path, monkeypatch):
    source = write_pages("01_a", parameters=HERE).parent
    calls, load = [], runner.load_mnist

    def download(data, *sizes):
        calls.append(data)
        if calls == ["full"]:
            raise RuntimeError("Error downloading MNIST")
        return load("sample", *sizes)

    monkeypatch.setattr(runner, "load_mnist", download)
    monkeypatch.setattr(runner, "run_notebook", lambda path, *_: calls.append(path.stem) or path)
    with pytest.raises(ParameterError, match="Error downloading MNIST"):
        run(["DATA=full"], source, tmp_path / "out")  # nothing runs without the data
    assert run(["DATA=full"], source, tmp_path / "out") is None
    assert calls == ["full", "full", "01_a"]


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
from IPython.display import display
display({"image/png": "iVBORw0KGgo="}, metadata={"image/png": {"alt": "an empty frame"}}, raw=True)"""


@pytest.mark.notebooks
def test_refresh(write_pages, tmp_path, monkeypatch):
    path = write_pages("01_a", FIGURE, tag="readme-figure")
    notebook = nbformat.read(path, 4)
    notebook.cells.append(nbformat.v4.new_code_cell("print(SEED)", id="last"))
    notebook.metadata["mine"] = "kept"
    nbformat.write(notebook, path)
    monkeypatch.setattr(runner, "BUILD", tmp_path / "build")
    (tmp_path / "figures").mkdir()
    runner.refresh([path], tmp_path / "figures")
    first = path.read_text()
    after = nbformat.read(path, 4)
    nbformat.validate(after)
    assert [cell.id for cell in after.cells] == [cell.id for cell in notebook.cells]
    assert [cell.source for cell in after.cells] == [cell.source for cell in notebook.cells]
    assert [cell.execution_count for cell in after.cells if cell.cell_type == "code"] == [1, 2, 3]
    assert all(not cell.metadata.keys() & {"execution", "papermill"} for cell in after.cells)
    assert after.cells[2].outputs[0].metadata["image/png"]["alt"] == "an empty frame"
    assert texts(path) == "0\n" and after.metadata["mine"] == "kept"
    made = after.metadata["collection"]
    assert made["code_sha256"] == code_hash(after)
    assert set(made) == {"code_sha256", "torch", "torchvision", "device", "date"}
    assert (tmp_path / "figures" / "01_a.png").read_bytes() == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["01_a.ipynb"]
    runner.refresh([path], tmp_path / "figures")
    assert path.read_text() == first  # nothing changes but what the code changes


@pytest.mark.notebooks
def test_refresh_that_fails_leaves_the_file(write_pages, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "BUILD", tmp_path / "build")
    bad = write_pages("01_a", "print('changed')", "raise KeyError('key')")
    before = bad.read_bytes()
    assert "01_a.ipynb failed in cell code-1, In [3]: KeyError: 'key'" in runner.main(["refresh", str(bad)])
    assert bad.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("--help", 0, "refresh"),
        ("", 2, "required: command"),
        ("walk", 2, "invalid choice: 'walk'"),
        ("html --all", 2, "unrecognized arguments: --all"),
        ("refresh nothere.ipynb", 2, "there is no file nothere.ipynb"),
    ],
)
def test_the_command_line(arguments, status, said, capsys):
    with pytest.raises(SystemExit) as ended:
        runner.main(arguments.split())
    assert ended.value.code == status and said in "".join(capsys.readouterr())


def test_html(write_pages, tmp_path, capsys):
    path = write_pages("01_a")
    runner.html(False, path.parent, tmp_path / "html")
    assert "2 pages are in" in capsys.readouterr().out
    assert "01_a" in (tmp_path / "html" / "01_a.html").read_text()
    with pytest.raises(PageError, match="`make run` comes first"):
        runner.html(False, tmp_path / "empty", tmp_path / "html")


def test_a_page_that_cannot_be_made_is_an_error_of_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "EXECUTED", tmp_path)
    assert runner.main(["html", "--executed"]) == "there are no notebooks to export: `make run` comes first"


@pytest.mark.notebooks
def test_an_executed_notebook_says_with_what(write_pages, tmp_path):
    """Its metadata comes from the committed notebook, whose outputs are not shown any more."""
    path = write_pages("01_a", "print(DEVICE)", parameters="DEVICE: str = 'nowhere'  # where")
    notebook = nbformat.read(path, 4)
    notebook.metadata["collection"] = {"torch": "0.1", "device": "abacus", "date": "1970-01-01"}
    nbformat.write(notebook, path)
    out = nbformat.read(runner.run_notebook(path, tmp_path / "out", {"DEVICE": "cpu"}), 4)
    made = out.metadata["collection"]
    assert made["device"] == "cpu" and made["torch"] == importlib.metadata.version("torch")
    assert made["code_sha256"] == code_hash(out) and made["date"] > "2020"
