"""The checkers of chapter 9."""

import functools
import math
from contextlib import nullcontext

import torch
from torch import nn

from helpers import predict_memory, remat
from helpers.book.exercises import attempted, compare, exercise, require
from helpers.memory import MemoryTrace


def network(*convolutions) -> list[nn.Module]:
    return [m for c in convolutions for m in (c, nn.BatchNorm2d(c.out_channels), nn.SiLU())]


@exercise(1)
def check_plan(answer):
    """(parts, price) from (model, image_shape, batch, memory, prices)."""
    # As the price rises, this network's peak falls at first, and then is higher than at 0.
    first, depthwise = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(48, 48, 3, padding=1, groups=48)
    model = nn.Sequential(*network(first, nn.Conv2d(12, 48, 1), depthwise, nn.Conv2d(48, 12, 1))).float()
    shape, batch, prices = (3, 12, 12), 7, (40, 12, 0)
    gradients = sum(p.nbytes for p in model.parameters())

    @functools.cache
    def step(images, price):
        return predict_memory(model, (images, *shape), max_cost=price)

    def plan(memory, rounded=math.ceil, what="peak", gradients=gradients):
        """What is wanted, or what a mistake gives."""
        for parts in range(1, batch + 1):
            for price in sorted(prices):
                part = getattr(step(max(1, rounded(batch / parts)), price), what)
                if part + (gradients if parts > 1 else 0) <= memory:
                    return parts, price

    tight = step(4, 12).peak
    for memory in (step(7, 0).peak, gradients + tight, tight, step(7, 0).forward):
        got, want = attempted(answer(model, shape, batch, memory, prices)), plan(memory)
        right_form = isinstance(got, tuple) and len(got) == 2
        require(right_form, f"return a tuple, (parts, price), got {got!r}")
        mistakes = {
            "the largest part has more images: round up": plan(memory, rounded=math.floor),
            "at the end of forward it fits, but the peak must": plan(memory, what="forward"),
            "the gradients of the parts before are there, too": plan(memory, gradients=0),
            f"there is a lower price that fits, {want[1]}": (want[0], got[1]),
        }
        compare("(parts, price)", got, want, mistakes, f"a batch of {batch} in {memory:,} bytes")


@exercise(2)
def check_lean(lean):
    """A subclass that computes what its base does, and saves little under `remat`."""

    def step(model, context):
        with MemoryTrace() as trace:
            with context as record:
                out = attempted(model(x))
            trace.mark("held")
            out.sum().backward()
        return out, trace.marks["held"], [p.grad for p in model.parameters()], record

    base, ours, x = lean.__bases__[0](), lean(), torch.randn(6, 3, 16, 16)
    ours.load_state_dict(base.state_dict())
    want, plain, right, _ = step(base, nullcontext())
    got, held, mine, record = step(ours, remat())
    alike = got.shape == want.shape and torch.allclose(got, want, atol=1e-5)
    require(alike, "forward returns other values than before")
    close = all(torch.allclose(g, h, rtol=1e-3, atol=1e-4) for g, h in zip(mine, right, strict=True))
    require(close, "forward is right, but its gradients are others; is something detached?")
    large = any(row.recipe == "given" and row.nbytes > x.nbytes for row in record.rows)
    why = "a large value is still given: look up whose it is" if large else "no large value is given any more"
    require(held <= 0.6 * plain, f"{held / plain:.2f} of plain PyTorch's bytes are held; {why}")
