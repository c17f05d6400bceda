"""The exercises' checkers: each says in one line whether an answer is right and, if not, what looks wrong.

The pages call them; `helpers/tests/wrong_answers.py` holds mistakes that they must tell apart.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.batch_norm import per_channel
from helpers.memory import saved_by, saved_tensors, storage_address

CHANNELS = (0, 2, 3)  # the dimensions that a per-channel sum runs over


def hint(
    number: int, name: str, got, want: Tensor, mistakes: dict[str, Tensor] | None = None, shape: str = ""
) -> str | None:
    """What is wrong with ``got``, which should equal ``want``; None if nothing is.

    Args:
        number: the exercise's.
        name: what ``got`` is called on the page.
        mistakes: what to say -> the values that this mistake gives.
        shape: what to add where the shape is wrong.
    """
    where = f"exercise {number}: "
    if got is None:
        return where + "not attempted yet"
    if not isinstance(got, Tensor):
        return where + f"{name} must be a tensor, got {type(got).__name__}"
    if got.shape != want.shape:
        return where + f"{name} must have shape {tuple(want.shape)}, got {tuple(got.shape)}" + shape
    if torch.allclose(got, want):
        return None
    for words, wrong in (mistakes or {}).items():
        if wrong.shape == got.shape and torch.allclose(got, wrong):
            return where + words
    return where + f"{name} has the right shape, but wrong values"


def hint_tuple(number: int, names: str, got) -> str | None:
    """What is wrong with ``got`` as a tuple of tensors called ``names``; None if nothing is."""
    if got is None:
        return f"exercise {number}: not attempted yet"
    if not isinstance(got, (tuple, list)) or len(got) != len(names.split(", ")):
        return f"exercise {number}: return a tuple, ({names})"
    return None


# Chapter 1 -----------------------------------------------------------------------------------------------


OPERATIONS = {
    "relu": (F.relu, "its slope is 1 or 0, and the output shows which"),
    "gelu": (F.gelu, "its slope is a formula in the input, which cannot be had from the output"),
    "tanh": (torch.tanh, "its slope is 1 - tanh², a formula in the output"),
    "square": (torch.square, "its slope is 2x, and the output has lost the sign of x"),
    "add one": (lambda x: x + 1, "its slope is 1, whatever x is"),
    "flatten": (lambda x: x.flatten(1), "no value is changed, so the gradient is only reshaped"),
    "average pooling": (lambda x: F.avg_pool2d(x, 2), "no value is needed; PyTorch saves some even so"),
}


def check_saved(answers) -> str:
    """Chapter 1: name -> "input", "output" or "nothing", as autograd has it."""
    if set(answers) != set(OPERATIONS):
        return f"exercise 1: give one answer for each of {', '.join(OPERATIONS)}"
    if None in answers.values():
        return f"exercise 1: {sum(a is None for a in answers.values())} of {len(answers)} not attempted yet"
    x = torch.randn(2, 3, 4, 6, requires_grad=True)
    for name, (function, why) in OPERATIONS.items():
        if answers[name] not in ("input", "output", "nothing"):
            return f'exercise 1: {name} must be "input", "output" or "nothing", got {answers[name]!r}'
        output, saved = saved_by(function, x)
        places = {storage_address(output): "output", storage_address(x): "input"}  # flatten's are the same
        right = places[storage_address(saved[0])] if saved else "nothing"
        if answers[name] != right:
            return f"exercise 1: {name} does not save {answers[name]}: {why}"
    return "exercise 1: right"


def check_predict(answer) -> str:
    """Chapter 1: bytes that a chain of conv, norm, ReLU keeps, from (n, height, width, channels)."""
    for n, height, width, channels in ((2, 9, 11, [3, 5]), (3, 16, 12, [1, 4, 6]), (2, 14, 13, [2, 7, 3, 5])):
        got = answer(n, height, width, channels)
        if got is None:
            return "exercise 2: not attempted yet"
        blocks = [(nn.Conv2d(c, d, 3), nn.BatchNorm2d(d), nn.ReLU()) for c, d in pairwise(channels)]
        chain = nn.Sequential(*(layer for block in blocks for layer in block)).float()
        batch = torch.randn(n, channels[0], height, width, dtype=torch.float32)
        _, saved = saved_tensors(chain, batch)
        sizes = {entry.storage: entry.nbytes for entry in saved if len(entry.shape) == 4}
        right = sum(sizes.values()) - sizes[storage_address(batch)]
        hints = {
            right // 4: "those are numbers; a float32 has 4 bytes",
            right // 2: "only half; batch norm keeps its input, and ReLU its output",
            right * 3 // 2: "three a block; batch norm's output is not kept: ReLU saves its own output",
            right + batch.nbytes: "the batch existed before, so it is not new",
            sum(8 * n * c * height * width for c in channels[1:]): "a 3×3 kernel without padding makes "
            "an image smaller",
        }
        if got != right:
            why = hints.get(got, f"got {got:,} bytes, the ledger has {right:,}")
            return f"exercise 2, channels {channels}: {why}"
    return "exercise 2: right"


# Chapter 2 -----------------------------------------------------------------------------------------------


class Convolutions(TorchDispatchMode):
    """Count the calls of a convolution."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "convolution" in func.name()
        return func(*args, **(kwargs or {}))


