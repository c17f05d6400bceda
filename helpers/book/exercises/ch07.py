"""The checkers of chapter 7."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.book.exercises import hint, hint_tuple
from helpers.memory import MemoryTrace
from helpers.remat import remat


def check_index(answer) -> str:
    """Chapter 7: a max-pool's index from (offsets, width, kernel, stride, padding)."""
    for kernel, stride, padding, size in ((2, 2, 0, (6, 9)), (3, 2, 1, (7, 11)), (5, 1, 2, (8, 90))):
        x = torch.randn(2, 3, *size)
        _, index = F.max_pool2d(x, kernel, stride, padding, return_indices=True)
        i, j = torch.arange(index.shape[2])[:, None], torch.arange(index.shape[3])
        row, column = stride * i - padding, stride * j - padding
        r, q = index // size[1] - row, index % size[1] - column
        offsets = (r * kernel + q).to(torch.uint8)
        got = answer(offsets.clone(), size[1], kernel, stride, padding)
        if got is None:
            return "exercise 1: not attempted yet"
        if isinstance(got, Tensor) and got.dtype != torch.int64:
            return f"exercise 1: the index must be int64, as PyTorch's backward wants it; got {got.dtype}"
        mistakes = {
            "a byte overflows: r times the width must not be computed in uint8": row * size[1]
            + (r.to(torch.uint8) * size[1]).long()
            + column
            + q,
            "rows and columns of the window have changed places": (row + q) * size[1] + column + r,
            "subtract the padding: the first window begins outside of the image": index
            + padding * size[1]
            + padding,
            "the stride is missing: windows lie that far apart": (i - padding + r) * size[1]
            + (j - padding + q),
            "a row of the image has `width` pixels, not `kernel`": (row + r) * kernel + column + q,
        }
        if wrong := hint(1, "the index", got, index, mistakes):
            return f"{wrong} (kernel {kernel}, stride {stride}, padding {padding}, width {size[1]})"
    return "exercise 1: right"


class _Bottleneck(nn.Module):
    """A dense block of layers with bottlenecks."""

    def __init__(self, n: int, c0: int, k: int, b: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for c in range(c0, c0 + n * k, k):
            narrow = nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, b * k, 1, bias=False)
            wide = nn.BatchNorm2d(b * k), nn.ReLU(), nn.Conv2d(b * k, k, 3, padding=1, bias=False)
            self.layers.append(nn.Sequential(*narrow, *wide))

    def forward(self, x):
        parts = [x]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)))
        return torch.cat(parts, 1).mean((2, 3))


def check_bottleneck(answer) -> str:
    """Chapter 7: channels held by a dense block with bottlenecks, (plain, recipes), from (n, c0, k, b)."""
    for n, c0, k, b in ((1, 8, 4, 2), (3, 8, 2, 4), (4, 6, 4, 3)):
        got = answer(n, c0, k, b)
        if wrong := hint_tuple(2, "plain, recipes", got):
            return wrong
        x, held = torch.randn(4, 3, 24, 24), []
        for context in (nullcontext, remat):
            first = nn.Conv2d(3, c0, 3, padding=1, bias=False)
            model = nn.Sequential(first, _Bottleneck(n, c0, k, b)).float()
            with MemoryTrace("cpu") as memory:
                with context():
                    out = model(x.float())
                memory.mark("end of forward")
            del out
            held.append(round(memory.marks["end of forward"] / (4 * 24 * 24 * 4)))
        case = f"n = {n}, c0 = {c0}, k = {k}, b = {b}"
        for name, mine, right in zip(("plain", "recipes"), got, held, strict=True):
            words = {
                right + k: "the last layer's output is read by nothing that needs it in backward",
                right - n * b * k: "the norm behind the 1x1 convolution keeps its input, too"
                if name == "recipes"
                else "each layer has two tensors between its convolutions that are kept",
                right - 2 * n * b * k: "the values between a layer's convolutions are missing",
                right + n * b * k: "the ReLU between the convolutions is made again"
                if name == "recipes"
                else "the output of a norm is kept by nobody",
            }
            if mine != right:
                why = words.get(mine, f"got {mine}, and it holds {right}")
                return f"exercise 2: {name}, {case}: {why}"
    return "exercise 2: right"


