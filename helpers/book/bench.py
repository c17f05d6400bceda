"""`make bench`: memory and time of the layers and networks, each next to the unfused pair, in one run.

    python -m helpers.book.bench [DEVICE=cuda] [REPEATS=7] [ONLY=resnet] [TIME_LIMIT=9] [QUICK=1] [FRONT=1]

prints tables and writes data/measurements/bench_<device>.json (with ONLY, a record of its own name), each row
as soon as it is there. What fails costs its own row, which carries the error. With FRONT=1 the tables are the
networks under `remat` at eight prices, with checkpoints and compiled, and the record is front_<device>.json:
chapter 8 draws it. Torch, torchvision and matplotlib are enough to run all of this.

Times are forward and backward of the network; all methods take turns, a ratio is taken within each round,
and the median of the ratios is shown with their range. Each table has a process of its own, as a training
has: memory that an earlier one left to the process would speed up those that use the most. On Linux a tensor
of over 32 MiB is fresh pages at each allocation, which punishes those that use the most, too: there each
table with times is measured again (and of the front, only so), in a process whose allocator keeps its memory.
A quick run's record is in build/.
"""

from __future__ import annotations

import bisect
import contextlib
import datetime
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from helpers.book.networks import (
    NETWORKS,
    PRICES,
    Remat,
    TutorialConvBN2d,
    chain,
    digit_ways,
    front_of,
    real_network,
    ways,
)
from helpers.book.parameters import QUICK, Parameter, ParameterError
from helpers.book.training import pair as unfused
from helpers.book.training import pick_device
from helpers.memory import MemoryTrace, describe_device, memory_device
from helpers.predict import largest_batch
from helpers.remat.compare import compare as compare_gradients

__all__ = ["PARAMETERS", "Remat", "TutorialConvBN2d", "chain", "compare", "recorded", "unfused"]

PARAMETERS = {
    parameter.name: parameter
    for parameter in (
        Parameter("DEVICE", "str", "auto", "auto, cpu, or an accelerator"),
        Parameter("REPEATS", "int", 7, "rounds of timing, at least 1"),
        Parameter("ONLY", "str", "", "measure the tables with this in their title"),
        Parameter("TIME_LIMIT", "float", 0, "minutes, at least 0, at most 10,000; 0: 9 on an accelerator"),
        Parameter("FRONT", "int", 0, "1 for chapter 8's record, at least 0, at most 1"),
        QUICK,
    )
}
ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS, BUILD = ROOT / "data" / "measurements", ROOT / "build"
MIB = 2**20

# One row after the other -----------------------------------------------------------------------------------


@contextlib.contextmanager
def failing(row: dict) -> Iterator[None]:
    """An error becomes a line of ``row``, and the others go on."""
    try:
        yield
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]


def tidy(device: torch.device) -> None:
    """Give back what the last network left to the allocator."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds that ``run`` takes."""
    wait = (lambda: None) if device.type == "cpu" else partial(torch.accelerator.synchronize, device)
    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


def autocast(device: torch.device, amp: torch.dtype | None):
    return torch.autocast(device.type, dtype=amp, enabled=amp is not None)


