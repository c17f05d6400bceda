"""Batch norm's forward and backward as pure functions, derived in notebooks/03_batch_norm_backward.ipynb.

Throughout, y is the norm's input (N, C, H, W), m = N·H·W the number of values in a channel, and
per-channel vectors have shape (C,). Statistics and sums are float32 at least, whatever y is.
"""

import math
import numbers

import torch
from torch import Tensor

from .conv import check_images

CHANNELS = (0, 2, 3)  # the dimensions that a per-channel sum runs over


def per_channel(vector: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1), so that it broadcasts over (N, C, H, W)."""
    return vector.view(-1, 1, 1)


def piece_bytes(t: Tensor) -> int:
    """How many bytes of ``t`` to process at once.

    On a CPU they should stay in a core's cache between the steps that use them; an accelerator needs larger
    pieces to be busy.
    """
    return 1 << 22 if t.is_cpu else 1 << 27


def pieces(t: Tensor) -> tuple[Tensor, ...]:
    """Views of ``t``, each of so many images."""
    image_bytes = t[0].numel() * max(t.itemsize, 4)  # half precision is computed in float32
    return t.split(max(1, piece_bytes(t) // image_bytes))


def batch_stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel: μ = Σ y / m, var = Σ (y - μ)² / m.

    Of pieces of the batch, each with n values in a channel and c their mean, rounded (Chan, Golub & LeVeque,
    *Updating Formulae and a Pairwise Algorithm for Computing Sample Variances*, 1979)::

        s = Σ (y - c)            μ = Σ (n c + s) / m
        q = Σ (y - c)²         var = Σ (q + 2 (c - μ) s + n (c - μ)²) / m

    This reads y once, a piece at a time, and loses no digits where μ is far from 0, or pieces differ. Where
    |c| < σ, y - c may lose y's last digits, and μ takes the piece's Σ y in place of n c + s.

    Args:
        y: (N, C, H, W), floating point, at least one value in a channel.

    Returns:
        ``(mean, var)``, each (C,), float32 or, for float64 input, float64.

    Raises:
        ValueError: y is something else.
    """
    check_images("y", y)
    if not y.numel():
        raise ValueError(f"y must have at least one value in a channel, got shape {tuple(y.shape)}")
    dtype, m, parts = torch.promote_types(y.dtype, torch.float32), y.numel() // y.shape[1], []
    for piece in pieces(y):
        total, n = channel_sums(piece, dtype), piece[:, 0].numel()
        c = (total / n).to(dtype)
        centred = centre(piece, c)
        sums = batch_norm_sums(centred, centred, torch.zeros_like(c))
        parts.append((torch.full_like(total, n), total, c, *sums))
        del centred
    n, total, c, s, q = (torch.stack(t).to(dtype_of_sums(y)) for t in zip(*parts, strict=True))
    mean = torch.where(n * c * c < q, total, n * c + s).sum(0) / m
    var = (q + 2 * (c - mean) * s + n * (c - mean) ** 2).sum(0) / m
    return mean.to(dtype), var.clamp_min(0).to(dtype)


def dtype_of_sums(t: Tensor) -> torch.dtype:
    """In which sums over parts of a batch are added up: float64, but for MPS, which has none."""
    return torch.float32 if t.is_mps else torch.float64


