"""`make bench`: memory and time of the layers, each next to the unfused pair, in one run.

    python -m helpers.book.bench [DEVICE=cuda] [REPEATS=7] [ONLY=resnet] [TIME_LIMIT=9] [QUICK=1] [FRONT=1]

prints tables and writes data/measurements/bench_<device>.json (with ONLY, a record of its own name), each row
as soon as it is there. What fails costs its own row, which carries the error. ONLY takes the tables with that
in their title. TIME_LIMIT is in minutes; 0 is none on a CPU, and 9 on an accelerator. With FRONT=1 the tables
are four networks, under `remat` at eight prices, with checkpoints and compiled, and the record is
front_<device>.json: chapter 8 draws it. Torch, torchvision and matplotlib are enough to run all of this.

Times are forward and backward of the network; all methods take turns, a ratio is taken within each round,
and the median of the ratios is shown with their range. Short steps have more than REPEATS rounds. Each
table has a process of its own, as a training has: memory that an earlier one left to the process would
speed up those that use the most. On Linux a tensor of over 32 MiB is fresh pages at each allocation, which
punishes those that use the most, too: there each table with times is measured again (and of the front, only
so), in a process whose allocator keeps its memory.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from helpers.book.networks import (
    FRONT,
    NETWORKS,
    PRICES,
    Remat,
    TutorialConvBN2d,
    chain,
    front_of,
    of_pairs,
    real_network,
    unfused,
    ways,
)
from helpers.book.steps import MIB, Report, brief, compare, print_table, table, tidy, timed
from helpers.book.training import Net, pick_device
from helpers.memory import MemoryTrace, describe_device, memory_device
from helpers.predict import largest_batch
from helpers.remat.compare import compare as compare_gradients

__all__ = ["PARAMETERS", "Remat", "TutorialConvBN2d", "chain", "compare", "front_of", "print_table",
           "real_network", "recorded", "unfused", "ways"]  # fmt: skip

PARAMETERS = {"DEVICE": "auto", "REPEATS": 7, "QUICK": 0, "ONLY": "", "FRONT": 0, "TIME_LIMIT": 0.0}
MEASUREMENTS = Path(__file__).resolve().parents[2] / "data" / "measurements"


# What is measured ------------------------------------------------------------------------------------------


class Mode(NamedTuple):
    """How numbers are computed, and how images lie in memory."""

    name: str
    amp: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format

    def network(self, make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
        return make().to(device).to(memory_format=self.memory_format)

    def images(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.randn(shape, device=device).contiguous(memory_format=self.memory_format)

    def autocast(self, device: torch.device):
        return torch.autocast(device.type, dtype=self.amp, enabled=self.amp is not None)


FLOAT32, TF32 = Mode("float32"), Mode("float32 with TF32")
BFLOAT16 = Mode("bfloat16 autocast, channels_last", torch.bfloat16, torch.channels_last)


class Table(NamedTuple):
    """What fills one table: ``run(device, repeats, report)``; and whether it has times as its point."""

    run: Callable[[torch.device, int, Report], None]
    timed: bool = False


def side_by_side(makers: dict[str, Callable], shape: tuple, mode: Mode, seconds: float) -> Table:
    """`compare` of these networks."""

    def run(device, repeats, report):
        networks = {name: mode.network(make, device) for name, make in makers.items()}
        compare(networks, mode.images(shape, device), repeats, mode.amp, seconds, report)

    return Table(run, timed=True)


def one_by_one(names, measure: Callable[[torch.device, str], Iterator[dict]]) -> Table:
    """A row for each of ``names``: ``measure(device, name)`` yields parts of it."""

    def run(device, repeats, report):
        for name in names:
            row = {"name": name}
            try:
                for part in measure(device, name):
                    row |= part
                    report(row)
            except Exception as error:
                report(row | {"error": brief(error)})
            tidy(device)

    return Table(run)


def errors(name: str, shape: tuple, mode: Mode) -> Table:
    """How far gradients under `remat` are from plain's, next to how far plain's are from float64's."""

    def measure(device, method):
        model, x = mode.network(functools.partial(real_network, name), device), mode.images(shape, device)
        with mode.autocast(device):
            found = compare_gradients(model, x, max_cost=float(method.split()[-1]), rounds=1)
        yield {"forward_equal": found.equal, "difference": found.difference, "rounding": found.rounding}

    return one_by_one([f"remat, {price}" for price in PRICES], measure)


KINDS = {  # the first of which a part is in the name of a kernel or an operator
    "norm": ("batch_norm", "batchnorm", "bn_fw", "bn_bw"),
    "one pass": ("one_pass", "remat::"),
    "pooling": ("pool",),
    "copy": ("copy", "memcpy", "cat", "transpose", "nchwtonhwc", "nhwctonchw", "contiguous"),
    "convolution": ("conv", "mm", "cudnn", "cutlass", "xmma", "wgrad", "dgrad", "fprop"),
    "elementwise": ("elementwise", "threshold", "clamp", "hardtanh", "lu", "add", "mul", "fill", "zero"),
}


