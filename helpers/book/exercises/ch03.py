"""The checkers of chapter 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.batch_norm import per_channel
from helpers.book.exercises import CHANNELS, grads, hint, hint_tuple


def closed_form(dz: Tensor, y_hat: Tensor, gamma: Tensor, std: Tensor, over=CHANNELS) -> Tensor:
    """Batch norm's dy, γ/σ (dz - mean of dz - ŷ times the mean of dz ŷ); all broadcast over y."""
    mean_dz, mean_dz_y_hat = dz.mean(over, keepdim=True), (dz * y_hat).mean(over, keepdim=True)
    return gamma / std * (dz - mean_dz - y_hat * mean_dz_y_hat)


def check_grad_from_output(answer) -> str:
    """Chapter 3: dy in training from (dz, z, gamma, beta, std)."""
    gamma, beta, y = torch.tensor([0.5, -2.0]), torch.tensor([1.0, 3.0]), torch.randn(3, 2, 4, 5) * 2 + 1
    dz, std = torch.randn_like(y), (y.var(CHANNELS, correction=0) + 1e-5).sqrt()
    z = F.batch_norm(y, None, None, gamma, beta, training=True)
    got = answer(dz.clone(), z.clone(), gamma, beta, std)
    (right,) = grads(lambda y: F.batch_norm(y, None, None, gamma, beta, training=True), (y,), dz)
    gamma, beta, std = (per_channel(t) for t in (gamma, beta, std))
    mistakes = {
        "z is not y_hat: undo gamma and beta first": closed_form(dz, z, gamma, std),
        "beta is still in your y_hat": closed_form(dz, z / gamma, gamma, std),
        "gamma is still in your y_hat": closed_form(dz, z - beta, gamma, std),
        "that is eval mode; in training mean and variance depend on y": gamma / std * dz,
    }
    return hint(2, "dy", got, right, mistakes) or "exercise 2: right"


def check_grads_group_norm(answer) -> str:
    """Chapter 3: (dy, dgamma, dbeta) of group norm from (dz, y, gamma, groups, eps)."""
    (N, C, H, W), groups, eps = (3, 6, 4, 5), 2, 0.1
    y, gamma, dz = torch.randn(N, C, H, W) * 2 + 1, torch.randn(C), torch.randn(N, C, H, W)
    want = grads(lambda *leaves: F.group_norm(leaves[0], groups, *leaves[1:], eps), (y, gamma, gamma), dz)
    got = answer(dz.clone(), y.clone(), gamma.clone(), groups, eps)
    if wrong := hint_tuple(3, "dy, dgamma, dbeta", got):
        return wrong

    def in_groups(t):
        return t.expand(N, C, H, W).reshape(N, groups, -1)

    def normalised(t, over):
        std = (t.var(over, correction=0, keepdim=True) + eps).sqrt()
        return (t - t.mean(over, keepdim=True)) / std, std

    y_hat, std = normalised(in_groups(y), 2)
    y_hat_c, std_c = normalised(y, CHANNELS)
    gamma_g, dz_g = in_groups(per_channel(gamma)), in_groups(dz)
    mistakes = {
        "gamma differs within a group, so it must stand inside the sums": closed_form(
            dz_g, y_hat, gamma_g, std, 2
        ).view_as(y),
        "dy lacks the paths through mean and variance": (gamma_g * dz_g / std).view_as(y),
        "those are batch norm's sums; group norm's run over some channels of one image": closed_form(
            dz, y_hat_c, per_channel(gamma), std_c
        ),
        "dgamma sums dz alone; gamma is multiplied by y_hat": want[2],
        "dy lacks gamma": closed_form(dz_g, y_hat, torch.ones(1), std, 2).view_as(y),
    }
    for name, grad, right in zip(("dy", "dgamma", "dbeta"), got, want, strict=True):
        if wrong := hint(3, name, grad, right, mistakes):
            return wrong
    return "exercise 3: right"


def check_through_gamma(answer) -> str:
    """Chapter 3: (dgamma, dy_hat) of scaled = gamma y_hat from (dscaled, gamma, y_hat)."""
    dscaled, gamma, y_hat = torch.randn(3, 2, 4, 5), torch.tensor([0.5, -2.0]), torch.randn(3, 2, 4, 5)
    got = answer(dscaled.clone(), gamma.clone(), y_hat.clone())
    if wrong := hint_tuple(1, "dgamma, dy_hat", got):
        return wrong
    want = grads(lambda gamma, y_hat: per_channel(gamma) * y_hat, (gamma, y_hat), dscaled)
    mistakes = {
        "dgamma is a mean; a number that is used m times collects a sum": want[0] / (y_hat.numel() / 2),
        "dgamma sums dscaled alone; gamma is multiplied by y_hat": dscaled.sum(CHANNELS),
        "dy_hat lacks gamma": dscaled,
    }
    shape = ": one gamma multiplies all values of its channel, so sum over them"
    for name, grad, right, more in zip(("dgamma", "dy_hat"), got, want, (shape, ""), strict=True):
        if wrong := hint(1, name, grad, right, mistakes, more):
            return wrong
    return "exercise 1: right"
