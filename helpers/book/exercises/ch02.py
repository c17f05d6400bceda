"""The checkers of chapter 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.book.exercises import grads, hint, hint_tuple


class Convolutions(TorchDispatchMode):
    """Count the calls of a convolution."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "convolution" in func.name()
        return func(*args, **(kwargs or {}))


def check_grads_1x1(answer) -> str:
    """Chapter 2: (dx, dw) of a 1×1 convolution from (dy, x, w)."""
    x, w, dy = torch.randn(3, 2, 4, 5), torch.randn(6, 2), torch.randn(3, 6, 4, 5)
    with Convolutions() as convolutions:
        got = answer(dy.clone(), x.clone(), w.clone())
    if wrong := hint_tuple(2, "dx, dw", got):
        return wrong
    if convolutions.count:
        return "exercise 2: that calls a convolution; a matrix product at every pixel is enough"
    want = grads(lambda x, w: F.conv2d(x, w[:, :, None, None]), (x, w), dy)
    for name, grad, right in zip(("dx", "dw"), got, want, strict=True):
        mistakes = {
            f"{name} is too small by the batch size: sum over n, do not average": right / len(x),
            "dx pairs w and dy by the wrong channel: what stands beside x in the sum?": torch.einsum(
                "oc,noij->ncij", w.flip(1), dy
            ),
        }
        shape = ": every image uses the same w, so sum over n" if name == "dw" else ""
        if wrong := hint(2, name, grad, right, mistakes, shape):
            return wrong
    return "exercise 2: right"


def check_grads_transposed(answer) -> str:
    """Chapter 2: (du, dw) of a transposed convolution from (dz, u, w, stride)."""
    for stride in ((1, 1), (2, 3)):
        u, w = torch.randn(2, 3, 4, 5), torch.randn(3, 6, 3, 2)
        dz = torch.randn(F.conv_transpose2d(u, w, stride=stride).shape)
        got = answer(dz.clone(), u.clone(), w.clone(), stride)
        if wrong := hint_tuple(3, "du, dw", got):
            return wrong
        want = grads(F.conv_transpose2d, (u, w), dz, stride=stride)
        for name, grad, right in zip(("du", "dw"), got, want, strict=True):
            swapped = name == "dw" and grad.shape == right.transpose(0, 1).shape
            mistakes = {
                f"{name} is flipped: transposing twice leaves no flip": right.flip(2, 3),
                "the kernel of du is flipped: transposing twice leaves no flip": F.conv2d(
                    dz, w.flip(2, 3), stride=stride
                ),
            }
            shape = "; exchange dimensions 0 and 1" if swapped else ""
            if wrong := hint(3, name, grad, right, mistakes, shape):
                return f"{wrong} (stride {stride})"
    return "exercise 3: right"


def check_grads_by_patches(answer) -> str:
    """Chapter 2: (dx, dw) of any convolution from (dy, x, w, stride, padding, dilation, groups)."""
    for stride, padding, dilation, groups in (
        ((1, 1), (0, 0), (1, 1), 1),
        ((2, 3), (1, 2), (1, 1), 1),
        ((2, 1), (2, 1), (2, 3), 1),
        ((2, 1), (1, 0), (1, 2), 3),
    ):
        options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        x, w = torch.randn(2, 2 * groups, 7, 9), torch.randn(5 * groups, 2, 3, 2)
        dy = torch.randn(F.conv2d(x, w, **options).shape)
        with Convolutions() as convolutions:
            got = answer(dy.clone(), x.clone(), w.clone(), **options)
        if wrong := hint_tuple(4, "dx, dw", got):
            return wrong
        if convolutions.count:
            return "exercise 4: that calls a convolution; F.unfold, F.fold and torch.einsum are enough"
        want = grads(F.conv2d, (x, w), dy, **options)
        for name, grad, right in zip(("dx", "dw"), got, want, strict=True):
            mistakes = {
                f"{name} is averaged over the images; sum": right / len(x),
                "dw takes the images for one: every image has its own patches": grads(
                    F.conv2d, (x[:1], w), dy[:1], **options
                )[1],
            }
            if wrong := hint(4, name, grad, right, mistakes):
                return f"{wrong} ({', '.join(f'{key} {value}' for key, value in options.items())})"
    return "exercise 4: right"


def check_grad_weight(answer) -> str:
    """Chapter 2: dw of a plain convolution from (dy, x)."""
    x, w, dy = torch.randn(2, 3, 7, 5), torch.randn(4, 3, 3, 2), torch.randn(2, 4, 5, 4)
    got, (right,) = answer(dy.clone(), x.clone()), grads(lambda w: F.conv2d(x, w), (w,), dy)
    mistakes = {
        "dw is averaged over the images; sum": right / len(x),
        "dw is flipped, but F.conv2d does not flip its kernel": right.flip(2, 3),
    }
    swapped = getattr(got, "shape", None) == right.transpose(0, 1).shape
    shape = "; exchange dimensions 0 and 1" if swapped else ""
    return hint(1, "dw", got, right, mistakes, shape) or "exercise 1: right"
