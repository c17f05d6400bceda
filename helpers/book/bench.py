"""`make bench`: memory and time of networks, each next to the unfused one, in one run.

    python -m helpers.book.bench [DEVICE=cuda] [REPEATS=7] [TABLE=resnet] [TIME_LIMIT=9] [QUICK=1] [FRONT=1]

prints tables and writes build/bench_<device>.json (with TABLE, a record of its own name), each row as soon as
it is there; a run that ends, and is not quick, puts the record in its place in data/measurements/. What fails
costs its own row, which carries the error. Torch and torchvision are enough to run all of it.

Times are forward and backward of the network; all methods take turns, a ratio is taken within each round,
and the median of the ratios is shown with their quartiles. Each table has a process of its own, as a training
has: memory that an earlier one left to the process would speed up those that use the most. On Linux a tensor
of over 32 MiB is fresh pages at each allocation, which punishes those that use the most, too: there each
table with times is measured again (and of the front, only so), in a process whose allocator keeps its memory.
"""

import bisect
import contextlib
import datetime
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from helpers.book.networks import LAYERS, NETWORKS, build
from helpers.book.parameters import NOTEBOOKS, QUICK, Parameter, ParameterError, read_json
from helpers.book.training import pick_device
from helpers.memory import MemoryTrace, describe_device, memory_device
from helpers.predict import largest_batch
from helpers.remat.compare import clock, compare
from helpers.remat.record import MIB

PARAMETERS = {
    parameter.name: parameter
    for parameter in (
        Parameter("DEVICE", "str", "auto", "auto, cpu, or an accelerator"),
        Parameter("REPEATS", "int", 7, "rounds of timing, at least 1"),
        Parameter("TABLE", "str", "", "measure the tables with this in their title"),
        Parameter("TIME_LIMIT", "float", 0, "minutes, at least 0, at most 10,000; 0: 9 on an accelerator"),
        Parameter("FRONT", "int", 0, "1 for chapter 8's record, at least 0, at most 1"),
        QUICK,
    )
}
MEASUREMENTS, BUILD = NOTEBOOKS.parent / "data" / "measurements", NOTEBOOKS.parent / "build"


class Table(NamedTuple):
    """A network with inputs of a shape, trained by some methods; a row has what ``measure`` says of one.

    With ``amp`` in channels_last and bfloat16 autocast, else in float32 with PyTorch's defaults.
    """

    measure: Callable[["Table", str], dict]
    methods: list[str]
    network: str
    shape: tuple[int, ...]
    device: torch.device
    amp: bool

    def build(self, method: str) -> tuple[nn.Module, Tensor]:
        """The network for this method and an input, always the same."""
        torch.manual_seed(0)
        layout = torch.channels_last if self.amp else torch.contiguous_format
        network, x = build(self.network, method), torch.randn(self.shape)
        return network.to(self.device, memory_format=layout), x.to(self.device, memory_format=layout)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def step(self, network: nn.Module, x: Tensor, mark=lambda label: None) -> None:
        """Forward and backward."""
        with self.autocast():
            out = network(x)
        mark("end of forward")
        out.sum().backward()
        network.zero_grad()


def memory(table: Table, method: str) -> dict:
    """Peak and end of forward, in bytes above the start; ``tensor_peak`` as in `MemoryTrace`."""
    network, x = table.build(method)
    table.step(network, x)  # libraries choose their algorithms
    with MemoryTrace(table.device) as trace:
        table.step(network, x, trace.mark)
    found = {"peak": trace.peak, "forward": trace.marks["end of forward"]}
    return found if trace.tensor_peak is None else {**found, "tensor_peak": trace.tensor_peak}


def errors(table: Table, method: str) -> dict:
    """How far gradients under `remat` are from plain's, next to how far plain's are from float64's."""
    model, x = table.build("unfused")
    with table.autocast():
        found = compare(model, x, max_cost=float(method.removeprefix("remat, ")), rounds=1)
    return {"forward_equal": found.equal, "difference": found.difference, "rounding": found.rounding}


