"""The checkers of chapter 3."""

from functools import partial

import torch.nn.functional as F

from helpers.batch_norm import CHANNELS, per_channel
from helpers.book.exercises import call, compare, exercise, grads, new


@exercise(1)
def check_through_gamma(answer):
    """(dgamma, dy_hat) of scaled = gamma y_hat from (dscaled, gamma, y_hat)."""
    dscaled, gamma, y_hat = new((3, 2, 4, 5), (2,), (3, 2, 4, 5))
    want = grads(lambda gamma, y_hat: per_channel(gamma) * y_hat, (gamma, y_hat), dscaled)
    mistakes = {
        "dgamma is a mean; a number that is used m times collects a sum": want[0] / (y_hat.numel() / 2),
        "dgamma sums dscaled alone; gamma is multiplied by y_hat": dscaled.sum(CHANNELS),
        "dgamma has gamma in it; the derivative of gamma y_hat by gamma is y_hat": gamma * want[0],
        "dy_hat lacks gamma, by which y_hat is multiplied": dscaled,
    }
    compare("dgamma, dy_hat", call(answer, dscaled, gamma, y_hat), want, mistakes)


@exercise(2)
def check_grad_from_output(answer):
    """dy in training from (dz, z, gamma, beta, std)."""
    y, dz, gamma, beta = new((3, 2, 4, 5), (3, 2, 4, 5), (2,), (2,))
    norm = partial(F.batch_norm, running_mean=None, running_var=None, weight=gamma, bias=beta, training=True)
    z, std = norm(y), (y.var(CHANNELS, correction=0) + 1e-5).sqrt()
    (want,) = grads(norm, (y,), dz)
    scale = per_channel(gamma / std)
    mean_dz, m = dz.mean(CHANNELS, keepdim=True), y.numel() / 2

    def along(y_hat):
        return y_hat * (dz * y_hat).mean(CHANNELS, keepdim=True)

    without_beta = z / per_channel(gamma)
    y_hat = without_beta - per_channel(beta / gamma)
    mistakes = {
        "z is not y_hat: undo gamma and beta first": scale * (dz - mean_dz - along(z)),
        "beta is still in y_hat: subtract it before you divide": scale * (dz - mean_dz - along(without_beta)),
        "the std is missing: dz is multiplied by gamma / std": per_channel(std) * want,
        "that is eval mode; in training mean and variance depend on y": scale * dz,
        "the term with y_hat is missing: the variance, too, depends on y": scale * (dz - mean_dz),
        "the sums must be divided by m": scale * (dz - m * mean_dz - m * along(y_hat)),
    }
    compare("dy", call(answer, dz, z, gamma, beta, std), want, mistakes)


@exercise(3)
def check_grads_group_norm(answer):
    """(dy, dgamma, dbeta) of group norm from (dz, y, gamma, groups, eps)."""
    groups, eps = 2, 0.1
    y, dz, gamma = new((3, 6, 4, 5), (3, 6, 4, 5), (6,))
    want = grads(lambda y, gamma, beta: F.group_norm(y, groups, gamma, beta, eps), (y, gamma, gamma), dz)
    (plain,) = grads(partial(F.group_norm, num_groups=groups, eps=eps), (y,), dz)
    (of_size,) = grads(lambda y: F.group_norm(y, 6 // groups, gamma, eps=eps), (y,), dz)
    (other_eps,) = grads(lambda y: F.group_norm(y, groups, gamma), (y,), dz)
    (batch_norms,) = grads(lambda y: F.batch_norm(y, None, None, gamma, training=True, eps=eps), (y,), dz)
    mistakes = {
        "gamma differs within a group, so it must be inside the sums": per_channel(gamma) * plain,
        "gamma is missing from dy": plain,
        "use the eps that is passed in": other_eps,
        "groups is how many there are, not how many channels each has": of_size,
        "those are batch norm's sums; group norm's run over some channels of one image": batch_norms,
    }
    compare("dy, dgamma, dbeta", call(answer, dz, y, gamma, groups, eps), want, mistakes)
