"""The checkers of chapter 2."""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.book.exercises import compare, compare_all, exercise, grads, require


class Convolutions(TorchDispatchMode):
    """Count the calls of a convolution."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "convolution" in func.name()
        return func(*args, **(kwargs or {}))


@exercise(1)
def check_grad_weight(answer):
    """dw of a plain convolution from (dy, x)."""
    x, w, dy = torch.randn(2, 3, 7, 5), torch.randn(4, 3, 3, 2), torch.randn(2, 4, 5, 4)
    (dw,) = grads(lambda w: F.conv2d(x, w), (w,), dy)
    mistakes = {
        "dw is averaged over the images; sum": dw / len(x),
        "dw is flipped, but F.conv2d does not flip its kernel": dw.flip(2, 3),
        "dw has its channels the wrong way round; exchange dimensions 0 and 1": dw.transpose(0, 1),
    }
    compare("dw", answer(dy.clone(), x.clone()), dw, mistakes)


@exercise(2)
def check_grads_transposed(answer):
    """(du, dw) of a transposed convolution from (dz, u, w, stride)."""
    for stride in ((1, 1), (2, 3)):
        u, w = torch.randn(2, 3, 4, 5), torch.randn(3, 6, 3, 2)
        dz = torch.randn(F.conv_transpose2d(u, w, stride=stride).shape)
        du, dw = grads(F.conv_transpose2d, (u, w), dz, stride=stride)
        kernel = F.conv2d(dz, w.flip(2, 3), stride=stride)
        mistakes = {
            "du is flipped: transposing twice leaves no flip": du.flip(2, 3),
            "dw is flipped: transposing twice leaves no flip": dw.flip(2, 3),
            "the kernel of du is flipped: transposing twice leaves no flip": kernel,
            "dw has its channels the wrong way round; exchange dimensions 0 and 1": dw.transpose(0, 1),
        }
        got = answer(dz.clone(), u.clone(), w.clone(), stride)
        compare_all("du, dw", got, (du, dw), mistakes, f"stride {stride}")


@exercise(3)
def check_grads_by_patches(answer):
    """(dx, dw) of any convolution from (dy, x, w, stride, padding, dilation, groups)."""
    cases = ((1, 1), (0, 0), (1, 1), 1), ((2, 3), (1, 2), (1, 1), 1), ((2, 1), (2, 1), (2, 3), 1)
    for stride, padding, dilation, groups in (*cases, ((2, 1), (1, 0), (1, 2), 3)):
        options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        x, w = torch.randn(2, 2 * groups, 7, 9), torch.randn(5 * groups, 2, 3, 2)
        dy = torch.randn(F.conv2d(x, w, **options).shape)
        with Convolutions() as convolutions:
            got = answer(dy.clone(), x.clone(), w.clone(), **options)
        dx, dw = grads(F.conv2d, (x, w), dy, **options)
        _, of_one = grads(F.conv2d, (x[:1], w), dy[:1], **options)
        mistakes = {
            "dx is averaged over the images; sum": dx / len(x),
            "dw is averaged over the images; sum": dw / len(x),
            "dw takes the images for one: every image has its own patches": of_one,
        }
        case = ", ".join(f"{key} {value}" for key, value in options.items())
        compare_all("dx, dw", got, (dx, dw), mistakes, case)
        calls = "that calls a convolution; F.unfold, F.fold and torch.einsum are enough"
        require(not convolutions.count, calls)
