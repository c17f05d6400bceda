"""Batch norm's forward and backward as pure functions, derived in notebooks/03_batch_norm_backward.ipynb.

Throughout, y is the norm's input (N, C, H, W), m = N·H·W the number of values in a channel, and
per-channel vectors have shape (C,). Statistics and sums are float32 at least, whatever y is.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["batch_norm_backward", "batch_norm_forward", "batch_stats", "update_running_stats"]

CHANNELS = (0, 2, 3)  # the dimensions that a per-channel sum runs over


def per_channel(vector: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1), so that it broadcasts over (N, C, H, W)."""
    return vector[None, :, None, None]


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float64 stays, everything smaller becomes float32."""
    return torch.promote_types(dtype, torch.float32)


def batch_stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel: μ = Σ y / m, var = Σ (y - μ)² / m.

    Args:
        y: (N, C, H, W), floating point, at least one value in a channel.

    Returns:
        ``(mean, var)``, each (C,), float32 or, for float64 input, float64.
    """
    # Neither way computes Σ y² - m μ², which loses every digit of the variance once |μ| is thousands of σ.
    y = y.to(stats_dtype(y.dtype))
    if y.is_cpu:  # nn.BatchNorm2d's own two-pass loop: there about three times as fast as var_mean
        return torch.batch_norm_update_stats(y, None, None, 0.0)
    var, mean = torch.var_mean(y, CHANNELS, correction=0)
    return mean, var


def centre(y: Tensor, mean: Tensor, inplace: bool = False) -> Tensor:
    """y - μ in the statistics' dtype; in y's own memory if ``inplace`` and the dtype allows it.

    Subtracting first is what keeps the digits of a channel whose mean is far from 0: y and μ are close,
    so their difference is (nearly) exact, while y/σ - μ/σ would cancel two rounded numbers.
    """
    if inplace and y.dtype == mean.dtype:
        return y.sub_(per_channel(mean))
    return y.to(mean.dtype) - per_channel(mean)


def batch_norm_sums(grad_out: Tensor, y_centred: Tensor) -> tuple[Tensor, Tensor]:
    """The two sums that batch norm's backward needs of each channel: Σ dz and Σ dz (y - μ)."""
    dtype = y_centred.dtype
    return grad_out.sum(CHANNELS, dtype=dtype), (grad_out * y_centred).sum(CHANNELS)


def batch_norm_grad_input_(
    grad_out: Tensor,
    y_centred: Tensor,
    scale: Tensor,
    var_eps: Tensor,
    sums: tuple[Tensor, Tensor] | None,
    m: int,
) -> Tensor:
    """Overwrite ``y_centred`` = y - μ with dy, the gradient of batch norm's input.

    With s = γ/σ (``scale``) and σ² = var + ε (``var_eps``)::

        dy = s (dz  -  Σ dz / m  -  (y - μ) Σ dz (y - μ) / (m σ²))

    Without ``sums`` the statistics are constants and dy = s dz.
    """
    if sums is None:
        return torch.mul(grad_out, per_channel(scale), out=y_centred)
    sum_dz, sum_dz_centred = sums
    a = -scale * sum_dz_centred / (m * var_eps)
    b = -scale * sum_dz / m
    torch.addcmul(per_channel(b), y_centred, per_channel(a), out=y_centred)
    return y_centred.addcmul_(grad_out, per_channel(scale))


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
    sum_dz, sum_dz_centred = sums = batch_norm_sums(grad_out, y_centred)
    m = input.numel() // input.shape[1]
    dy = batch_norm_grad_input_(grad_out, y_centred, scale, var_eps, sums if training else None, m)
    return dy.to(input.dtype), sum_dz_centred * torch.rsqrt(var_eps), sum_dz


def update_running_stats(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, m: int, momentum: float
) -> None:
    """Move the running statistics towards the batch's, in place: r ← (1 - momentum) r + momentum s.

    The running variance takes the unbiased variance, var·m/(m - 1), as ``nn.BatchNorm2d`` does, although
    the batch itself is normalised with the biased one.
    """
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (m / max(m - 1, 1))).to(running_var.dtype), momentum)
