"""The checkers of chapter 8."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from helpers.remat import remat


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
