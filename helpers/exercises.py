"""The exercises' checkers: each says in one line whether an answer is right and, if not, what looks wrong.

The pages call them; `helpers/tests/wrong_answers.py` holds mistakes that they must tell apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.batch_norm import batch_stats, per_channel
from helpers.fused import FusedConvBN2d
from helpers.memory import MemoryTrace, saved_by, saved_tensors, storage_address
from helpers.mnist import Net, pair
from helpers.predict import predict_memory
from helpers.remat import remat

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


def check_held_bytes(answer) -> str:
    """``answer(batch_size, is_fused)``: bytes that the MNIST network holds at the end of forward."""
    n, mib = 16, 2**20
    pooled, outputs = n * 9216 * 4, n * (21632 + 36864) * 4
    mistakes = {
        -pooled: "the places of the maxima are int64, 8 bytes each, not 4; or a ReLU's output is missing",
        -2 * pooled: "max-pooling also keeps where each maximum was",
        outputs: "one pair of outputs too many; nothing keeps the norm's output, nor the fused layer any y",
        -outputs: "one pair of outputs is missing; ReLU keeps its output, the norm alone its input",
    }
    for is_fused, make in ((False, pair), (True, lambda *args: FusedConvBN2d(*args, bias=False))):
        name, got, network = "fused" if is_fused else "unfused", answer(n, is_fused), Net(make).float()
        if got is None:
            return "exercise 1: not attempted yet"
        with MemoryTrace() as trace:
            out = network(torch.randn(n, 1, 28, 28, dtype=torch.float32))
            trace.mark("now")
        want = trace.marks["now"] - n * 28 * 28 * 4  # without the batch, made inside the trace
        del out
        for extra, words in mistakes.items():
            if abs(got - want) > 0.02 * want and abs(got - extra - want) < 0.01 * want:
                return f"exercise 1, {name}: {words}"
        if abs(got - want) > 0.02 * want:
            return f"exercise 1, {name}: measured {want / mib:.1f} MiB, your answer is {got / mib:.1f} MiB"
    return "exercise 1: right"


def check_lower_peak(network_class) -> str:
    """``network_class``: the MNIST network with a forward whose peak under `remat` is lower by a y2."""
    n, y1, y2 = 128, 32 * 26 * 26 * 4, 64 * 24 * 24 * 4
    x, labels = torch.randn(n, 1, 28, 28, dtype=torch.float32), torch.randint(10, (n,))

    def step(make):
        torch.manual_seed(0)
        network = make().float()
        torch.manual_seed(0)
        with MemoryTrace(timeline=True) as trace:
            with remat(max_cost=0):
                out = network(x)
            if isinstance(out, Tensor):
                F.nll_loss(out, labels).backward()
        return out, trace.tensor_peak, [p.grad for p in network.parameters()]

    (got, peak, grads), (want, before, right) = step(network_class), step(Net)
    if got is None:
        return "exercise 2: not attempted yet"
    if not torch.equal(got, want):
        return "exercise 2: the output must be that of Net, bit for bit"
    if len(grads) != len(right) or not all(
        g is not None and torch.allclose(g, r, rtol=1e-3, atol=1e-5)
        for g, r in zip(grads, right, strict=True)
    ):
        return "exercise 2: the output is right, but a gradient is not"
    linear = sum(p.nbytes for name, p in Net().float().named_parameters() if name.startswith("fc"))
    if peak > n * (y1 + 3 * y2) + linear + n * y2 // 20:  # the linear layers' gradients are there by then
        if peak > before - n * y2 // 50:
            return "exercise 2: the peak is where it was; which line of forward makes its last tensor?"
        return f"exercise 2: the peak has fallen by {(before - peak) / (n * y2):.2f} y2, which is not enough"
    return "exercise 2: right"


class _Applied(nn.Module):
    """A function as a module, for `saved_tensors`."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def check_pool(function) -> str:
    """``function.apply(x)``: 2x2 max-pooling that keeps one byte for each output."""
    x = torch.randn(3, 2, 6, 8, dtype=torch.float64, requires_grad=True)
    out, saved = saved_tensors(_Applied(function.apply), x)
    if out is None:
        return "exercise 3: not attempted yet"
    want = F.max_pool2d(x, 2)
    if out.shape != want.shape:
        return f"exercise 3: the output must have shape {tuple(want.shape)}, got {tuple(out.shape)}"
    if not torch.equal(out, want):
        return "exercise 3: the output is wrong; does a window have 2 rows and 2 columns?"
    wide = [f"{s.dtype} {s.shape}" for s in saved if s.nbytes > out.numel()]
    if wide:
        return f"exercise 3: the output is right, but more than a byte a value is kept: {', '.join(wide)}"
    dout = torch.randn_like(out)
    try:
        (got,) = torch.autograd.grad(out, x, dout)
    except RuntimeError as reason:
        return f"exercise 3: backward fails: {reason}"
    (right,) = torch.autograd.grad(want, x, dout)
    if torch.equal(got, right):
        return f"exercise 3: right, with {sum(s.nbytes for s in saved) / out.numel():g} bytes a value"
    if got.sum().sub(dout.sum()).abs() > 1e-9:
        return "exercise 3: the sum of dx must be that of the output's gradient: each value goes to one place"
    return "exercise 3: each value goes to one place, but not to that of the maximum; mind rows and columns"


