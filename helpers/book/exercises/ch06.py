"""The checkers of chapter 6; that of exercise 1 is on the page."""

from collections import namedtuple
from functools import partial

import torch
import torch.nn.functional as F

from helpers import conv2d_backward
from helpers.batch_norm import CHANNELS, per_channel
from helpers.book.exercises import call, compare, compare_function, exercise, grads, measured, new, require

NAMES = "dx, dw, dgamma, dbeta"
HowMade = namedtuple("HowMade", "function inputs")  # a recipe, as chapter 6 has it
convolve = partial(F.conv2d, padding=1)


@exercise(2)
def check_frozen(answer):
    """``answer(dz, x, w, gamma, mean, var, eps)``: gradients of conv (padding 1) and a constant norm."""
    x, w, gamma, beta, mean, dz = new((6, 2, 14, 12), (8, 2, 3, 3), (8,), (8,), (8,), (6, 8, 14, 12))
    var, eps = torch.rand_like(gamma) + 0.5, 0.1
    gamma[0] = 0.0  # so that nothing can be divided by it

    def layer(x, w, gamma, beta, eps):
        return F.batch_norm(convolve(x, w), mean, var, gamma, beta, eps=eps)

    want, other = (grads(layer, (x, w, gamma, beta), dz, eps=e) for e in (eps, 1e-5))
    (dx, dw), inv_std = grads(convolve, (x, w), dz), (var + eps).rsqrt()
    no_mean, no_y = ((dz * t).sum(CHANNELS) * inv_std for t in (convolve(x, w), -per_channel(mean)))
    mistakes = {
        "use the eps that is passed in": other[0],
        "the sum needs w itself, not the scaled one": gamma * inv_std * no_mean + no_y,
        "z is γ/σ times y, and the factor is missing from dx": dx,
        "z is γ/σ times y, and the factor is missing from dw": dw,
        "the mean is missing from dgamma: Σ dz (y - μ) = Σ dz y - μ Σ dz": no_mean,
        "subtract μ Σ dz from Σ dz y, do not add it": no_mean - no_y,
        "dgamma must be divided by σ, too": (no_mean + no_y) / inv_std,
    }
    got, trace, flops = measured(call, answer, dz, x, w, gamma, mean, var, eps)
    compare(NAMES, got, want, mistakes)
    times = flops / measured(conv2d_backward, dz, x, w, padding=1)[2]
    require(times <= 1, f"right gradients, but convolutions take {times:.1f} times those of one backward")
    more = (trace.tensor_peak - x.nbytes) / dz.nbytes
    require(more <= 0.5, f"right gradients, but they needed {more:.1f} buffers of y's size")


@exercise(3)
def check_norm_leaky(answer):
    """``answer(y, gamma, beta, recipe, alpha)``: batch norm and leaky ReLU that keep y's recipe."""
    inputs, alpha = new((16, 5, 9, 8), (5, 5, 3, 3), (5,), (5,)), 0.3

    def layer(x, w, gamma, beta):
        return call(answer, convolve(x, w), gamma, beta, HowMade(convolve, (x, w)), alpha)

    def norm(x, w, gamma, beta):
        return F.batch_norm(convolve(x, w), None, None, gamma, beta, training=True)

    def dx(dz):
        return grads(norm, inputs, dz)[0]

    y, z = convolve(*inputs[:2]), norm(*inputs)
    mistakes = {
        "that is without leaky ReLU; dz = da where z > 0, α da elsewhere": dx,
        "the sign that counts is z's, not y's": lambda da: dx(torch.where(y > 0, da, alpha * da)),
        "where z < 0, dz is α da, not 0": lambda da: dx(da * (z > 0)),
    }
    compare_function(layer, lambda *inputs: F.leaky_relu(norm(*inputs), alpha), NAMES, inputs, mistakes)
    leaves, da = [t.requires_grad_() for t in inputs], torch.randn_like(inputs[0])
    out, forward, _ = measured(layer, *leaves)
    _, backward, _ = measured(out.backward, da)
    for name, buffers in (("forward", forward.tensor_peak), ("backward", out.nbytes + backward.tensor_peak)):
        words = f"right gradients, but {name} peaks at {buffers / da.nbytes:.1f} buffers, and L + 2 is 3"
        require(buffers <= 3.5 * da.nbytes, words)
