"""The checkers of chapter 10."""

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.batch_norm import CHANNELS, batch_stats
from helpers.book.exercises import call, compare, exercise, grads, measured, new, require


@exercise(1)
def check_forward(answer):
    """``answer(x, w, gamma, beta, eps)``: z of a pointwise convolution and batch norm, by one convolution."""
    (x, w, gamma, beta), eps = new((3, 4, 5, 7), (24, 4, 1, 1), (24,), (24,)), 0.1
    y, _, once = measured(F.conv2d, x, w)
    (mean, var), m = batch_stats(y), y[:, 0].numel()

    def z_with(mean, var):
        return F.batch_norm(y, mean, var, gamma, beta, eps=eps)

    z = z_with(mean, var)
    covariance = torch.einsum("nohw,nphw->op", y - mean[:, None, None], y) / m
    mistakes = {
        "beta is missing: it belongs in the bias": z - beta[:, None, None],
        "the variance is the diagonal of W R Wᵀ / m, not its row sums": z_with(mean, covariance.sum(1)),
        "the mean is still in z: centre x, or put -scale W x_mean into the bias": z_with(0 * mean, var),
        "R sums over the pixels; the variance is their mean: divide by m": z_with(mean, m * var),
        "divide R by m, not by m - 1": z_with(mean, var * m / (m - 1)),
        "R must be of centred x": z_with(mean, var + mean**2),
        "the scale is gamma / sqrt(var + eps)": z_with(mean, var - eps),
        "eps belongs inside the root": z_with(mean, (var.sqrt() + eps) ** 2 - eps),
        "the root is missing: the scale is gamma / sqrt(var + eps)": z_with(mean, (var + eps) ** 2 - eps),
        "gamma is missing": F.batch_norm(y, mean, var, None, beta, eps=eps),
    }
    got, trace, flops = measured(call, answer, x, w, gamma, beta, eps)
    compare("z", got, z, mistakes)
    require(flops <= once, f"z is right, but call F.conv2d once; you call it {flops / once:.0f} times")
    alone = trace.tensor_peak < 1.8 * z.nbytes and got._version == 0
    words = "y must not exist, and no pass over z comes after"
    require(alone, f"z is right, but the convolution must write it, the bias included: {words}")


def untouched(slabs):
    """The same pairs; a `Wrong` if one was changed."""
    for pair in slabs:
        yield pair
        require(not any(t._version for t in pair), "a slab has been overwritten, and others may need it")


@exercise(2)
def check_slabs(answer):
    """``answer(slabs)``: Σ dz, G and R, with no tensor of x's size on the way."""
    x, shift, dz = (t.float() for t in new((63, 4, 9, 8), (63, 4, 1, 1), (63, 6, 9, 8)))
    x = x + 3 * shift + 1000  # images whose means differ, far from 0, where float32 loses digits
    centred = x.double() - x.double().mean(CHANNELS, keepdim=True)
    G, R = (torch.einsum("nohw,nchw->oc", t.double(), centred).float() for t in (dz, centred))
    slabs = ((a.clone(), b.clone()) for a, b in zip(dz.split(2), x.split(2), strict=True))
    got, trace, _ = measured(call, answer, untouched(slabs))
    if isinstance(got, tuple | list):
        got = [t.float() if isinstance(t, Tensor) else t for t in got]  # float64 is right, too
    note = "subtract the same value, one amid the data, from every slab, and correct G and R with δ"
    compare("sum_dz, G, R", got, (dz.sum(CHANNELS), G, R), note=note, rtol=1e-3, atol=0.5)
    large = trace.tensor_peak >= x.nbytes
    require(not large, "right sums, but there was a tensor of x's size, or all slabs at once")


@exercise(3)
def check_instance_norm(answer):
    """``answer(dz, x, w, gamma, var, eps)``: gradients of a pointwise convolution, then instance norm."""
    x, w, gamma, beta, dz = new((5, 3, 9, 8), (48, 3, 1, 1), (48,), (48,), (5, 48, 9, 8))

    def layer(x, w, gamma, beta):
        return F.instance_norm(F.conv2d(x, w), None, None, gamma, beta, eps=0.1)

    want, var = grads(layer, (x, w, gamma, beta), dz), F.conv2d(x, w).var((2, 3), correction=0)
    got, trace, _ = measured(call, answer, dz, x, w, gamma, var, 0.1)
    note = "each image has its own mean of x, its own σ and κ, and m is its pixels; sum over the images last"
    compare("dx, dw, dgamma, dbeta", got, want, note=note)
    require(trace.tensor_peak < dz.nbytes, "right gradients, but a tensor of y's size was made on the way")
