"""The checkers of chapter 5."""

import torch
import torch.nn.functional as F

from helpers import FusedConvBN2d, remat
from helpers.book.exercises import attempted, compare, compare_function, exercise, require
from helpers.book.training import Net, pair
from helpers.memory import MemoryTrace


@exercise(1)
def check_held_bytes(answer):
    """``answer(batch_size, is_fused)``: bytes that the MNIST network holds at the end of forward."""
    n, pooled, ys = 16, 16 * 9216 * 4, 16 * (21632 + 36864) * 4
    for case, make in (("unfused", pair), ("fused", lambda *args: FusedConvBN2d(*args, bias=False))):
        got, network = answer(n, case == "fused"), Net(make).float()
        with MemoryTrace() as trace:
            out = network(torch.randn(n, 1, 28, 28, dtype=torch.float32))
            trace.mark("now")
        want = trace.marks["now"] - n * 28 * 28 * 4  # without the batch, made inside the trace
        del out
        mistakes = {
            "the places of the maxima are int64, 8 bytes each; or a ReLU's output is missing": want - pooled,
            "max-pooling also keeps where each maximum was": want - 2 * pooled,
            "one pair of outputs too many; nothing keeps the norm's output, nor the fused layer y": want + ys,
            "one pair of outputs is missing; ReLU keeps its output, the norm alone its input": want - ys,
        }
        compare("what was measured, in bytes,", got, want, mistakes, case, rel=0.02)


@exercise(2)
def check_lower_peak(network_class):
    """``network_class``: the MNIST network with a forward whose peak under `remat` is lower by a y2."""
    n, y1, y2 = 128, 32 * 26 * 26 * 4, 64 * 24 * 24 * 4
    x, labels = torch.randn(n, 1, 28, 28, dtype=torch.float32), torch.randint(10, (n,))

    def step(make):
        torch.manual_seed(0)
        network = make().float()
        torch.manual_seed(0)
        with MemoryTrace() as trace:
            with remat(max_cost=0):
                out = attempted(network(x))
            F.nll_loss(out, labels).backward()
        return out, trace.tensor_peak, [p.grad for p in network.parameters()]

    (got, peak, grads), (want, before, right) = step(network_class), step(Net)
    require(torch.equal(got, want), "the output must be that of Net, bit for bit")
    pairs = zip(grads, right, strict=False)
    close = all(g is not None and torch.allclose(g, r, rtol=1e-3, atol=1e-5) for g, r in pairs)
    require(close and len(grads) == len(right), "the output is right, but a gradient is not")
    linear = sum(p.nbytes for name, p in Net().float().named_parameters() if name.startswith("fc"))
    fallen = f"the peak has fallen by {(before - peak) / (n * y2):.2f} y2, which is not enough"
    last = "the peak is where it was; which line of forward makes its last tensor?"
    low = peak <= n * (y1 + 3 * y2) + linear + n * y2 // 20  # the linear layers' gradients are there by then
    require(low, fallen if peak <= before - n * y2 // 50 else last)


@exercise(3)
def check_pool(function):
    """``function.apply(x)``: 2x2 max-pooling that keeps one byte for each output."""
    x = torch.randn(3, 2, 6, 8, dtype=torch.float64, requires_grad=True)

    def mistakes(dout, got):
        once = "the sum of dx must be that of the output's gradient: each value goes to one place"
        place = "each value goes to one place, but not to that of the maximum; mind rows and columns"
        return {place if torch.allclose(got[0].sum(), dout.sum()) else once: got[0]}

    window = "the output is wrong; does a window have 2 rows and 2 columns?"
    compare_function(function.apply, "dx", [x], F.max_pool2d(x, 2), mistakes, forward=window)
    return ", with at most a byte a value"
