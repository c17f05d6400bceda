"""The checkers of chapter 1."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from helpers.book.exercises import compare, exercise, require
from helpers.memory import saved_by, saved_tensors, storage_address

OPERATIONS = {
    "relu": (F.relu, "its slope is 1 or 0, and the output shows which"),
    "gelu": (F.gelu, "its slope is a formula in the input, which the output does not give back"),
    "tanh": (torch.tanh, "its slope is 1 - tanh², a formula in the output"),
    "square": (torch.square, "its slope is 2x, and the output has lost the sign of x"),
    "add one": (lambda x: x + 1, "its slope is 1, whatever x is"),
    "flatten": (lambda x: x.flatten(1), "no value is changed, so the gradient is only reshaped"),
    "average pooling": (lambda x: F.avg_pool2d(x, 2), "no value is needed, but PyTorch saves some even so"),
}


@exercise(1)
def check_saved(answers):
    """Name -> "input", "output" or "nothing", as autograd has it."""
    require(isinstance(answers, dict), f"answers must be a dict, got a {type(answers).__name__}")
    missing = sum(answers.get(name) is None for name in OPERATIONS)
    require(not missing, f"{missing} of {len(OPERATIONS)} not attempted yet")
    x, words = torch.randn(2, 3, 4, 6, requires_grad=True), ("input", "output", "nothing")
    for name, (function, why) in OPERATIONS.items():
        require(answers[name] in (*words, "both"), f"{name}: write one of {', '.join(words)}")
        output, saved = saved_by(function, x)
        places = {storage_address(output): "output", storage_address(x): "input"}  # flatten's are the same
        right = places[storage_address(saved[0])] if saved else "nothing"
        require(answers[name] == right, f'{name}: "{answers[name]}" is wrong; {why}')


@exercise(2)
def check_predict(answer):
    """Bytes that a chain of conv, norm, ReLU keeps, from (n, height, width, channels)."""
    for n, height, width, channels in ((3, 16, 12, [1, 4, 6, 2]), (2, 9, 11, [3, 5])):
        blocks = [(nn.Conv2d(c, d, 3), nn.BatchNorm2d(d), nn.ReLU()) for c, d in pairwise(channels)]
        chain, batch = nn.Sequential(*sum(blocks, ())), torch.randn(n, channels[0], height, width)
        sizes = {s.storage: s.nbytes for s in saved_tensors(chain, batch)[1] if len(s.shape) == 4}
        right = sum(sizes.values()) - batch.nbytes
        first, last = ((height - 2 * i) * (width - 2 * i) for i in (1, len(blocks)))  # pixels
        mistakes = {
            "the last ReLU keeps its output, too": right - 4 * n * channels[-1] * last,
            "each convolution cuts the border off, not the first alone": 8 * n * sum(channels[1:]) * first,
            "those are numbers; a float32 has 4 bytes": right // 4,
            "only half; batch norm keeps its input, and ReLU its output": right // 2,
            "three a block; batch norm's output is not kept: ReLU saves its own output": right * 3 // 2,
            "the batch existed before, so it is not new": right + batch.nbytes,
            "a 3×3 kernel without padding makes an image smaller": 8 * n * sum(channels[1:]) * height * width,
        }
        compare("bytes", answer(n, height, width, channels), right, mistakes, f"channels {channels}")