class _Recipe:
    """The page's: a value's parents, its tensor if it is kept, and else the function that makes it."""

    def __init__(self, parents=(), kept=None) -> None:
        self.parents, self.kept, self.make = parents, kept, None

    def tensor(self) -> Tensor:
        return self.make(*[p.tensor() for p in self.parents]) if self.kept is None else self.kept


def check_silu(function) -> str:
    """Chapter 7: ``function.apply(z, made)`` is F.silu, with a recipe in place of z."""
    leaf = torch.randn(4, 3, 40, 30).requires_grad_()
    source = _Recipe(kept=leaf.detach().clone())
    made, kept, dout = _Recipe([source]), leaf.detach().clone(), torch.randn_like(leaf)
    with MemoryTrace("cpu") as memory:
        z = leaf * 1
        a = function.apply(z, made)
        if a is None:
            return "exercise 3: not attempted yet"
        if not torch.equal(a, F.silu(kept)):
            return "exercise 3: forward must return F.silu(z), to the last bit"
        out = a * dout
        del z, a
        memory.mark("end of forward")
    if memory.marks["end of forward"] > 1.5 * out.nbytes:
        return "exercise 3: a tensor of image size is held until backward; hold the recipe that makes z"
    if made.make is None:
        return "exercise 3: made.make is missing: whoever needs a could not make it"
    if not torch.equal(made.tensor(), F.silu(kept)):
        return "exercise 3: made.make is called with z and must return a"
    if not torch.equal(source.kept, kept):
        return "exercise 3: made.make writes over its argument, which may be a kept tensor"
    (got,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    if not torch.equal(source.kept, kept):
        return "exercise 3: backward writes over z, which may be a kept tensor"

    def slope(z):
        s = z.sigmoid()
        return s * (1 + z * (1 - s))

    mistakes = {
        "that is a's slope at a: ctx must hold the recipe of z": dout * slope(F.silu(kept)),
        "the chain rule multiplies by da": slope(kept),
        "a product has two terms, and the second is missing": dout * kept.sigmoid(),
        "a product has two terms, and the first is missing": dout
        * kept
        * kept.sigmoid()
        * (1 - kept.sigmoid()),
    }
    return hint(3, "dz", got, dout * slope(kept), mistakes) or "exercise 3: right"


def check_dropout(function) -> str:
    """Chapter 7: ``function.apply(a, p)`` is dropout, without a mask that is kept."""
    leaf, p = (torch.rand(6, 4, 24, 20) + 0.5).requires_grad_(), 0.25
    torch.manual_seed(1)
    with MemoryTrace("cpu") as memory:
        out = function.apply(leaf, p)
        memory.mark("end of forward")
    if out is None:
        return "exercise 4: not attempted yet"
    k = out.detach() / leaf.detach()
    if not torch.allclose(k[k != 0], torch.tensor(1 / (1 - p), dtype=k.dtype)):
        return "exercise 4: what stays must be multiplied by 1 / (1 - p), so that the mean stays, too"
    if abs((k == 0).double().mean() - p) > 0.1:
        return f"exercise 4: a share p = {p} must go, but {(k == 0).double().mean():.2f} has gone"
    if torch.equal(function.apply(leaf, p), out):
        return "exercise 4: two calls drop the same places; draw a new seed in each forward"
    torch.manual_seed(1)
    if not torch.equal(function.apply(leaf, p), out):
        return "exercise 4: torch.manual_seed does not decide; draw the seed with torch's random numbers"
    if memory.marks["end of forward"] > 1.1 * out.nbytes:
        return "exercise 4: besides the output, a tensor of its size is kept; keep what makes the mask again"
    dout = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, leaf, dout)
    mistakes = {
        "the slope of a ∘ k is k: multiply dout by it": dout,
        "the factor 1 / (1 - p) is missing": dout * (k != 0),
        "that is not dout times forward's k; is it the same seed?": got,
    }
    return hint(4, "da", got, dout * k, mistakes) or "exercise 4: right"
