"""The checkers of chapter 6."""

from collections import namedtuple
from functools import partial

import torch
import torch.nn.functional as F

from helpers.book.exercises import CHANNELS, compare_all, compare_function, exercise, grads, require
from helpers.memory import MemoryTrace

NAMES = "dx, dw, dgamma, dbeta"
HowMade = namedtuple("HowMade", "function inputs")  # a recipe, as chapter 6 has it
convolve = partial(F.conv2d, padding=1)


def new_leaves(*shapes):
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@exercise(2)
def check_frozen(answer):
    """``answer(dz, x, w, gamma, mean, var, eps)``: gradients of conv (padding 1) and a constant norm."""
    leaves, eps = new_leaves((6, 2, 14, 12), (8, 2, 3, 3), (8,), (8,)), 0.1
    x, w, gamma, beta = (t.detach() for t in leaves)
    mean, var, y = torch.randn_like(gamma), torch.rand_like(gamma) + 0.5, convolve(*leaves[:2])
    z = F.batch_norm(y, mean, var, *leaves[2:], training=False, eps=eps)
    dz, inv_std = torch.randn_like(z), torch.rsqrt(var + eps)
    want = torch.autograd.grad(z, leaves, dz)
    with MemoryTrace() as trace:
        got = answer(dz, x, w, gamma, mean, var, eps)
    dx, dw = grads(convolve, (x, w), dz)
    no_mean = (dz * y.detach()).sum(CHANNELS) * inv_std
    mistakes = {
        "z is γ/σ times y, and the factor is missing from dx": dx,
        "z is γ/σ times y, and the factor is missing from dw": dw,
        "the mean is missing from dgamma: Σ dz (y - μ) = Σ dz y - μ Σ dz": no_mean,
        "dgamma has a γ too many: take the weight gradient before it is scaled": want[2] * gamma,
        "dgamma is to be divided by σ, the root of var + ε": want[2] / inv_std,
    }
    compare_all(NAMES, got, want, mistakes)
    more = (trace.tensor_peak - x.nbytes) / dz.nbytes
    require(more <= 0.5, f"right gradients, but they needed {more:.1f} buffers of y's size")
    return ", without y"


@exercise(3)
def check_norm_leaky(answer):
    """``answer(y, gamma, beta, recipe, alpha)``: batch norm and leaky ReLU that keep y's recipe."""
    leaves, alpha = new_leaves((16, 5, 9, 8), (5, 5, 3, 3), (5,), (5,)), 0.3
    x = leaves[0]

    def layer(x, w, gamma, beta):
        return answer(convolve(x, w), gamma, beta, HowMade(convolve, (x, w)), alpha)

    def norm(x, w, gamma, beta):
        return F.batch_norm(convolve(x, w), None, None, gamma, beta, training=True)

    def mistakes(da, got):
        slopes = zip(NAMES.split(", "), grads(norm, leaves, da), strict=True)
        return {f"{name} is without leaky ReLU; dz = da where z > 0, α da elsewhere": s for name, s in slopes}

    compare_function(layer, NAMES, leaves, F.leaky_relu(norm(*leaves), alpha), mistakes, [x])
    da = torch.randn_like(x)
    with MemoryTrace() as trace:
        layer(*leaves).backward(da)
    buffers = trace.tensor_peak / x.nbytes
    require(buffers <= 3.5, f"right gradients, but one block peaks at {buffers:.1f} buffers, and L + 2 is 3")
    return f", with a peak of {buffers:.2f} buffers for one block"
