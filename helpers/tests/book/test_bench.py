"""The benchmark: each network is the same function and holds what its name says; and it runs anywhere."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers.book import bench, networks

CPU = torch.device("cpu")


@pytest.mark.parametrize("parts", ["blocks", "stages", "selective"])
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_checkpoints_change_no_gradient(name, parts):
    plain, ours = (networks.build(name, method).double() for method in ("unfused", f"checkpoint, {parts}"))
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        q.data.copy_(p.data)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    want, got = plain(x), ours(x)
    assert torch.equal(got, want)
    assert any("forward" in vars(module) for module in ours.modules())
    grad_out = torch.randn_like(want)
    want.backward(grad_out)
    got.backward(grad_out)
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


def test_front_has_every_method():
    titles = bench.tables(torch.device("cpu"), False, True)
    for name, (title, table) in zip(networks.NETWORKS, titles.items(), strict=True):
        assert title.startswith(f"{name}, 16x3x160x160, float32")
        assert table.methods[0] == "unfused" and len(table.methods) == 12 + (name == "resnet50")
        prices = [method for method in table.methods if method.startswith("remat, ")]
        assert prices == [f"remat, {price}" for price in (0, 9, 32, 64, 150, 300, 600, 1200)]
        assert table.methods[9:12] == [f"checkpoint, {parts}" for parts in ("blocks", "stages", "selective")]
        assert ("compile, 0.4" in table.methods) == (name == "resnet50")


def test_parameters_are_checked_before_anything_runs(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(bench, "BUILD", tmp_path)
    monkeypatch.setattr(bench, "run", lambda *arguments: called.append(arguments))
    assert bench.main(["TIME_LIMIT=2.5", "TABLE=MNIST", "DEVICE=cpu", "REPEATS=3", "QUICK=1"]) is None
    [(found, path, repeats, minutes)] = called
    first, *others = found
    assert first == "MNIST, 64x1x28x28, float32" and (repeats, minutes) == (3, 2.5)
    assert others == [first + ", allocator keeps its memory"] * (sys.platform == "linux")
    assert path == tmp_path / "bench_cpu_MNIST.json" and found[first].device == torch.device("cpu")
    assert bench.main(["FRONT=1", "QUICK=1", "DEVICE=cpu"]) is None
    assert len(called[1][0]) == len(networks.NETWORKS) and called[1][1].name == "front_cpu.json"
    for wrong, said in {
        "FRONT=much": "FRONT must be a whole number, at least 0, at most 1, got 'much'",
        "TIME_LIMIT=-1": "TIME_LIMIT must be a finite number, at least 0",
        "TIME_LIMIT=inf": "TIME_LIMIT must be a finite number",
        "REPEATS=0": "REPEATS must be a whole number, at least 1, got 0",
        "TABLE=vgg99": "TABLE must be part of a title, got 'vgg99'; there are: MNIST",
        "DEVICE=abacus": "DEVICE must be one of",
        "SPEED=1": "SPEED=1 is no parameter",
        "TABLE": "TABLE is no parameter",
    }.items():
        assert said in bench.main([wrong, *([] if "DEVICE" in wrong else ["DEVICE=cpu"])])
    assert len(called) == 2


@pytest.mark.parametrize("how", ["ends", "is stopped", "has errors"])
def test_a_record_is_replaced_by_a_run_that_ends(monkeypatch, tmp_path, how):
    record, build = tmp_path / "record", tmp_path / "build"
    monkeypatch.setattr(bench, "MEASUREMENTS", record)
    monkeypatch.setattr(bench, "BUILD", build)
    bench.write(record / "bench_cpu_MNIST.json", {"tables": "the last run's"})

    def run(tables, path, *_):
        row = {"name": "a"} | ({"error": "b"} if how == "has errors" else {})
        bench.write(path, {"tables": {"new": [row]}})
        if how == "is stopped":
            raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", run)
    wrong = bench.main(["DEVICE=cpu", "TABLE=MNIST"])
    said = {"is stopped": "interrupted", "has errors": "not all was measured, so the record stays"}
    assert wrong is None if how == "ends" else said[how] in wrong
    kept = json.loads((record / "bench_cpu_MNIST.json").read_text())["tables"]
    assert kept == ({"new": [{"name": "a"}]} if how == "ends" else "the last run's")


def test_every_table_of_a_card_has_a_title():
    titles = list(bench.tables(torch.device("cuda"), False, False))
    for name in networks.NETWORKS:
        for n in (184, 272):
            for mode in ("float32", "bfloat16 autocast, channels_last"):
                assert f"{name}, {n}x3x224x224, {mode}" in titles
    for part in ("MNIST", "largest batch", "errors"):
        assert any(part in title for title in titles)


def breaks(table, method):
    if method == "bad":
        raise RuntimeError("out of everything\nand more")
    return {"peak": 3 * 2**20}


@pytest.mark.parametrize("methods", [["good", "bad", "other"], ["bad", "good", "other"]])
def test_a_method_that_fails_costs_its_own_row(methods, tmp_path):
    path = tmp_path / "record.json"
    bench.write(path, {"tables": {}})
    bench.fill(path, "one", bench.Table(breaks, methods, "MNIST", (2, 1, 28, 28), CPU, False), 1)
    rows = json.loads(path.read_text())["tables"]["one"]
    assert [row["name"] for row in rows] == methods
    for row in rows:
        bad = {"error": "RuntimeError: out of everything"}
        assert row == {"name": row["name"]} | (bad if row["name"] == "bad" else {"peak": 3 * 2**20})
    lines = bench.shown(rows).splitlines()
    assert lines[0].split() == ["name", "peak", "error"]
    assert "out of everything" in lines[1 + methods.index("bad")] and "3,145,728" in lines[-1]
    assert lines[-1].endswith(" 1.000") == (methods[0] == "good")


@pytest.fixture
def record(monkeypatch, tmp_path):
    """What a quick run of these tables leaves in its one file."""
    monkeypatch.setattr(bench, "BUILD", tmp_path)

    def run(only="", time_limit=0):
        arguments = ["DEVICE=cpu", "REPEATS=1", "QUICK=1", f"TABLE={only}", f"TIME_LIMIT={time_limit}"]
        assert bench.main(arguments) is None
        (path,) = tmp_path.iterdir()
        return json.loads(path.read_text())

    return run


# One of each kind of table; a process for each.
@pytest.mark.parametrize("only", ["MNIST", "largest", "errors, resnet"])
def test_runs_from_end_to_end(only, record):
    record = record(only)
    assert {"date", "device", "torch", "memory"} < record.keys() and record["tables"]
    for title, rows in record["tables"].items():
        assert only in title
        for row in rows:
            assert "error" not in row, (title, row)
    (title, rows), *_ = record["tables"].items()
    names = [row["name"] for row in rows]
    if only == "MNIST":
        layers = ["unfused", "tutorial", "checkpoint", "fused, whole batch", "fused, slabs"]
        assert names == [*layers, "remat, 0", "remat, 150", "remat, 600"]
        assert all(row["peak"] > row["forward"] > 0 and row["time_ratio"] > 0 for row in rows)
        assert rows[0]["time_ratio"] == 1 and rows[-1]["forward"] < rows[0]["forward"]
    if only == "largest":
        batches = [row["batch"] for row in rows]
        assert names == ["unfused", "remat, 0", "remat, 150"] and 0 < batches[0] < batches[1]
    if only.startswith("errors"):
        assert names == ["remat, 600"] and len(record["tables"]) == 2
        assert all(row["forward_equal"] and row["difference"] < 1 for row in rows)


def breaks_off(table, method):
    if method == "dies":
        os._exit(7)
    if method == "sleeps":
        time.sleep(600)
    return {"peak": 1}


def table_of(*methods):
    table = bench.Table(breaks_off, list(methods), "MNIST", (2, 1, 28, 28), CPU, False)
    return lambda *_: {"one": table}


def test_a_table_that_breaks_off_keeps_its_rows(monkeypatch, record):
    monkeypatch.setattr(bench, "tables", table_of("first", "dies"))
    last = {"name": "all", "error": "the process ended with 7"}
    assert record()["tables"] == {"one": [{"name": "first", "peak": 1}, last]}


def test_a_table_that_takes_too_long_is_stopped(monkeypatch, record):
    monkeypatch.setattr(bench, "tables", table_of("first", "sleeps"))
    rows = record(time_limit=0.01)["tables"]["one"]  # the first row may be there already
    assert rows[-1] == {"name": "all", "error": "stopped at the time limit"}


def test_what_is_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "MEASUREMENTS", tmp_path)
    about, tables = {"date": "2020-01-02", "device": "a card", "torch": "2.9"}, {"MNIST": [{"name": "plain"}]}
    bench.write(tmp_path / "bench_cuda.json", {**about, "memory": "how", "tables": tables})
    assert bench.recorded("bench_cuda") == ("2020-01-02, a card, torch 2.9", tables)


def test_torch_and_torchvision_are_enough():
    """What a bare machine lacks is not imported, by the bench or by what it imports."""
    absent = "matplotlib tqdm IPython papermill nbformat nbclient nbconvert pytest triton scipy".split()
    source = f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
    source += "from helpers.book import bench\n"
    source += "sys.exit(bench.main(['DEVICE=cpu', 'TABLE=nothing']))\n"
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "TABLE must be part of a title" in done.stderr, done.stderr
