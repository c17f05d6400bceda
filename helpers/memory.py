"""One way to measure memory, on the CPU and on an accelerator.

    with MemoryTrace(device) as trace:
        loss = step(batch)
        trace.mark("end of forward")
        loss.backward()
    trace.peak, trace.marks["end of forward"], trace.timeline

Every number counts bytes *allocated since the trace began*: weights, optimizer state and the batch exist
before it and are not included.
"""

import contextlib
import functools
import gc
import os
import platform
import re
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.module_tracker import ModuleTracker

BEGINS = "helpers.memory.MemoryTrace begins"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to stderr at every start otherwise


def memory_device(device: torch.device | str) -> tuple[torch.device, str]:
    """The device that memory can be measured on, and how, in words.

    An accelerator whose allocator keeps no peak is named in the words, and the CPU returned instead.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return device, "CPU allocator, every allocation from the profiler"
    with contextlib.suppress(AssertionError, AttributeError, RuntimeError, NotImplementedError, ValueError):
        torch.empty(1, device=device)  # an allocator that was never used has no statistics
        if torch.accelerator.memory_stats(device):
            return device, f"{device.type} allocator's statistics"
    return torch.device("cpu"), f"CPU allocator: {device.type} is not available or keeps no peak statistics"


def describe_device(device: torch.device | str) -> dict[str, str]:
    """What a measurement must carry: device, its instructions, threads, the versions of torch and cuDNN."""
    device = torch.device(device)
    facts = {"device": device.type, "torch": torch.__version__}
    if device.type == "cpu":
        linux = Path("/proc/cpuinfo")
        names = re.findall(r"^model name\s*: (.*)", linux.read_text() if linux.exists() else "", re.MULTILINE)
        name = names[0] if names else platform.processor() or platform.machine()
        instructions, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        facts["device"] = f"{name} with {instructions}, {threads} threads"
    elif device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["cudnn"] = str(torch.backends.cudnn.version())
    return facts


class MemoryTrace:
    """Context manager that records the memory of what this thread runs inside it, from zero at each use.

    Args:
        device: where the work runs. Must be one that ``memory_device`` returns unchanged.
        timeline: also record every allocation. Always on for the CPU, which has no other source.

    Attributes:
        peak: the most bytes at any moment, above the start.
        tensor_peak: the most between two of PyTorch's operations, if the timeline is recorded: tensors alone,
            without a library's scratch memory inside an operation, which depends on the algorithm that it
            chooses for the processor and the number of threads. Tensors are the same everywhere.
        marks: bytes above the start at each ``mark(name)``.
        timeline: ``(milliseconds, bytes)`` after each allocation and release, if recorded.
        mark_times: milliseconds of each mark on the timeline's clock.

    Raises:
        ValueError, or PyTorch's own error: ``device`` does not fit.
        RuntimeError: on entry, inside another trace, or if PyTorch's profiler is running already; on exit, if
            the profiler was started inside, because that ended this trace.
    """

    _traced: ClassVar[set[str]] = set()  # kinds of accelerators: an allocator counts one peak

    def __init__(self, device: torch.device | str = "cpu", timeline: bool = False) -> None:
        self.device = torch.device(device)
        usable, how = memory_device(self.device)
        if usable != self.device:
            raise ValueError(f"device must keep memory statistics, got {self.device} ({how})")
        self._records, self._profile = self.device.type == "cpu" or timeline, None

    def mark(self, name: str) -> None:
        """Note the memory held at this moment."""
        if not isinstance(name, str):
            raise ValueError(f"name must be a str, got {name!r:.80}")
        if self._profile is None and self.device.type not in MemoryTrace._traced:
            raise RuntimeError("mark must be called inside of the trace's with block")
        if self.device.type != "cpu":
            self.marks[name] = torch.accelerator.memory_allocated(self.device) - self._start
        if self._profile is not None:
            with record_function("mark:" + name):
                pass

    def __enter__(self) -> "MemoryTrace":
        if (self._records and torch.autograd._profiler_enabled()) or self.device.type in MemoryTrace._traced:
            raise RuntimeError("MemoryTrace cannot run inside PyTorch's profiler or another MemoryTrace")
        self.peak, self.tensor_peak, self.timeline, self.marks, self.mark_times = 0, None, [], {}, {}
        self._complete = False
        if self._records:
            _silence_the_profilers_first_warning()
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self._profile = profile(activities=activities, profile_memory=True).__enter__()
            with record_function(BEGINS):  # lost if another profiler starts inside
                pass
        if self.device.type != "cpu":
            gc.collect()  # what is freed from now on would count as negative
            torch.accelerator.synchronize(self.device)
            torch.accelerator.reset_peak_memory_stats(self.device)
            self._start = torch.accelerator.memory_allocated(self.device)
            MemoryTrace._traced.add(self.device.type)
        return self

    def __exit__(self, *exception) -> None:
        if self.device.type != "cpu":
            MemoryTrace._traced.discard(self.device.type)
            torch.accelerator.synchronize(self.device)
            self.peak = torch.accelerator.max_memory_allocated(self.device) - self._start
        if self._profile is not None:
            if torch.autograd._profiler_enabled():  # else one inside has ended ours
                self._profile.__exit__(*exception)
                self._read_events()
            self._profile = None  # it holds every event
            if not self._complete and exception[0] is None:
                raise RuntimeError("PyTorch's profiler ran inside MemoryTrace, which has recorded nothing")

    def _read_events(self) -> None:
        results = self._profile.profiler.kineto_results
        events, blocks = results.experimental_event_tree(), set()  # those made in this trace, by address
        for event in events:  # it grows
            events.extend(event.children)
        held, kind = 0, self.device.type
        between, until = 0, 0  # the most between operations, and when the one that runs will return
        for event in sorted(events, key=lambda event: event.start_time_ns):
            name, start = event.name, event.start_time_ns
            ms = (start - results.trace_start_ns()) / 1e6
            if start > until:
                between = max(between, held)
            if event.tag == _EventType.Allocation and event.extra_fields.device.type == kind:
                block, change = event.extra_fields.ptr, event.extra_fields.alloc_size
                if change > 0:
                    blocks.add(block)
                if block in blocks:  # the release of a block made before the trace counts for nothing
                    held += change
                    self.timeline.append((ms, held))
                if change < 0:
                    blocks.discard(block)
            elif name == BEGINS:
                self._complete = True
            elif name.startswith("aten::"):
                until = max(until, start + event.duration_time_ns)
            elif name.startswith("mark:"):
                self.mark_times[name[5:]] = ms
                if kind == "cpu":
                    self.marks[name[5:]] = held
        self.tensor_peak = max(between, held)
        if kind == "cpu":
            self.peak = max((held for _, held in self.timeline), default=0)


@functools.cache
def _silence_the_profilers_first_warning() -> None:
    """Let the profiler give its one warning unheard: it does not count blocks made before it, as we want."""
    block = [torch.empty(1, device="cpu")]
    stderr = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
                block.clear()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


class SavedTensor(NamedTuple):
    """A tensor that autograd keeps: which module saved it, its shape and its storage."""

    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    nbytes: int


def storage_address(t: torch.Tensor) -> int:
    """Where the memory of ``t`` begins; all views of it have the same address."""
    return t.untyped_storage().data_ptr()


def saved_by(function, *inputs: torch.Tensor):
    """``(function(*inputs), [each tensor that autograd saves during the call, in order])``."""
    saved = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t := t.detach())  # else an output would hold the graph that holds it
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = function(*inputs)
    return output, saved


def saved_tensors(model: torch.nn.Module, *inputs: torch.Tensor):
    """Run ``model(*inputs)`` and list what it saves for backward, in order, except its parameters.

    Returns:
        ``(output, [SavedTensor, ...])``. A tensor that is saved twice is listed twice, with one
        ``storage``; its memory counts once.
    """
    parameters = {storage_address(p) for p in model.parameters()}
    saved, alive = [], []

    def pack(t: torch.Tensor) -> torch.Tensor:
        t = t.detach()  # else an output would hold the graph that holds it
        if storage_address(t) not in parameters:
            alive.append(t)  # while it lives, no other tensor can get its address
            innermost = max(running.parents, key=lambda p: p.count("."))  # the longest, as "Net.conv1.bn"
            entry = (tuple(t.shape), t.dtype, storage_address(t), t.untyped_storage().nbytes())
            saved.append(SavedTensor(innermost.partition(".")[2], *entry))
        return t

    with ModuleTracker() as running, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(*inputs)
    return output, saved
