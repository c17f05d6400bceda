"""The checkers of chapter 10."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from helpers.batch_norm import batch_stats, per_channel
from helpers.book.exercises import CHANNELS, hint, hint_tuple
from helpers.memory import MemoryTrace


def check_forward(answer) -> str:
    """``answer(x, w, gamma, beta, eps)``: z of a pointwise convolution and batch norm, by one convolution."""
    shapes = ((3, 4, 5, 7), (6, 4, 1, 1), (6,), (6,))
    x, w, gamma, beta = (torch.randn(s).double() for s in shapes)
    x, calls, real = 3 * x + torch.randn(1, 4, 1, 1).double(), [], F.conv2d
    try:
        F.conv2d = lambda *args, **options: calls.append(args[0].shape) or real(*args, **options)
        got = answer(x, w, gamma, beta, 1e-5)
    finally:
        F.conv2d = real
    y = F.conv2d(x, w)
    want = F.batch_norm(y, None, None, gamma, beta, training=True, eps=1e-5)
    mean, var = (per_channel(t) for t in batch_stats(y))
    scale = per_channel(gamma) / (var + 1e-5).sqrt()
    mistakes = {
        "the mean is still in z: centre x, or put -W x_mean into the bias": want + scale * mean,
        "beta is missing": want - per_channel(beta),
        "R sums over the pixels; the variance is their mean: divide by m": (want - per_channel(beta))
        * ((var + 1e-5) / (var * len(y) * 35 + 1e-5)).sqrt()
        + per_channel(beta),
    }
    wrong = hint(1, "z", got, want, mistakes)
    if wrong:
        return wrong
    if len(calls) != 1:
        return f"exercise 1: z is right, but call F.conv2d once; you call it {len(calls)} times"
    return "exercise 1: right"


def check_slabs(answer) -> str:
    """``answer(dz, x, slab_size)``: Σ dz, G and R, with no tensor of x's size on the way."""
    x = torch.randn(7, 4, 9, 8).double() + 3 * torch.randn(7, 4, 1, 1).double()  # each image has its own mean
    dz, size = torch.randn(7, 6, 9, 8).double(), 2

    def sums(x, *about):
        parts = [x_i - a for x_i, a in zip(x.split(size), about, strict=True)]
        return [
            sum(torch.einsum("nohw,nchw->oc", of, x_i) for of, x_i in zip(left, parts, strict=True))
            for left in (dz.to(x.dtype).split(size), parts)
        ]

    mean = per_channel(x.mean(CHANNELS))
    first, *_ = own = [per_channel(t.mean(CHANNELS)) for t in x.split(size)]
    with MemoryTrace() as trace:
        got = answer(dz, x, size)
    wrong = hint_tuple(2, "sum_dz, G, R", got)
    names, want = ("sum_dz", "G", "R"), (dz.sum(CHANNELS), *sums(x, *[mean] * 4))
    mistakes = {
        "each slab is centred by its own mean, and what that loses is not added back": sums(x, *own),
        "what was subtracted is not yet the batch's mean; correct it with δ": sums(x, *[first] * 4),
        "x is not centred": sums(x, *[torch.zeros_like(mean)] * 4),
    }
    for i, name in enumerate(names):
        seen = {words: values[i - 1] for words, values in mistakes.items()} if i else {}
        seen = {f"{name}: {words}": value for words, value in seen.items()}
        wrong = wrong or hint(2, name, got[i], want[i], seen)
    if wrong:
        return wrong
    far = (x + 1000).float()
    exact = sums(far.double(), *[per_channel(far.double().mean(CHANNELS))] * 4)
    for name, g, h in zip(names[1:], answer(dz.float(), far, size)[1:], exact, strict=True):
        if (g - h).norm() > 1e-3 * h.norm():
            return f"exercise 2: right in float64, but {name} loses its digits in float32, far from 0"
    levels = [0] + [held for _, held in trace.timeline]
    if max(b - a for a, b in itertools.pairwise(levels)) >= x.nbytes:
        return "exercise 2: right sums, but a tensor of x's size was made on the way"
    return "exercise 2: right"


def check_instance_norm(answer) -> str:
    """``answer(dz, x, w, gamma, var, eps)``: gradients of a pointwise convolution, then instance norm."""
    n, c_in, c_out = 5, 4, 16
    x = torch.randn(n, c_in, 9, 8).double() + 3 * torch.randn(n, c_in, 1, 1).double()
    shapes = ((c_out, c_in, 1, 1), (c_out,), (c_out,))
    leaves = [t.requires_grad_() for t in (x, *(torch.randn(s).double() for s in shapes))]
    y = F.conv2d(*leaves[:2])
    z = F.instance_norm(y, None, None, *leaves[2:], eps=1e-5)
    dz, var = torch.randn_like(z), y.detach().var((2, 3), correction=0)
    with MemoryTrace() as trace:
        got = answer(dz, *(t.detach() for t in leaves[:3]), var, 1e-5)
    if got is None:
        return "exercise 3: not attempted yet"
    want, why = torch.autograd.grad(z, leaves, dz), {}
    why["dbeta"] = "beta is one vector for all images: sum over them"
    why["dgamma"] = "each image has its own mean of x and its own sigma; sum over the images last"
    why["dw"] = "the κ belong to an image and a channel; m is the pixels of one image"
    why["dx"] = "the matrices of its two products differ from image to image"
    for name, g, h in reversed(list(zip(("dx", "dw", "dgamma", "dbeta"), got, want, strict=True))):
        if g.shape != h.shape:
            return f"exercise 3: {name} must have shape {tuple(h.shape)}, got {tuple(g.shape)}"
        if not torch.allclose(g, h):
            return f"exercise 3: {name} is wrong; {why[name]}"
    levels = [0] + [held for _, held in trace.timeline]
    if max(b - a for a, b in itertools.pairwise(levels)) >= dz.nbytes:
        return "exercise 3: right gradients, but a tensor of y's size was made on the way"
    return "exercise 3: right"