def largest(budget: int, table: Table, method: str) -> dict:
    """The largest batch whose step fits into ``budget`` bytes, with momentum, next to the predicted one."""
    device, model = table.device, build(table.network, "unfused")
    price = None if method == "unfused" else float(method.removeprefix("remat, "))
    kind = "cpu" if device.type == "cpu" else "cuda"
    predicted = largest_batch(model, table.shape, budget, max_cost=price, device_type=kind)
    if device.type == "cuda":  # so that libraries, too, see no more
        torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.mem_get_info()[1])

    def too_large(n: int) -> bool:
        torch.accelerator.empty_cache()
        try:
            with MemoryTrace(device) as trace:
                network, x = table._replace(shape=(n, *table.shape)).build(method)
                optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
                for _ in range(2):  # the first makes the momentum
                    network(x).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
        except torch.OutOfMemoryError:
            return True
        return trace.peak > budget

    batches = range(0, 2 * predicted + 2, max(1, predicted // 32))
    found = bisect.bisect_left(batches, True, lo=1, key=too_large)
    return {"budget": budget, "predicted": predicted, "batch": batches[found - 1]}


REMATS = ["remat, 0", "remat, 150", "remat, 600"]
USUAL, FEW = ["unfused", *REMATS, "checkpoint, blocks"], ["unfused", *REMATS[:2]]
FRONT = ["unfused", *[f"remat, {price}" for price in (0, 9, 32, 64, 150, 300, 600, 1200)]]
FRONT += [f"checkpoint, {parts}" for parts in ("blocks", "stages", "selective")]
KEPT = ", allocator keeps its memory"


def tables(device: torch.device, quick: bool, front: bool) -> dict[str, Table]:
    """What there is to measure, by title, the most wanted first."""
    cpu, amps, found = device.type == "cpu", [False, True] if device.type == "cuda" else [False], {}
    shape, small = ((4, 3, 64, 64), (2, 3, 32, 32)) if quick else ((16, 3, 160, 160), (8, 3, 96, 96))
    shapes = [shape] if cpu or quick else [(n, 3, 224, 224) for n in (184, 272)]
    budget = 64 * MIB if quick else 2**30 if cpu else 2**34
    fits, to_fit = f"largest batch in {budget / MIB:,.0f} MiB, ", NETWORKS[1:2] if quick else NETWORKS[:2]
    wanted = [
        ("", memory, [*LAYERS, *REMATS], ["MNIST"], (64 if quick else 2048, 1, 28, 28), [False]),
        ("", memory, USUAL, NETWORKS, shapes[0], amps),
        (fits, partial(largest, budget), FEW, to_fit, shapes[0][1:], [False]),
        ("errors, ", errors, REMATS[-1:] if quick else REMATS, NETWORKS, small, [False, True]),
        *[("", memory, USUAL, NETWORKS, shape, amps) for shape in shapes[1:]],
    ]
    if front:
        wanted = [
            ("", memory, [*FRONT, "compile, 0.4"], NETWORKS[:1], shapes[0], amps),  # minutes on a CPU
            ("", memory, FRONT, NETWORKS[1:], shapes[0], amps),
        ]
    for what, measure, methods, names, shape, modes in wanted:
        for name, amp in product(names, modes):
            mode = "bfloat16 autocast, channels_last" if amp else "float32"
            title = f"{what}{name}, {'x'.join(map(str, shape))}, {mode}"
            control = measure is memory and cpu and sys.platform == "linux"
            for allocator in ([KEPT] if front else ["", KEPT]) if control else [""]:
                found[title + allocator] = Table(measure, methods, name, shape, device, amp)
    return found


def times(table: Table, rows: list[dict], repeats: int) -> None:
    """Add to ``rows`` the times of steps that take turns: medians, and ratios to the unfused one's.

    With CUDA also those of steps captured in a CUDA graph: the device's own time, without the host's.
    """
    steps = [partial(table.step, *table.build(row["name"])) for row in rows]

    def seconds(step: Callable) -> float:
        begin = clock(table.device)
        step()
        return clock(table.device) - begin

    def add(name: str, steps: list[Callable]) -> None:
        rounds = [[seconds(step) for step in steps] for _ in range(1 + repeats)][1:]  # one to get warm
        for row, mine in zip(rows, zip(*rounds, strict=True), strict=False):
            row[f"{name}seconds"] = statistics.median(mine)
            if rows[0]["name"] == "unfused":  # it may have failed
                ratios = [a / first for a, (first, *_) in zip(mine, rounds, strict=True)]
                row[f"{name}time_ratio"] = statistics.median(ratios)
                row[f"{name}time_quartiles"] = np.percentile(ratios, (25, 75)).round(3).tolist()

    add("", steps)
    if table.device.type == "cuda":
        pool, graphs = torch.cuda.graph_pool_handle(), []  # they share memory, as no two run at once
        with contextlib.suppress(RuntimeError):  # one that cannot be captured, and those after it
            for step in steps:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    step()
                graphs.append(graph.replay)
        add("graph_", graphs)


KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


def write(path: Path, record: dict) -> None:
    """At once, and whole: a run may be stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def fill(path: Path, title: str, table: Table, repeats: int) -> None:
    """Measure one table into the record at ``path``, row by row: what a process of its own does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who waits for it will stop it
    record = read_json(path)
    rows = record["tables"][title] = []
    for method in table.methods:
        rows.append({"name": method})
        try:
            rows[-1] |= table.measure(table, method)
        except Exception as error:  # it costs this row alone
            rows[-1]["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        write(path, record)
    if table.measure is memory:
        try:
            times(table, [row for row in rows if "error" not in row], repeats)
        finally:
            write(path, record)


def run(tables: dict[str, Table], path: Path, repeats: int, minutes: float) -> None:
    """Measure ``tables`` into the record at ``path``, each in a process of its own, and print them."""
    until = time.monotonic() + 60 * minutes
    for title, table in tables.items():
        process = get_context("spawn").Process(target=fill, args=(path, title, table, repeats))
        with patch.dict(os.environ, KEEPS_MEMORY if title.endswith(KEPT) else {}):
            process.start()
        try:
            process.join(until - time.monotonic())
            stopped = process.is_alive()
        finally:
            process.kill()
            process.join()
        record = read_json(path)
        rows = record["tables"].setdefault(title, [])
        if process.exitcode:
            why = "stopped at the time limit" if stopped else f"the process ended with {process.exitcode}"
            rows.append({"name": "all", "error": why})
            write(path, record)
        print(f"\n{title}\n{shown(rows)}", flush=True)


def shown(rows: list[dict]) -> str:
    """Rows as text, a column for each entry; counts and bytes with the ratio to those of the first row."""

    def cell(row: dict, key: str) -> str:
        value, first = row.get(key, ""), rows[0].get(key)
        if type(value) is int:
            return f"{value:,}" + (f" {value / first:.3f}" if first else "")
        how = ".3f" if key.endswith("ratio") else ".3g"
        return format(value, how) if isinstance(value, float) else str(value)

    keys = sorted(dict.fromkeys(key for row in rows for key in row), key="error".__eq__)  # the error last
    lines = [keys, *[[cell(row, key) for key in keys] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<" if key in ("name", "error") else ">" for key in keys]
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return "\n".join(line.format(*cells).rstrip() for cells in lines)


def recorded(name: str) -> tuple[str, dict[str, list[dict]]]:
    """When, where and with what the record of this name was made; and its rows, by title."""
    record = read_json(MEASUREMENTS / f"{name}.json")
    return "{date}, {device}, torch {torch}".format_map(record), record["tables"]


def main(arguments: list[str]) -> str | None:
    """Run with these NAME=VALUE arguments, checked before anything runs; what went wrong, or None."""
    values = {name: parameter.default for name, parameter in PARAMETERS.items()}
    try:
        for argument in arguments:
            name, equals, text = argument.partition("=")
            if name not in PARAMETERS or not equals:
                given = f"{argument} is no parameter of bench"
                raise ParameterError(f"{given}; there are {'=..., '.join(PARAMETERS)}=...")
            values[name] = PARAMETERS[name].parse(text)
        device, how = memory_device(pick_device(values["DEVICE"]))
        found, only = tables(device, values["QUICK"], values["FRONT"]), values["TABLE"]
        chosen = {title: table for title, table in found.items() if only in title}
        if not chosen:
            titles = "; ".join(found)
            raise ParameterError(f"TABLE must be part of a title, got {only!r}; there are: {titles}")
    except ValueError as error:
        return f"bench: {error}"
    facts = {"date": datetime.date.today().isoformat(), **describe_device(device), "memory": how}
    print(", ".join(f"{k}: {v}" for k, v in facts.items()))
    parts = "front" if values["FRONT"] else "bench", device.type, *only.split()
    path = BUILD / f"{'_'.join(parts)}.json"
    write(path, {**facts, "tables": {}})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `run` stops its process
    minutes = values["TIME_LIMIT"] or (10_000 if device.type == "cpu" else 9)
    try:
        run(chosen, path, values["REPEATS"], minutes)
    except KeyboardInterrupt:
        return f"\ninterrupted; as far as it came: {os.path.relpath(path)}"
    if not values["QUICK"]:
        if any("error" in row for rows in read_json(path)["tables"].values() for row in rows):
            return f"\nnot all was measured, so the record stays; what there is: {os.path.relpath(path)}"
        path = path.replace(MEASUREMENTS / path.name)
    print(f"\nwritten to {os.path.relpath(path)}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for encodings without ×
    sys.exit(main(sys.argv[1:]))
