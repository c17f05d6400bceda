"""The checkers of chapter 7."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import DenseNet

from helpers import remat
from helpers.book.exercises import attempted, compare, compare_function, exercise, require
from helpers.memory import MemoryTrace


@exercise(1)
def check_bottleneck(answer):
    """Channels held by a dense block with bottlenecks, (plain, recipes), from (n, c0, k, b)."""
    for n, c0, k, b in ((1, 8, 4, 2), (3, 8, 2, 4), (4, 6, 4, 3)):
        held, inner, x = [], n * b * k, torch.randn(4, 3, 24, 24).float()
        for context in (nullcontext, remat):
            block = DenseNet(k, (n,), c0, b, num_classes=1).features.denseblock1
            model = nn.Sequential(nn.Conv2d(3, c0, 3, padding=1, bias=False), block).float()
            with MemoryTrace("cpu") as memory:
                with context():
                    out = model(x).mean((2, 3))
                memory.mark("end of forward")
            del out
            held.append(round(memory.marks["end of forward"] / x[:, :1].nbytes))
        got, case = attempted(answer(n, c0, k, b)), f"n={n}, c0={c0}, k={k}, b={b}"
        require(isinstance(got, tuple) and len(got) == 2, "return a tuple, (plain, recipes)")
        two = "each layer has two tensors between its convolutions that are kept"
        norm = "the norm behind the 1x1 convolution keeps its input, too"
        for name, mine, right, less, more in (
            ("plain", got[0], held[0], two, "no operation keeps the output of a norm"),
            ("recipes", got[1], held[1], norm, "the ReLU between the convolutions is recomputed"),
        ):
            mistakes = {
                "the last layer's output is read by nothing that needs it in backward": right + k,
                "the values between a layer's convolutions are missing": right - 2 * inner,
                less: right - inner,
                more: right + inner,
            }
            compare(name, mine, right, mistakes, case)


class Recipe:
    """The page's: a value's parents, its tensor if it is kept, and else the function that makes it."""

    def __init__(self, parents=(), kept=None) -> None:
        self.parents, self.kept, self.make = parents, kept, None

    def tensor(self):
        return self.make(*[p.tensor() for p in self.parents]) if self.kept is None else self.kept


@exercise(2)
def check_silu(function):
    """``function.apply(z, made)`` is F.silu, with a recipe in place of z."""
    leaf = torch.randn(4, 3, 40, 30, dtype=torch.float64, requires_grad=True)
    z, source = leaf.detach().clone(), Recipe(kept=leaf.detach().clone())
    made = Recipe([source])
    with MemoryTrace("cpu") as memory:
        a = attempted(function.apply(leaf * 1, made))
        require(torch.equal(a, F.silu(z)), "forward must return F.silu(z), to the last bit")
        out = a + 0
        del a
        memory.mark("end of forward")
    held = memory.marks["end of forward"] > 1.5 * out.nbytes
    require(not held, "a tensor of image size is held until backward; hold the recipe that makes z")
    require(made.make, "made.make is missing, so a cannot be recomputed")
    require(torch.equal(made.tensor(), F.silu(z)), "made.make is called with z and must return a")
    require(torch.equal(source.kept, z), "made.make writes over its argument, which may be a kept tensor")

    def slope(z):
        return z.sigmoid() * (1 + z * (1 - z.sigmoid()))

    def mistakes(da, got):
        require(torch.equal(source.kept, z), "backward writes over z, which may be a kept tensor")
        return {
            "that is a's slope at a: ctx must hold the recipe of z": da * slope(F.silu(z)),
            "the chain rule multiplies by da": slope(z),
            "a product has two terms, and the second is missing": da * z.sigmoid(),
            "a product has two terms, and the first is missing": da * (slope(z) - z.sigmoid()),
        }

    compare_function(lambda z: function.apply(z * 1, made), "dz", [leaf], F.silu(leaf), mistakes)


@exercise(3)
def check_dropout(function):
    """``function.apply(a, p)`` is dropout, without a mask that is kept."""
    leaf, p = (torch.rand(6, 4, 24, 20) + 0.5).requires_grad_(), 0.25
    torch.manual_seed(1)
    with MemoryTrace("cpu") as memory:
        out = attempted(function.apply(leaf, p))
        memory.mark("end of forward")
    k = out.detach() / leaf.detach()
    gone, scaled = (k == 0).double().mean(), torch.allclose(k[k != 0], torch.ones_like(k[k != 0]) / (1 - p))
    require(scaled, "what stays must be multiplied by 1 / (1 - p), so that the mean stays, too")
    require(abs(gone - p) < 0.1, f"a share p = {p} must go, but {gone:.2f} has gone")
    again = function.apply(leaf, p)
    require(not torch.equal(again, out), "two calls drop the same places; draw a new seed in each forward")
    torch.manual_seed(1)
    words = "torch.manual_seed does not decide; draw the seed with torch's random numbers"
    require(torch.equal(function.apply(leaf, p), out), words)
    words = "next to the output, a tensor of its size is kept; keep what the mask can be recomputed from"
    require(memory.marks["end of forward"] <= 1.1 * out.nbytes, words)

    def mistakes(da, got):
        another = "that is not dout times forward's k; is it the same seed?"
        return {"the slope of a ∘ k is k: multiply dout by it": da, another: got[0]}

    torch.manual_seed(1)
    compare_function(lambda a: function.apply(a, p), "da", [leaf], leaf * k, mistakes)
