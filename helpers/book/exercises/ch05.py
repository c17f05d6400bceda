"""The checkers of chapter 5."""

import torch
import torch.nn.functional as F

from helpers import FusedConvBN2d, remat
from helpers.book.exercises import compare, compare_function, exercise, held_after, new, one_tensor, require
from helpers.book.training import Net, pair
from helpers.memory import MemoryTrace


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
    x = torch.randn(128, 1, 28, 28)

    def step(network):
        torch.manual_seed(0)  # dropout's
        with MemoryTrace() as trace:
            with remat(max_cost=0):
                out = one_tensor(network(x))
            out.square().mean().backward()
        grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        return out, grads, trace.tensor_peak / (128 * 64 * 24 * 24 * 4)

    base, network = Net(), network_class()
    network.load_state_dict(base.state_dict())
    (got, mine, peak), (want, right, before) = step(network), step(base)
    compare("the output", got, want, rtol=0, atol=0)
    compare("a gradient", mine, right, rtol=1e-3, atol=1e-5)
    peaks = f"the peak was {before:.2f} times y2 and is {peak:.2f}"
    require(before - peak > 0.25, f"{peaks}; which line makes its last tensor?")


@exercise(3)
def check_pool(function):
    """``function.apply(x)``: 2x2 max-pooling that keeps one byte for each output."""
    note = "mind rows and columns: each value goes to the place of its window's maximum"
    x = new((3, 2, 18, 20))[0].round()  # windows with equal values, and more places than a byte can count

    def pool(x):
        return function.apply(x + 0)  # a tensor of forward's own, which would count if it were kept

    compare_function(pool, lambda x: F.max_pool2d(x, 2), "dx", [x], kept=1, note=note)