def compare(
    networks: dict[str, nn.Module], x: Tensor, repeats: int = 5, amp: torch.dtype | None = None
) -> Iterator[dict]:
    """Peak, end of forward and time of one step of each network on ``x``.

    Args:
        networks: all on ``x``'s device, and that device one that ``memory_device`` returns unchanged.
        repeats: rounds of timing; 0 for memory alone.
        amp: an autocast dtype, or None.

    Yields:
        A row for each network when its memory is known, and again with its times: name, peak, forward (bytes
        above the start), on a CPU tensor_peak, too (see `MemoryTrace`), seconds (median), and time_ratio to
        the first network with time_range. One that fails has ``error`` instead, and the others go on.
    """
    device, base, grad_out = x.device, next(iter(networks)), []
    rows, times = {name: {"name": name} for name in networks}, {name: [] for name in networks}

    def step(name: str, mark: Callable[[str], None] = lambda label: None) -> None:
        with autocast(device, amp):
            out = networks[name](x)
        if not grad_out:  # at the first step of all
            grad_out.append(torch.randn_like(out))
        mark("end of forward")
        out.backward(grad_out[0])

    for name, row in rows.items():
        with failing(row):
            step(name)  # warm: libraries choose their algorithms
            networks[name].zero_grad()
            with MemoryTrace(device) as trace:
                step(name, trace.mark)
            row |= {"peak": trace.peak, "forward": trace.marks["end of forward"]}
            row |= {} if trace.tensor_peak is None else {"tensor_peak": trace.tensor_peak}
        networks[name].zero_grad()
        tidy(device)
        yield row
    for name, row in repeats * [*rows.items()]:
        if "error" not in row:
            with failing(row):
                times[name].append(timed(partial(step, name), device))
            networks[name].zero_grad()
    for name, row in rows.items() if repeats else ():
        if "error" not in row:
            row["seconds"] = statistics.median(times[name])
        if "error" not in row and "error" not in rows[base]:
            ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
            row |= {"time_ratio": statistics.median(ratios), "time_range": (min(ratios), max(ratios))}
        yield row


def table(rows: list[dict]) -> str:
    """Rows as text, one line each: `compare`'s in columns, others with the names of their numbers."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}}      peak          end of forward   step"] if "peak" in rows[0] else []
    for row in rows:
        line = f"{row['name']:{width}}"
        if "peak" in row:
            for key in ("peak", "forward"):
                line += f"  {row[key] / MIB:7.1f} MiB {row[key] / rows[0].get(key, math.nan):5.3f}"
            line += f"  {row['seconds'] * 1e3:6.0f} ms" if "seconds" in row else ""
            if "time_ratio" in row:
                low, high = row["time_range"]
                line += f" {row['time_ratio']:5.3f} ({low:.2f} to {high:.2f})"
        else:
            numbers = {k: v for k, v in row.items() if k not in ("name", "error")}
            line += "".join(f"  {k} {v:{'.3g' * isinstance(v, float)}}" for k, v in numbers.items())
        lines.append(line + (f"  {row['error']}" if "error" in row else ""))
    return "\n".join(lines)


# What is measured ------------------------------------------------------------------------------------------


MODES = {"float32": None, "float32 with TF32": None, "bfloat16 autocast, channels_last": torch.bfloat16}
FLOAT32, TF32, BFLOAT16 = MODES


def put(device: torch.device, mode: str, what: nn.Module | Tensor):
    """``what`` on the device, in the mode's memory format."""
    format = torch.channels_last if "channels_last" in mode else torch.contiguous_format
    return what.to(device, memory_format=format)


def side_by_side(makers: Callable[[], dict], shape: tuple, mode: str, *, device, repeats):
    """`compare` of these networks."""
    networks = {name: put(device, mode, make()) for name, make in makers().items()}
    return compare(networks, put(device, mode, torch.randn(shape)), repeats, MODES[mode])


def one_by_one(measure: Callable[..., dict], methods: list[str], *arguments, device, repeats):
    """A row for each of ``methods``: what ``measure(device, method, *arguments)`` returns."""
    for method in methods:
        row = {"name": method}
        with failing(row):
            row |= measure(device, method, *arguments)
        yield row
        tidy(device)


def price_of(method: str) -> float | None:
    """What `largest_batch` and `remat` call max_cost; None is plain PyTorch."""
    return None if method == "unfused" else float(method.removeprefix("remat, "))


def errors(device: torch.device, method: str, name: str, shape: tuple, mode: str) -> dict:
    """How far gradients under `remat` are from plain's, next to how far plain's are from float64's."""
    model, x = put(device, mode, real_network(name)), put(device, mode, torch.randn(shape))
    with autocast(device, MODES[mode]):
        found = compare_gradients(model, x, max_cost=price_of(method), rounds=1)
    return {"forward_equal": found.equal, "difference": found.difference, "rounding": found.rounding}


