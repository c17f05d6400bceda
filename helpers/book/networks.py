"""What `bench` compares: the same layers and networks, trained by different methods."""

from functools import partial
from itertools import pairwise

import torch
import torch._functorch.config
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torchvision.ops import StochasticDepth

from helpers.book.training import Net, pair
from helpers.fused import FusedConvBN2d
from helpers.remat import remat


class TutorialConvBN2dFunction(torch.autograd.Function):
    """The function of PyTorch's tutorial as it stands there, but for ``padding``: what ours is measured by.

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


class TutorialConvBN2d(nn.Conv2d):
    """The tutorial's layer: a convolution's weight, with ``TutorialConvBN2dFunction``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int = 0) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return TutorialConvBN2dFunction.apply(x, self.weight, self.padding)


def checkpointed(module: nn.Module, **options) -> nn.Module:
    """``module``, from now on under torch.utils.checkpoint with these options."""
    forward = module.forward

    def again(*inputs: Tensor) -> Tensor:
        # A dense block appends to the list that it hands in: backward must find the list as it was.
        inputs = [list(i) if isinstance(i, list) else i for i in inputs]
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    module.forward = again
    return module


BLOCKS = {"BasicBlock", "Bottleneck", "InvertedResidual", "MBConv", "_DenseLayer"}


def saves_convolutions(ctx, operation, x=None, *_, **__) -> CheckpointPolicy:
    """For a selective checkpoint. Not squeeze-and-excite's, which activations in place overwrite."""
    images = operation is torch.ops.aten.convolution.default and x.shape[2:].numel() > 1
    return CheckpointPolicy.MUST_SAVE if images else CheckpointPolicy.PREFER_RECOMPUTE


def in_parts(model: nn.Module, parts: str) -> nn.Module:
    """One of torchvision's networks, its "blocks" or its "stages" (blocks of one width) each checkpointed.

    "selective": its blocks, which then save their convolutions' outputs and recompute the rest.
    """
    contexts = partial(create_selective_checkpoint_contexts, saves_convolutions)
    options = {"context_fn": contexts} if parts == "selective" else {}
    if parts == "stages" and isinstance(model, torchvision.models.MobileNetV2):  # a flat list of blocks
        starts = [i for i, block in enumerate(model.features) if not getattr(block, "use_res_connect", False)]
        stages = pairwise([*starts, len(model.features)])  # each begins with the first block of its width
        model.features = nn.Sequential(*[model.features[start:end] for start, end in stages])
    for module in model.modules():
        inside = module.children() if parts == "stages" else [module]
        names = {type(block).__name__ for block in inside}
        if names and names <= BLOCKS:
            checkpointed(module, **options)
    return model


def under_remat(model: nn.Module, max_cost: float) -> nn.Module:
    """``model``, from now on under `remat`."""
    model.forward = remat(max_cost)(model.forward)
    return model


NETWORKS = ("resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0")
LAYERS = {  # the network for MNIST with each of them
    "unfused": pair,
    "tutorial": TutorialConvBN2d,
    "checkpoint": lambda *sizes: checkpointed(pair(*sizes)),
    "fused, whole batch": partial(FusedConvBN2d, bias=False, slab_size="batch"),
    "fused, slabs": partial(FusedConvBN2d, bias=False),
}


def check_networks(names: str, images: int, size: int) -> None:
    """Raise a ValueError unless these are classifiers of torchvision's for images of 3×size×size."""
    if unknown := set(names.split() or [names]) - set(torchvision.models.list_models(torchvision.models)):
        wanted = "names from torchvision.models.list_models(torchvision.models)"
        raise ValueError(f"NETWORKS must be {wanted}, got {sorted(unknown)}")
    for name in names.split():
        with torch.device("meta"):  # where nothing is computed
            model, x = torchvision.models.get_model(name, weights=None), torch.empty(images, 3, size, size)
        try:
            out = model(x)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"NETWORKS must take 3×{size}×{size} images, {name} says: {error}") from None
        if not isinstance(out, Tensor):
            raise ValueError(f"NETWORKS must return one tensor, {name} returns {type(out).__name__}")


def build(network: str, method: str) -> nn.Module:
    """The network, "MNIST" or one of torchvision's, without dropout, to be trained by this method.

    A method is "unfused", "remat, PRICE", "checkpoint, blocks", "stages" or "selective", "compile, BUDGET"
    (the share of memory that the compiler keeps, about), or for MNIST one of `LAYERS`.
    """
    if network == "MNIST":
        model = Net(LAYERS.get(method, pair))
    else:
        model = torchvision.models.get_model(network, weights=None)
    for module in model.modules():
        # What is dropped would differ from method to method; and with a budget, the compiler draws the mask
        # anew in backward, so that gradients are wrong (seen in torch 2.14.1).
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
    kind, _, value = method.partition(", ")
    if kind == "remat":
        return under_remat(model, float(value))
    if kind == "compile":
        torch._functorch.config.activation_memory_budget = float(value)  # of all that the process compiles
        return torch.compile(model, dynamic=False)
    return in_parts(model, value) if kind == "checkpoint" and value else model
