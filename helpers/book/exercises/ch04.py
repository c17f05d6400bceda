"""The checkers of chapter 4."""

from types import SimpleNamespace

import torch.nn.functional as F

from helpers.batch_norm import CHANNELS, per_channel
from helpers.book.exercises import call, compare, compare_function, exercise, grads, new, require


def simple_norm(y, eps):
    """The tutorial's norm."""
    return (y - per_channel(y.mean(CHANNELS))) / per_channel(y.std(CHANNELS) + eps)


@exercise(1)
def check_six_steps(answer):
    """The tutorial's function, backward, (dx, dw, None) from (ctx, dz)."""
    (x, w, dz), eps = new((3, 2, 6, 5), (4, 2, 3, 2), (3, 4, 4, 4)), 0.5
    y = F.conv2d(x, w)
    want = grads(lambda x, w: simple_norm(F.conv2d(x, w), eps), (x, w), dz)
    mistakes = {
        "that is the convolution's alone; step 4 turns dz into dy": grads(F.conv2d, (x, w), dz)[0],
        "take eps from ctx": grads(lambda x, w: simple_norm(F.conv2d(x, w), 1e-3), (x, w), dz)[0],
    }
    saved = x, w, y.mean(CHANNELS), y.std(CHANNELS)
    ctx = SimpleNamespace(saved_tensors=saved, eps=eps, needs_input_grad=(True, True, False))
    got = call(answer, ctx, dz)
    require(not isinstance(got, list), "autograd takes a list for one value: return a tuple")
    compare("dx, dw, None for eps", got, (*want, None), mistakes)


@exercise(2)
def check_repaired(answer):
    """The tutorial's norm, backward, without the bug, from (dz, y, mean, sqrt_var, eps)."""
    (y, dz), eps = new((3, 4, 5, 6), (3, 4, 5, 6)), 0.5
    (want,) = grads(simple_norm, (y,), dz, eps=eps)
    mean, sqrt_var = y.mean(CHANNELS), y.std(CHANNELS)
    centred, denom, m = y - per_channel(mean), sqrt_var + eps, y.numel() / 4
    ddenom = -(dz * centred).sum(CHANNELS) / denom**2
    through_var, as_before = (centred * per_channel(ddenom / (m - 1) / root) for root in (sqrt_var, denom))
    words = "the bug is still there; for dz = 1, which of the per-channel numbers are 0?"
    mistakes = {words: want - through_var + as_before}
    compare("dy", call(answer, dz, y, mean, sqrt_var, eps), want, mistakes)


@exercise(3)
def check_conv_bn_relu(function):
    """Conv, batch norm and ReLU as one function, apply(x, w, gamma, beta)."""
    inputs = new((6, 2, 9, 8), (4, 2, 3, 2), (4,), (4,))

    def conv_bn(x, w, gamma, beta):
        return F.batch_norm(F.conv2d(x, w), None, None, gamma, beta, training=True)

    mistakes = {"that is the gradient without ReLU; mask da": lambda da: grads(conv_bn, inputs, da)[0]}
    names = "dx, dw, dgamma, dbeta"
    compare_function(function.apply, lambda *inputs: conv_bn(*inputs).relu(), names, inputs, mistakes, kept=1)
