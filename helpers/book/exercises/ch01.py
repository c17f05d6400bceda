"""The checkers of chapter 1."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from helpers.memory import saved_by, saved_tensors, storage_address

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
