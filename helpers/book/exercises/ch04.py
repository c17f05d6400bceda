"""The checkers of chapter 4."""

import torch
import torch.nn.functional as F

from helpers.batch_norm import per_channel
from helpers.book.exercises import CHANNELS, compare, compare_function, exercise


def simple_norm(y, eps=1e-3):
    """The tutorial's norm."""
    return (y - per_channel(y.mean(CHANNELS))) / per_channel(y.std(CHANNELS) + eps)


def tutorials_backward(dz, y, mean, sqrt_var, eps, bug: bool):
    """The tutorial's norm, backward; with exercise 2's bug or without."""
    m, num, denom = y.numel() / y.shape[1], y - per_channel(mean), sqrt_var + eps
    ddenom = -(dz * num).sum(CHANNELS) / denom**2
    dvar = ddenom / (2 * (denom if bug else sqrt_var))
    dmean = -dz.sum(CHANNELS) / denom
    return dz / per_channel(denom) + per_channel(dmean / m) + per_channel(2 * dvar / (m - 1)) * num


@exercise(1)
def check_biased(function):
    """The tutorial's function with a bias, apply(x, w, b)."""
    x, w, b = leaves = [torch.randn(s, requires_grad=True) for s in ((3, 2, 6, 5), (4, 2, 3, 2), (4,))]

    def mistakes(dz, got):
        y, mean = F.conv2d(x, w), F.conv2d(x, w, b).mean(CHANNELS)
        dy = tutorials_backward(dz, y, mean, y.std(CHANNELS), 1e-3, bug=False)
        (dx,), db = torch.autograd.grad(y, x, dy), dz.sum(CHANNELS)
        return {
            "dx is wrong; is the y that backward computes the y that mean belongs to?": dx,
            "db sums dz, but b reaches z through the mean as well": db,
        }

    want = simple_norm(F.conv2d(x, w, b))
    compare_function(function.apply, "dx, dw, db", leaves, want, mistakes, leaves)


@exercise(2)
def check_mended(answer):
    """The tutorial's norm, backward, without the bug, from (dz, y, mean, sqrt_var, eps)."""
    y, dz = torch.randn(3, 4, 5, 6) * 2 + 1, torch.randn(3, 4, 5, 6)
    for eps in (1e-3, 0.5):
        arguments = dz, y, y.mean(CHANNELS), y.std(CHANNELS)
        right, buggy = (tutorials_backward(*arguments, eps, bug=bug) for bug in (False, True))
        mistakes = {"the bug is still there; for dz = 1, which of the per-channel numbers are 0?": buggy}
        compare("dy", answer(*(a.clone() for a in arguments), eps), right, mistakes)


@exercise(3)
def check_conv_bn_relu(function):
    """Conv, batch norm and ReLU as one function, apply(x, w, gamma, beta)."""
    leaves = [torch.randn(s, requires_grad=True) for s in ((3, 2, 6, 5), (4, 2, 3, 2), (4,), (4,))]
    z = F.batch_norm(F.conv2d(*leaves[:2]), None, None, *leaves[2:], training=True)
    names = "dx, dw, dgamma, dbeta"

    def mistakes(dz, got):
        unmasked = zip(names.split(", "), torch.autograd.grad(z, leaves, dz, retain_graph=True), strict=True)
        return {f"{name} is the gradient without ReLU; mask dz": grad for name, grad in unmasked}

    compare_function(function.apply, names, leaves, z.relu(), mistakes, leaves)