def grads(function, inputs, dy, **options):
    """Autograd's gradients of ``function(*inputs, **options)``."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves, **options), leaves, dy)


def check_grad_bias(answer) -> str:
    """Chapter 2: db from dy."""
    dy = torch.randn(3, 4, 2, 5)
    mistakes = {"that is the mean; every entry that b is added to counts in full": dy.mean(CHANNELS)}
    wrong = hint(1, "db", answer(dy.clone()), dy.sum(CHANNELS), mistakes, ": sum over all but o")
    return wrong or "exercise 1: right"


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


# Chapter 3 -----------------------------------------------------------------------------------------------


def closed_form(dz: Tensor, y_hat: Tensor, gamma: Tensor, std: Tensor, over=CHANNELS) -> Tensor:
    """Batch norm's dy, γ/σ (dz - mean of dz - ŷ times the mean of dz ŷ); all broadcast over y."""
    mean_dz, mean_dz_y_hat = dz.mean(over, keepdim=True), (dz * y_hat).mean(over, keepdim=True)
    return gamma / std * (dz - mean_dz - y_hat * mean_dz_y_hat)


def check_grad_input_eval(answer) -> str:
    """Chapter 3: dy in eval mode from (dz, gamma, running_var, eps)."""
    dz, gamma, var, eps = torch.randn(3, 2, 4, 5), torch.tensor([2.0, -3.0]), torch.tensor([0.5, 4.0]), 0.7
    right = per_channel(gamma / (var + eps).sqrt()) * dz
    mistakes = {
        "gamma is missing": right / per_channel(gamma),
        "eps is missing": right * per_channel(((var + eps) / var).sqrt()),
        "eps belongs inside the root": per_channel(gamma / (var.sqrt() + eps)) * dz,
        "divide by the root of the variance, not by the variance": right / per_channel((var + eps).sqrt()),
        "subtract no mean: here it does not depend on y": right - right.mean(CHANNELS, keepdim=True),
    }
    return hint(1, "dy", answer(dz.clone(), gamma, var, eps), right, mistakes) or "exercise 1: right"


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


# Chapter 4 -----------------------------------------------------------------------------------------------


def simple_norm(y: Tensor, eps: float = 1e-3) -> Tensor:
    """The tutorial's norm."""
    return (y - per_channel(y.mean(CHANNELS))) / per_channel(y.std(CHANNELS) + eps)


def tutorials_backward(dz, y, mean, sqrt_var, eps, bug: bool) -> Tensor:
    """The tutorial's norm, backward; with exercise 2's bug or without."""
    m, num, denom = y.numel() / y.shape[1], y - per_channel(mean), sqrt_var + eps
    ddenom = -(dz * num).sum(CHANNELS) / denom**2
    dvar = ddenom / (2 * (denom if bug else sqrt_var))
    dmean = -dz.sum(CHANNELS) / denom
    return dz / per_channel(denom) + per_channel(dmean / m) + per_channel(2 * dvar / (m - 1)) * num


