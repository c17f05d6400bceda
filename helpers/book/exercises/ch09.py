"""The checkers of chapter 9."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.memory import MemoryTrace
from helpers.predict import predict_memory
from helpers.remat import remat


def small_network() -> nn.Sequential:
    """As the price rises, its peak falls at first, and then is higher than at 0."""
    wide, depthwise = nn.Conv2d(12, 48, 1), nn.Conv2d(48, 48, 3, padding=1, groups=48)
    layers = [
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.SiLU(),
        wide,
        nn.BatchNorm2d(48),
        nn.SiLU(),
    ]
    layers += [depthwise, nn.BatchNorm2d(48), nn.SiLU(), nn.Conv2d(48, 12, 1), nn.BatchNorm2d(12), nn.SiLU()]
    return nn.Sequential(*layers)


def parts_and_price(model, image_shape, batch, memory, prices, rounded=math.ceil, what="peak", there=True):
    """The plan that `check_plan` wants, or with a mistake in it."""
    for parts in range(1, batch + 1):
        images = max(1, rounded(batch / parts))
        gradients = sum(p.nbytes for p in model.parameters()) if there and parts > 1 else 0
        for price in prices:
            step = predict_memory(model, (images, *image_shape), max_cost=price)
            if gradients + getattr(step, what) <= memory:
                return parts, price
    return None


def check_plan(answer) -> str:
    """Chapter 9: (parts, price) from (model, image_shape, batch, memory, prices)."""
    model, shape, prices, where = small_network().float(), (3, 12, 12), (40, 27, 0, 12), "exercise 1: "
    step = {(n, p): predict_memory(model, (n, *shape), max_cost=p) for n in (3, 4, 10) for p in prices}
    gradients = sum(p.nbytes for p in model.parameters())
    for batch, memory in ((10, step[10, 0].peak), (10, step[10, 12].peak), (10, step[10, 27].peak),
                          (10, gradients + step[4, 12].peak), (10, step[4, 12].peak),
                          (10, step[10, 40].forward)):  # fmt: skip
        case = model, shape, batch, memory, prices
        got, want = answer(*case), parts_and_price(*case[:4], sorted(prices))
        if got is None:
            return where + "not attempted yet"
        if not isinstance(got, tuple) or len(got) != 2:
            return where + f"return a tuple, (parts, price), got {got!r}"
        if got == want:
            continue
        mistakes = {
            "the largest part has more images: round up": {"rounded": math.floor},
            "at the end of forward it fits, but the peak must": {"what": "forward"},
            "the gradients of the parts before are there, too": {"there": False},
        }
        for words, how in mistakes.items():
            if got == parts_and_price(*case[:4], sorted(prices), **how):
                return where + words
        said = "" if got[0] != want[0] else ": there is a lower price that fits"
        return where + f"a batch of {batch} in {memory:,} bytes: it is {want}, got {got}{said}"
    return where + "right"


def gradients_and_memory(forward: Callable[[], Tensor], model: nn.Module) -> tuple[list[Tensor], int, int]:
    """Gradients of the sum of what ``forward`` returns; bytes held at the end of it, and at the peak."""
    model.zero_grad()
    with MemoryTrace() as trace:
        out = forward()
        trace.mark("held")
        out.sum().backward()
    return [p.grad for p in model.parameters()], trace.marks["held"], trace.tensor_peak


def check_lean(lean) -> str:
    """Chapter 9: a subclass that computes what its base does, and saves little under `remat`."""
    where, (base, *_), x = "exercise 2: ", lean.__bases__, torch.randn(6, 3, 16, 16)
    model = base()
    ours = lean()
    ours.load_state_dict(model.state_dict())
    if ours(x) is None:
        return where + "not attempted yet"
    want, got = model(x), ours(x)
    if not isinstance(got, Tensor) or got.shape != want.shape or not torch.allclose(got, want, atol=1e-5):
        return where + "forward returns other values than before"
    grads, plain, _ = gradients_and_memory(lambda: model(x), model)
    with remat() as record:
        mine, held, _ = gradients_and_memory(lambda: ours(x), ours)
    if not all(torch.allclose(g, h, rtol=1e-3, atol=1e-4) for g, h in zip(mine, grads, strict=True)):
        return where + "forward is right, but its gradients are others; is something detached?"
    if held > 0.6 * plain:
        large = sum(row.recipe == "given" and row.nbytes > x.nbytes for row in record.rows)
        why = (
            "a large value is still given: look up whose it is"
            if large
            else "no large value is given any more"
        )
        return where + f"{held / plain:.2f} of plain PyTorch's bytes are held; {why}"
    return where + "right"


def accumulated(model, images, labels, parts: int, weighted: bool = True, context=nullcontext) -> None:
    """Gradients of the mean over all images, part by part; or of the parts' means."""
    model.zero_grad()
    for x, wanted in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        share = len(x) / len(images) if weighted else 1 / parts
        with context():
            loss = F.cross_entropy(model(x), wanted) * share
        loss.backward()


def check_accumulate(answer) -> str:
    """Chapter 9: gradients over parts, each under `remat`, from (model, images, labels, parts, max_cost)."""
    where, parts, batch = "exercise 3: ", 3, 10
    layers = [m for c in (3, 8, 8, 8) for m in (nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    images, labels = torch.randn(batch, 3, 16, 16).double(), torch.randint(8, (batch,))
    peaks, grads = {}, {}
    ways = {
        "answer": lambda: answer(model, images, labels, parts, 100),
        "plain": lambda: accumulated(model, images, labels, parts),
        "unweighted": lambda: accumulated(model, images, labels, parts, weighted=False),
        "remat": lambda: accumulated(model, images, labels, parts, context=lambda: remat(100)),
    }
    for name, way in ways.items():
        model.zero_grad()
        with MemoryTrace() as trace:
            way()
        peaks[name], grads[name] = trace.tensor_peak, [p.grad for p in model.parameters()]
        if None in grads[name]:
            return where + "not attempted yet"
        moved = model[1].num_batches_tracked.item()
        model[1].num_batches_tracked.zero_()
        if moved != parts:
            return where + f"forward ran {moved} times, and there are {parts} parts"

    def apart(other: str) -> float:
        pairs = zip(grads["answer"], grads[other], strict=True)
        return max(((g - h).norm() / h.norm().clamp_min(1e-3)).item() for g, h in pairs)

    if apart("unweighted") < 1e-8:
        return (
            where + "the mean of the parts' means is not the mean over all images: the last part is smaller"
        )
    if apart("plain") > 1e-8:
        factor = (grads["answer"][0].norm() / grads["plain"][0].norm()).item()
        return where + f"the gradients are wrong, {factor:.2f} times as long as they should be"
    if peaks["answer"] > 1.05 * peaks["remat"]:
        if abs(peaks["answer"] - peaks["plain"]) < 0.02 * peaks["plain"]:
            return where + "right gradients, but as much is held as in plain PyTorch; is forward under remat?"
        return where + "right gradients, but more than one part is held; call backward for each"
    return where + "right"
