"""What `bench` compares: the same layers and networks, trained in different ways."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

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


def unfused(c_in: int, c_out: int, kernel: int, padding: int = 0) -> nn.Sequential:
    """nn.Conv2d without bias, then nn.BatchNorm2d."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, padding=padding, bias=False), nn.BatchNorm2d(c_out))


class Checkpointed(nn.Module):
    """A module under torch.utils.checkpoint."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        # A dense block appends to the list that it hands in: backward must find the list as it was.
        inputs = [list(i) if isinstance(i, list) else i for i in inputs]
        return checkpoint(self.module, *inputs, use_reentrant=False)


class Remat(nn.Module):
    """A module under `helpers.remat`."""

    def __init__(self, module: nn.Module, max_cost: float) -> None:
        super().__init__()
        self.module, self.max_cost = module, max_cost

    def forward(self, x: Tensor) -> Tensor:
        with remat(self.max_cost):
            return self.module(x)


def under_remat(make: Callable[[], nn.Module], *prices: float) -> dict[str, Callable[[], nn.Module]]:
    """The network of ``make`` under `remat`, at each price."""
    return {f"remat, {price:g}": lambda price=price: Remat(make(), price) for price in prices}


def block_by_block(model: nn.Module) -> nn.Module:
    """Each block of one of torchvision's networks under a checkpoint of its own."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in BLOCKS:
                setattr(module, name, Checkpointed(child))
    return model


def stage_by_stage(model: nn.Module) -> nn.Module:
    """Each stage of one of torchvision's networks, its blocks of one width, under a checkpoint of its own."""
    if isinstance(model, torchvision.models.MobileNetV2):  # a flat list of blocks
        stages: list[list[nn.Module]] = []
        for block in model.features:
            if not getattr(block, "use_res_connect", False):  # the first of its width
                stages.append([])
            stages[-1].append(block)
        model.features = nn.Sequential(*[nn.Sequential(*stage) for stage in stages])
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            blocks = isinstance(child, nn.Sequential) and {type(block).__name__ for block in child}
            if (blocks and blocks <= {*BLOCKS}) or type(child).__name__ == "_DenseBlock":
                setattr(module, name, Checkpointed(child))
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


def fused(slab_size: int | str | None) -> Callable[..., nn.Module]:
    """A factory of ours, with that slab size."""
    return lambda c_in, c_out, kernel, padding=0: FusedConvBN2d(
        c_in, c_out, kernel, padding=padding, bias=False, slab_size=slab_size
    )


METHODS: dict[str, Callable[..., nn.Module]] = {
    "unfused": unfused,
    "tutorial": TutorialConvBN2d,
    "checkpoint": lambda *args: Checkpointed(unfused(*args)),
    "fused, whole batch": fused("batch"),
    "fused, slabs": fused(None),
}


def chain(make: Callable[..., nn.Module], blocks: int, channels: int, kernel: int) -> nn.Sequential:
    """``blocks`` equal blocks conv, batch norm, ReLU that keep the image's size."""
    block = [nn.Sequential(make(channels, channels, kernel, kernel // 2), nn.ReLU()) for _ in range(blocks)]
    return nn.Sequential(*block)


BLOCKS = ("BasicBlock", "Bottleneck", "InvertedResidual", "MBConv", "_DenseLayer")
PRICES = (0, 150, 600)
FRONT = ("resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0")
FRONT_PRICES = (0, 9, 32, 64, 150, 300, 600, 1200)
BUDGETS = {"resnet50": (0.4,)}  # compiling takes minutes on a CPU
NETWORKS = ("resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0", "resnet18", "vgg11_bn")


def real_network(name: str) -> nn.Module:
    """torchvision's network ``name``, always with the same weights and without dropout.

    Raises:
        ValueError: torchvision has no such network.
    """
    if name not in torchvision.models.list_models():
        raise ValueError(
            f"name must be a network of torchvision, such as {', '.join(NETWORKS)}; got {name!r}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None)
    for module in model.modules():  # what is dropped would differ from method to method
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
    return model


def ways(name: str, prices: tuple[float, ...]) -> dict[str, Callable[[], nn.Module]]:
    """The ways to train torchvision's network ``name`` in less memory, unfused first."""
    make = functools.partial(real_network, name)
    return {
        "unfused": make,
        **under_remat(make, *prices),
        "checkpoint, blocks": lambda: block_by_block(make()),
    }


def front_of(name: str) -> dict[str, Callable[[], nn.Module]]:
    """More of them, for chapter 8's figure."""
    make = functools.partial(real_network, name)
    return {
        **ways(name, FRONT_PRICES),
        "checkpoint, stages": lambda: stage_by_stage(make()),
        **{f"compile, {b:g}": lambda b=b: compiled(make(), b) for b in BUDGETS.get(name, ())},
    }


def of_pairs(build: Callable[[Callable], nn.Module]) -> dict[str, Callable]:
    """A network of pairs by each of the methods, and under `remat`."""
    networks = {name: functools.partial(build, make) for name, make in METHODS.items()}
    return {**networks, **under_remat(networks["unfused"], *PRICES)}
