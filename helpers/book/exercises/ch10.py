"""The checkers of chapter 10."""

import torch
import torch.nn.functional as F

from helpers.batch_norm import batch_stats, per_channel
from helpers.book.exercises import CHANNELS, attempted, compare, compare_all, exercise, largest_new, require
from helpers.memory import MemoryTrace


def new(*shapes) -> list[torch.Tensor]:
    return [torch.randn(s).double() for s in shapes]


@exercise(1)
def check_forward(answer):
    """``answer(x, w, gamma, beta, eps)``: z of a pointwise convolution and batch norm, by one convolution."""
    x, w, gamma, beta, shift = new((3, 4, 5, 7), (6, 4, 1, 1), (6,), (6,), (1, 4, 1, 1))
    x, calls, real = 3 * x + shift, [], F.conv2d
    try:
        F.conv2d = lambda *args, **options: calls.append(args[0].shape) or real(*args, **options)
        got = answer(x, w, gamma, beta, 1e-5)
    finally:
        F.conv2d = real
    y = F.conv2d(x, w)
    want = F.batch_norm(y, None, None, gamma, beta, training=True, eps=1e-5)
    (mean, var), b = (per_channel(t) for t in batch_stats(y)), per_channel(beta)
    not_centred = want + per_channel(gamma) / (var + 1e-5).sqrt() * mean
    summed = (want - b) * ((var + 1e-5) / (var * len(y) * 35 + 1e-5)).sqrt() + b
    mistakes = {
        "the mean is still in z: centre x, or put -W x_mean into the bias": not_centred,
        "beta is missing": want - b,
        "R sums over the pixels; the variance is their mean: divide by m": summed,
    }
    compare("z", got, want, mistakes)
    require(len(calls) == 1, f"z is right, but call F.conv2d once; you call it {len(calls)} times")


@exercise(2)
def check_slabs(answer):
    """``answer(dz, x, slab_size)``: Σ dz, G and R, with no tensor of x's size on the way."""
    x, shift, dz = new((7, 4, 9, 8), (7, 4, 1, 1), (7, 6, 9, 8))
    x = x + 3 * shift  # each image has its own mean

    def sums(x, means):
        """G and R, of x in slabs of two images, centred by a mean for each."""
        centred = torch.cat([x_i - per_channel(m) for x_i, m in zip(x.split(2), means, strict=True)])
        return [torch.einsum("nohw,nchw->oc", t.to(x.dtype), centred) for t in (dz, centred)]

    mean, own = x.mean(CHANNELS), [t.mean(CHANNELS) for t in x.split(2)]
    with MemoryTrace() as trace:
        got = answer(dz, x, 2)
    ways = {
        "each slab is centred by its own mean, and what that loses is not added back": own,
        "what was subtracted is not yet the batch's mean; correct it with δ": [own[0]] * 4,
        "x is not centred": [torch.zeros_like(mean)] * 4,
    }
    pairs = [(words, zip("GR", sums(x, means), strict=True)) for words, means in ways.items()]
    mistakes = {f"{name}: {words}": value for words, values in pairs for name, value in values}
    compare_all("sum_dz, G, R", got, (dz.sum(CHANNELS), *sums(x, [mean] * 4)), mistakes)
    far = (x + 1000).float()
    exact = sums(far.double(), [far.double().mean(CHANNELS)] * 4)
    for name, g, h in zip("GR", answer(dz.float(), far, 2)[1:], exact, strict=True):
        words = f"right in float64, but {name} loses its digits in float32, far from 0"
        require((g - h).norm() <= 1e-3 * h.norm(), words)
    require(largest_new(trace) < x.nbytes, "right sums, but a tensor of x's size was made on the way")


@exercise(3)
def check_instance_norm(answer):
    """``answer(dz, x, w, gamma, var, eps)``: gradients of a pointwise convolution, then instance norm."""
    x, shift, *others = new((5, 4, 9, 8), (5, 4, 1, 1), (16, 4, 1, 1), (16,), (16,))
    leaves = [t.requires_grad_() for t in (x + 3 * shift, *others)]
    y = F.conv2d(*leaves[:2])
    z = F.instance_norm(y, None, None, *leaves[2:], eps=1e-5)
    dz, var = torch.randn_like(z), y.detach().var((2, 3), correction=0)
    with MemoryTrace() as trace:
        got = answer(dz, *(t.detach() for t in leaves[:3]), var, 1e-5)
    require(len(attempted(got)) == 4, "return a tuple, (dx, dw, dgamma, dbeta)")
    why = {
        "dbeta": "beta is one vector for all images: sum over them",
        "dgamma": "each image has its own mean of x and its own sigma; sum over the images last",
        "dw": "the κ belong to an image and a channel; m is the pixels of one image",
        "dx": "the matrices of its two products differ from image to image",
    }
    want = torch.autograd.grad(z, leaves, dz)
    for (name, words), g, h in zip(why.items(), got[::-1], want[::-1], strict=True):
        compare(name, g, h, {f"{name} is wrong; {words}": g} if g.shape == h.shape else {})
    require(largest_new(trace) < dz.nbytes, "right gradients, but a tensor of y's size was made on the way")