KINDS = {  # the first of which a part is in the name of a kernel or an operator
    "norm": ("batch_norm", "batchnorm", "bn_fw", "bn_bw"),
    "one pass": ("one_pass", "remat::"),
    "pooling": ("pool",),
    "copy": ("copy", "memcpy", "cat", "transpose", "nchwtonhwc", "nhwctonchw", "contiguous"),
    "convolution": ("conv", "mm", "cudnn", "cutlass", "xmma", "wgrad", "dgrad", "fprop"),
    "elementwise": ("elementwise", "threshold", "clamp", "hardtanh", "lu", "add", "mul", "fill", "zero"),
    "other": ("",),
}


def time_by_kind(device: torch.device, method: str, name: str, shape: tuple, mode: str) -> dict:
    """Seconds of a step, and of its kernels (on a CPU, of its operators) by kind, and their number."""
    network, x = put(device, mode, ways(name)[method]()), put(device, mode, torch.randn(shape))

    def step() -> None:
        with autocast(device, MODES[mode]):
            out = network(x)
        out.backward(torch.ones_like(out))
        network.zero_grad()

    step()
    seconds = timed(step, device)
    with torch.profiler.profile() as found:
        timed(step, device)
    events = [e for e in found.key_averages() if e.device_type.name.lower() == device.type]
    spent = dict.fromkeys(KINDS, 0.0)
    for e in events:
        kind = next(kind for kind, parts in KINDS.items() if any(part in e.key.lower() for part in parts))
        spent[kind] += (e.self_cpu_time_total if device.type == "cpu" else e.self_device_time_total) / 1e6
    return {"step": seconds, "calls": sum(e.count for e in events), **spent}


def largest(device: torch.device, method: str, name: str, shape: tuple, budget: int) -> dict:
    """The largest batch whose step fits into ``budget`` bytes, with momentum, next to the predicted one."""
    predicted = largest_batch(real_network(name), shape, budget, max_cost=price_of(method))
    if device.type == "cuda":  # so that libraries, too, see no more
        torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.mem_get_info(device)[1], device)

    def too_large(n: int) -> bool:
        tidy(device)
        try:
            with MemoryTrace(device) as trace:
                network, x = ways(name)[method]().to(device), torch.randn(n, *shape, device=device)
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


def tables(device: torch.device, quick: bool, front: bool) -> dict[str, Callable[..., Iterator[dict]]]:
    """By title what yields the rows, given ``device`` and ``repeats``; the most wanted first."""
    cpu = device.type == "cpu"
    shapes = [(16, 3, 160, 160)] if cpu else [(n, 3, 224, 224) for n in (184, 272)]
    shapes, small = ([(4, 3, 64, 64)], (2, 3, 32, 32)) if quick else (shapes, (8, 3, 96, 96))
    modes = [TF32, BFLOAT16] if device.type == "cuda" else [FLOAT32]
    budget = 100 * MIB if quick else 2**30 if cpu else 2**34
    remats = [f"remat, {price}" for price in PRICES]
    found = {}

    def add(what: str, shape: tuple[int, ...], mode: str, function: Callable, *arguments) -> None:
        title = f"{what}, {'x'.join(map(str, shape))}, {mode}"
        found[title] = partial(function, *arguments, shape, mode)

    def networks(shape: tuple[int, ...], makers: Callable[[str], dict]) -> None:
        for name, mode in product(NETWORKS, modes):
            add(name, shape, mode, side_by_side, partial(makers, name))

    if front:
        networks(shapes[-1], front_of)
        return found
    add("MNIST network", (64 if quick else 2048, 1, 28, 28), modes[0], side_by_side, digit_ways)
    networks(shapes[0], ways)
    for mode in modes:
        kinds = one_by_one, time_by_kind, ["unfused", *remats[:2]], "resnet50"
        add("time by kind, resnet50", shapes[0], mode, *kinds)
    for name in NETWORKS[1:2] if quick else NETWORKS[:2]:
        fits = partial(one_by_one, largest, ["unfused", *remats[:2]], name, shapes[0][1:], budget)
        found[f"largest batch, {name}, {budget / MIB:,.0f} MiB, float32"] = fits
    for name, mode in product(NETWORKS, (FLOAT32, BFLOAT16)):
        add(f"errors, {name}", small, mode, one_by_one, errors, remats, name)
    for shape in shapes[1:]:
        networks(shape, ways)
    return found