# Chapter 6 -----------------------------------------------------------------------------------------------


def check_frozen(answer) -> str:
    """``answer(dz, x, w, gamma, mean, var, eps)``: gradients of conv (padding 1) and a constant norm."""
    n, c_in, c_out, eps = 6, 2, 8, 0.1
    shapes = ((n, c_in, 14, 12), (c_out, c_in, 3, 3), (c_out,), (c_out,))
    x, w, gamma, beta = leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    mean, var = torch.randn(c_out, dtype=torch.float64), torch.rand(c_out, dtype=torch.float64) + 0.5
    z = F.batch_norm(F.conv2d(x, w, padding=1), mean, var, gamma, beta, training=False, eps=eps)
    dz = torch.randn_like(z)
    want = torch.autograd.grad(z, leaves, dz)
    arguments = [t.detach() for t in (dz, x, w, gamma)]
    with MemoryTrace() as trace:
        got = answer(*arguments, mean, var, eps)
    if (wrong := hint_tuple(2, "dx, dw, dgamma, dbeta", got)) is not None:
        return wrong
    inv_std, sum_dz_y = torch.rsqrt(var + eps), (dz * F.conv2d(*arguments[1:3], padding=1)).sum(CHANNELS)
    scale = gamma.detach() * inv_std
    mistakes = {
        "dx": {"z is γ/σ times y, and the factor is missing from dx": grad_of_conv(x, w, dz)[0]},
        "dw": {"z is γ/σ times y, and the factor is missing from dw": grad_of_conv(x, w, dz)[1]},
        "dgamma": {
            "the mean is missing from dgamma: Σ dz (y - μ) = Σ dz y - μ Σ dz": sum_dz_y * inv_std,
            "dgamma has a γ too many: take the weight gradient before it is scaled": want[2]
            * scale
            / inv_std,
            "dgamma is to be divided by σ, the root of var + ε": want[2] / inv_std,
        },
    }
    for name, g, h in zip(("dx", "dw", "dgamma", "dbeta"), got, want, strict=True):
        if (wrong := hint(2, name, g, h, mistakes.get(name))) is not None:
            return wrong
    if trace.tensor_peak - x.nbytes > dz.nbytes / 2:
        more = (trace.tensor_peak - x.nbytes) / dz.nbytes
        return f"exercise 2: right gradients, but they needed {more:.1f} buffers of y's size"
    return "exercise 2: right, without y"


