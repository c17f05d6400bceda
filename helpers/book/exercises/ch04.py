"""The checkers of chapter 4."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from helpers.batch_norm import per_channel
from helpers.book.exercises import (
    CHANNELS,
    attempted,
    compare,
    compare_all,
    compare_function,
    exercise,
    grads,
    require,
)


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
def check_six_steps(answer):
    """The tutorial's function, backward, (dx, dw, None) from (ctx, dz)."""
    x, w, eps = torch.randn(3, 2, 6, 5), torch.randn(4, 2, 3, 2), 0.5
    y = F.conv2d(x, w)
    saved, dz = (x, w, y.mean(CHANNELS), y.std(CHANNELS)), torch.randn_like(y)
    given = dz.clone()
    got = attempted(answer(SimpleNamespace(saved_tensors=tuple(t.clone() for t in saved), eps=eps), given))
    require(torch.equal(given, dz), "dz was overwritten; it belongs to autograd, and others may need it")
    require(isinstance(got, (tuple, list)) and len(got) == 3, "return a tuple, (dx, dw, None)")
    of_dz = zip(("dx", "dw"), grads(F.conv2d, (x, w), dz), strict=True)
    mistakes = {f"{name} is the convolution's alone; step 4 turns dz into dy": grad for name, grad in of_dz}
    want = grads(lambda x, w: simple_norm(F.conv2d(x, w), eps), (x, w), dz)
    compare_all("dx, dw", got[:2], want, mistakes)
    require(got[2] is None, "eps has no gradient, return None for it")


@exercise(2)
def check_repaired(answer):
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