def check_function(number: int, function, leaves, want: Tensor, names: tuple[str, ...], mistakes) -> str:
    """The verdict on an autograd.Function, given what it must compute and the names of its gradients.

    ``mistakes(dz)`` maps what to say to the name of a gradient and the values that a mistake gives.
    """
    z, saved = saved_by(function.apply, *leaves)
    if z is None:
        return f"exercise {number}: not attempted yet"
    if wrong := hint(number, "the output", z.detach(), want.detach()):
        return wrong
    if large := [str(t.dtype) for t in saved if t.shape == z.shape and t.dtype != torch.bool]:
        return f"exercise {number}: right output, but a tensor of its shape is saved, {', '.join(large)}"
    dz = torch.randn_like(z)
    try:
        got = torch.autograd.grad(z, leaves, dz, allow_unused=True)
    except RuntimeError as reason:
        return f"exercise {number}: backward fails: {reason}"
    right = torch.autograd.grad(want, leaves, dz, retain_graph=True, materialize_grads=True)
    for name, grad, wanted in zip(names, got, right, strict=True):
        if grad is None:
            return f"exercise {number}: {name} is None; an optimiser would pass that parameter over"
        ours = {words: wrong for words, (of, wrong) in mistakes(dz).items() if of == name}
        if (grad - wanted).abs().max() > 1e-10 and (wrong := hint(number, name, grad, wanted, ours)):
            return wrong
    return f"exercise {number}: right"


def check_biased(function) -> str:
    """Chapter 4: the tutorial's function with a bias, apply(x, w, b)."""
    x, w, b = leaves = [torch.randn(s, requires_grad=True) for s in ((3, 2, 6, 5), (4, 2, 3, 2), (4,))]
    want = simple_norm(F.conv2d(x, w, b))

    def mistakes(dz):
        y, mean = F.conv2d(x, w), F.conv2d(x, w, b).mean(CHANNELS)
        dy = tutorials_backward(dz, y, mean, y.std(CHANNELS), 1e-3, bug=False)
        return {
            "is the y that backward computes the y that mean belongs to?": (
                "dx",
                torch.autograd.grad(y, x, dy)[0],
            ),
            "db sums dz, but b reaches z through the mean as well": ("db", dz.sum(CHANNELS)),
        }

    return check_function(1, function, leaves, want, ("dx", "dw", "db"), mistakes)


def check_mended(answer) -> str:
    """Chapter 4: the tutorial's norm, backward, without the bug, from (dz, y, mean, sqrt_var, eps)."""
    y, dz = torch.randn(3, 4, 5, 6) * 2 + 1, torch.randn(3, 4, 5, 6)
    for eps in (1e-3, 0.5):
        arguments = dz, y, y.mean(CHANNELS), y.std(CHANNELS), eps
        got = answer(*(a.clone() for a in arguments[:4]), eps)
        right, buggy = (tutorials_backward(*arguments, bug=bug) for bug in (False, True))
        mistakes = {"the bug is still there; for dz = 1, which of the per-channel numbers are 0?": buggy}
        if wrong := hint(2, "dy", got, right, mistakes):
            return wrong
    return "exercise 2: right"


def check_conv_bn_relu(function) -> str:
    """Chapter 4: conv, batch norm and ReLU as one function, apply(x, w, gamma, beta)."""
    leaves = [torch.randn(s, requires_grad=True) for s in ((3, 2, 6, 5), (4, 2, 3, 2), (4,), (4,))]
    x, w, gamma, beta = leaves
    z = F.batch_norm(F.conv2d(x, w), None, None, gamma, beta, training=True)
    names = "dx", "dw", "dgamma", "dbeta"

    def mistakes(dz):
        unmasked = zip(names, torch.autograd.grad(z, leaves, dz, retain_graph=True), strict=True)
        return {f"{name} is the gradient without ReLU; mask dz": (name, grad) for name, grad in unmasked}

    return check_function(3, function, leaves, z.relu(), names, mistakes)


# Chapter 5 -----------------------------------------------------------------------------------------------


# Chapter 6 -----------------------------------------------------------------------------------------------


# Chapter 7 -----------------------------------------------------------------------------------------------


# Chapter 8 -----------------------------------------------------------------------------------------------