def grad_of_conv(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """dx and dw of ``F.conv2d(x, w, padding=1)``."""
    return torch.autograd.grad(F.conv2d(x, w, padding=1), (x, w), dy)


class HowMade(NamedTuple):
    """A recipe, as chapter 6 has it."""

    function: Callable
    inputs: tuple[Tensor, ...]


def check_norm_leaky(answer) -> str:
    """``answer(y, gamma, beta, recipe, alpha)``: batch norm and leaky ReLU that keep y's recipe."""
    alpha, channels = 0.3, 5
    shapes = ((16, channels, 9, 8), (channels, channels, 3, 3), (channels,), (channels,))
    x, w, gamma, beta = leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    plain = F.leaky_relu(
        F.batch_norm(F.conv2d(x, w, padding=1), None, None, gamma, beta, training=True), alpha
    )
    da = torch.randn_like(plain)
    want, before = torch.autograd.grad(plain, leaves, da), da.clone()

    def convolve(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1)

    def layer() -> Tensor | None:
        return answer(convolve(x, w), gamma, beta, HowMade(convolve, (x, w)), alpha)

    a, saved = saved_by(layer)
    if (wrong := hint(3, "a", a, plain)) is not None:
        return wrong
    if {storage_address(t) for t in saved if t.nbytes >= x.nbytes / 8} - {storage_address(x)}:
        return "exercise 3: a is right, but another tensor of y's size than x is kept for backward"
    grads = torch.autograd.grad(a, leaves, da, allow_unused=True)
    if not torch.equal(da, before):
        return "exercise 3: the gradient that came in was overwritten"
    slopes = torch.autograd.grad(
        F.batch_norm(convolve(x, w), None, None, gamma, beta, training=True), leaves, da
    )
    for name, g, h, s in zip(("dx", "dw", "dgamma", "dbeta"), grads, want, slopes, strict=True):
        if g is None:
            return f"exercise 3: {name} is None; backward returns a gradient for each of forward's tensors"
        if wrong := hint(
            3, name, g, h, {"this is without leaky ReLU; dz = da where z > 0, α da elsewhere": s}
        ):
            return wrong
    del a, plain
    for leaf in leaves:
        leaf.grad = None
    with MemoryTrace() as trace:
        a = layer()
        a.backward(da)
    buffers = trace.tensor_peak / x.nbytes
    if buffers > 3.5:
        return f"exercise 3: right gradients, but one block peaks at {buffers:.1f} buffers, and L + 2 is 3"
    return f"exercise 3: right, with a peak of {buffers:.2f} buffers for one block"


# Chapter 7 -----------------------------------------------------------------------------------------------


def check_index(answer) -> str:
    """Chapter 7: a max-pool's index from (offsets, width, kernel, stride, padding)."""
    for kernel, stride, padding, size in ((2, 2, 0, (6, 9)), (3, 2, 1, (7, 11)), (5, 1, 2, (8, 90))):
        x = torch.randn(2, 3, *size)
        _, index = F.max_pool2d(x, kernel, stride, padding, return_indices=True)
        i, j = torch.arange(index.shape[2])[:, None], torch.arange(index.shape[3])
        row, column = stride * i - padding, stride * j - padding
        r, q = index // size[1] - row, index % size[1] - column
        offsets = (r * kernel + q).to(torch.uint8)
        got = answer(offsets.clone(), size[1], kernel, stride, padding)
        if got is None:
            return "exercise 1: not attempted yet"
        if isinstance(got, Tensor) and got.dtype != torch.int64:
            return f"exercise 1: the index must be int64, as PyTorch's backward wants it; got {got.dtype}"
        mistakes = {
            "a byte overflows: r times the width must not be computed in uint8": row * size[1]
            + (r.to(torch.uint8) * size[1]).long()
            + column
            + q,
            "rows and columns of the window have changed places": (row + q) * size[1] + column + r,
            "subtract the padding: the first window begins outside of the image": index
            + padding * size[1]
            + padding,
            "the stride is missing: windows lie that far apart": (i - padding + r) * size[1]
            + (j - padding + q),
            "a row of the image has `width` pixels, not `kernel`": (row + r) * kernel + column + q,
        }
        if wrong := hint(1, "the index", got, index, mistakes):
            return f"{wrong} (kernel {kernel}, stride {stride}, padding {padding}, width {size[1]})"
    return "exercise 1: right"


class _Bottleneck(nn.Module):
    """A dense block of layers with bottlenecks."""

    def __init__(self, n: int, c0: int, k: int, b: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for c in range(c0, c0 + n * k, k):
            narrow = nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, b * k, 1, bias=False)
            wide = nn.BatchNorm2d(b * k), nn.ReLU(), nn.Conv2d(b * k, k, 3, padding=1, bias=False)
            self.layers.append(nn.Sequential(*narrow, *wide))

    def forward(self, x):
        parts = [x]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)))
        return torch.cat(parts, 1).mean((2, 3))


def check_bottleneck(answer) -> str:
    """Chapter 7: channels held by a dense block with bottlenecks, (plain, recipes), from (n, c0, k, b)."""
    for n, c0, k, b in ((1, 8, 4, 2), (3, 8, 2, 4), (4, 6, 4, 3)):
        got = answer(n, c0, k, b)
        if wrong := hint_tuple(2, "plain, recipes", got):
            return wrong
        x, held = torch.randn(4, 3, 24, 24), []
        for context in (nullcontext, remat):
            first = nn.Conv2d(3, c0, 3, padding=1, bias=False)
            model = nn.Sequential(first, _Bottleneck(n, c0, k, b)).float()
            with MemoryTrace("cpu") as memory:
                with context():
                    out = model(x.float())
                memory.mark("end of forward")
            del out
            held.append(round(memory.marks["end of forward"] / (4 * 24 * 24 * 4)))
        case = f"n = {n}, c0 = {c0}, k = {k}, b = {b}"
        for name, mine, right in zip(("plain", "recipes"), got, held, strict=True):
            words = {
                right + k: "the last layer's output is read by nothing that needs it in backward",
                right - n * b * k: "the norm behind the 1x1 convolution keeps its input, too"
                if name == "recipes"
                else "each layer has two tensors between its convolutions that are kept",
                right - 2 * n * b * k: "the values between a layer's convolutions are missing",
                right + n * b * k: "the ReLU between the convolutions is made again"
                if name == "recipes"
                else "the output of a norm is kept by nobody",
            }
            if mine != right:
                why = words.get(mine, f"got {mine}, and it holds {right}")
                return f"exercise 2: {name}, {case}: {why}"
    return "exercise 2: right"


