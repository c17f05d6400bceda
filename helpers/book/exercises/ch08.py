"""The checkers of chapter 8."""

from bisect import bisect_left

import torch
from torch import nn

from helpers import remat
from helpers.book.exercises import attempted, compare, exercise, numbers, require


def kept_values(layers: list[nn.Conv2d], max_cost: float) -> list[str]:
    """What `remat` keeps of convolutions with a norm and ReLU each, but for the input: y1, a1, y2, ..."""
    stack = [m for conv in layers for m in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())]
    with remat(max_cost) as record:
        nn.Sequential(*stack)(torch.randn(2, layers[0].in_channels, 8, 8))
    names = [f"{letter}{i + 1}" for i in range(len(layers)) for letter in "ya"]
    rows = [row for row in record.rows if row.recipe != "given"]
    return [name for name, row in zip(names, rows, strict=True) if row.kept]


def blocks(work, max_cost, after=lambda since, p: 0) -> list[int]:
    """The kept blocks if the count of multiplications goes on ``after`` a kept one from what this returns."""
    since, kept = 0, []
    for i, p in enumerate(work, 1):
        since += p
        if since > max_cost:
            since, kept = after(since, p), [*kept, i]
    return kept


@exercise(1)
def check_chain(answer):
    """The blocks of a chain whose convolution's output is kept, from (work, max_cost)."""
    for kernels, max_cost in (([3, 1, 1, 5, 1], 150), ([1, 1, 3, 1, 1], 16), ([3, 3, 3, 3], 144)):
        work = [16 * k * k for k in kernels]
        kept = kept_values([nn.Conv2d(16, 16, k, padding=k // 2) for k in kernels], max_cost)
        want, alone = [int(name[1:]) for name in kept], [i for i, p in enumerate(work, 1) if p > max_cost]
        mistakes = {
            "a cost equal to max_cost is affordable": blocks(work, max_cost - 1),
            "after a kept y the count starts at 0": blocks(work, max_cost, lambda since, p: since),
            "a kept y costs nothing itself": blocks(work, max_cost, lambda since, p: p),
            "blocks count from 1": [i - 1 for i in want],
            "what is not kept on the way must be paid for, too": alone,
        }
        note = f"work {work}, max_cost {max_cost}"
        compare("the blocks", numbers(answer(work, max_cost)), want, mistakes, note)


@exercise(2)
def check_only_input(answer):
    """The least price at which three convolutions keep their input alone."""
    cases = (16, 4, 16, 1), (16, 4, 16, 2), (7, 8, 7, 2), (8, 8, 3, 1), (4, 8, 4, 1)
    for c_in, width, c_out, stride in cases:
        (got,) = numbers([attempted(answer(c_in, width, c_out, stride))])
        require(isinstance(got, int) and got >= 0, f"return an integer, at least 0, got {got}")
        layers = nn.Conv2d(c_in, width, 1), nn.Conv2d(width, width, 3, stride, 1), nn.Conv2d(width, c_out, 1)
        case = f"{c_in} channels in, {width} inside, {c_out} out, stride {stride}; at max_cost {got}"
        kept = ", ".join(kept_values(layers, got))
        require(not kept, f"{case} this is still kept: {kept}. What does it cost, counted from the input?")
        require(kept_values(layers, got - 1), f"{case} nothing is kept, but a lower price is enough")


@exercise(3)
def check_fooled(answer):
    """Peaks at the prices 0 to 7 for which bisection does not find the smallest that fits."""
    for memory in (10, 6400):
        peaks = numbers(answer(memory))
        require(len(peaks) == 8, f"return eight peaks, got {len(peaks)}")
        require(min(peaks) <= memory, "no price fits, so bisection is right to find none")
        found = bisect_left([peak <= memory for peak in peaks], True)
        require(found == 8, f"bisection finds price {found}; make it find none although one fits")
