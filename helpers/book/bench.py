"""`make bench`: memory and time of the layers, each beside the unfused pair, in one run.

    python -m helpers.book.bench [DEVICE=cuda] [REPEATS=7] [ONLY=resnet] [QUICK=1] [FRONT=1]

prints a table for each workload and writes data/measurements/bench_<device>.json (with ONLY, a record of its
own name). With FRONT=1 the workloads are four networks, under `remat` at eight prices, with checkpoints and
compiled, and the record is front_<device>.json: chapter 8 draws it.

Times are forward and backward of the network; all methods take turns, a ratio is taken within each round,
and the median of the ratios is shown with their range. Short steps have more than REPEATS rounds. Each
workload has a process of its own, as a training has: memory that an earlier one left to the process would
speed up those that use the most. On Linux a tensor of over 32 MiB is fresh pages at each allocation, which
punishes those that use the most, too: there each workload is timed a second time (and of the front, only
so), in a process whose allocator keeps its memory.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from helpers.book.training import Net, pick_device
from helpers.fused import FusedConvBN2d
from helpers.memory import MemoryTrace, describe_device, memory_device
from helpers.remat import remat

__all__ = ["METHODS", "NETWORKS", "TutorialConvBN2d", "chain", "compare", "print_table", "real_network"]

MIB = 2**20
ROUNDS_SECONDS = 20  # at least, for each workload, whatever REPEATS says
PARAMETERS = {"DEVICE": "auto", "REPEATS": 7, "QUICK": 0, "ONLY": "", "FRONT": 0}
MEASUREMENTS = Path(__file__).resolve().parents[2] / "data" / "measurements"


class TutorialConvBN2dFunction(torch.autograd.Function):
    """The kernel of PyTorch's tutorial as it stands there, but for ``padding``: what ours is measured by.

    Unbiased variance, ε outside the root, no γ and β; the weight gradient as a convolution of transposed
    inputs. Chapter 4 explains it.
    """

    @staticmethod
    def forward(ctx, x, weight, padding, eps=1e-3):
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.eps = padding, eps
        y = F.conv2d(x, weight, padding=padding)
        ctx.m = y.numel() / y.shape[1]
        ctx.sum = y.sum((0, 2, 3))
        ctx.std = y.var((0, 2, 3), unbiased=True).sqrt()
        z = y - (ctx.sum / ctx.m)[:, None, None]
        z /= (ctx.std + eps)[:, None, None]
        return z

    @staticmethod
    def backward(ctx, dz):
        x, weight = ctx.saved_tensors
        y = F.conv2d(x, weight, padding=ctx.padding)
        m, denom = ctx.m, (ctx.std + ctx.eps)[:, None, None]
        mean = (ctx.sum / m)[:, None, None]
        dvar = -((y - mean) * dz).sum((0, 2, 3)) / (ctx.std + ctx.eps) ** 2 / (2 * ctx.std)
        dmean = (dz / denom).sum((0, 2, 3)) / -m
        dy = y * (dvar * m)[:, None, None]
        dy += (-dvar * ctx.sum)[:, None, None]
        dy *= 2 / ((m - 1) * m)
        dy += dmean[:, None, None]
        dy *= denom
        dy += dz
        dy /= denom
        p = ctx.padding
        dw = F.conv2d(x.transpose(0, 1), dy.transpose(0, 1), padding=p).transpose(0, 1)
        dx = F.conv_transpose2d(dy, weight, padding=p)
        return dx, dw, None, None


class TutorialConvBN2d(nn.Module):
    """The tutorial's layer: ``TutorialConvBN2dFunction`` with a weight."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int = 0) -> None:
        super().__init__()
        self.weight = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False).weight
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return TutorialConvBN2dFunction.apply(x, self.weight, self.padding)


def unfused(c_in: int, c_out: int, kernel: int, padding: int = 0) -> nn.Sequential:
    """nn.Conv2d without bias, then nn.BatchNorm2d."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, padding=padding, bias=False), nn.BatchNorm2d(c_out))


class Checkpointed(nn.Module):
    """A module under torch.utils.checkpoint."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        # A dense block appends to the list that it hands in: backward must find the list as it was.
        inputs = [list(i) if isinstance(i, list) else i for i in inputs]
        return checkpoint(self.module, *inputs, use_reentrant=False)