class _Recipe:
    """The page's: a value's parents, its tensor if it is kept, and else the function that makes it."""

    def __init__(self, parents=(), kept=None) -> None:
        self.parents, self.kept, self.make = parents, kept, None

    def tensor(self) -> Tensor:
        return self.make(*[p.tensor() for p in self.parents]) if self.kept is None else self.kept


def check_silu(function) -> str:
    """Chapter 7: ``function.apply(z, made)`` is F.silu, with a recipe in place of z."""
    leaf = torch.randn(4, 3, 40, 30).requires_grad_()
    source = _Recipe(kept=leaf.detach().clone())
    made, kept, dout = _Recipe([source]), leaf.detach().clone(), torch.randn_like(leaf)
    with MemoryTrace("cpu") as memory:
        z = leaf * 1
        a = function.apply(z, made)
        if a is None:
            return "exercise 3: not attempted yet"
        if not torch.equal(a, F.silu(kept)):
            return "exercise 3: forward must return F.silu(z), to the last bit"
        out = a * dout
        del z, a
        memory.mark("end of forward")
    if memory.marks["end of forward"] > 1.5 * out.nbytes:
        return "exercise 3: a tensor of image size is held until backward; hold the recipe that makes z"
    if made.make is None:
        return "exercise 3: made.make is missing: whoever needs a could not make it"
    if not torch.equal(made.tensor(), F.silu(kept)):
        return "exercise 3: made.make is called with z and must return a"
    if not torch.equal(source.kept, kept):
        return "exercise 3: made.make writes over its argument, which may be a kept tensor"
    (got,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    if not torch.equal(source.kept, kept):
        return "exercise 3: backward writes over z, which may be a kept tensor"

    def slope(z):
        s = z.sigmoid()
        return s * (1 + z * (1 - s))

    mistakes = {
        "that is a's slope at a: ctx must hold the recipe of z": dout * slope(F.silu(kept)),
        "the chain rule multiplies by da": slope(kept),
        "a product has two terms, and the second is missing": dout * kept.sigmoid(),
        "a product has two terms, and the first is missing": dout
        * kept
        * kept.sigmoid()
        * (1 - kept.sigmoid()),
    }
    return hint(3, "dz", got, dout * slope(kept), mistakes) or "exercise 3: right"


def check_dropout(function) -> str:
    """Chapter 7: ``function.apply(a, p)`` is dropout, without a mask that is kept."""
    leaf, p = (torch.rand(6, 4, 24, 20) + 0.5).requires_grad_(), 0.25
    torch.manual_seed(1)
    with MemoryTrace("cpu") as memory:
        out = function.apply(leaf, p)
        memory.mark("end of forward")
    if out is None:
        return "exercise 4: not attempted yet"
    k = out.detach() / leaf.detach()
    if not torch.allclose(k[k != 0], torch.tensor(1 / (1 - p), dtype=k.dtype)):
        return "exercise 4: what stays must be multiplied by 1 / (1 - p), so that the mean stays, too"
    if abs((k == 0).double().mean() - p) > 0.1:
        return f"exercise 4: a share p = {p} must go, but {(k == 0).double().mean():.2f} has gone"
    if torch.equal(function.apply(leaf, p), out):
        return "exercise 4: two calls drop the same places; draw a new seed in each forward"
    torch.manual_seed(1)
    if not torch.equal(function.apply(leaf, p), out):
        return "exercise 4: torch.manual_seed does not decide; draw the seed with torch's random numbers"
    if memory.marks["end of forward"] > 1.1 * out.nbytes:
        return "exercise 4: besides the output, a tensor of its size is kept; keep what makes the mask again"
    dout = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, leaf, dout)
    mistakes = {
        "the slope of a ∘ k is k: multiply dout by it": dout,
        "the factor 1 / (1 - p) is missing": dout * (k != 0),
        "that is not dout times forward's k; is it the same seed?": got,
    }
    return hint(4, "da", got, dout * k, mistakes) or "exercise 4: right"


