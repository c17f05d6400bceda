"""The gradients of conv2d, derived in notebooks/02_convolution_backward.ipynb."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["conv2d_backward"]


def conv2d_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    needs=(True, True, False),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    r"""Gradients of ``y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)``.

    With dy = ``grad_out``, x = ``input``, w = ``weight``, stride s, padding p, dilation d::

        dx[n,c,a,b] = sum of  w[o,c,k,l] dy[n,o,i,j]  over s i + d k - p = a, s j + d l - p = b
        dw[o,c,k,l] = sum over (n,i,j) of  dy[n,o,i,j]  x[n, c, s i + d k - p, s j + d l - p]
        db[o]       = sum over (n,i,j) of  dy[n,o,i,j]

    The library's own convolution backward computes them; the derivation is chapter 2 (the index arithmetic:
    Dumoulin & Visin 2016, arXiv:1603.07285).

    Args:
        grad_out: (N, C_out, H_out, W_out), the dtype and device of ``input``. Never written to.
        input: (N, C_in, H, W), floating point.
        weight: (C_out, C_in / groups, kH, kW), the dtype and device of ``input``.
        stride, padding, dilation: an int or a pair of ints, as in ``F.conv2d``.
        groups: number of blocks that input and output channels are divided into.
        needs: which of (d input, d weight, d bias) to compute; the others come back as None.

    Returns:
        ``(grad_input, grad_weight, grad_bias)``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or range.
    """
    stride, dilation = pair_of_ints("stride", stride, 1), pair_of_ints("dilation", dilation, 1)
    padding = pair_of_ints("padding", padding, 0)
    check_fit(input, weight, groups)
    for name, t in (("grad_out", grad_out), ("weight", weight)):
        if t.dtype != input.dtype or t.device != input.device:
            raise ValueError(
                f"{name} must be {input.dtype} on {input.device} like input, got {t.dtype} on {t.device}"
            )
    out_size = output_size(input, weight, stride, padding, dilation)
    expected = (input.shape[0], weight.shape[0], *out_size)
    if tuple(grad_out.shape) != expected:
        raise ValueError(f"grad_out must have the output's shape {expected}, got {tuple(grad_out.shape)}")
    return conv_grads(grad_out, input, weight, stride, padding, dilation, groups, needs)


def conv_grads(grad_out, input, weight, stride, padding, dilation, groups, needs):
    """``conv2d_backward`` without its checks, for the slabs of the fused kernel."""
    how = (stride, padding, dilation, False, [0, 0], groups, needs)
    return torch.ops.aten.convolution_backward(grad_out, input, weight, [weight.shape[0]], *how)


# Arguments -------------------------------------------------------------------------------------------------


def pair_of_ints(name: str, value, low: int) -> list[int]:
    """Return `value` as two ints, or say which argument is wrong."""
    pair = list(value) if isinstance(value, (tuple, list)) else [value, value]
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v >= low for v in pair):
        raise ValueError(f"{name} must be an int or a pair of ints, each at least {low}; got {value!r}")
    return pair


def explicit_padding(input: Tensor, weight: Tensor, padding, dilation, stride):
    """Padding as two ints; "same" with an even kernel pads ``input`` by one more on the far side first."""
    if padding == "valid":
        return input, [0, 0]
    if padding != "same":
        return input, pair_of_ints("padding", padding, 0)
    if stride != [1, 1]:
        raise ValueError(f'padding="same" needs stride 1, got stride {stride}')
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, [t // 2 for t in total]


def output_size(input: Tensor, weight: Tensor, stride, padding, dilation) -> list[int]:
    """Height and width of conv(input, weight)."""
    sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    if min(size) < 1:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} (dilation {dilation}) is larger than the padded input "
            f"of shape {tuple(input.shape)} (padding {padding})"
        )
    return size


def check_fit(input: Tensor, weight: Tensor, groups: int) -> None:
    """Raise a ValueError that says why there is no conv(input, weight)."""
    if input.dim() != 4:
        hint = " (an image alone is input[None])" if input.dim() == 3 else ""
        raise ValueError(f"input must be (N, C, H, W), got shape {tuple(input.shape)}{hint}")
    if not input.is_floating_point():
        raise ValueError(f"input must be floating point, got {input.dtype}")
    if weight.dim() != 4 or groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"weight must be (C_out, C_in / groups, kH, kW) with C_out divisible by groups={groups}, "
            f"got shape {tuple(weight.shape)}"
        )
    if input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"input must have {weight.shape[1] * groups} channels to fit weight {tuple(weight.shape)} with "
            f"groups={groups}, got {input.shape[1]}"
        )


def layout(*tensors: Tensor) -> torch.memory_format:
    """channels_last if one of the tensors is, as F.conv2d chooses for its output."""
    last = torch.channels_last
    if any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in tensors):
        return last
    return torch.contiguous_format


def empty_output(input: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
    """Uninitialised memory for conv(input, weight)."""
    size = (len(input), weight.shape[0], *output_size(input, weight, stride, padding, dilation))
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=layout(input, weight))
