"""Batch norm's forward and backward as pure functions, derived in notebooks/03_batch_norm_backward.ipynb.

Throughout, y is the norm's input (N, C, H, W), m = N·H·W the number of values in a channel, and
per-channel vectors have shape (C,). Statistics and sums are float32 at least, whatever y is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["batch_norm_backward", "batch_norm_forward", "batch_stats", "update_running_stats"]

CHANNELS = (0, 2, 3)  # the dimensions that a per-channel sum runs over
SMALL_BYTES = 1 << 19  # up to which one call of the library takes statistics faster than sweeps of ours
CACHED_BYTES = 1 << 22  # what a CPU keeps at hand between two sweeps
ONE_SWEEP_SIGMAS = 4  # so far may μ be from 0, in σ, for a variance by one sweep: it loses μ²/σ² of an ulp
WIDENED_BYTES = 1 << 26  # what an accelerator widens to float32 at once


def per_channel(vector: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1), so that it broadcasts over (N, C, H, W)."""
    return vector.view(-1, 1, 1)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float64 stays, everything smaller becomes float32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def batch_stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel: μ = Σ y / m, var = Σ (y - μ)² / m.

    Args:
        y: (N, C, H, W), floating point, at least one value in a channel.

    Returns:
        ``(mean, var)``, each (C,), float32 or, for float64 input, float64.
    """
    return merge_stats(partial_stats(y), stats_dtype(y.dtype))


def partial_stats(y: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """(values in a channel, mean, variance) of y, or of pieces of it, for `merge_stats`."""
    dtype, m = stats_dtype(y.dtype), y.numel() // y.shape[1]
    if not y.is_cpu:
        stats = []
        for piece in in_pieces(y, y.nbytes if y.dtype == dtype else WIDENED_BYTES):
            var, mean = torch.var_mean(piece.to(dtype), CHANNELS, correction=0)
            stats.append((piece.numel() // piece.shape[1], mean, var))
        return stats
    if y.nbytes <= SMALL_BYTES and y.dtype == dtype:
        return [(m, *torch.batch_norm_update_stats(y, None, None, 0.0))]
    # That one call adds in float64, value by value, which is several times slower than a sweep or two of
    # float32 over pieces in the cache, about a value amid the others, the first image's mean.
    about, pieces = y[0].mean((1, 2), dtype=dtype), in_pieces(y, CACHED_BYTES)
    if y.dtype == dtype and y.is_contiguous():
        # One sweep: var = Σ y (y - about)/m - μ (μ - about), which loses digits where |μ| is many σ. Fewer
        # with a Σ y that is summed pairwise, so not the one that `batch_norm_sums` has as well.
        mean, product = summed(
            t for piece in pieces for t in (piece.sum(CHANNELS), batch_norm_sums(piece, piece, about)[1])
        ).div_(m)
        var = torch.addcmul(product, mean, about - mean).clamp_min_(0)
        lost = torch.addcmul(ONE_SWEEP_SIGMAS**2 * var, mean, mean, value=-1)
        if isinstance(y, FakeTensor) or not lost.amin() < 0:  # a fake one has no digits to lose
            return [(m, mean, var)]
        about = mean.to(dtype)
    # Two sweeps: with δ = μ - about, var = Σ (y - about)²/m - δ², which loses none.
    delta, square = summed(t for piece in pieces for t in sums_about(piece, about)).div_(m)
    return [(m, about + delta, square.addcmul_(delta, delta, value=-1).clamp_min_(0))]


def sums_about(y: Tensor, about: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (y - about) and Σ (y - about)² of each channel, in the dtype of ``about``."""
    y = y.to(about.dtype)
    return batch_norm_sums(centre(y, about), y, about)


