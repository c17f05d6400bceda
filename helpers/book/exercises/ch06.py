"""The checkers of chapter 6."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.book.exercises import CHANNELS, hint, hint_tuple
from helpers.memory import MemoryTrace, saved_by, storage_address


def check_frozen(answer) -> str:
    """``answer(dz, x, w, gamma, mean, var, eps)``: gradients of conv (padding 1) and a constant norm."""
    n, c_in, c_out, eps = 6, 2, 8, 0.1
    shapes = ((n, c_in, 14, 12), (c_out, c_in, 3, 3), (c_out,), (c_out,))
    x, w, gamma, beta = leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    mean, var = torch.randn(c_out, dtype=torch.float64), torch.rand(c_out, dtype=torch.float64) + 0.5
    z = F.batch_norm(F.conv2d(x, w, padding=1), mean, var, gamma, beta, training=False, eps=eps)
    dz = torch.randn_like(z)
    want = torch.autograd.grad(z, leaves, dz)
    arguments = [t.detach() for t in (dz, x, w, gamma)]
    with MemoryTrace() as trace:
        got = answer(*arguments, mean, var, eps)
    if (wrong := hint_tuple(2, "dx, dw, dgamma, dbeta", got)) is not None:
        return wrong
    inv_std, sum_dz_y = torch.rsqrt(var + eps), (dz * F.conv2d(*arguments[1:3], padding=1)).sum(CHANNELS)
    scale = gamma.detach() * inv_std
    mistakes = {
        "dx": {"z is γ/σ times y, and the factor is missing from dx": grad_of_conv(x, w, dz)[0]},
        "dw": {"z is γ/σ times y, and the factor is missing from dw": grad_of_conv(x, w, dz)[1]},
        "dgamma": {
            "the mean is missing from dgamma: Σ dz (y - μ) = Σ dz y - μ Σ dz": sum_dz_y * inv_std,
            "dgamma has a γ too many: take the weight gradient before it is scaled": want[2]
            * scale
            / inv_std,
            "dgamma is to be divided by σ, the root of var + ε": want[2] / inv_std,
        },
    }
    for name, g, h in zip(("dx", "dw", "dgamma", "dbeta"), got, want, strict=True):
        if (wrong := hint(2, name, g, h, mistakes.get(name))) is not None:
            return wrong
    if trace.tensor_peak - x.nbytes > dz.nbytes / 2:
        more = (trace.tensor_peak - x.nbytes) / dz.nbytes
        return f"exercise 2: right gradients, but they needed {more:.1f} buffers of y's size"
    return "exercise 2: right, without y"


def grad_of_conv(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """dx and dw of ``F.conv2d(x, w, padding=1)``."""
    return torch.autograd.grad(F.conv2d(x, w, padding=1), (x, w), dy)


class HowMade(NamedTuple):
    """A recipe, as chapter 6 has it."""

    function: Callable
    inputs: tuple[Tensor, ...]


def check_norm_leaky(answer) -> str:
    """``answer(y, gamma, beta, recipe, alpha)``: batch norm and leaky ReLU that keep y's recipe."""
    alpha, channels = 0.3, 5
    shapes = ((16, channels, 9, 8), (channels, channels, 3, 3), (channels,), (channels,))
    x, w, gamma, beta = leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    plain = F.leaky_relu(
        F.batch_norm(F.conv2d(x, w, padding=1), None, None, gamma, beta, training=True), alpha
    )
    da = torch.randn_like(plain)
    want, before = torch.autograd.grad(plain, leaves, da), da.clone()

    def convolve(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1)

    def layer() -> Tensor | None:
        return answer(convolve(x, w), gamma, beta, HowMade(convolve, (x, w)), alpha)

    a, saved = saved_by(layer)
    if (wrong := hint(3, "a", a, plain)) is not None:
        return wrong
    if {storage_address(t) for t in saved if t.nbytes >= x.nbytes / 8} - {storage_address(x)}:
        return "exercise 3: a is right, but another tensor of y's size than x is kept for backward"
    grads = torch.autograd.grad(a, leaves, da, allow_unused=True)
    if not torch.equal(da, before):
        return "exercise 3: the gradient that came in was overwritten"
    slopes = torch.autograd.grad(
        F.batch_norm(convolve(x, w), None, None, gamma, beta, training=True), leaves, da
    )
    for name, g, h, s in zip(("dx", "dw", "dgamma", "dbeta"), grads, want, slopes, strict=True):
        if g is None:
            return f"exercise 3: {name} is None; backward returns a gradient for each of forward's tensors"
        if wrong := hint(
            3, name, g, h, {"this is without leaky ReLU; dz = da where z > 0, α da elsewhere": s}
        ):
            return wrong
    del a, plain
    for leaf in leaves:
        leaf.grad = None
    with MemoryTrace() as trace:
        a = layer()
        a.backward(da)
    buffers = trace.tensor_peak / x.nbytes
    if buffers > 3.5:
        return f"exercise 3: right gradients, but one block peaks at {buffers:.1f} buffers, and L + 2 is 3"
    return f"exercise 3: right, with a peak of {buffers:.2f} buffers for one block"