class Remat(nn.Module):
    """A module under `helpers.remat`."""

    def __init__(self, module: nn.Module, max_cost: float) -> None:
        super().__init__()
        self.module, self.max_cost = module, max_cost

    def forward(self, x: Tensor) -> Tensor:
        with remat(self.max_cost):
            return self.module(x)


def under_remat(make: Callable[[], nn.Module], *prices: float) -> dict[str, Callable[[], nn.Module]]:
    """The network of ``make`` under `remat`, at each price."""
    return {f"remat, {price:g}": lambda price=price: Remat(make(), price) for price in prices}


def block_by_block(model: nn.Module) -> nn.Module:
    """Each block of one of torchvision's networks under a checkpoint of its own."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in BLOCKS:
                setattr(module, name, Checkpointed(child))
    return model


def stage_by_stage(model: nn.Module) -> nn.Module:
    """Each stage of one of torchvision's networks, its blocks of one width, under a checkpoint of its own."""
    if isinstance(model, torchvision.models.MobileNetV2):  # a flat list of blocks
        stages: list[list[nn.Module]] = []
        for block in model.features:
            if not getattr(block, "use_res_connect", False):  # the first of its width
                stages.append([])
            stages[-1].append(block)
        model.features = nn.Sequential(*[nn.Sequential(*stage) for stage in stages])
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            blocks = isinstance(child, nn.Sequential) and {type(block).__name__ for block in child}
            if (blocks and blocks <= {*BLOCKS}) or type(child).__name__ == "_DenseBlock":
                setattr(module, name, Checkpointed(child))
    return model


def compiled(model: nn.Module, budget: float) -> nn.Module:
    """``model`` under torch.compile; with a ``budget`` below 1 the compiler keeps about that share of memory.

    The model must draw no random numbers: with a budget the compiler draws a dropout's mask anew in backward,
    and the gradients are wrong (seen in torch 2.14.1).
    """
    inductor = torch._dynamo.lookup_backend("inductor")

    def backend(graph, inputs):
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return inductor(graph, inputs)

    return torch.compile(model, backend=backend, dynamic=False)


def fused(slab_size: int | str | None) -> Callable[..., nn.Module]:
    """A factory of ours, with that slab size."""
    return lambda c_in, c_out, kernel, padding=0: FusedConvBN2d(
        c_in, c_out, kernel, padding=padding, bias=False, slab_size=slab_size
    )


METHODS: dict[str, Callable[..., nn.Module]] = {
    "unfused": unfused,
    "tutorial": TutorialConvBN2d,
    "checkpoint": lambda *args: Checkpointed(unfused(*args)),
    "fused, whole batch": fused("batch"),
    "fused, slabs": fused(None),
}


