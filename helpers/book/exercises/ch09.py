"""The checkers of chapter 9."""

import functools
import math
from contextlib import nullcontext

import torch
from torch import nn

from helpers import predict_memory, remat
from helpers.book.exercises import compare, compare_nets, exercise, require


@exercise(1)
def check_plan(answer):
    """(parts, price) from (model, image_shape, batch, memory, prices)."""
    # As the price rises, this network's peak falls at first, and then it is as high as at 0.
    widen, depthwise = nn.Conv2d(12, 48, 1), nn.Conv2d(48, 48, 3, padding=1, groups=48)
    convolutions = nn.Conv2d(3, 12, 3, padding=1), widen, depthwise, nn.Conv2d(48, 12, 1)
    blocks = [(conv, nn.BatchNorm2d(conv.out_channels), nn.SiLU()) for conv in convolutions]
    model, shape, batch, prices = nn.Sequential(*sum(blocks, ())), (3, 12, 12), 7, (40, 12, 80, 0)
    gradients = sum(p.nbytes for p in model.parameters())

    @functools.cache
    def peak(images, price):
        return predict_memory(model, (images, *shape), max_cost=price).peak

    def plan(memory, rounded=math.ceil, there=gradients, alone=0, order=sorted, parts_first=True):
        pairs = [(k, p) for k in range(1, batch + 1) for p in order(prices)]
        pairs = pairs if parts_first else sorted(pairs, key=lambda pair: pair[1])
        held = ((k, p, there if k > 1 else alone) for k, p in pairs)
        return next(((k, p) for k, p, more in held if more + peak(rounded(batch / k), p) <= memory), None)

    def by_peak(prices):
        return sorted(prices, key=functools.partial(peak, batch))

    two_parts = gradients + peak(4, 12)
    for memory in (
        2 * peak(7, 0),
        peak(7, 0),
        two_parts,
        two_parts - 1,
        peak(4, 12),
        gradients + peak(3, 12) - 1,
    ):
        want, got = plan(memory), answer(model, shape, batch, memory, [*prices])
        got = tuple(got) if isinstance(got, list) else got
        note = f"{batch} images, {memory:,} bytes, prices {prices}"
        mistakes = {
            "try the prices from the lowest": plan(memory, order=list),
            "round up: 7 images in 2 parts are 4 and 3": plan(memory, rounded=int),
            "with more than one part, there are the gradients, too, in bytes": plan(memory, there=0),
            "what takes exactly `memory` fits": plan(memory - 1),
            "one part alone has no gradients from before": plan(memory, alone=gradients),
            "fewest parts come first, then the lowest price": plan(memory, parts_first=False),
            "the pair is swapped: parts come first": want[::-1],
        }
        if memory > peak(7, 0):  # else other mistakes give the same
            words = "take the lowest price that fits, not the one with the least peak"
            mistakes[words] = plan(memory, order=by_peak)
        wrong = [words for words, value in mistakes.items() if got == value != want]
        require(not wrong, f"{', or '.join(wrong)} ({note})")
        compare("parts, price", got, want, note=note)


@exercise(2)
def check_lean(lean):
    """A subclass that computes what its base does, and saves little under `remat`."""
    base, x = lean.__bases__[0](), torch.randn(6, 3, 16, 16)
    traces = compare_nets(base, lean(), x, (nullcontext, remat), atol=1e-5)
    plain, held = (trace.marks["end of forward"] for trace in traces)
    share = f"{held / plain:.2f} of plain PyTorch's bytes are held"
    require(held <= 0.6 * plain, f"{share}; which large value is kept that no convolution made?")