# Chapter 8 -----------------------------------------------------------------------------------------------


def check_transposed(answer) -> str:
    """Chapter 8: multiplications per output value of a transposed convolution, by counting them."""
    for c_in, k, stride, groups in ((8, 4, 2, 1), (12, 2, 2, 3), (4, 6, 3, 2), (6, 3, 1, 1)):
        got = answer(c_in, k, stride, groups)
        if got is None:
            return "exercise 1: not attempted yet"
        image, w = torch.ones(1, c_in, 8, 8), torch.ones(c_in, 5, k, k)  # a sum of ones counts its terms
        count = F.conv_transpose2d(image, w, stride=stride, groups=groups)
        want = count.sum().item() / (count.shape[1] * 8 * 8 * stride**2)
        if abs(got - want) > 1e-6:
            words = {
                want * stride**2: "that is an ordinary convolution's; here the output is larger",
                want * stride: "the output grows by the stride in height and in width",
                want * groups: "an input channel reaches the outputs of its own group alone",
                want * stride**4: "stride² fewer multiplications, not more",
            }
            why = next((said for wrong, said in words.items() if abs(got - wrong) < 1e-6), f"it is {want:g}")
            case = f"{c_in} channels, kernel {k}, stride {stride}, {groups} groups"
            return f"exercise 1: {case}: got {got:g}; {why}"
    return "exercise 1: right"


def kept_values(layers: list[nn.Conv2d], max_cost: float, size: int = 8) -> list[str]:
    """What `remat` keeps of convolutions with a norm and ReLU each, but for the input: y1, a1, y2, ..."""
    stack = [m for conv in layers for m in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())]
    with remat(max_cost) as record:
        nn.Sequential(*stack)(torch.randn(2, layers[0].in_channels, size, size))
    names = [f"{letter}{i + 1}" for i in range(len(layers)) for letter in "ya"]
    rows = [row for row in record.rows if row.recipe != "given"]
    return [name for name, row in zip(names, rows, strict=True) if row.kept]


