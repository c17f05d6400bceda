"""Memory and time of one training step of several networks, next to each other: rows, and a table of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from helpers.memory import MemoryTrace

MIB = 2**20
Report = Callable[[dict], None]


def compare(
    networks: dict[str, nn.Module],
    x: Tensor,
    repeats: int = 5,
    amp: torch.dtype | None = None,
    seconds: float = 0,
    report: Report | None = None,
) -> list[dict]:
    """Peak, end of forward and time of one step of each network on ``x``, next to the first network's.

    Args:
        networks: all on ``x``'s device, and that device one that ``memory_device`` returns unchanged.
        repeats: rounds of timing; 0 for memory alone.
        amp: an autocast dtype, or None.
        seconds: go on with the rounds for so long: short steps spread more than long ones.
        report: called with each row as soon as it has its memory, and again with its times. A network that
            fails then has a row with ``error``, and the others go on; without ``report`` the error is raised.

    Returns:
        A row each: name, peak, forward (bytes above the start), on a CPU tensor_peak, too (see
        `MemoryTrace`), seconds (median), and the ratios ``peak_ratio``, ``forward_ratio``, ``time_ratio``
        with ``time_range``.
    """
    device, base, grad_out = x.device, next(iter(networks)), []
    rows, times = {name: {"name": name} for name in networks}, {name: [] for name in networks}

    def step(name: str, mark: Report = lambda label: None) -> None:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            out = networks[name](x)
        if not grad_out:  # at the first step of all
            grad_out.append(torch.randn_like(out))
        mark("end of forward")
        out.backward(grad_out[0])

    def memory(name: str) -> dict:
        step(name)  # warm: libraries choose their algorithms
        networks[name].zero_grad()
        with MemoryTrace(device) as trace:
            step(name, trace.mark)
        found = {"peak": trace.peak, "forward": trace.marks["end of forward"]}
        found |= {} if trace.tensor_peak is None else {"tensor_peak": trace.tensor_peak}
        first = rows[base] if "peak" in rows[base] else found if name == base else {}
        return found | {f"{k}_ratio": found[k] / first[k] for k in ("peak", "forward") if first}

    def attempt(name: str, run: Callable[[str], dict], say: bool = True) -> None:
        try:
            rows[name] |= run(name)
        except Exception as error:
            if report is None:
                raise
            rows[name]["error"], say = brief(error), True
        networks[name].zero_grad()
        tidy(device) if say else None
        report(rows[name]) if say and report is not None else None

    def once(name: str) -> dict:
        times[name].append(timed(lambda: step(name), device))
        return {}

    def time_of(name: str) -> dict:
        found, first = {"seconds": statistics.median(times[name])}, times[base]
        if len(first) == len(times[name]):
            ratios = [a / b for a, b in zip(times[name], first, strict=True)]
            found |= {"time_ratio": statistics.median(ratios), "time_range": (min(ratios), max(ratios))}
        return found

    for name in networks:
        attempt(name, memory)
    done, until = 0, time.perf_counter() + seconds
    while repeats and (done < repeats or time.perf_counter() < until):
        done += 1
        for name in [name for name in rows if "error" not in rows[name]]:
            attempt(name, once, say=False)
    for name in [name for name in rows if repeats and "error" not in rows[name]]:
        attempt(name, time_of)
    return list(rows.values())


def brief(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def tidy(device: torch.device) -> None:
    """Give back what the last network left to the allocator."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds that ``run`` takes: on a CUDA device between two of its own events."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begin


def table(rows: list[dict]) -> str:
    """Rows as text, one line each: `compare`'s in columns, others with the names of their numbers."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}}      peak          end of forward   step"] if "peak" in rows[0] else []
    for row in rows:
        line = f"{row['name']:{width}}"
        if "peak" in row:
            for key in ("peak", "forward"):
                line += f"  {row[key] / MIB:7.1f} MiB {row.get(f'{key}_ratio', math.nan):5.3f}"
            line += f"  {row['seconds'] * 1e3:6.0f} ms" if "seconds" in row else ""
            if "time_ratio" in row:
                low, high = row["time_range"]
                line += f" {row['time_ratio']:5.3f} ({low:.2f} to {high:.2f})"
        else:
            numbers = {k: v for k, v in row.items() if k not in ("name", "error")}
            line += "".join(f"  {k} {v:{'.3g' * isinstance(v, float)}}" for k, v in numbers.items())
        lines.append(line + (f"  {row['error']}" if "error" in row else ""))
    return "\n".join(lines)


def print_table(title: str, rows: list[dict]) -> None:
    """Print ``compare``'s rows under ``title``."""
    print(f"\n{title}\n{table(rows)}", flush=True)