def add_up(parts: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Per-channel sums over a batch, from those over its parts."""
    return [torch.stack(sums).sum(0) for sums in zip(*parts, strict=True)]


def centre(y: Tensor, mean: Tensor, inplace: bool = False) -> Tensor:
    """y - μ in the statistics' dtype; in y's memory if ``inplace`` and the dtype allows it.

    Subtracting first is what keeps the digits of a channel whose mean is far from 0: y and μ are close,
    so their difference is (nearly) exact, while y/σ - μ/σ would cancel two rounded numbers.
    """
    if inplace and y.dtype == mean.dtype:
        return y.sub_(per_channel(mean))
    return y - per_channel(mean)  # the wider of the two dtypes


def channel_sums(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ t of each channel: of each image in this dtype, then of all images in float64.

    Of many images it is as exact as in float64 throughout, and faster.
    """
    return t.sum((2, 3), dtype=dtype).sum(0, dtype=dtype_of_sums(t))


def batch_norm_sums(grad_out: Tensor, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The two sums that batch norm's backward needs of each channel: Σ dz and Σ dz (y - μ), in float64."""
    sum_dz = channel_sums(grad_out, mean.dtype)
    one_dtype, dense = grad_out.dtype == y.dtype == mean.dtype, grad_out.is_contiguous() and y.is_contiguous()
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (grad_out, y, mean))
    plain = not (graph or torch._C._are_functorch_transforms_active())
    if y.is_cpu and one_dtype and dense and y.numel() and plain:
        # The library's backward for constant statistics returns dγ at σ = 1: one pass over dz and y, and no
        # tensor of y's size, but no graph either. In other layouts and dtypes its sum is less exact.
        _, sum_dz_y, _ = torch.ops.aten.native_batch_norm_backward(
            grad_out, y, None, mean, torch.ones_like(mean), None, None, False, 0.0, (False, True, False)
        )
        return sum_dz, sum_dz_y.to(sum_dz.dtype)
    return sum_dz, channel_sums(grad_out * centre(y, mean), mean.dtype)


def scale_of(weight: Tensor | None, var_eps: Tensor) -> Tensor:
    """γ/σ, with σ² = var + ε (``var_eps``)."""
    return torch.rsqrt(var_eps) if weight is None else weight * torch.rsqrt(var_eps)


def grad_input_coefficients(
    scale: Tensor, var_eps: Tensor, sums: tuple[Tensor, Tensor], m: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-channel κ, λ, η and η' of batch norm's input gradient, dy = κ (dz - λ (y - μ) - η - η').

    With σ² = var + ε (``var_eps``), κ = γ/σ (``scale``) and λ = Σ dz (y - μ) / (m σ²). The mean of dz is η,
    a rounded number, plus what that leaves, η'.
    """
    # An error in the mean would be in all m values, and Σ dy would no longer vanish.
    mean_dz, mean_dz_y = (t.to(dtype_of_sums(t)) / m for t in sums)
    eta = mean_dz.to(scale.dtype)
    return scale, (mean_dz_y / var_eps).to(scale.dtype), eta, (mean_dz - eta).to(scale.dtype)


def grad_input_(
    grad_out: Tensor, y_centred: Tensor, kappa: Tensor, slope: Tensor, eta: Tensor, eta_rest: Tensor
) -> Tensor:
    """dy = κ (dz - λ (y - μ) - η - η'), in the memory of ``y_centred`` = y - μ; λ is the ``slope``."""
    dy = y_centred.mul_(per_channel(-slope)).add_(grad_out)
    return dy.sub_(per_channel(eta)).sub_(per_channel(eta_rest)).mul_(per_channel(kappa))


def batch_norm_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float = 1e-5
) -> Tensor:
    """z = γ (y - μ) / sqrt(var + ε) + β, in y's shape and dtype (Ioffe & Szegedy 2015, arXiv:1502.03167).

    Args:
        input: y, (N, C, H, W).
        weight, bias: γ and β, (C,), or None for 1 and 0.
        mean, var: (C,): the batch's own (``batch_stats``) in training, the running ones in eval mode.
        eps: ε, inside the root.

    Raises:
        ValueError: shapes that do not belong together, or a negative ε.
    """
    check_norm(input, eps, weight=weight, bias=bias, mean=mean, var=var)
    z = centre(input, mean) * per_channel(scale_of(weight, var + eps))
    return (z if bias is None else z + per_channel(bias)).to(input.dtype)


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
        mean, var, eps: what the forward used, (C,) each and a number.
        training: whether ``mean`` and ``var`` came from ``input`` itself.

    Returns:
        ``(grad_input, grad_weight, grad_bias)``: (N, C, H, W) in ``input``'s dtype, (C,) and (C,) in
        ``mean``'s.

    Raises:
        ValueError: shapes that do not belong together, or a negative ε.
    """
    check_norm(input, eps, mean=mean, var=var, weight=weight)
    check_images("grad_out", grad_out)
    if (grad_out.shape, grad_out.device) != (input.shape, input.device):
        wanted, got = (f"{tuple(t.shape)} on {t.device}" for t in (input, grad_out))
        raise ValueError(f"grad_out must have input's shape, {wanted}, got {got}")
    var_eps, m = var + eps, len(input) * input.shape[2:].numel()
    scale = scale_of(weight, var_eps)
    sums = batch_norm_sums(grad_out, input, mean)
    if training:
        coefficients = grad_input_coefficients(scale, var_eps, sums, m)
        dy = grad_input_(grad_out, centre(input, mean), *coefficients)
    else:
        dy = grad_out * per_channel(scale)
    dgamma, dbeta = sums[1] * torch.rsqrt(var_eps), sums[0]
    return dy.to(input.dtype), dgamma.to(mean.dtype), dbeta.to(mean.dtype)


def check_norm(input: Tensor, eps: float, **vectors: Tensor | None) -> None:
    """Raise a ValueError unless these fit: a batch of images, ε, and a value for each channel."""
    check_images("input", input)
    if isinstance(eps, bool) or not (isinstance(eps, numbers.Real) and 0 <= eps < math.inf):
        raise ValueError(f"eps must be a number, at least 0, got {eps!r}")
    check_vectors(input.shape[1], input.device, **vectors)
    for name, t in vectors.items():
        if name in ("mean", "var") and torch.promote_types(t.dtype, input.dtype) != t.dtype:
            raise ValueError(f"{name} must be at least as wide as input, {input.dtype}, got {t.dtype}")


def check_vectors(channels: int, device: torch.device, **vectors: Tensor | None) -> None:
    """Raise a ValueError unless each has a value for each channel, on this device; γ and β may be None."""
    for name, vector in vectors.items():
        got = f"{type(vector)}"
        if isinstance(vector, Tensor):
            got = f"{tuple(vector.shape)}" if vector.is_floating_point() else f"{vector.dtype}"
        if got != f"{(channels,)}" and not (vector is None and name in ("weight", "bias")):
            raise ValueError(f"{name} must have shape ({channels},), floating point, got {got}")
        if vector is not None and vector.device != device:
            raise ValueError(f"{name} must be on {device}, like the others, got one on {vector.device}")


def check_momentum(momentum: float | Tensor, device: torch.device) -> None:
    """Raise a ValueError unless it is a share, perhaps in a tensor that this device can use."""
    number = isinstance(momentum, numbers.Real) and not isinstance(momentum, bool) and 0 <= momentum <= 1
    if isinstance(momentum, Tensor):
        here = momentum.device.type == "cpu" or momentum.device == device
        number = momentum.dim() == 0 and momentum.is_floating_point() and here
    if not number:
        allowed = "a number from 0 to 1 (or a tensor with a floating-point one, here or on the CPU)"
        raise ValueError(f"momentum must be {allowed}, got {momentum!r}")


def check_changeable(name: str, t: Tensor) -> None:
    if t.numel() > 1 and not t.stride(0):
        raise ValueError(f"{name} must have memory for each value, got an expanded tensor")
    if t.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} must not be an inference tensor, which could not be changed here")


def update_running_stats(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, m: int, momentum: float | Tensor
) -> None:
    """Move the running statistics in place: running ← (1 - momentum) running + momentum batch's.

    The running variance takes the unbiased variance, var·m/(m - 1), as ``nn.BatchNorm2d`` does, although
    the batch itself is normalised with the biased one.

    Args:
        running_mean, running_var: (C,), changed.
        mean, var: the batch's (``batch_stats``), (C,).
        m: values per channel; the variance of a single one is taken as it is.
        momentum: the batch's share, from 0 to 1. A tensor without dimensions is taken as it is: looking at
            its value would make an accelerator wait.

    Raises:
        ValueError: an argument that does not fit, before anything is changed.
    """
    if not isinstance(mean, Tensor):
        raise ValueError(f"mean must be a tensor (C,), floating point, got {type(mean)}")
    vectors = {"mean": mean, "var": var, "running_mean": running_mean, "running_var": running_var}
    check_vectors(mean.numel(), mean.device, **vectors)
    for name in ("running_mean", "running_var"):
        check_changeable(name, vectors[name])
    if isinstance(m, bool) or not isinstance(m, numbers.Integral) or m < 1:
        raise ValueError(f"m must be a whole number of values, at least 1, got {m!r}")
    check_momentum(momentum, mean.device)
    momentum = momentum if isinstance(momentum, Tensor) else float(momentum)
    with torch.no_grad():
        for running, new in ((running_mean, mean), (running_var, var * (m / max(m - 1, 1)))):
            before = running.to(torch.promote_types(running.dtype, new.dtype))
            running.copy_((1 - momentum) * before + momentum * new)  # lerp_ would make NaN of infinity
