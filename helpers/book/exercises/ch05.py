"""The checkers of chapter 5."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.book.training import Net, pair
from helpers.fused import FusedConvBN2d
from helpers.memory import MemoryTrace, saved_tensors
from helpers.remat import remat


def check_held_bytes(answer) -> str:
    """``answer(batch_size, is_fused)``: bytes that the MNIST network holds at the end of forward."""
    n, mib = 16, 2**20
    pooled, outputs = n * 9216 * 4, n * (21632 + 36864) * 4
    mistakes = {
        -pooled: "the places of the maxima are int64, 8 bytes each, not 4; or a ReLU's output is missing",
        -2 * pooled: "max-pooling also keeps where each maximum was",
        outputs: "one pair of outputs too many; nothing keeps the norm's output, nor the fused layer any y",
        -outputs: "one pair of outputs is missing; ReLU keeps its output, the norm alone its input",
    }
    for is_fused, make in ((False, pair), (True, lambda *args: FusedConvBN2d(*args, bias=False))):
        name, got, network = "fused" if is_fused else "unfused", answer(n, is_fused), Net(make).float()
        if got is None:
            return "exercise 1: not attempted yet"
        with MemoryTrace() as trace:
            out = network(torch.randn(n, 1, 28, 28, dtype=torch.float32))
            trace.mark("now")
        want = trace.marks["now"] - n * 28 * 28 * 4  # without the batch, made inside the trace
        del out
        for extra, words in mistakes.items():
            if abs(got - want) > 0.02 * want and abs(got - extra - want) < 0.01 * want:
                return f"exercise 1, {name}: {words}"
        if abs(got - want) > 0.02 * want:
            return f"exercise 1, {name}: measured {want / mib:.1f} MiB, your answer is {got / mib:.1f} MiB"
    return "exercise 1: right"


def check_lower_peak(network_class) -> str:
    """``network_class``: the MNIST network with a forward whose peak under `remat` is lower by a y2."""
    n, y1, y2 = 128, 32 * 26 * 26 * 4, 64 * 24 * 24 * 4
    x, labels = torch.randn(n, 1, 28, 28, dtype=torch.float32), torch.randint(10, (n,))

    def step(make):
        torch.manual_seed(0)
        network = make().float()
        torch.manual_seed(0)
        with MemoryTrace(timeline=True) as trace:
            with remat(max_cost=0):
                out = network(x)
            if isinstance(out, Tensor):
                F.nll_loss(out, labels).backward()
        return out, trace.tensor_peak, [p.grad for p in network.parameters()]

    (got, peak, grads), (want, before, right) = step(network_class), step(Net)
    if got is None:
        return "exercise 2: not attempted yet"
    if not torch.equal(got, want):
        return "exercise 2: the output must be that of Net, bit for bit"
    if len(grads) != len(right) or not all(
        g is not None and torch.allclose(g, r, rtol=1e-3, atol=1e-5)
        for g, r in zip(grads, right, strict=True)
    ):
        return "exercise 2: the output is right, but a gradient is not"
    linear = sum(p.nbytes for name, p in Net().float().named_parameters() if name.startswith("fc"))
    if peak > n * (y1 + 3 * y2) + linear + n * y2 // 20:  # the linear layers' gradients are there by then
        if peak > before - n * y2 // 50:
            return "exercise 2: the peak is where it was; which line of forward makes its last tensor?"
        return f"exercise 2: the peak has fallen by {(before - peak) / (n * y2):.2f} y2, which is not enough"
    return "exercise 2: right"


class _Applied(nn.Module):
    """A function as a module, for `saved_tensors`."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def check_pool(function) -> str:
    """``function.apply(x)``: 2x2 max-pooling that keeps one byte for each output."""
    x = torch.randn(3, 2, 6, 8, dtype=torch.float64, requires_grad=True)
    out, saved = saved_tensors(_Applied(function.apply), x)
    if out is None:
        return "exercise 3: not attempted yet"
    want = F.max_pool2d(x, 2)
    if out.shape != want.shape:
        return f"exercise 3: the output must have shape {tuple(want.shape)}, got {tuple(out.shape)}"
    if not torch.equal(out, want):
        return "exercise 3: the output is wrong; does a window have 2 rows and 2 columns?"
    wide = [f"{s.dtype} {s.shape}" for s in saved if s.nbytes > out.numel()]
    if wide:
        return f"exercise 3: the output is right, but more than a byte a value is kept: {', '.join(wide)}"
    dout = torch.randn_like(out)
    try:
        (got,) = torch.autograd.grad(out, x, dout)
    except RuntimeError as reason:
        return f"exercise 3: backward fails: {reason}"
    (right,) = torch.autograd.grad(want, x, dout)
    if torch.equal(got, right):
        return f"exercise 3: right, with {sum(s.nbytes for s in saved) / out.numel():g} bytes a value"
    if got.sum().sub(dout.sum()).abs() > 1e-9:
        return "exercise 3: the sum of dx must be that of the output's gradient: each value goes to one place"
    return "exercise 3: each value goes to one place, but not to that of the maximum; mind rows and columns"
