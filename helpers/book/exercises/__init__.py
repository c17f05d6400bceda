"""The exercises' checkers, a file for each chapter. Each says in one line whether an answer is right.

A wrong answer is told what looks wrong; `helpers/tests/book/wrong_answers.py` holds mistakes that the
checkers must tell apart. Here is what they share.
"""

import functools
import math
from itertools import pairwise

import torch
from torch import Tensor

from helpers.memory import saved_by, storage_address

CHANNELS = (0, 2, 3)  # the dimensions that a per-channel sum runs over


class Wrong(Exception):
    """What to say about an answer that is not right."""


def exercise(number: int):
    """Make a checker of ``check(answer)``, which raises `Wrong`, or returns what to add to "right"."""

    def decorate(check):
        @functools.wraps(check)
        def verdict(answer) -> str:
            try:
                return f"exercise {number}: right{check(answer) or ''}"
            except Wrong as wrong:
                return f"exercise {number}: {wrong}"

        return verdict

    return decorate


def require(holds, words: str) -> None:
    if not holds:
        raise Wrong(words)


def attempted(got):
    """``got``, unless it is None, as in the gap on the page."""
    require(got is not None, "not attempted yet")
    return got


def same(got, want, rel: float) -> bool:
    if isinstance(want, Tensor):
        alike = isinstance(got, Tensor) and got.shape == want.shape and got.dtype == want.dtype
        return alike and torch.allclose(got, want)
    numbers = isinstance(want, (int, float)) and isinstance(got, (int, float))
    return math.isclose(got, want, rel_tol=rel) if numbers else got == want


def compare(name: str, got, want, mistakes=(), case: str = "", rel: float = 1e-9) -> None:
    """Raise `Wrong` unless ``got`` is ``want``: a tensor, a number within ``rel``, or anything else.

    ``mistakes`` maps what to say to the value that this mistake gives; ``case`` says what ``got`` is for.
    """
    if same(attempted(got), want, rel):
        return
    words = [said for said, wrong in dict(mistakes).items() if same(got, wrong, rel)]
    if not isinstance(want, Tensor):
        words += [f"{name} is {want}, got {got}"]
    elif not isinstance(got, Tensor):
        words += [f"{name} must be a tensor, got {type(got).__name__}"]
    else:
        facts = ("have shape", tuple(got.shape), tuple(want.shape)), ("be", got.dtype, want.dtype)
        words += [f"{name} must {verb} {w}, got {g}" for verb, g, w in facts if g != w]
    words += [f"{name} has the right shape, but wrong values"]
    raise Wrong(words[0] + (f" ({case})" if case else ""))


def compare_all(names: str, got, want, mistakes=(), case: str = "") -> None:
    """`compare` each of a tuple; ``names`` is as the exercise writes it, such as "dx, dw"."""
    attempted(got)
    require(isinstance(got, (tuple, list)) and len(got) == len(want), f"return a tuple, ({names})")
    for name, g, w in zip(names.split(", "), got, want, strict=True):
        compare(name, g, w, mistakes, case)


def grads(function, inputs, dy, **options):
    """Autograd's gradients of ``function(*inputs, **options)``."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves, **options), leaves, dy)


def compare_function(function, names: str, leaves, want, mistakes, free=(), forward: str = "") -> None:
    """Check a differentiable function: forward, what it keeps next to ``free``, and its gradients.

    ``forward`` is what to say where forward is wrong; ``mistakes(dout, got)`` maps words to gradients.
    """
    out, saved = saved_by(function, *leaves)
    compare("the output", out, want, {forward: out} if forward else ())
    free = [storage_address(t) for t in free]
    large = [t for t in saved if t.nbytes > out.numel() and storage_address(t) not in free]
    told = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in large)
    require(not large, f"the output is right, but more than a byte a value is kept for backward: {told}")
    dout = torch.randn_like(out)
    right, before = torch.autograd.grad(want, leaves, dout, True, materialize_grads=True), dout.clone()
    try:
        got = torch.autograd.grad(out, leaves, dout, allow_unused=True)
    except RuntimeError as reason:
        raise Wrong(f"backward fails: {reason}") from reason
    for name, grad in zip(names.split(", "), got, strict=True):
        require(grad is not None, f"{name} is None; an optimiser would pass that parameter over")
    require(torch.equal(dout, before), "the gradient that came in was overwritten")
    compare_all(names, got, right, mistakes(dout, got))


def largest_new(trace) -> int:
    """Bytes of the largest tensor that was made during a `MemoryTrace`."""
    return max(b - a for a, b in pairwise([0, *(held for _, held in trace.timeline)]))