def in_pieces(y: Tensor, nbytes: int) -> list[Tensor] | tuple[Tensor, ...]:
    """Views of some images each, of at most so many bytes where one image is no more than that."""
    return [y] if y.nbytes <= nbytes else y.split(max(1, nbytes // (y.nbytes // y.shape[0])))


def summed(parts: Iterable[Tensor]) -> Tensor:
    """The per-channel sums of pieces, two vectors of each in turn: (2, C) in `wide_dtype`."""
    rows = torch.stack(list(parts))
    return rows.view(-1, 2, rows.shape[1]).sum(0, dtype=wide_dtype(rows))


def add_up(total: list[Tensor] | None, parts: tuple[Tensor, ...]) -> list[Tensor]:
    """Per-channel sums over the slabs, in `wide_dtype`."""
    if total is None:
        return [t.to(wide_dtype(t)) for t in parts]
    return [t.add_(part) for t, part in zip(total, parts, strict=True)]


def merge_stats(stats: list[tuple[int, Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and variance of the whole from (size, mean, variance) of its parts (Chan, Golub & LeVeque 1983).

    μ = Σ n_s μ_s / n and var = Σ n_s (var_s + (μ_s - μ)²) / n, where n = Σ n_s; rounded to ``dtype`` last.
    """
    if len(stats) == 1:
        return stats[0][1].to(dtype), stats[0][2].to(dtype)
    sizes, means, variances = zip(*stats, strict=True)
    means, variances = torch.stack(means), torch.stack(variances)
    sizes = torch.as_tensor(sizes, dtype=wide_dtype(means), device=means.device)
    share = (sizes / sizes.sum())[:, None]
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean) ** 2)).sum(0)
    return mean.to(dtype), var.to(dtype)


def wide_dtype(t: Tensor) -> torch.dtype:
    """float64, in which the few sums of slabs are summed, where the device has it."""
    return t.dtype if t.device.type == "mps" else torch.float64


def centre(y: Tensor, mean: Tensor, inplace: bool = False) -> Tensor:
    """y - μ in the statistics' dtype; in y's own memory if ``inplace`` and the dtype allows it.

    Subtracting first is what keeps the digits of a channel whose mean is far from 0: y and μ are close,
    so their difference is (nearly) exact, while y/σ - μ/σ would cancel two rounded numbers.
    """
    if inplace and y.dtype == mean.dtype:
        return y.sub_(per_channel(mean))
    return y.to(mean.dtype) - per_channel(mean)


def batch_norm_sums(grad_out: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The two sums that batch norm's backward needs of each channel: Σ dz and Σ dz (y - μ)."""
    one_dtype, dense = grad_out.dtype == y.dtype == mean.dtype, grad_out.is_contiguous() and y.is_contiguous()
    if y.is_cpu and one_dtype and dense:
        # The library's backward for constant statistics, asked for dγ and dβ at σ = 1: one sweep, with no
        # tensor of y's size. In other layouts and dtypes its sums are less exact.
        _, sum_dz_y, sum_dz = torch.ops.aten.native_batch_norm_backward(
            grad_out, y, None, mean, torch.ones_like(mean), None, None, False, 0.0, (False, True, True)
        )
        return sum_dz, sum_dz_y
    return grad_out.sum(CHANNELS, dtype=mean.dtype), (grad_out * centre(y, mean)).sum(CHANNELS)


def grad_input_coefficients(
    scale: Tensor, var_eps: Tensor, sums: tuple[Tensor, Tensor], m: int | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-channel κ_dz, κ_y and κ_0 of batch norm's input gradient, dy = κ_dz dz + κ_y (y - μ) + κ_0.

    With σ² = var + ε (``var_eps``), they are κ_dz = γ/σ (``scale``), κ_y = -κ_dz Σ dz (y - μ) / (m σ²) and
    κ_0 = -κ_dz Σ dz / m.
    """
    # Each is rounded once: an error of κ_0 would be in all m values, and Σ dy would not vanish.
    sum_dz, sum_dz_y = (t.to(wide_dtype(t)) for t in sums)
    by_m = scale / -m
    return scale, (by_m * sum_dz_y / var_eps).to(scale.dtype), (by_m * sum_dz).to(scale.dtype)


def grad_input_(
    grad_out: Tensor,
    y_centred: Tensor,
    kappa_dz: Tensor,
    kappa_y: Tensor | None,
    kappa_0: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """dy = κ_dz dz + κ_y (y - μ) + κ_0, with κ_y and κ_0 None for constant statistics.

    Overwrites ``y_centred`` = y - μ; the result lies there or in ``out``, which may be ``grad_out``.
    """
    kappa_dz = per_channel(kappa_dz)
    if kappa_y is None:
        return torch.mul(grad_out, kappa_dz, out=y_centred if out is None else out)
    # A broadcast first argument of addcmul is slow on a CPU; these three are not.
    y_centred.mul_(per_channel(kappa_y)).add_(per_channel(kappa_0))
    return torch.addcmul(y_centred, grad_out, kappa_dz, out=y_centred if out is None else out)


def batch_norm_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float = 1e-5
) -> Tensor:
    """z = γ (y - μ) / sqrt(var + ε) + β, in ``input``'s dtype (Ioffe & Szegedy 2015, arXiv:1502.03167).

    Args:
        input: y, (N, C, H, W).
        weight, bias: γ and β, (C,), or None for 1 and 0.
        mean, var: (C,): the batch's own (``batch_stats``) in training, the running ones in eval mode.
        eps: ε, inside the root.
    """
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    z = centre(input, mean) * per_channel(scale)
    if bias is not None:
        z = z + per_channel(bias)
    return z.to(input.dtype)


def batch_norm_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float = 1e-5,
    training: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``batch_norm_forward``; the closed form of chapter 3.

    With σ² = var + ε, ŷ = (y - μ)/σ and grad_out = dz::

        dβ = Σ dz        dγ = Σ dz ŷ
        dy = γ/σ (dz - dβ/m - ŷ dγ/m)     in training, where μ and var depend on y
        dy = γ/σ dz                       in eval mode, where they do not

    Args:
        grad_out: dz, (N, C, H, W), the shape of ``input``. Never written to.
        input: y, (N, C, H, W).
        weight: γ, (C,) or None for 1.
        mean, var: what the forward used, (C,).
        training: whether ``mean`` and ``var`` came from ``input`` itself.

    Returns:
        ``(grad_input, grad_weight, grad_bias)``: (N, C, H, W) in ``input``'s dtype, (C,) and (C,).

    Raises:
        ValueError: shapes that do not belong together.
    """
    if grad_out.shape != input.shape or input.dim() != 4:
        raise ValueError(
            "grad_out and input must have one shape (N, C, H, W), "
            f"got {tuple(grad_out.shape)} and {tuple(input.shape)}"
        )
    for name, vector in (("mean", mean), ("var", var), ("weight", weight)):
        if vector is not None and tuple(vector.shape) != (input.shape[1],):
            raise ValueError(f"{name} must have shape ({input.shape[1]},), got {tuple(vector.shape)}")
    var_eps = var + eps
    scale = torch.rsqrt(var_eps) if weight is None else weight * torch.rsqrt(var_eps)
    y_centred = centre(input, mean)
    sum_dz, sum_dz_centred = sums = batch_norm_sums(grad_out, input, mean)
    m = input.numel() // input.shape[1]
    kappas = grad_input_coefficients(scale, var_eps, sums, m) if training else (scale, None, None)
    dy = grad_input_(grad_out, y_centred, *kappas)
    return dy.to(input.dtype), sum_dz_centred * torch.rsqrt(var_eps), sum_dz


def update_running_stats(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, m: int | Tensor, momentum: float
) -> None:
    """Move the running statistics in place: running ← (1 - momentum) running + momentum batch's.

    The running variance takes the unbiased variance, var·m/(m - 1), as ``nn.BatchNorm2d`` does, although
    the batch itself is normalised with the biased one.
    """
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    unbiased = m / (m - 1) if isinstance(m, Tensor) else m / max(m - 1, 1)
    running_var.lerp_((var * unbiased).to(running_var.dtype), momentum)
