"""The checkers of chapter 5."""

import torch
import torch.nn.functional as F

from helpers import FusedConvBN2d, remat
from helpers.book.exercises import compare, compare_function, compare_nets, exercise, held_after, new, require
from helpers.book.training import Net, pair


@exercise(1)
def check_held_bytes(answer):
    """``answer(batch_size, is_fused)``: bytes that the MNIST network holds at the end of forward."""
    n, pooled, ys = 16, 16 * 9216 * 4, 16 * (21632 + 36864) * 4
    for case, make in (("unfused", pair), ("fused", lambda *args: FusedConvBN2d(*args, bias=False))):
        _, want = held_after(Net(make), torch.randn(n, 1, 28, 28))
        also = "or a ReLU's output is missing"
        mistakes = {
            f"the places of the maxima are int64, 8 bytes each; {also}": want - pooled,
            f"max-pooling also keeps where each maximum was, in 8 bytes; {also}": want - 2 * pooled,
            "one pair of outputs is missing; ReLU keeps its output, the norm alone its input": want - ys,
        }
        compare("the bytes", answer(n, case == "fused"), want, mistakes, case, rtol=0.02, atol=0)


@exercise(2)
def check_lower_peak(network_class):
    """``network_class``: the MNIST network with a forward whose peak under `remat` is lower."""
    x, contexts = torch.randn(128, 1, 28, 28), (remat, remat)
    traces = compare_nets(Net(), network_class(), x, contexts, atol=0)
    before, peak = (trace.tensor_peak / (128 * 64 * 24 * 24 * 4) for trace in traces)
    peaks = f"the peak was {before:.2f} times y2 and is {peak:.2f}"
    require(before - peak > 0.2, f"{peaks}; which line makes its last tensor?")


@exercise(3)
def check_pool(function):
    """``function.apply(x)``: 2x2 max-pooling that keeps one byte for each output."""
    note = "mind rows and columns: each value goes to its window's maximum, the first of equal ones"
    x = new((3, 2, 18, 20))[0].round()  # windows with equal values, and more places than a byte can count
    compare_function(function.apply, lambda x: F.max_pool2d(x, 2), "dx", [x], kept=1, note=note, copies=True)
