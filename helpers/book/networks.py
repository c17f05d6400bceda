"""What `bench` compares: the same layers and networks, trained in different ways."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from helpers.book.training import Net, pair
from helpers.fused import FusedConvBN2d
from helpers.remat import remat


class TutorialConvBN2dFunction(torch.autograd.Function):
    """The kernel of PyTorch's tutorial as it stands there, but for ``padding``: what ours is measured by.

    Unbiased variance, ε outside the root, no γ and β; the weight gradient as a convolution of transposed
    inputs. Chapter 4 explains it.
    """

    @staticmethod
    def forward(ctx, x, weight, padding, eps=1e-3):
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.eps = padding, eps
        y = F.conv2d(x, weight, padding=padding)
        ctx.m = y.numel() / y.shape[1]
        ctx.sum = y.sum((0, 2, 3))
        ctx.std = y.var((0, 2, 3), unbiased=True).sqrt()
        z = y - (ctx.sum / ctx.m)[:, None, None]
        z /= (ctx.std + eps)[:, None, None]
        return z

    @staticmethod
    def backward(ctx, dz):
        x, weight = ctx.saved_tensors
        y = F.conv2d(x, weight, padding=ctx.padding)
        m, denom = ctx.m, (ctx.std + ctx.eps)[:, None, None]
        mean = (ctx.sum / m)[:, None, None]
        dvar = -((y - mean) * dz).sum((0, 2, 3)) / (ctx.std + ctx.eps) ** 2 / (2 * ctx.std)
        dmean = (dz / denom).sum((0, 2, 3)) / -m
        dy = y * (dvar * m)[:, None, None]
        dy += (-dvar * ctx.sum)[:, None, None]
        dy *= 2 / ((m - 1) * m)
        dy += dmean[:, None, None]
        dy *= denom
        dy += dz
        dy /= denom
        p = ctx.padding
        dw = F.conv2d(x.transpose(0, 1), dy.transpose(0, 1), padding=p).transpose(0, 1)
        dx = F.conv_transpose2d(dy, weight, padding=p)
        return dx, dw, None, None


class TutorialConvBN2d(nn.Module):
    """The tutorial's layer: ``TutorialConvBN2dFunction`` with a weight."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int = 0) -> None:
        super().__init__()
        self.weight = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False).weight
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return TutorialConvBN2dFunction.apply(x, self.weight, self.padding)


def checkpointed(module: nn.Module) -> nn.Module:
    """``module``, from now on under torch.utils.checkpoint."""
    forward = module.forward

    def again(*inputs: Tensor) -> Tensor:
        # A dense block appends to the list that it hands in: backward must find the list as it was.
        inputs = [list(i) if isinstance(i, list) else i for i in inputs]
        return checkpoint(forward, *inputs, use_reentrant=False)

    module.forward = again
    return module


class Remat(nn.Module):
    """A module under `helpers.remat`."""

    def __init__(self, module: nn.Module, max_cost: float) -> None:
        super().__init__()
        self.module, self.max_cost = module, max_cost

    def forward(self, x: Tensor) -> Tensor:
        with remat(self.max_cost):
            return self.module(x)


BLOCKS = ("BasicBlock", "Bottleneck", "InvertedResidual", "MBConv", "_DenseLayer")


def block_by_block(model: nn.Module) -> nn.Module:
    """Each block of one of torchvision's networks under a checkpoint of its own."""
    for module in model.modules():
        if type(module).__name__ in BLOCKS:
            checkpointed(module)
    return model


def stage_by_stage(model: nn.Module) -> nn.Module:
    """Each stage of one of torchvision's networks, its blocks of one width, under a checkpoint of its own."""
    if isinstance(model, torchvision.models.MobileNetV2):  # a flat list of blocks
        starts = [i for i, block in enumerate(model.features) if not getattr(block, "use_res_connect", False)]
        stages = pairwise([*starts, len(model.features)])  # each begins with the first block of its width
        model.features = nn.Sequential(*[model.features[start:end] for start, end in stages])
    for module in model.modules():
        blocks = isinstance(module, nn.Sequential) and {type(block).__name__ for block in module}
        if (blocks and blocks <= {*BLOCKS}) or type(module).__name__ == "_DenseBlock":
            checkpointed(module)
    return model


def compiled(model: nn.Module, budget: float) -> nn.Module:
    """``model`` under torch.compile; with a ``budget`` below 1 the compiler keeps about that share of memory.

    The model must draw no random numbers: with a budget the compiler draws a dropout's mask anew in backward,
    and the gradients are wrong (seen in torch 2.14.1).
    """
    inductor = torch._dynamo.lookup_backend("inductor")

    def backend(graph, inputs):
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return inductor(graph, inputs)

    return torch.compile(model, backend=backend, dynamic=False)


def chain(make: Callable[..., nn.Module], blocks: int, channels: int, kernel: int) -> nn.Sequential:
    """``blocks`` equal blocks conv, batch norm, ReLU that keep the image's size."""
    block = [nn.Sequential(make(channels, channels, kernel, kernel // 2), nn.ReLU()) for _ in range(blocks)]
    return nn.Sequential(*block)


NETWORKS = ("resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0")
PRICES = (0, 150, 600)
FRONT_PRICES = (0, 9, 32, 64, 150, 300, 600, 1200)


def real_network(name: str) -> nn.Module:
    """torchvision's network ``name``, always with the same weights and without dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None)
    for module in model.modules():  # what is dropped would differ from method to method
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
    return model


def under_remat(make: Callable[[], nn.Module], prices: tuple[float, ...] = PRICES) -> dict[str, Callable]:
    """The network of ``make`` under `remat`, at each price."""
    return {f"remat, {price:g}": lambda price=price: Remat(make(), price) for price in prices}


def ways(name: str, prices: tuple[float, ...] = PRICES) -> dict[str, Callable[[], nn.Module]]:
    """The ways to train torchvision's network ``name`` in less memory, unfused first."""
    make = functools.partial(real_network, name)
    checkpoints = {"checkpoint, blocks": lambda: block_by_block(make())}
    return {"unfused": make, **under_remat(make, prices), **checkpoints}


def front_of(name: str) -> dict[str, Callable[[], nn.Module]]:
    """More of them, for chapter 8's figure."""
    found = ways(name, FRONT_PRICES)
    found["checkpoint, stages"] = lambda: stage_by_stage(real_network(name))
    if name == "resnet50":  # compiling takes minutes on a CPU
        found["compile, 0.4"] = lambda: compiled(real_network(name), 0.4)
    return found


def digit_ways() -> dict[str, Callable[[], nn.Module]]:
    """The network for MNIST with each of the layers, and under `remat`."""
    layers = {
        "unfused": pair,
        "tutorial": TutorialConvBN2d,
        "checkpoint": lambda *sizes: checkpointed(pair(*sizes)),
        "fused, whole batch": functools.partial(FusedConvBN2d, bias=False, slab_size="batch"),
        "fused, slabs": functools.partial(FusedConvBN2d, bias=False),
    }
    return {**{name: functools.partial(Net, layer) for name, layer in layers.items()}, **under_remat(Net)}
