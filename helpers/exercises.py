"""The exercises' checkers: each says in one line whether an answer is right and, if not, what looks wrong.

A reader's cell calls them; `helpers/tests/wrong_answers.py` holds answers that they must tell apart.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hint(number: int, name: str, got, want: Tensor, mistakes: dict[str, Tensor] | None = None) -> str | None:
    """What is wrong with ``got``, which should equal ``want``; None if nothing is.

    Args:
        number: the exercise's.
        name: what ``got`` is called on the page.
        mistakes: what to say -> the values that this mistake gives.
    """
    where = f"exercise {number}: "
    if got is None:
        return where + "not attempted yet"
    if not isinstance(got, Tensor):
        return where + f"{name} must be a tensor, got {type(got).__name__}"
    if got.shape != want.shape:
        return where + f"{name} must have shape {tuple(want.shape)}, got {tuple(got.shape)}"
    if torch.allclose(got, want):
        return None
    for words, wrong in (mistakes or {}).items():
        if torch.allclose(got, wrong):
            return where + words
    return where + f"{name} has the right shape, but wrong values"


# Chapter 1 -----------------------------------------------------------------------------------------------


# Chapter 2 -----------------------------------------------------------------------------------------------


# Chapter 3 -----------------------------------------------------------------------------------------------


# Chapter 4 -----------------------------------------------------------------------------------------------


# Chapter 5 -----------------------------------------------------------------------------------------------


# Chapter 6 -----------------------------------------------------------------------------------------------


# Chapter 7 -----------------------------------------------------------------------------------------------


# Chapter 8 -----------------------------------------------------------------------------------------------
