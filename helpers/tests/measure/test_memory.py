"""What MemoryTrace counts, and what it leaves out."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from helpers import memory
from helpers.memory import MemoryTrace, memory_device, saved_by, saved_tensors, storage_address


def test_tensors_and_what_a_library_takes_inside_of_an_operation():
    with MemoryTrace() as trace:
        x = torch.empty(1000)
        with record_function("aten::convolution"):
            scratch = torch.empty(5000)
            y = torch.empty(2000)
            with record_function("aten::copy_"):
                more = torch.empty(300)
            del scratch, more
        trace.mark("y is made")
        del x
        z = torch.empty(500)
    assert trace.marks == {"y is made": 4 * 3000}
    assert trace.tensor_peak == 4 * 3000
    assert trace.peak == 4 * 8300
    assert y.nbytes + z.nbytes == trace.timeline[-1][1]


def test_the_most_is_between_operations_or_at_the_end():
    with MemoryTrace() as trace:
        x = torch.empty(1000)
        del x
        y = torch.empty(2000)
    assert trace.tensor_peak == trace.peak == y.nbytes
    with MemoryTrace() as trace:
        pass
    assert trace.tensor_peak == trace.peak == 0


def test_a_trace_can_be_used_again_but_not_inside_another():
    trace, made = MemoryTrace(), []
    for size in (10, 1000):
        with trace:
            made.append(torch.empty(size))
            trace.mark(str(size))
        assert trace.peak == 4 * size and trace.marks == {str(size): 4 * size}
    with trace, pytest.raises(RuntimeError, match="^MemoryTrace cannot run inside"), MemoryTrace():
        pass


def test_not_inside_another_on_an_accelerator_either(monkeypatch):
    """It has one peak, which the inner trace would reset."""
    monkeypatch.setattr(memory, "memory_device", lambda device: (device, ""))
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.accelerator, name, lambda device: 0, raising=False)
    for _ in range(2):
        with MemoryTrace("cuda"):
            with pytest.raises(RuntimeError, match="^MemoryTrace cannot run inside"), MemoryTrace("cuda:0"):
                pass


def test_a_mark_has_a_name():
    with MemoryTrace() as trace, pytest.raises(ValueError, match="^name must be a str, got 5"):
        trace.mark(5)


def test_a_mark_outside_of_the_block_is_an_error():
    trace = MemoryTrace()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="^mark must be called inside"):
            trace.mark("now")
        with trace:
            trace.mark("now")
    assert trace.marks == {"now": 0}


def test_a_profiler_inside_is_an_error():
    """It would take the trace's events, and leave zeros."""
    with pytest.raises(RuntimeError, match="^PyTorch's profiler ran inside MemoryTrace"):
        with MemoryTrace():
            with torch.profiler.profile():
                torch.empty(10)
    started = torch.profiler.profile()
    with pytest.raises(RuntimeError, match="^PyTorch's profiler ran inside MemoryTrace"):
        with MemoryTrace():
            started.__enter__()
    with MemoryTrace() as trace:
        kept = torch.empty(1000)
    assert trace.peak == kept.nbytes


def test_an_error_inside_is_not_hidden_by_that_of_a_profiler():
    with pytest.raises(ZeroDivisionError), MemoryTrace():
        with torch.profiler.profile():
            1 / 0  # noqa: B018


def test_a_mark_may_have_any_name():
    with MemoryTrace() as trace:
        trace.mark("")
        kept = torch.empty(1000)
        trace.mark("mark:")
    assert trace.marks == {"": 0, "mark:": kept.nbytes} and trace.mark_times.keys() == trace.marks.keys()


def test_garbage_of_an_earlier_trace_is_not_subtracted():
    class Knot:
        def __init__(self, t):
            self.t, self.me = t, self

    with MemoryTrace():
        Knot(torch.empty(1000))
    with MemoryTrace() as trace:
        gc.collect()
    assert all(held == 0 for _, held in trace.timeline)


def test_a_block_of_an_earlier_trace_is_not_subtracted():
    with MemoryTrace():
        block = torch.empty(1000)
    with MemoryTrace() as trace:
        del block
        trace.mark("without it")
        again = torch.empty(1000)  # perhaps in the same place
        del again
    assert trace.marks == {"without it": 0} and trace.peak == 4000 and trace.timeline[-1][1] == 0


def test_a_cpu_is_measured_by_the_profiler():
    assert memory_device("cpu") == (torch.device("cpu"), "CPU allocator, every allocation from the profiler")


def test_an_accelerator_is_asked_only_after_it_allocated(monkeypatch):
    """Before that its allocator has no statistics, and the CPU would be measured in its place."""
    made = []
    monkeypatch.setattr(torch, "empty", lambda *size, device: made.append(device))
    monkeypatch.setattr(torch.accelerator, "memory_stats", lambda device: {"peak": 1} if made else {})
    assert memory_device("cuda")[0].type == "cuda"


def test_what_a_model_saves_but_no_parameters():
    """By the module that saved it; views have the whole's memory, which counts once."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid())

        def forward(self, x):
            y = self.block(x)
            return y[:, :3] * y[:, 3:]

    x, model = torch.randn(5, 4, requires_grad=True), Net()
    out, saved = saved_tensors(model, x)
    names, shapes = [entry.module for entry in saved], [entry.shape for entry in saved]
    assert names == ["block.0", "block.1", "", ""] and shapes == [(5, 4), (5, 6), (5, 3), (5, 3)]
    assert len({entry.storage for entry in saved}) == 2 and saved[0].storage == storage_address(x)
    assert [entry.nbytes for entry in saved] == [4 * 20, 4 * 30, 4 * 30, 4 * 30]
    assert torch.equal(out, model(x)) and all(entry.dtype == torch.float32 for entry in saved)
    again, everything = saved_by(model, x)
    assert torch.equal(again, out) and any(t.shape == (4, 6) for t in everything)  # the weight, transposed


@pytest.mark.parametrize("save", [saved_by, saved_tensors])
def test_nothing_is_left_without_a_backward(save):
    """An output that is saved must not hold its own graph."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Sigmoid())
    out, saved = save(model, torch.randn(5, 4))
    gone = weakref.ref(out)
    del out, saved
    gc.collect()
    assert gone() is None


def test_what_is_gone_before_the_end_has_a_storage_of_its_own():
    """Its address may be used again."""

    class Forgetful(nn.Linear):
        def forward(self, x):
            for _ in range(20):
                super().forward(x).square()
            return x

    _, saved = saved_tensors(Forgetful(400, 400), x := torch.randn(500, 400))
    made = [entry.storage for entry in saved if entry.storage != storage_address(x)]
    assert len(set(made)) == len(made) == 20
