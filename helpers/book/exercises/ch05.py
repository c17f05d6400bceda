"""The checkers of chapter 5."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from helpers import remat
from helpers.book.exercises import compare, compare_function, compare_nets, exercise, grads, new, require
from helpers.book.training import Net
from helpers.remat.writes import name_of, targets


class NothingInPlace(TorchFunctionMode):
    """Refuses calls that change a tensor in place, unless it is a counter."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        changed = any(t.is_floating_point() for t in targets(function, args, kwargs or {}))
        require(not changed, f"{name_of(function)} works in place; there is another way")
        return function(*args, **(kwargs or {}))


@exercise(1)
def check_lower_peak(network_class):
    """``network_class``: the MNIST network with a forward whose peak under `remat` is lower."""
    x, contexts, nets = torch.randn(128, 1, 28, 28), (remat, remat), (Net(), network_class())
    traces = compare_nets(*nets, x, contexts, atol=0)
    with NothingInPlace():
        for net in nets:
            net(x[:2])
        want, got = (net.eval()(x[:2]) for net in nets)
    compare("the output in eval mode", got, want, rtol=0, atol=0)
    before, peak = (trace.tensor_peak / (128 * 64 * 24 * 24 * 4) for trace in traces)
    peaks = f"the peak was {before:.2f} times y2 and is {peak:.2f}, and must fall by 0.2"
    require(before - peak > 0.2, f"{peaks}; which line makes the last tensor at the peak?")


@exercise(2)
def check_pool(function):
    """``function.apply(x)``: 2x2 max-pooling that keeps one byte for each output."""
    x = new((3, 2, 18, 20))[0].round()  # windows with equal values, and more places than a byte can count

    def pool(x):
        return F.max_pool2d(x, 2)

    def to_all(dout):
        larger, dout = (F.interpolate(t, scale_factor=2) for t in (pool(x), dout))
        return dout * (x == larger)

    def to_last(dout):
        return grads(lambda x: pool(x.flip(2, 3)).flip(2, 3), [x], dout)[0]

    def exchanged(dout):
        (dx,) = grads(pool, [x], dout)
        return dx.view(3, 2, 9, 2, 10, 2).transpose(3, 5).reshape(x.shape)

    mistakes = {
        "of equal values the first gets the gradient, and no other": to_all,
        "of equal values the first gets the gradient, not the last": to_last,
        "mind rows and columns: they are exchanged within the windows": exchanged,
    }
    note = "in backward, each value of dout goes to its window's maximum"
    compare_function(function.apply, pool, "dx", [x], mistakes, kept=1, note=note, copies=True)