# The run ---------------------------------------------------------------------------------------------------


KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


def allocators(device: torch.device, front: bool, rows: partial) -> dict[str, dict[str, str]]:
    """The environments to measure a table in, by what they add to its title."""
    if device.type != "cpu" or sys.platform != "linux" or rows.func is not side_by_side:
        return {"": {}}
    return ({} if front else {"": {}}) | {", allocator keeps its memory": KEEPS_MEMORY}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, record: dict) -> None:
    """At once, and whole: a run may be stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def fill(path: Path, title: str, rows: Callable[..., Iterator[dict]], device, repeats: int) -> None:
    """Measure one table into the record at ``path``: what a process of its own does."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = TF32 in title
    torch.manual_seed(0)
    record, found = read(path), {}
    for row in rows(device=device, repeats=repeats):
        found[row["name"]] = row
        record["tables"][title] = list(found.values())
        write(path, record)


def run(device, tables: list[tuple], path: Path, repeats: int, minutes: float) -> None:
    """Measure ``tables``, (title, rows, environment), into the record at ``path``, and print them."""
    until = time.monotonic() + 60 * minutes
    for title, rows, environment in tables:
        process = get_context("spawn").Process(target=fill, args=(path, title, rows, device, repeats))
        with patch.dict(os.environ, environment):
            process.start()
        try:
            process.join(until - time.monotonic())
            error = "stopped at the time limit" if process.is_alive() else None
        finally:
            process.kill()
            process.join()
        record = read(path)
        lines = record["tables"].setdefault(title, [])
        if process.exitcode:
            lines.append({"name": "all", "error": error or f"the process ended with {process.exitcode}"})
            write(path, record)
        print(f"\n{title}\n{table(lines)}", flush=True)


def recorded(device: str, *only: str) -> str:
    """The tables of a device's record with one of ``only`` in their title, or that there is no record."""
    path = MEASUREMENTS / f"bench_{device}.json"
    if not path.is_file():
        return f"There is no record of {device} yet: `make bench DEVICE={device}` makes one."
    record = read(path)
    about = ", ".join(f"{k} {v}" for k, v in record.items() if k != "tables")
    tables = {t: rows for t, rows in record["tables"].items() if not only or any(part in t for part in only)}
    return "\n\n".join([about, *[f"{title}\n{table(rows)}" for title, rows in tables.items()]])


def main(arguments: list[str]) -> int:
    """NAME=VALUE arguments, checked before anything runs."""
    values = {parameter.name: parameter.default for parameter in PARAMETERS.values()}
    try:
        for argument in arguments:
            name, _, text = argument.partition("=")
            if name not in PARAMETERS:
                raise ParameterError(f"{name} is no parameter of bench; there are {', '.join(PARAMETERS)}")
            values[name] = PARAMETERS[name].parse(text)
        device, how = memory_device(pick_device(values["DEVICE"]))
        found, only = tables(device, values["QUICK"], values["FRONT"]), values["ONLY"]
        if not any(only in title for title in found):
            raise ParameterError(f"ONLY must be part of a title, got {only!r}; there are: {'; '.join(found)}")
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    about = {"date": datetime.date.today().isoformat(), **describe_device(device), "memory": how}
    print(", ".join(f"{k}: {v}" for k, v in about.items()))
    parts = "front" if values["FRONT"] else "bench", device.type, *only.split()
    path = (BUILD if values["QUICK"] else MEASUREMENTS) / f"{'_'.join(parts)}.json"
    write(path, {**about, "tables": {}})
    chosen = [
        (title + more, rows, environment)
        for title, rows in found.items()
        if only in title
        for more, environment in allocators(device, values["FRONT"], rows).items()
    ]
    minutes = values["TIME_LIMIT"] or (10_000 if device.type == "cpu" else 9)
    run(device, chosen, path, values["REPEATS"], minutes)
    print(f"\nwritten to {os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
