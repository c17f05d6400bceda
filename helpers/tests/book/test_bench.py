"""The benchmark: each network is the same function and holds what its name says; and it runs anywhere."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.book import bench, networks


@pytest.mark.parametrize("under_checkpoints", [networks.block_by_block, networks.stage_by_stage])
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "densenet121"])
def test_checkpoints_change_no_gradient(name, under_checkpoints):
    make = partial(bench.real_network, name)
    plain, ours = make().double(), under_checkpoints(make()).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    want, got = plain(x), ours(x)
    assert torch.equal(got, want)
    assert any("forward" in vars(module) for module in ours.modules())
    grad_out = torch.randn_like(want)
    want.backward(grad_out)
    got.backward(grad_out)
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


def test_front_has_every_way():
    for name in networks.NETWORKS:
        ways = list(networks.front_of(name))
        assert ways[0] == "unfused" and ways[1:9] == [f"remat, {q}" for q in networks.FRONT_PRICES]
        assert ways[9:] == ["checkpoint, blocks", "checkpoint, stages", "compile, 0.4"][: len(ways) - 9]
        assert ("compile, 0.4" in ways) == (name == "resnet50")


def test_parameters_are_checked_before_anything_runs(monkeypatch, capsys, tmp_path):
    called = []
    monkeypatch.setattr(bench, "BUILD", tmp_path)
    monkeypatch.setattr(bench, "run", lambda *arguments: called.append(arguments))
    assert bench.main(["TIME_LIMIT=2.5", "ONLY=MNIST", "DEVICE=cpu", "REPEATS=3", "QUICK=1"]) == 0
    [(device, found, path, repeats, minutes)] = called
    assert found[0][0] == "MNIST network, 64x1x28x28, float32" and (repeats, minutes) == (3, 2.5)
    if sys.platform == "linux":
        assert [environment for *_, environment in found] == [{}, bench.KEEPS_MEMORY]
        assert found[1][0] == found[0][0] + ", allocator keeps its memory"
    assert path == tmp_path / "bench_cpu_MNIST.json" and device == torch.device("cpu")
    assert bench.main(["FRONT=1", "QUICK=1", "DEVICE=cpu"]) == 0
    assert len(called[1][1]) == len(networks.NETWORKS) and called[1][2].name == "front_cpu.json"
    for wrong, said in {
        "FRONT=much": "FRONT must be a whole number, at least 0, at most 1, got 'much'",
        "TIME_LIMIT=-1": "TIME_LIMIT must be a finite number, at least 0",
        "TIME_LIMIT=inf": "TIME_LIMIT must be a finite number",
        "REPEATS=0": "REPEATS must be a whole number, at least 1, got 0",
        "ONLY=vgg99": "ONLY must be part of a title, got 'vgg99'; there are: MNIST",
        "DEVICE=abacus": "DEVICE must be one of",
        "SPEED=1": "SPEED is no parameter",
    }.items():
        assert bench.main([wrong, *([] if "DEVICE" in wrong else ["DEVICE=cpu"])]) == 2
        assert said in capsys.readouterr().err
    assert len(called) == 2


def test_every_table_of_a_card_has_a_title():
    titles = list(bench.tables(torch.device("cuda"), False, False))
    for name in networks.NETWORKS:
        for n in (184, 272):
            for mode in (bench.TF32, bench.BFLOAT16):
                assert f"{name}, {n}x3x224x224, {mode}" in titles
    for part in ("MNIST", "time by kind", "largest batch", "errors"):
        assert any(part in title for title in titles)


class Breaks(nn.Module):
    def forward(self, x):
        raise RuntimeError("out of everything\nand more")


@pytest.mark.parametrize("first", [False, True])
def test_a_network_that_fails_costs_its_own_row(first):
    made = {"good": nn.Linear(3, 3), "bad": Breaks(), "other": nn.Linear(3, 3)}
    made = {name: made[name] for name in (("bad", "good", "other") if first else made)}
    said = [dict(row) for row in bench.compare(made, torch.randn(2, 3), 2)]
    assert [row["name"] for row in said] == 2 * list(made)
    assert not any("seconds" in row for row in said[:3])
    found = {row["name"]: row for row in said}
    assert found["bad"] == {"name": "bad", "error": "RuntimeError: out of everything"}
    assert found["other"]["seconds"] > 0 and ("time_ratio" in found["other"]) == (not first)
    text = bench.table(said[3:])
    assert "out of everything" in text and ("nan" in text) == first


@pytest.fixture
def record(monkeypatch, tmp_path):
    """What a quick run of these tables leaves in its one file."""
    monkeypatch.setattr(bench, "BUILD", tmp_path)

    def run(only="", time_limit=0):
        arguments = ["DEVICE=cpu", "REPEATS=1", "QUICK=1", f"ONLY={only}", f"TIME_LIMIT={time_limit}"]
        assert bench.main(arguments) == 0
        (path,) = tmp_path.iterdir()
        return json.loads(path.read_text())

    return run


# One of each kind of table; a process for each.
@pytest.mark.parametrize("only", ["MNIST", "time by kind", "largest", "errors, mobilenet"])
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
    if only == "time by kind":
        assert names == ["unfused", "remat, 0", "remat, 150"]
        for row in rows:
            assert row["convolution"] > 0 and row["norm"] > 0 and row["calls"] > 100
            assert row["other"] < 0.5 * sum(row[kind] for kind in bench.KINDS)
    if only == "largest":
        batches = [row["batch"] for row in rows]
        assert names == ["unfused", "remat, 0", "remat, 150"] and 0 < batches[0] < batches[1]
    if only.startswith("errors"):
        assert names == ["remat, 0", "remat, 150", "remat, 600"] and len(record["tables"]) == 2
        assert all(row["forward_equal"] and row["difference"] < 1 for row in rows)


def breaks_off(way, device, repeats):
    yield {"name": "first"}
    if way == "raises":
        raise RuntimeError("out of everything")
    if way == "dies":
        os._exit(7)
    time.sleep(600)


@pytest.mark.parametrize("way, status", [("raises", 1), ("dies", 7)])
def test_a_table_that_breaks_off_keeps_its_rows(monkeypatch, record, way, status):
    monkeypatch.setattr(bench, "tables", lambda *_: {"one": partial(breaks_off, way)})
    last = {"name": "all", "error": f"the process ended with {status}"}
    assert record()["tables"] == {"one": [{"name": "first"}, last]}


def test_a_table_that_takes_too_long_is_stopped(monkeypatch, record):
    monkeypatch.setattr(bench, "tables", lambda *_: {"one": partial(breaks_off, "sleeps")})
    rows = record(time_limit=0.01)["tables"]["one"]  # the first row may be there already
    assert rows[-1] == {"name": "all", "error": "stopped at the time limit"}


def test_what_is_recorded_is_shown_and_that_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "MEASUREMENTS", tmp_path)
    assert bench.recorded("cuda") == "There is no record of cuda yet: `make bench DEVICE=cuda` makes one."
    rows = [{"name": "plain", "peak": 2**20, "forward": 2**20}]
    record = {"date": "2020-01-02", "device": "a card", "tables": {"MNIST, x": rows, "other": rows}}
    (tmp_path / "bench_cuda.json").write_text(json.dumps(record))
    shown = bench.recorded("cuda", "MNIST")
    assert "date 2020-01-02, device a card" in shown and "1.0 MiB 1.000" in shown
    assert "other" not in shown


def test_torch_torchvision_and_matplotlib_are_enough():
    """What a bare machine lacks is not imported, by the bench or by what it imports."""
    absent = "tqdm IPython papermill nbformat nbclient nbconvert hypothesis pytest triton scipy".split()
    source = f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
    source += "from helpers.book import bench\n"
    source += "assert bench.main(['DEVICE=cpu', 'ONLY=nothing']) == 2\n"
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "ONLY must be part of a title" in done.stderr, done.stderr
