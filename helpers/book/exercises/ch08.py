"""The checkers of chapter 8."""

import math

import torch
from torch import nn

from helpers import remat
from helpers.book.exercises import attempted, compare, exercise, require


def kept_values(layers: list[nn.Conv2d], max_cost: float, size: int = 8) -> list[str]:
    """What `remat` keeps of convolutions with a norm and ReLU each, but for the input: y1, a1, y2, ..."""
    stack = [m for conv in layers for m in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())]
    with remat(max_cost) as record:
        nn.Sequential(*stack)(torch.randn(2, layers[0].in_channels, size, size))
    names = [f"{letter}{i + 1}" for i in range(len(layers)) for letter in "ya"]
    rows = [row for row in record.rows if row.recipe != "given"]
    return [name for name, row in zip(names, rows, strict=True) if row.kept]


@exercise(1)
def check_chain(answer):
    """The blocks of a chain whose convolution's output is kept, from (prices, max_cost)."""
    cases = (([1, 3, 1, 5], 150), ([1, 1, 3, 1, 1], 16), ([3, 3, 3, 3], 144), ([1, 3, 1, 1], 160))
    for kernels, max_cost in cases:
        prices = [16 * k * k for k in kernels]
        got = list(attempted(answer(prices, max_cost)))
        kept = kept_values([nn.Conv2d(16, 16, k, padding=k // 2) for k in kernels], max_cost)
        want, alone = [int(y[1:]) for y in kept], [i for i, p in enumerate(prices, 1) if p > max_cost]
        more = got if len(got) > len(want) else None
        mistakes = {
            "blocks count from 1": [i - 1 for i in want],
            "what is not kept on the way must be paid for, too": alone,
            "the way ends at what is kept, and a cost that is just max_cost can be paid": more,
        }
        compare("what remat keeps", got, want, mistakes, f"prices {prices}, max_cost {max_cost}: got {got}")


@exercise(2)
def check_only_input(answer):
    """The least price at which three convolutions keep their input alone."""
    for c_in, width, c_out, stride in ((16, 4, 16, 1), (16, 4, 16, 2), (8, 8, 4, 1), (6, 4, 8, 2)):
        got = attempted(answer(c_in, width, c_out, stride))
        require(isinstance(got, (int, float)) and got >= 1, f"return a number from 1 on, got {got!r}")
        layers = nn.Conv2d(c_in, width, 1), nn.Conv2d(width, width, 3, stride, 1), nn.Conv2d(width, c_out, 1)
        case = f"{c_in} channels in, {width} inside, {c_out} out, stride {stride}: at {got} "
        kept, larger = kept_values(layers, got), "; y1 has stride² times as many values as y2"
        why = {"y2": "the way to y2 begins at the input", "y3": "is y3's recipe cheaper where it is narrow?"}
        words = why.get("".join(kept[:1]), "count its price") + larger * (stride > 1 and "y2" in kept)
        require(not kept, f"{case}{', '.join(kept)} is still kept: {words}")
        cheaper = kept_values(layers, math.ceil(got) - 1)
        require(cheaper, case + "nothing else is kept, but neither is it at a lower price")


@exercise(3)
def check_fooled(answer):
    """Peaks at the prices 0 to 7 for which bisection does not find the smallest that fits."""
    for memory in (10, 64):
        peaks = attempted(answer(memory))
        require(isinstance(peaks, (list, tuple)) and len(peaks) == 8, "return a list of eight peaks")
        require(min(peaks) <= memory, "no price fits, so bisection is right to find none")
        low, high = 0, 8
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if peaks[middle] <= memory else (middle + 1, high)
        first = next(price for price, peak in enumerate(peaks) if peak <= memory)
        require(low != first, f"bisection finds price {low}, and that is the smallest that fits")
        require(low == 8, f"bisection finds {low}, not {first}; make it find none although one fits")