def chain(make: Callable[..., nn.Module], blocks: int, channels: int, kernel: int) -> nn.Sequential:
    """``blocks`` equal blocks conv, batch norm, ReLU that keep the image's size."""
    block = [nn.Sequential(make(channels, channels, kernel, kernel // 2), nn.ReLU()) for _ in range(blocks)]
    return nn.Sequential(*block)


BLOCKS = ("BasicBlock", "Bottleneck", "InvertedResidual", "MBConv", "_DenseLayer")
PRICES = (0, 150, 600)
FRONT = ("resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0")
FRONT_PRICES = (0, 9, 32, 64, 150, 300, 600, 1200)
BUDGETS = {"resnet50": (0.4,)}  # compiling takes minutes on a CPU
NETWORKS = ("resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0", "resnet18", "vgg11_bn")


def real_network(name: str) -> nn.Module:
    """torchvision's network ``name``, always with the same weights and without dropout.

    Raises:
        ValueError: torchvision has no such network.
    """
    if name not in torchvision.models.list_models():
        raise ValueError(
            f"name must be a network of torchvision, such as {', '.join(NETWORKS)}; got {name!r}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None)
    for module in model.modules():  # what is dropped would differ from method to method
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
    return model


def ways(name: str, prices: tuple[float, ...]) -> dict[str, Callable[[], nn.Module]]:
    """The ways to train torchvision's network ``name`` in less memory, unfused first."""
    make = functools.partial(real_network, name)
    return {
        "unfused": make,
        **under_remat(make, *prices),
        "checkpoint, blocks": lambda: block_by_block(make()),
    }


def front_of(name: str) -> dict[str, Callable[[], nn.Module]]:
    """More of them, for chapter 8's figure."""
    make = functools.partial(real_network, name)
    return {
        **ways(name, FRONT_PRICES),
        "checkpoint, stages": lambda: stage_by_stage(make()),
        **{f"compile, {b:g}": lambda b=b: compiled(make(), b) for b in BUDGETS.get(name, ())},
    }


def compare(
    networks: dict[str, nn.Module],
    x: Tensor,
    repeats: int = 5,
    amp: torch.dtype | None = None,
    seconds: float = 0,
) -> list[dict]:
    """Peak, end of forward and time of one step of each network on ``x``, beside the first network's.

    Args:
        networks: all on ``x``'s device, and that device one that ``memory_device`` returns unchanged.
        repeats: rounds of timing; 0 for memory alone.
        amp: an autocast dtype, or None.
        seconds: go on with the rounds for so long: short steps spread more than long ones.

    Returns:
        A row each: name, peak, forward (bytes above the start), on a CPU tensor_peak, too (see
        `MemoryTrace`), seconds (median), and the ratios ``peak_ratio``, ``forward_ratio``, ``time_ratio``
        with ``time_range``.
    """
    device = x.device

    def forward(network: nn.Module) -> Tensor:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            return network(x)

    def step(network: nn.Module, mark: Callable[[str], None] = lambda name: None) -> None:
        out = forward(network)
        mark("end of forward")
        out.backward(grad_out)

    with torch.no_grad():
        grad_out = torch.randn_like(forward(next(iter(networks.values()))))
    rows, times = [], {name: [] for name in networks}
    for name, network in networks.items():
        step(network)  # warm: libraries choose their algorithms
        network.zero_grad()
        with MemoryTrace(device) as trace:
            step(network, trace.mark)
        network.zero_grad()
        rows.append({"name": name, "peak": trace.peak, "forward": trace.marks["end of forward"]})
        if trace.tensor_peak is not None:
            rows[-1]["tensor_peak"] = trace.tensor_peak
    base = next(iter(networks))
    while repeats and (len(times[base]) < repeats or sum(map(sum, times.values())) < seconds):
        for name, network in networks.items():
            times[name].append(timed(lambda network=network: step(network), device))
            network.zero_grad()
    for row in rows:
        row["peak_ratio"], row["forward_ratio"] = (row[k] / rows[0][k] for k in ("peak", "forward"))
        if repeats:
            ratios = [a / b for a, b in zip(times[row["name"]], times[base], strict=True)]
            row["seconds"] = statistics.median(times[row["name"]])
            row["time_ratio"], row["time_range"] = statistics.median(ratios), (min(ratios), max(ratios))
    return rows


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
    """``compare``'s rows as text, one line a network."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}}      peak          end of forward   step"]
    for row in rows:
        line = f"{row['name']:{width}}  {row['peak'] / MIB:7.1f} MiB {row['peak_ratio']:5.3f}"
        line += f"  {row['forward'] / MIB:7.1f} MiB {row['forward_ratio']:5.3f}"
        if "seconds" in row:
            low, high = row["time_range"]
            line += f"  {row['seconds'] * 1e3:6.0f} ms {row['time_ratio']:5.3f} ({low:.2f} to {high:.2f})"
        lines.append(line)
    return "\n".join(lines)


def print_table(title: str, rows: list[dict]) -> None:
    """Print ``compare``'s rows under ``title``."""
    print(f"\n{title}\n{table(rows)}", flush=True)


def workloads(device: torch.device, quick: bool) -> dict[str, tuple[tuple[int, ...], dict[str, Callable]]]:
    """Title -> (input shape, {method: function that makes the network})."""
    batch, n = (64, 4) if quick else (2048, 32 if device.type == "cpu" else 256)
    kinds = {"3x3, 32 channels": (32, 3), "1x1, 128 channels": (128, 1)}

    def of_pairs(build: Callable[[Callable], nn.Module]) -> dict[str, Callable]:
        networks = {name: functools.partial(build, make) for name, make in METHODS.items()}
        return {**networks, **under_remat(networks["unfused"], *PRICES)}

    works = {f"MNIST network, batch {batch}": ((batch, 1, 28, 28), of_pairs(Net))}
    for kind, (channels, kernel) in kinds.items():
        networks = of_pairs(lambda make, c=channels, k=kernel: chain(make, 12, c, k))
        works[f"12 blocks conv, norm, ReLU: {kind}, {n}x56x56"] = ((n, channels, 56, 56), networks)
    shape = image_shape(device, quick)
    for name in NETWORKS:
        works[f"{name}, {'x'.join(map(str, shape))}"] = (shape, ways(name, PRICES))
    return works


def fronts(device: torch.device, quick: bool) -> dict[str, tuple[tuple[int, ...], dict[str, Callable]]]:
    """The same for memory against time."""
    shape = image_shape(device, quick)
    return {f"{name}, {'x'.join(map(str, shape))}": (shape, front_of(name)) for name in FRONT}


def image_shape(device: torch.device, quick: bool) -> tuple[int, ...]:
    """Of the batch that a whole network gets."""
    return (4, 3, 64, 64) if quick else (16, 3, 160, 160) if device.type == "cpu" else (256, 3, 224, 224)


def modes(device: torch.device) -> dict[str, tuple[torch.dtype | None, torch.memory_format]]:
    """Title -> (autocast's dtype or None, memory format)."""
    if device.type != "cuda":
        return {"float32": (None, torch.contiguous_format)}
    return {
        "float32 with TF32": (None, torch.contiguous_format),
        "bfloat16 autocast, channels_last": (torch.bfloat16, torch.channels_last),
    }


def measure(
    works: Callable, device: torch.device, mode: str, title: str, repeats: int, quick: bool
) -> list[dict]:
    """`compare`'s rows of one of ``works``, `workloads` or `fronts`, on a device as `compare` takes it."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    amp, memory_format = modes(device)[mode]
    shape, makers = works(device, quick)[title]
    torch.manual_seed(0)
    networks = {n: make().to(device).to(memory_format=memory_format) for n, make in makers.items()}
    x = torch.randn(shape, device=device).contiguous(memory_format=memory_format)
    return compare(networks, x, repeats, amp, 0 if quick else ROUNDS_SECONDS)


def run(
    device_name: str = "auto",
    repeats: int = 7,
    quick: bool = False,
    write: bool = True,
    only: str = "",
    front: bool = False,
) -> dict:
    """Measure the workloads with ``only`` in their title; print the tables; return (and write) the record."""
    device, how = memory_device(pick_device(device_name))
    works, name = (fronts, "front") if front else (workloads, "bench")
    record = {
        "date": datetime.date.today().isoformat(),
        **describe_device(device),
        "memory": how,
        "tables": {},
    }
    print(", ".join(f"{k}: {v}" for k, v in record.items() if k != "tables"))
    allocators = {"": {}}
    if device.type == "cpu" and sys.platform == "linux":
        held_still = {", allocator keeps its memory": KEEPS_MEMORY}
        allocators = held_still if front else allocators | held_still
    for mode in modes(device):
        for title in (title for title in works(device, quick) if only in title):
            for allocator, environment in allocators.items():
                rows = measured(environment, works, device, mode, title, repeats, quick)
                record["tables"][f"{title}, {mode}{allocator}"] = rows
                print_table(f"{title}, {mode}{allocator}", rows)
    if write:
        MEASUREMENTS.mkdir(exist_ok=True)
        path = MEASUREMENTS / f"{name}_{device.type}{only and '_' + only.replace(' ', '_')}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(
            f"\nwritten to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name}"
        )
    return record


KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


def measured(environment: dict[str, str], *arguments) -> list[dict]:
    """`measure` in a process of its own, which starts with these variables."""
    with patch.dict(os.environ, environment), ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


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
        pick_device(values["DEVICE"])
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    quick = bool(values["QUICK"])
    run(values["DEVICE"], values["REPEATS"], quick, not quick, values["ONLY"], bool(values["FRONT"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
