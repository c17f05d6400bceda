"""The checkers of chapter 4."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.batch_norm import per_channel
from helpers.book.exercises import CHANNELS, grads, hint, hint_tuple
from helpers.memory import saved_by


def simple_norm(y: Tensor, eps: float = 1e-3) -> Tensor:
    """The tutorial's norm."""
    return (y - per_channel(y.mean(CHANNELS))) / per_channel(y.std(CHANNELS) + eps)


def tutorials_backward(dz, y, mean, sqrt_var, eps, bug: bool) -> Tensor:
    """The tutorial's norm, backward; with exercise 2's bug or without."""
    m, num, denom = y.numel() / y.shape[1], y - per_channel(mean), sqrt_var + eps
    ddenom = -(dz * num).sum(CHANNELS) / denom**2
    dvar = ddenom / (2 * (denom if bug else sqrt_var))
    dmean = -dz.sum(CHANNELS) / denom
    return dz / per_channel(denom) + per_channel(dmean / m) + per_channel(2 * dvar / (m - 1)) * num


def check_function(number: int, function, leaves, want: Tensor, names: tuple[str, ...], mistakes) -> str:
    """The verdict on an autograd.Function, given what it must compute and the names of its gradients.

    ``mistakes(dz)`` maps what to say to the name of a gradient and the values that a mistake gives.
    """
    z, saved = saved_by(function.apply, *leaves)
    if z is None:
        return f"exercise {number}: not attempted yet"
    if wrong := hint(number, "the output", z.detach(), want.detach()):
        return wrong
    if large := [str(t.dtype) for t in saved if t.shape == z.shape and t.dtype != torch.bool]:
        return f"exercise {number}: right output, but a tensor of its shape is saved, {', '.join(large)}"
    dz = torch.randn_like(z)
    try:
        got = torch.autograd.grad(z, leaves, dz, allow_unused=True)
    except RuntimeError as reason:
        return f"exercise {number}: backward fails: {reason}"
    right = torch.autograd.grad(want, leaves, dz, retain_graph=True, materialize_grads=True)
    for name, grad, wanted in zip(names, got, right, strict=True):
        if grad is None:
            return f"exercise {number}: {name} is None; an optimiser would pass that parameter over"
        ours = {words: wrong for words, (of, wrong) in mistakes(dz).items() if of == name}
        if (grad - wanted).abs().max() > 1e-10 and (wrong := hint(number, name, grad, wanted, ours)):
            return wrong
    return f"exercise {number}: right"


def check_repaired(answer) -> str:
    """Chapter 4: the tutorial's norm, backward, without the bug, from (dz, y, mean, sqrt_var, eps)."""
    y, dz = torch.randn(3, 4, 5, 6) * 2 + 1, torch.randn(3, 4, 5, 6)
    for eps in (1e-3, 0.5):
        arguments = dz, y, y.mean(CHANNELS), y.std(CHANNELS), eps
        got = answer(*(a.clone() for a in arguments[:4]), eps)
        right, buggy = (tutorials_backward(*arguments, bug=bug) for bug in (False, True))
        mistakes = {"the bug is still there; for dz = 1, which of the per-channel numbers are 0?": buggy}
        if wrong := hint(2, "dy", got, right, mistakes):
            return wrong
    return "exercise 2: right"


def check_conv_bn_relu(function) -> str:
    """Chapter 4: conv, batch norm and ReLU as one function, apply(x, w, gamma, beta)."""
    leaves = [torch.randn(s, requires_grad=True) for s in ((3, 2, 6, 5), (4, 2, 3, 2), (4,), (4,))]
    x, w, gamma, beta = leaves
    z = F.batch_norm(F.conv2d(x, w), None, None, gamma, beta, training=True)
    names = "dx", "dw", "dgamma", "dbeta"

    def mistakes(dz):
        unmasked = zip(names, torch.autograd.grad(z, leaves, dz, retain_graph=True), strict=True)
        return {f"{name} is the gradient without ReLU; mask dz": (name, grad) for name, grad in unmasked}

    return check_function(3, function, leaves, z.relu(), names, mistakes)


def check_six_steps(answer) -> str:
    """Chapter 4: the tutorial's function, backward, (dx, dw, None) from (ctx, dz)."""
    x, w, eps = torch.randn(3, 2, 6, 5), torch.randn(4, 2, 3, 2), 0.5
    y = F.conv2d(x, w)
    saved, dz = (x, w, y.mean(CHANNELS), y.std(CHANNELS)), torch.randn_like(y)
    given = dz.clone()
    got = answer(SimpleNamespace(saved_tensors=tuple(t.clone() for t in saved), eps=eps), given)
    if wrong := hint_tuple(1, "dx, dw, None", got):
        return wrong
    if not given.equal(dz):
        return "exercise 1: dz was overwritten; it belongs to autograd, and others may need it"
    want = grads(lambda x, w: simple_norm(F.conv2d(x, w), eps), (x, w), dz)
    of_dz = grads(F.conv2d, (x, w), dz)
    for name, grad, right, skipped in zip(("dx", "dw"), got[:2], want, of_dz, strict=True):
        mistakes = {f"{name} is the convolution's alone; step 4 turns dz into dy": skipped}
        if wrong := hint(1, name, grad, right, mistakes):
            return wrong
    return "exercise 1: right" if got[2] is None else "exercise 1: eps has no gradient, return None for it"