def check_chain(answer) -> str:
    """Chapter 8: the blocks of a chain whose convolution's output is kept, from (prices, max_cost)."""
    cases = (([1, 3, 1, 5], 150), ([1, 1, 3, 1, 1], 16), ([3, 3, 3, 3], 144), ([1, 3, 1, 1], 160))
    for kernels, max_cost in cases:
        layers = [nn.Conv2d(16, 16, k, padding=k // 2) for k in kernels]
        prices = [16 * k * k for k in kernels]
        got = answer(prices, max_cost)
        if got is None:
            return "exercise 2: not attempted yet"
        want = [int(name[1:]) for name in kept_values(layers, max_cost)]
        if list(got) != want:
            case = f"prices {prices}, max_cost {max_cost}: got {list(got)}, remat keeps {want}"
            alone = [i for i, price in enumerate(prices, 1) if price > max_cost]
            why = ""
            if list(got) == [i - 1 for i in want]:
                why = "; blocks count from 1"
            elif list(got) == alone:
                why = "; what is not kept on the way must be paid for, too"
            elif len(got) > len(want):
                why = "; the way ends at what is kept, and a cost that is just max_cost can be paid"
            return f"exercise 2: {case}{why}"
    return "exercise 2: right"


def check_only_input(answer) -> str:
    """Chapter 8: the least price at which three convolutions keep their input alone."""
    for c_in, width, c_out, stride in ((16, 4, 16, 1), (16, 4, 16, 2), (8, 8, 4, 1), (6, 4, 8, 2)):
        got = answer(c_in, width, c_out, stride)
        if got is None:
            return "exercise 3: not attempted yet"
        layers = [
            nn.Conv2d(c_in, width, 1),
            nn.Conv2d(width, width, 3, stride, 1),
            nn.Conv2d(width, c_out, 1),
        ]
        case = f"exercise 3: {c_in} channels in, {width} inside, {c_out} out, stride {stride}: at {got} "
        if not isinstance(got, (int, float)) or got < 1:
            return f"exercise 3: return a number from 1 on, got {got!r}"
        kept = kept_values(layers, got)
        if kept:
            which = {
                "y3": "and is y3's recipe cheaper where it is narrow?",
                "y2": "the way to y2 begins at the input",
            }
            larger = "; y1 has stride² times as many values as y2" if stride > 1 and "y2" in kept else ""
            return case + f"{', '.join(kept)} is still kept: {which.get(kept[0], 'count its price')}{larger}"
        if not kept_values(layers, math.ceil(got) - 1):
            return case + "nothing else is kept, but neither is it at a lower price"
    return "exercise 3: right"


def check_fooled(answer) -> str:
    """Chapter 8: peaks at the prices 0 to 7 for which bisection does not find the smallest that fits."""
    for memory in (10, 64):
        peaks = answer(memory)
        if peaks is None:
            return "exercise 4: not attempted yet"
        if not isinstance(peaks, (list, tuple)) or len(peaks) != 8:
            return "exercise 4: return a list of eight peaks"
        if min(peaks) > memory:
            return "exercise 4: no price fits, so bisection is right to find none"
        low, high = 0, 8
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if peaks[middle] <= memory else (middle + 1, high)
        first = next(price for price, peak in enumerate(peaks) if peak <= memory)
        if low == first:
            return f"exercise 4: bisection finds price {low}, and that is the smallest that fits"
        if low < 8:
            return f"exercise 4: bisection finds {low}, not {first}; make it find none although one fits"
    return "exercise 4: right"


# Chapter 9 -----------------------------------------------------------------------------------------------


def small_network() -> nn.Sequential:
    """As the price rises, its peak falls at first, and then is higher than at 0."""
    wide, depthwise = nn.Conv2d(12, 48, 1), nn.Conv2d(48, 48, 3, padding=1, groups=48)
    layers = [
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.SiLU(),
        wide,
        nn.BatchNorm2d(48),
        nn.SiLU(),
    ]
    layers += [depthwise, nn.BatchNorm2d(48), nn.SiLU(), nn.Conv2d(48, 12, 1), nn.BatchNorm2d(12), nn.SiLU()]
    return nn.Sequential(*layers)


def parts_and_price(model, image_shape, batch, memory, prices, rounded=math.ceil, what="peak", there=True):
    """The plan that `check_plan` wants, or with a mistake in it."""
    for parts in range(1, batch + 1):
        images = max(1, rounded(batch / parts))
        gradients = sum(p.nbytes for p in model.parameters()) if there and parts > 1 else 0
        for price in prices:
            step = predict_memory(model, (images, *image_shape), max_cost=price)
            if gradients + getattr(step, what) <= memory:
                return parts, price
    return None


def check_plan(answer) -> str:
    """Chapter 9: (parts, price) from (model, image_shape, batch, memory, prices)."""
    model, shape, prices, where = small_network().float(), (3, 12, 12), (40, 27, 0, 12), "exercise 1: "
    step = {(n, p): predict_memory(model, (n, *shape), max_cost=p) for n in (3, 4, 10) for p in prices}
    gradients = sum(p.nbytes for p in model.parameters())
    for batch, memory in ((10, step[10, 0].peak), (10, step[10, 12].peak), (10, step[10, 27].peak),
                          (10, gradients + step[4, 12].peak), (10, step[4, 12].peak),
                          (10, step[10, 40].forward)):  # fmt: skip
        case = model, shape, batch, memory, prices
        got, want = answer(*case), parts_and_price(*case[:4], sorted(prices))
        if got is None:
            return where + "not attempted yet"
        if not isinstance(got, tuple) or len(got) != 2:
            return where + f"return a tuple, (parts, price), got {got!r}"
        if got == want:
            continue
        mistakes = {
            "the largest part has more images: round up": {"rounded": math.floor},
            "at the end of forward it fits, but the peak must": {"what": "forward"},
            "the gradients of the parts before are there, too": {"there": False},
        }
        for words, how in mistakes.items():
            if got == parts_and_price(*case[:4], sorted(prices), **how):
                return where + words
        said = "" if got[0] != want[0] else ": there is a lower price that fits"
        return where + f"a batch of {batch} in {memory:,} bytes: it is {want}, got {got}{said}"
    return where + "right"


def gradients_and_memory(forward: Callable[[], Tensor], model: nn.Module) -> tuple[list[Tensor], int, int]:
    """Gradients of the sum of what ``forward`` returns; bytes held at the end of it, and at the peak."""
    model.zero_grad()
    with MemoryTrace() as trace:
        out = forward()
        trace.mark("held")
        out.sum().backward()
    return [p.grad for p in model.parameters()], trace.marks["held"], trace.tensor_peak


def check_lean(lean) -> str:
    """Chapter 9: a subclass that computes what its base does, and saves little under `remat`."""
    where, (base, *_), x = "exercise 2: ", lean.__bases__, torch.randn(6, 3, 16, 16)
    model = base()
    ours = lean()
    ours.load_state_dict(model.state_dict())
    if ours(x) is None:
        return where + "not attempted yet"
    want, got = model(x), ours(x)
    if not isinstance(got, Tensor) or got.shape != want.shape or not torch.allclose(got, want, atol=1e-5):
        return where + "forward returns other values than before"
    grads, plain, _ = gradients_and_memory(lambda: model(x), model)
    with remat() as record:
        mine, held, _ = gradients_and_memory(lambda: ours(x), ours)
    if not all(torch.allclose(g, h, rtol=1e-3, atol=1e-4) for g, h in zip(mine, grads, strict=True)):
        return where + "forward is right, but its gradients are others; is something detached?"
    if held > 0.6 * plain:
        large = sum(row.recipe == "given" and row.nbytes > x.nbytes for row in record.rows)
        why = (
            "a large value is still given: look up whose it is"
            if large
            else "no large value is given any more"
        )
        return where + f"{held / plain:.2f} of plain PyTorch's bytes are held; {why}"
    return where + "right"


def accumulated(model, images, labels, parts: int, weighted: bool = True, context=nullcontext) -> None:
    """Gradients of the mean over all images, part by part; or of the parts' means."""
    model.zero_grad()
    for x, wanted in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        share = len(x) / len(images) if weighted else 1 / parts
        with context():
            loss = F.cross_entropy(model(x), wanted) * share
        loss.backward()


def check_accumulate(answer) -> str:
    """Chapter 9: gradients over parts, each under `remat`, from (model, images, labels, parts, max_cost)."""
    where, parts, batch = "exercise 3: ", 3, 10
    layers = [m for c in (3, 8, 8, 8) for m in (nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    images, labels = torch.randn(batch, 3, 16, 16).double(), torch.randint(8, (batch,))
    peaks, grads = {}, {}
    ways = {
        "answer": lambda: answer(model, images, labels, parts, 100),
        "plain": lambda: accumulated(model, images, labels, parts),
        "unweighted": lambda: accumulated(model, images, labels, parts, weighted=False),
        "remat": lambda: accumulated(model, images, labels, parts, context=lambda: remat(100)),
    }
    for name, way in ways.items():
        model.zero_grad()
        with MemoryTrace() as trace:
            way()
        peaks[name], grads[name] = trace.tensor_peak, [p.grad for p in model.parameters()]
        if None in grads[name]:
            return where + "not attempted yet"
        moved = model[1].num_batches_tracked.item()
        model[1].num_batches_tracked.zero_()
        if moved != parts:
            return where + f"forward ran {moved} times, and there are {parts} parts"

    def apart(other: str) -> float:
        pairs = zip(grads["answer"], grads[other], strict=True)
        return max(((g - h).norm() / h.norm().clamp_min(1e-3)).item() for g, h in pairs)

    if apart("unweighted") < 1e-8:
        return (
            where + "the mean of the parts' means is not the mean over all images: the last part is smaller"
        )
    if apart("plain") > 1e-8:
        factor = (grads["answer"][0].norm() / grads["plain"][0].norm()).item()
        return where + f"the gradients are wrong, {factor:.2f} times as long as they should be"
    if peaks["answer"] > 1.05 * peaks["remat"]:
        if abs(peaks["answer"] - peaks["plain"]) < 0.02 * peaks["plain"]:
            return where + "right gradients, but as much is held as in plain PyTorch; is forward under remat?"
        return where + "right gradients, but more than one part is held; call backward for each"
    return where + "right"


# Chapter 10 ----------------------------------------------------------------------------------------------


def check_forward(answer) -> str:
    """``answer(x, w, gamma, beta, eps)``: z of a pointwise convolution and batch norm, by one convolution."""
    shapes = ((3, 4, 5, 7), (6, 4, 1, 1), (6,), (6,))
    x, w, gamma, beta = (torch.randn(s).double() for s in shapes)
    x, calls, real = 3 * x + torch.randn(1, 4, 1, 1).double(), [], F.conv2d
    try:
        F.conv2d = lambda *args, **options: calls.append(args[0].shape) or real(*args, **options)
        got = answer(x, w, gamma, beta, 1e-5)
    finally:
        F.conv2d = real
    y = F.conv2d(x, w)
    want = F.batch_norm(y, None, None, gamma, beta, training=True, eps=1e-5)
    mean, var = (per_channel(t) for t in batch_stats(y))
    scale = per_channel(gamma) / (var + 1e-5).sqrt()
    mistakes = {
        "the mean is still in z: centre x, or put -W x_mean into the bias": want + scale * mean,
        "beta is missing": want - per_channel(beta),
        "R sums over the pixels; the variance is their mean: divide by m": (want - per_channel(beta))
        * ((var + 1e-5) / (var * len(y) * 35 + 1e-5)).sqrt()
        + per_channel(beta),
    }
    wrong = hint(1, "z", got, want, mistakes)
    if wrong:
        return wrong
    if len(calls) != 1:
        return f"exercise 1: z is right, but call F.conv2d once; you call it {len(calls)} times"
    return "exercise 1: right"


def check_slabs(answer) -> str:
    """``answer(dz, x, slab_size)``: Σ dz, G and R, with no tensor of x's size on the way."""
    x = torch.randn(7, 4, 9, 8).double() + 3 * torch.randn(7, 4, 1, 1).double()  # each image has its own mean
    dz, size = torch.randn(7, 6, 9, 8).double(), 2

    def sums(x, *about):
        parts = [x_i - a for x_i, a in zip(x.split(size), about, strict=True)]
        return [
            sum(torch.einsum("nohw,nchw->oc", of, x_i) for of, x_i in zip(left, parts, strict=True))
            for left in (dz.to(x.dtype).split(size), parts)
        ]

    mean = per_channel(x.mean(CHANNELS))
    first, *_ = own = [per_channel(t.mean(CHANNELS)) for t in x.split(size)]
    with MemoryTrace() as trace:
        got = answer(dz, x, size)
    wrong = hint_tuple(2, "sum_dz, G, R", got)
    names, want = ("sum_dz", "G", "R"), (dz.sum(CHANNELS), *sums(x, *[mean] * 4))
    mistakes = {
        "each slab is centred by its own mean, and what that loses is not added back": sums(x, *own),
        "what was subtracted is not yet the batch's mean; correct it with δ": sums(x, *[first] * 4),
        "x is not centred": sums(x, *[torch.zeros_like(mean)] * 4),
    }
    for i, name in enumerate(names):
        seen = {words: values[i - 1] for words, values in mistakes.items()} if i else {}
        seen = {f"{name}: {words}": value for words, value in seen.items()}
        wrong = wrong or hint(2, name, got[i], want[i], seen)
    if wrong:
        return wrong
    far = (x + 1000).float()
    exact = sums(far.double(), *[per_channel(far.double().mean(CHANNELS))] * 4)
    for name, g, h in zip(names[1:], answer(dz.float(), far, size)[1:], exact, strict=True):
        if (g - h).norm() > 1e-3 * h.norm():
            return f"exercise 2: right in float64, but {name} loses its digits in float32, far from 0"
    levels = [0] + [held for _, held in trace.timeline]
    if max(b - a for a, b in itertools.pairwise(levels)) >= x.nbytes:
        return "exercise 2: right sums, but a tensor of x's size was made on the way"
    return "exercise 2: right"


def check_instance_norm(answer) -> str:
    """``answer(dz, x, w, gamma, var, eps)``: gradients of a pointwise convolution, then instance norm."""
    n, c_in, c_out = 5, 4, 16
    x = torch.randn(n, c_in, 9, 8).double() + 3 * torch.randn(n, c_in, 1, 1).double()
    shapes = ((c_out, c_in, 1, 1), (c_out,), (c_out,))
    leaves = [t.requires_grad_() for t in (x, *(torch.randn(s).double() for s in shapes))]
    y = F.conv2d(*leaves[:2])
    z = F.instance_norm(y, None, None, *leaves[2:], eps=1e-5)
    dz, var = torch.randn_like(z), y.detach().var((2, 3), correction=0)
    with MemoryTrace() as trace:
        got = answer(dz, *(t.detach() for t in leaves[:3]), var, 1e-5)
    if got is None:
        return "exercise 3: not attempted yet"
    want, why = torch.autograd.grad(z, leaves, dz), {}
    why["dbeta"] = "beta is one vector for all images: sum over them"
    why["dgamma"] = "each image has its own mean of x and its own sigma; sum over the images last"
    why["dw"] = "the κ belong to an image and a channel; m is the pixels of one image"
    why["dx"] = "the matrices of its two products differ from image to image"
    for name, g, h in reversed(list(zip(("dx", "dw", "dgamma", "dbeta"), got, want, strict=True))):
        if g.shape != h.shape:
            return f"exercise 3: {name} must have shape {tuple(h.shape)}, got {tuple(g.shape)}"
        if not torch.allclose(g, h):
            return f"exercise 3: {name} is wrong; {why[name]}"
    levels = [0] + [held for _, held in trace.timeline]
    if max(b - a for a, b in itertools.pairwise(levels)) >= dz.nbytes:
        return "exercise 3: right gradients, but a tensor of y's size was made on the way"
    return "exercise 3: right"
