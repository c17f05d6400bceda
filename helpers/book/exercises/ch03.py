"""The checkers of chapter 3."""

from functools import partial

import torch
import torch.nn.functional as F

from helpers.batch_norm import per_channel
from helpers.book.exercises import CHANNELS, compare, compare_all, exercise, grads


def closed_form(dz, y_hat, gamma, std, over=CHANNELS):
    """Batch norm's dy, γ/σ (dz - mean of dz - ŷ times the mean of dz ŷ); all broadcast over y."""
    mean_dz, mean_dz_y_hat = dz.mean(over, keepdim=True), (dz * y_hat).mean(over, keepdim=True)
    return gamma / std * (dz - mean_dz - y_hat * mean_dz_y_hat)


@exercise(1)
def check_through_gamma(answer):
    """(dgamma, dy_hat) of scaled = gamma y_hat from (dscaled, gamma, y_hat)."""
    dscaled, gamma, y_hat = torch.randn(3, 2, 4, 5), torch.tensor([0.5, -2.0]), torch.randn(3, 2, 4, 5)
    want = grads(lambda gamma, y_hat: per_channel(gamma) * y_hat, (gamma, y_hat), dscaled)
    mistakes = {
        "dgamma is a mean; a number that is used m times collects a sum": want[0] / (y_hat.numel() / 2),
        "dgamma sums dscaled alone; gamma is multiplied by y_hat": dscaled.sum(CHANNELS),
        "one gamma multiplies all values of its channel, so sum over them": dscaled * y_hat,
        "dy_hat lacks gamma": dscaled,
    }
    got = answer(dscaled.clone(), gamma.clone(), y_hat.clone())
    compare_all("dgamma, dy_hat", got, want, mistakes)


@exercise(2)
def check_grad_from_output(answer):
    """dy in training from (dz, z, gamma, beta, std)."""
    gamma, beta, y = torch.tensor([0.5, -2.0]), torch.tensor([1.0, 3.0]), torch.randn(3, 2, 4, 5) * 2 + 1
    dz, std = torch.randn_like(y), (y.var(CHANNELS, correction=0) + 1e-5).sqrt()

    norm = partial(F.batch_norm, running_mean=None, running_var=None, weight=gamma, bias=beta, training=True)
    z, (g, b, s) = norm(y), (per_channel(t) for t in (gamma, beta, std))
    mistakes = {
        "z is not y_hat: undo gamma and beta first": closed_form(dz, z, g, s),
        "beta is still in your y_hat": closed_form(dz, z / g, g, s),
        "gamma is still in your y_hat": closed_form(dz, z - b, g, s),
        "that is eval mode; in training mean and variance depend on y": g / s * dz,
    }
    compare("dy", answer(dz.clone(), z.clone(), gamma, beta, std), *grads(norm, (y,), dz), mistakes)


@exercise(3)
def check_grads_group_norm(answer):
    """(dy, dgamma, dbeta) of group norm from (dz, y, gamma, groups, eps)."""
    (N, C, H, W), groups, eps = (3, 6, 4, 5), 2, 0.1
    y, gamma, dz = torch.randn(N, C, H, W) * 2 + 1, torch.randn(C), torch.randn(N, C, H, W)
    want = grads(lambda *leaves: F.group_norm(leaves[0], groups, *leaves[1:], eps), (y, gamma, gamma), dz)

    def grouped(t):
        return t.expand(N, C, H, W).reshape(N, groups, -1)

    def normalised(t, over):
        std = (t.var(over, correction=0, keepdim=True) + eps).sqrt()
        return (t - t.mean(over, keepdim=True)) / std, std

    g, (y_hat, std) = per_channel(gamma), normalised(grouped(y), 2)
    outside, no_gamma = (closed_form(grouped(dz), y_hat, t, std, 2) for t in (grouped(g), torch.ones(1)))
    y_hat_c, std_c = normalised(y, CHANNELS)
    batch_norms = closed_form(dz, y_hat_c, g, std_c)
    mistakes = {
        "gamma differs within a group, so it must be inside the sums": outside.view_as(y),
        "dy lacks the paths through mean and variance": (grouped(g * dz) / std).view_as(y),
        "those are batch norm's sums; group norm's run over some channels of one image": batch_norms,
        "dgamma sums dz alone; gamma is multiplied by y_hat": want[2],
        "dy lacks gamma": no_gamma.view_as(y),
    }
    got = answer(dz.clone(), y.clone(), gamma.clone(), groups, eps)
    compare_all("dy, dgamma, dbeta", got, want, mistakes)
