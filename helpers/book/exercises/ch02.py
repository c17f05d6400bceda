"""The checkers of chapter 2."""

import torch.nn.functional as F

from helpers.book.exercises import call, compare, exercise, grads, measured, new, require


@exercise(1)
def check_grad_weight(answer):
    """dw of a plain convolution from (dy, x)."""
    x, w, dy = new((2, 3, 7, 5), (4, 3, 3, 2), (2, 4, 5, 4))
    (dw,) = grads(lambda w: F.conv2d(x, w), (w,), dy)
    mistakes = {
        "dw is flipped, but F.conv2d does not flip its kernel": dw.flip(2, 3),
        "dw has its channels the wrong way round; exchange dimensions 0 and 1": dw.transpose(0, 1),
    }
    xt, dyt, flipped = (t.transpose(0, 1) for t in (x, dy, dy.flip(2, 3)))
    mistakes["dy is flipped, but F.conv2d does not flip its kernel"] = F.conv2d(xt, flipped).transpose(0, 1)
    mistakes["reshape mixes the values; exchange dimensions 0 and 1"] = F.conv2d(xt, dyt).view_as(dw)
    compare("dw", call(answer, dy, x), dw, mistakes)


@exercise(2)
def check_grads_transposed(answer):
    """(du, dw) of a transposed convolution from (dz, u, w, stride)."""
    for stride in ((1, 1), (2, 3)):
        u, w = new((2, 3, 4, 5), (3, 6, 3, 2))
        (dz,) = new(F.conv_transpose2d(u, w, stride=stride).shape)
        du, dw = grads(F.conv_transpose2d, (u, w), dz, stride=stride)
        mistakes = {
            "du is flipped: transposing twice leaves no flip": F.conv2d(dz, w.flip(2, 3), stride=stride),
            "dw is flipped: transposing twice leaves no flip": dw.flip(2, 3),
            "dw has its channels the wrong way round; exchange dimensions 0 and 1": dw.transpose(0, 1),
        }
        compare("du, dw", call(answer, dz, u, w, stride), (du, dw), mistakes, f"stride {stride}")


@exercise(3)
def check_grads_by_patches(answer):
    """(dx, dw) of any convolution from (dy, x, w, stride, padding, dilation, groups)."""
    for setting in (((1, 1), (0, 0), (1, 1), 1), ((2, 3), (1, 2), (1, 1), 1), ((2, 1), (2, 1), (2, 3), 3)):
        options = dict(zip(("stride", "padding", "dilation", "groups"), setting, strict=True))
        x, w = new((2, 2 * options["groups"], 7, 9), (15, 2, 3, 2))
        (dy,) = new(F.conv2d(x, w, **options).shape)
        want = grads(F.conv2d, (x, w), dy, **options)
        _, of_one = grads(F.conv2d, (x[:1], w), dy[:1], **options)
        got, _, flops = measured(call, answer, dy, x, w, **options)
        mistakes = {"that is dw of the first image alone; add up those of all images": of_one}
        compare("dx, dw", got, want, mistakes, note=f"{options}")
        require(not flops, "that calls a convolution; F.unfold, F.fold and torch.einsum are enough")
