"""The gradients of conv2d, derived in notebooks/02_convolution_backward.ipynb."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair


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

        dx[n,c,a,b] = sum over (o,i,j,k,l) of  w[o,c,k,l] dy[n,o,i,j],  s i + d k - p = a, s j + d l - p = b
        dw[o,c,k,l] = sum over (n,i,j) of  dy[n,o,i,j] x[n, c, s i + d k - p, s j + d l - p]
        db[o]       = sum over (n,i,j) of  dy[n,o,i,j]

    for groups = 1; with more, o runs over the group of c, and w's second index counts within it. The
    library's own backward computes them; the derivation is chapter 2 (the index arithmetic: Dumoulin &
    Visin 2016, arXiv:1603.07285).

    Args:
        grad_out: (N, C_out, H_out, W_out), the dtype and device of ``input``. Never written to.
        input: (N, C_in, H, W), floating point.
        weight: (C_out, C_in / groups, kH, kW), the dtype and device of ``input``.
        stride, padding, dilation: an int or a pair of ints, as in ``F.conv2d``.
        groups: number of blocks that input and output channels are divided into.
        needs: which of (d input, d weight, d bias) to compute, by default all but the last; the others come
            back as None.

    Returns:
        ``(grad_input, grad_weight, grad_bias)``, of the shapes of input, weight and bias, in their dtype.

    Raises:
        ValueError: ``input`` is no batch of images, a tensor's shape, dtype or device does not fit it, or
            ``padding`` is a word, or ``needs`` is not three bools.
        RuntimeError or TypeError: PyTorch's own, if there is no such convolution.
    """
    check_images("input", input)
    wanted = f"{input.dtype} on {input.device}"
    for name, t in (("grad_out", grad_out), ("weight", weight)):
        got = f"{t.dtype} on {t.device}" if isinstance(t, Tensor) else f"{type(t)}"
        if got != wanted:
            raise ValueError(f"{name} must be a tensor, {wanted} like input, got {got}")
    if not (isinstance(needs, (tuple, list)) and [type(need) for need in needs] == [bool] * 3):
        raise ValueError(f"needs must be three bools, for input, weight and bias, got {needs!r}")
    if isinstance(padding, str):
        raise ValueError(f"padding must be an int or a pair of ints, got {padding!r}")
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    no_images = F.conv2d(input[:0].detach(), weight.detach(), None, stride, padding, dilation, groups)
    expected = (len(input), *no_images.shape[1:])  # PyTorch has checked the other arguments
    if grad_out.shape != expected:
        raise ValueError(f"grad_out must have the output's shape {expected}, got {tuple(grad_out.shape)}")
    how = (stride, padding, dilation, False, [0, 0], groups, needs)
    grads = torch.ops.aten.convolution_backward(grad_out, input, weight, [weight.shape[0]], *how)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))  # some give more


def check_images(name: str, images: Tensor) -> None:
    """Raise a ValueError unless ``images`` is a batch of images."""
    if not isinstance(images, Tensor):
        raise ValueError(f"{name} must be a tensor (N, C, H, W), floating point, got {type(images)}")
    if images.dim() != 4 or not images.is_floating_point():
        hint = f"; an image alone is {name}[None]" if images.dim() == 3 else ""
        got = f"shape {tuple(images.shape)}, {images.dtype}{hint}"
        raise ValueError(f"{name} must be (N, C, H, W), floating point, got {got}")