def time_by_kind(name: str, shape: tuple, mode: Mode) -> Table:
    """Seconds of a step, and of its kernels (on a CPU, of its operators) by kind, and their number."""
    makers = ways(name, PRICES[:2])

    def measure(device, method):
        network, x = mode.network(makers[method], device), mode.images(shape, device)

        def step() -> None:
            with mode.autocast(device):
                out = network(x)
            out.backward(torch.ones_like(out))
            network.zero_grad()

        step()
        yield {"step": timed(step, device)}
        activities, cpu = [torch.profiler.ProfilerActivity.CPU], device.type == "cpu"
        activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
        with torch.profiler.profile(activities=activities) as found:
            timed(step, device)
        here = [e for e in found.key_averages() if e.device_type.name.lower() == device.type]
        spent = {kind: 0.0 for kind in (*KINDS, "other")}
        for e in here:
            fits = (kind for kind, parts in KINDS.items() if any(part in e.key.lower() for part in parts))
            own = e.self_cpu_time_total if cpu else e.self_device_time_total
            spent[next(fits, "other")] += own / 1e6
        yield {"calls": sum(e.count for e in here), **spent}

    return one_by_one(makers, measure)


def largest(name: str, shape: tuple, budget: int) -> Table:
    """The largest batch whose step fits into ``budget`` bytes, with momentum, next to the predicted one."""
    prices = {"unfused": None, **{f"remat, {price}": price for price in PRICES[:2]}}

    def fits(device: torch.device, network: nn.Module, n: int) -> bool:
        optimizer, x = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9), None
        try:
            for p in network.parameters():
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
            before = [*network.parameters(), *network.parameters(), *network.buffers()]  # and the momentum
            x = torch.randn(n, *shape, device=device)
            with MemoryTrace(device) as trace:
                network(x).square().mean().backward()
                optimizer.step()
            return sum(t.nbytes for t in (*before, x)) + trace.peak <= budget
        except torch.OutOfMemoryError:
            return False
        finally:
            optimizer.zero_grad()
            del optimizer, x
            tidy(device)

    def measure(device, method):
        if device.type == "cuda":  # so that libraries, too, see no more
            torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.mem_get_info(device)[1], device)
        model, price = real_network(name), prices[method]
        n = predicted = largest_batch(model, shape, budget, max_cost=price)
        yield {"budget": budget, "predicted": predicted}
        network = (model if price is None else Remat(model, price)).to(device)
        low, high, fine = 0, 2 * predicted, max(1, predicted // 32)
        for tried in range(16):
            low, high = (n, high) if fits(device, network, n) else (low, n)
            if high - low <= fine:
                break
            n = (n + fine if n == low else n - fine) if not tried else (low + high) // 2
        yield {"batch": low, "too_large": high}

    return one_by_one(prices, measure)


def tables(device: torch.device, quick: bool, front: bool) -> dict[str, Table]:
    """By title, the most wanted first."""
    cpu, cuda = device.type == "cpu", device.type == "cuda"
    batches = [(16, 3, 160, 160)] if cpu else [(n, 3, 224, 224) for n in (184, 272)]
    batches = [(4, 3, 64, 64)] if quick else batches
    modes, names = [TF32, BFLOAT16] if cuda else [FLOAT32], NETWORKS if cpu else FRONT
    digits, images, seconds = (64, 4, 0) if quick else (2048, 32, 20) if cpu else (2048, 256, 4)
    found: dict[str, Table] = {}

    def whole(shape: tuple, names: tuple[str, ...], makers: Callable[[str], dict]) -> None:
        for name in names:
            for mode in modes:
                title = f"{name}, {times(shape)}, {mode.name}"
                found[title] = side_by_side(makers(name), shape, mode, seconds)

    if front:
        whole(batches[-1], FRONT, front_of)
        return found
    title = f"MNIST network, batch {digits}, {modes[0].name}"
    found[title] = side_by_side(of_pairs(Net), (digits, 1, 28, 28), modes[0], seconds)
    whole(batches[0], names, lambda name: ways(name, PRICES))
    for mode in modes:
        title = f"time by kind, resnet50, {times(batches[0])}, {mode.name}"
        found[title] = time_by_kind("resnet50", batches[0], mode)
    budget = 100 * MIB if quick else 2**30 if cpu else 2**34
    for name in FRONT[1:2] if quick else FRONT[:2]:
        title = f"largest batch, {name}, {budget / MIB:,.0f} MiB, float32"
        found[title] = largest(name, batches[0][1:], budget)
    for name in FRONT:
        for mode in (FLOAT32, BFLOAT16):
            shape = (2, 3, 32, 32) if quick else (8, 3, 96, 96)
            found[f"errors, {name}, {times(shape)}, {mode.name}"] = errors(name, shape, mode)
    for shape in batches[1:]:
        whole(shape, names, lambda name: ways(name, PRICES))
    for kind, (channels, kernel) in {"3x3, 32 channels": (32, 3), "1x1, 128 channels": (128, 1)}.items():
        shape = images, channels, 56, 56
        makers = of_pairs(lambda make, c=channels, k=kernel: chain(make, 12, c, k))
        title = f"12 blocks conv, norm, ReLU: {kind}, {images}x56x56, {modes[0].name}"
        found[title] = side_by_side(makers, shape, modes[0], seconds)
    return found


def times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# The run ---------------------------------------------------------------------------------------------------

KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


def fill(device: torch.device, quick: bool, front: bool, title: str, repeats: int, pipe) -> None:
    """Send the rows of one table: what a process of its own does."""
    if device.type == "cuda":
        tf32 = not title.endswith(f", {FLOAT32.name}")
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.manual_seed(0)
    try:
        tables(device, quick, front)[title].run(device, repeats, pipe.send)
    except Exception as error:
        pipe.send({"name": "all", "error": brief(error)})


def measured(environment: dict[str, str], until: float, *arguments) -> Iterator[dict]:
    """The rows of `fill` in a process that starts with these variables and is stopped at ``until``."""
    ours, theirs = get_context("spawn").Pipe(duplex=False)
    process, error = get_context("spawn").Process(target=fill, args=(*arguments, theirs)), None
    with patch.dict(os.environ, environment):
        process.start()
    theirs.close()
    try:
        with contextlib.suppress(EOFError):
            while ours.poll(min(until - time.monotonic(), 1e6)) if until > time.monotonic() else False:
                yield ours.recv()
            error = "stopped at the time limit"
    finally:
        if error or sys.exc_info()[0]:
            process.kill()
        process.join()
    if error or process.exitcode:
        yield {"name": "all", "error": error or f"the process ended with {process.exitcode}"}


def run(
    device_name: str = "auto",
    repeats: int = 7,
    quick: bool = False,
    write: bool = True,
    only: str = "",
    front: bool = False,
    time_limit: float = 0.0,
) -> dict:
    """Measure the tables with ``only`` in their title; print them; return (and write) the record."""
    device, how = memory_device(pick_device(device_name))
    about = {"date": datetime.date.today().isoformat(), **describe_device(device), "memory": how}
    print(", ".join(f"{k}: {v}" for k, v in about.items()))
    until = time.monotonic() + 60 * (time_limit or (math.inf if device.type == "cpu" else 9))
    name = f"{'front' if front else 'bench'}_{device.type}{only and '_' + only.replace(' ', '_')}.json"
    path, record = MEASUREMENTS / name, {**about, "tables": {}}
    allocators = {"": {}}
    if device.type == "cpu" and sys.platform == "linux":
        allocators = ({} if front else allocators) | {", allocator keeps its memory": KEEPS_MEMORY}
    for title, one in tables(device, quick, front).items():
        for allocator, environment in (allocators if one.timed else {"": {}}).items():
            if only not in title:
                continue
            rows: dict[str, dict] = {}
            for row in measured(environment, until, device, quick, front, title, repeats):
                rows[row["name"]] = row
                record["tables"][title + allocator] = list(rows.values())
                if write:  # at once, and whole: this run may be stopped
                    path.parent.mkdir(exist_ok=True)
                    new = path.with_suffix(".new")
                    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                    os.replace(new, path)
            print_table(title + allocator, list(rows.values()))
    if write:
        print(f"\nwritten to {os.path.relpath(path)}")
    return record


def recorded(device: str, *only: str) -> str:
    """The tables of a device's record with one of ``only`` in their title, or that there is no record."""
    path = MEASUREMENTS / f"bench_{device}.json"
    if not path.is_file():
        return f"There is no record of {device} yet: `make bench DEVICE={device}` makes one."
    record = json.loads(path.read_text(encoding="utf-8"))
    about = ", ".join(f"{k} {v}" for k, v in record.items() if k != "tables")
    chosen = lambda title: not only or any(part in title for part in only)  # noqa: E731
    found = [f"{title}\n{table(rows)}" for title, rows in record["tables"].items() if chosen(title)]
    return "\n\n".join([about, *found])


def main(arguments: list[str]) -> int:
    """NAME=VALUE arguments, checked before anything runs."""
    values = dict(PARAMETERS)
    try:
        for argument in arguments:
            name, _, text = argument.partition("=")
            if name not in values:
                raise ValueError(f"{name} is no parameter of bench; there are {', '.join(values)}")
            kind = type(PARAMETERS[name])
            try:
                values[name] = kind(text)
            except ValueError:
                raise ValueError(f"{name} must be of type {kind.__name__}, got {text!r}") from None
        if values["REPEATS"] < 1:
            raise ValueError(f"REPEATS must be at least 1, got {values['REPEATS']}")
        if not 0 <= values["TIME_LIMIT"] < math.inf:
            raise ValueError(f"TIME_LIMIT must be minutes, 0 or more, got {values['TIME_LIMIT']}")
        device, _ = memory_device(pick_device(values["DEVICE"]))
        quick, front, only = bool(values["QUICK"]), bool(values["FRONT"]), values["ONLY"]
        titles = list(tables(device, quick, front))
        if not any(only in title for title in titles):
            raise ValueError(f"ONLY must be part of a title, got {only!r}; there are: {'; '.join(titles)}")
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    run(values["DEVICE"], values["REPEATS"], quick, not quick, only, front, values["TIME_LIMIT"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
