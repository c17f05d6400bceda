"""The exercises' checkers, a file for each chapter: each says in one line whether an answer is right.

A wrong answer is told what looks wrong; `helpers/tests/book/wrong_answers.py` holds mistakes that the
checkers must tell apart. Here is what they share.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def grads(function, inputs, dy, **options):
    """Autograd's gradients of ``function(*inputs, **options)``."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves, **options), leaves, dy)
