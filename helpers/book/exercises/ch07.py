"""The checkers of chapter 7."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import DenseNet

from helpers import remat
from helpers.book.exercises import call, compare, compare_function, exercise, grads, require
from helpers.memory import MemoryTrace


@exercise(1)
def check_bottleneck(answer):
    """Channels held by a dense block with bottlenecks, (plain, recipes), from (n, c0, k, b)."""

    def channels(context, n, c0, k, b):
        block = DenseNet(k, (n,), c0, b, num_classes=1).features.denseblock1
        model, x = nn.Sequential(nn.Conv2d(3, c0, 3, padding=1, bias=False), block), torch.randn(4, 3, 24, 24)
        with context(), MemoryTrace() as trace:
            out = model(x).mean((2, 3))
        return round((trace.timeline[-1][1] - out.nbytes) / x[:, :1].nbytes)

    for n, c0, k, b in ((1, 11, 4, 3), (4, 7, 5, 2)):
        plain, recipes = want = channels(nullcontext, n, c0, k, b), channels(remat, n, c0, k, b)
        wide = n * c0 + n * (n - 1) // 2 * k  # the concatenations together
        mistakes = {
            "the pair is swapped: plain comes first": recipes,
            "plain: a concatenation and its ReLU are two tensors": plain - wide,
            "recipes: the block's input is kept, too": recipes - c0,
            "plain: the first layer reads c0 channels, the second c0 + k": plain + 2 * n * k,
            "plain: each layer has two tensors between its convolutions that are kept": plain - n * b * k,
            "recipes: the last layer's output is read by nothing that needs it in backward": recipes + k,
            "recipes: the norm behind the 1x1 convolution keeps its input, too": recipes - n * b * k,
        }
        compare("plain, recipes", answer(n, c0, k, b), want, mistakes, f"n={n}, c0={c0}, k={k}, b={b}")


class Recipe:
    """The page's: a value's parents, its tensor if it is kept, and else the function that makes it."""

    def __init__(self, parents=(), kept=None) -> None:
        self.parents, self.kept, self.make = parents, kept, None

    def tensor(self):
        return self.make(*[p.tensor() for p in self.parents]) if self.kept is None else self.kept


@exercise(2)
def check_silu(function):
    """``function.apply(z, made)`` is F.silu, with a recipe in place of z."""
    z = torch.randn(4, 3, 40, 30, dtype=torch.float64)
    source = Recipe(kept=z.clone())
    made = Recipe([source])

    def dz(da, at=z):
        return grads(F.silu, [at], da)[0]

    mistakes = {
        "that is a's slope at a: ctx must hold the recipe of z": lambda da: dz(da, F.silu(z)),
        "da is missing: by the chain rule, dz is da times the slope": lambda da: dz(torch.ones_like(da)),
    }
    norm = Recipe([source])
    norm.make = lambda z: z * 1
    for made.parents in ([norm], [source]):  # z is recomputed, and z is kept
        compare_function(lambda z: function.apply(z, made), F.silu, "dz", [z], mistakes, copies=True)
        require(torch.equal(source.kept, z), "backward has overwritten z, which may be a kept tensor")
    again = made.make and torch.equal(call(made.make, z), function.apply(z, made))
    require(again, "made.make, called with z, must return forward's output to the last bit")


@exercise(3)
def check_dropout(function):
    """``function.apply(a, p)`` is dropout, without a mask that is kept."""
    a, p = torch.rand(6, 4, 24, 20) + 0.5, 0.25
    torch.manual_seed(1)
    out, other = (call(function.apply, a, p) for _ in range(2))
    k = out / a
    gone, stays = (k == 0).double(), k[k != 0]
    both = [(gone * gone.roll(1, dim)).mean() for dim in range(4)]  # neighbours, along each dimension
    require(max(both) < 1.5 * gone.mean() ** 2, "entries go together: each needs a number of its own")
    require(abs(gone.mean() - p) < 0.05, f"a share p = {p} must go, but {gone.mean():.2f} has gone")
    note = "what stays is multiplied by 1 / (1 - p), so that the mean stays, too"
    compare("the factor", stays, torch.full_like(stays, 1 / (1 - p)), note=note)
    require(not torch.equal(out, other), "two calls drop the same places; draw a new seed in each forward")
    torch.manual_seed(1)
    note = (
        "torch.manual_seed decides forward's k, and backward needs the same k, whatever dout's layout, which "
        "rand_like and empty_like follow"
    )
    mistakes = {"backward must multiply by 1 / (1 - p), too": lambda dout: dout * (k != 0)}
    ours, reference = lambda a: function.apply(a, p), lambda a: a * k
    compare_function(ours, reference, "da", [a], mistakes, note=note, copies=True)
    first, second = (function.apply(a.requires_grad_(), p) for _ in range(2))
    (first + second).sum().backward()
    third = function.apply(a, p)
    words = "backward sets PyTorch's random numbers back: the next call drops the same places as one before"
    require(not torch.equal(third, first) and not torch.equal(third, second), words)
