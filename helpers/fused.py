"""Convolution, then batch norm, in one autograd function that saves the convolution's input alone.

PyTorch's two layers keep x for the convolution's backward and y = conv(x) for batch norm's. This function
keeps x alone and recomputes y in backward (chapter 4), one *slab* of a few images at a time, so that backward
needs little extra memory (chapter 6).
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.batch_norm import (
    add_up,
    batch_norm_sums,
    batch_stats,
    centre,
    grad_input_,
    grad_input_coefficients,
    per_channel,
    piece_bytes,
    stats_dtype,
    update_running_stats,
)
from helpers.conv import (
    check_fit,
    conv_grads,
    empty_output,
    explicit_padding,
    layout,
    output_size,
    pair_of_ints,
)

__all__ = ["FusedConvBN2d", "FusedConvBN2dFunction", "fused_conv_bn2d"]

WHOLE_BATCH = 1 << 62  # images in a slab: more than there are
HOOKS = ("forward", "forward_pre", "backward", "backward_pre")  # the kinds that a module may have


class Settings(NamedTuple):
    """What the kernel needs apart from tensors; stride to groups are F.conv2d's, in its order."""

    eps: float
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    slab_size: int  # images in a slab, 0 for as many as suit the device


class Saved(NamedTuple):
    """What forward saves for backward: one tensor of image size, the weight, and vectors."""

    x: Tensor
    weight: Tensor
    gamma: Tensor | None
    mean: Tensor
    var: Tensor


def slabs(x: Tensor, weight: Tensor, settings: Settings) -> list[slice]:
    """The images of each slab; forward and backward cut alike."""
    images = settings.slab_size
    if not images:
        y_values = weight.shape[0] * math.prod(output_size(x, weight, *settings[1:4]))
        image_bytes = max(x[0].numel(), y_values) * x.element_size()
        # Every slab adds a whole weight gradient to the sum: make it large enough to be worth that.
        images = max(1, max(piece_bytes(x), weight.nbytes) // image_bytes)
    return [slice(start, min(start + images, len(x))) for start in range(0, len(x), images)]


def fused_forward(
    x: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """z, and the mean and variance of y, (C_out,) each, in float32 at least.

        y = conv(x, w)        μ, var = statistics of y        z = γ (y - μ)/σ + β,  σ² = var + ε

    There is no bias: the norm would subtract it again. z is written into y's memory.
    """
    eps, *geometry, _ = settings
    cut = slabs(x, weight, settings)
    if len(cut) == 1:
        z = F.conv2d(x, weight, None, *geometry)
    else:
        z = empty_output(x, weight, *settings[1:4])
        for s in cut:
            z[s] = F.conv2d(x[s], weight, None, *geometry)
    mean, var = batch_stats(z)
    scale = torch.rsqrt(var + eps) if gamma is None else gamma * torch.rsqrt(var + eps)
    for s in cut:
        z_s = centre(z[s], mean, inplace=True).mul_(per_channel(scale))
        if beta is not None:
            z_s.add_(per_channel(beta))
        if z_s.dtype != z.dtype:  # it is not z's memory then
            z[s] = z_s
    return z, mean, var


def fused_backward(
    dz: Tensor, saved: Saved, settings: Settings, need_x: bool = True, need_w: bool = True
) -> tuple[Tensor | None, ...]:
    """dx, dw, db, dγ and dβ of the pair, from dz. dx and dw are None where they are not needed; db is 0.

        dβ = Σ dz        dγ = Σ dz (y - μ) / σ        dy = κ_dz dz + κ_y (y - μ) + κ_0

    with the κ of chapter 3. dy needs sums over the whole batch, so there are two passes over the slabs: the
    first computes y and the sums, the second turns y into dy and differentiates the convolution. In between,
    each y is stored where its dx will be written.
    """
    x, weight, gamma, mean, var = saved
    eps, *geometry, _ = settings
    cut, need_dy = slabs(x, weight, settings), need_x or need_w
    dx = torch.empty_like(x, memory_format=layout(x)) if need_x and len(cut) > 1 else None
    sums, outputs = recompute(dz, saved, geometry, cut, dx, keep=need_dy)
    inv_std = torch.rsqrt(var + eps)
    scale = inv_std if gamma is None else gamma * inv_std
    kappas = grad_input_coefficients(scale, var + eps, sums, dz.numel() // dz.shape[1])
    dw = torch.zeros_like(weight, dtype=mean.dtype) if need_w else None
    for s in cut if need_dy else ():
        y_centred = centre(outputs.popleft(), mean, inplace=True)
        dy = grad_input_(dz[s], y_centred, *kappas).to(x.dtype)
        del y_centred  # in half precision it is not dy's memory
        dx_s, dw_s, _ = conv_grads(dy, x[s], weight, *geometry, (need_x, need_w, False))
        if need_w:
            dw += dw_s
        if dx is not None:
            dx[s] = dx_s
    if need_x and dx is None:
        dx = dx_s.contiguous(memory_format=layout(x))
    dbeta, dgamma = (t.to(mean.dtype) for t in (sums[0], sums[1] * inv_std))
    return dx, dw.to(weight.dtype) if need_w else None, torch.zeros_like(dbeta), dgamma, dbeta


def recompute(dz: Tensor, saved: Saved, geometry, cut: list[slice], dx: Tensor | None, keep: bool):
    """Σ dz and Σ dz (y - μ), with y recomputed; and the y of all slabs if ``keep``."""
    sums, outputs = None, deque()
    for s in cut:
        # This must be forward's y, with the same rounding: with any other, Σ (y - μ) is not 0, and a large
        # gradient leaks through it. So subtract μ afterwards, not inside the convolution.
        y = F.conv2d(saved.x[s], saved.weight, None, *geometry)
        sums = add_up(sums, batch_norm_sums(dz[s], y, saved.mean))
        if keep:
            outputs.append(y if dx is None else moved_into(dx[s], y))
    return sums, outputs


def moved_into(dx: Tensor, y: Tensor) -> Tensor:
    """``y`` in the memory of ``dx``, or unchanged if it does not fit."""
    return y if y.numel() > dx.numel() else torch.as_strided(dx, y.shape, y.stride()).copy_(y)


# torch.compile would notice that backward repeats forward's convolution, compute it once, and keep y: the
# very tensor that this file avoids keeping. Custom operators are opaque to it. Outside of torch.compile the
# functions are called directly, which costs less and lets `helpers.predict` follow their memory.
SETTINGS = "float eps, int[] stride, int[] padding, int[] dilation, int groups, int slab_size"


def _forward(x, weight, gamma, beta, *settings):
    return fused_forward(x, weight, gamma, beta, Settings(*settings))


def _backward(dz, x, weight, gamma, mean, var, need_x, need_w, *settings):
    """With an empty tensor in place of None, which an operator cannot return."""
    saved = Saved(x, weight, gamma, mean, var)
    grads = fused_backward(dz, saved, Settings(*settings), need_x, need_w)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def operator(name: str, function, arguments: str, outputs: int):
    """``function`` as an operator."""
    schema = f"({arguments}, {SETTINGS}) -> ({', '.join(['Tensor'] * outputs)})"
    return torch.library.custom_op(f"fused_conv_bn2d::{name}", function, mutates_args=(), schema=schema)


FORWARD = "Tensor x, Tensor weight, Tensor? gamma, Tensor? beta"
BACKWARD = (
    "Tensor dz, Tensor x, Tensor weight, Tensor? gamma, Tensor mean, Tensor var, bool need_x, bool need_w"
)
_forward_operator = operator("forward", _forward, FORWARD, outputs=3)
_backward_operator = operator("backward", _backward, BACKWARD, outputs=5)


@_forward_operator.register_fake
def _(x, weight, gamma, beta, *settings):
    stats = [x.new_empty(weight.shape[0], dtype=stats_dtype(x.dtype)) for _ in "12"]
    return empty_output(x, weight, *settings[1:4]), *stats


@_backward_operator.register_fake
def _(dz, x, weight, gamma, mean, var, need_x, need_w, *_):
    dx = torch.empty_like(x, memory_format=layout(x)) if need_x else x.new_empty(0)
    dw = torch.empty_like(weight) if need_w else x.new_empty(0)
    return dx, dw, *(torch.empty_like(mean) for _ in "123")


class FusedConvBN2dFunction(torch.autograd.Function):
    """``apply(x, weight, bias, gamma, beta, settings)``: z, and the mean and variance of y without the bias.

    Batch norm takes the batch's own statistics. The gradients cannot be differentiated (`FirstOnly`).
    """

    @staticmethod
    def forward(x, weight, bias, gamma, beta, settings):
        run = _forward_operator if torch.compiler.is_compiling() else _forward
        with no_autocast(x):
            return run(x, weight, gamma, beta, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, gamma, _, ctx.settings = inputs
        ctx.save_for_backward(x, weight, gamma, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, dz, *_):
        needs = ctx.needs_input_grad[:5]
        run = FirstOnly.apply if torch.is_grad_enabled() else _backward  # enabled with create_graph=True
        run = _backward_operator if torch.compiler.is_compiling() else run
        with no_autocast(dz):
            grads = run(dz, *ctx.saved_tensors, *needs[:2], *ctx.settings)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None


class FirstOnly(torch.autograd.Function):
    """The same backward as a function of dz and the saved tensors; differentiating one of its results raises.

    PyTorch's once_differentiable raises only if dz has a graph. For the loss z.sum() it has none, and the
    missing second derivative would silently count as 0.
    """

    generate_vmap_rule = True
    forward = staticmethod(_backward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "FusedConvBN2d has first derivatives only; where you need second ones, call its two modules "
            "instead, first conv and then bn"
        )


def no_autocast(x: Tensor):
    """A context without autocast."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Under autocast, cast as F.conv2d does: every float32 or half tensor, to autocast's dtype."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype, narrow = torch.get_autocast_dtype(device), (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if t is not None and t.dtype in narrow else t for t in tensors]


def fused_conv_bn2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    slab_size: int | str | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """``F.batch_norm(F.conv2d(input, weight, bias, ...), ...)`` that saves ``input`` and no output.

    Args:
        input: (N, C_in, H, W), floating point. Under autocast it and the weights are cast as F.conv2d's.
        weight, bias: the convolution's, in the dtype of ``input``.
        gamma, beta: the norm's weight and bias, (C_out,) or None, in the dtype of ``input`` or in float32.
        running_mean, running_var, training, momentum, eps: as in ``F.batch_norm``. Constant statistics are
            folded into the convolution; momentum=None needs ``num_batches_tracked``.
        stride, padding, dilation, groups: as in ``F.conv2d``, padding "same" and "valid" included.
        slab_size: images to process at once: backward's temporary memory grows with it. None chooses by size
            (see `slabs`), "batch" takes the whole batch, as the tutorial does.

    Returns:
        (N, C_out, H_out, W_out) in the dtype of ``input`` (under autocast, autocast's).

    Raises:
        ValueError: an argument that does not fit, before anything is computed or changed.
    """
    stride, dilation = pair_of_ints("stride", stride, 1), pair_of_ints("dilation", dilation, 1)
    slab_size = slab_argument(slab_size)
    input, weight, bias = autocast(input, weight, bias)
    norm = {"gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var}
    check(input, weight, groups, bias=bias, **norm)
    moves_statistics = training and running_mean is not None
    if moves_statistics and momentum is None and num_batches_tracked is None:
        raise ValueError("momentum=None needs num_batches_tracked, got None for both")
    input, padding = explicit_padding(input, weight, padding, dilation, stride)
    geometry = (stride, padding, dilation, groups)
    m = len(input) * math.prod(output_size(input, weight, *geometry[:3]))
    if not training and running_mean is not None:
        return F.conv2d(input, *fold(weight, bias, gamma, beta, running_mean, running_var, eps), *geometry)
    if m == 1:
        raise ValueError("input: batch statistics need more than 1 value per channel, got 1")
    if moves_statistics and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if m == 0:  # an empty batch has no statistics
        return F.batch_norm(F.conv2d(input, weight, bias, *geometry), None, None, gamma, beta, True)
    settings = Settings(eps, *geometry, slab_size)
    z, mean, var = FusedConvBN2dFunction.apply(input, weight, bias, gamma, beta, settings)
    if moves_statistics:
        if momentum is None:
            momentum = num_batches_tracked.to(running_mean.dtype).reciprocal()
        mean = mean if bias is None else mean + bias.detach()
        update_running_stats(running_mean, running_var, mean, var, m, momentum)
    return z


def fold(weight, bias, gamma, beta, mean, var, eps: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals conv, then a norm with constant statistics.

    γ (w∗x + b - μ)/σ + β  =  (γ/σ w)∗x  +  β + γ/σ (b - μ), with ∗ the convolution.
    """
    scale = torch.rsqrt(var.to(stats_dtype(var.dtype)) + eps)
    scale = scale if gamma is None else gamma * scale
    shift = scale * (-mean if bias is None else bias - mean)
    shift = shift if beta is None else shift + beta
    return (weight * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)


def slab_argument(slab_size: int | str | None) -> int:
    """``slab_size`` as `Settings` has it."""
    if slab_size is None or slab_size == "batch":
        return 0 if slab_size is None else WHOLE_BATCH
    if isinstance(slab_size, int) and not isinstance(slab_size, bool) and slab_size >= 1:
        return slab_size
    raise ValueError(f'slab_size must be None, "batch" or a number of images from 1 on, got {slab_size!r}')


def check(input: Tensor, weight: Tensor, groups: int, **vectors: Tensor | None) -> None:
    """Raise a ValueError that names the first argument that does not fit the others."""
    check_fit(input, weight, groups)
    if (vectors["running_mean"] is None) != (vectors["running_var"] is None):
        raise ValueError("running_mean and running_var must both be given or both be None")
    for name, t in {"weight": weight, **vectors}.items():
        if t is None:
            continue
        if name != "weight" and t.shape != weight.shape[:1]:
            raise ValueError(f"{name} must have shape ({weight.shape[0]},), got {tuple(t.shape)}")
        if t.device != input.device:
            raise ValueError(f"{name} must be on input's device {input.device}, got {t.device}")
        wider = input.dtype if name in ("weight", "bias") else stats_dtype(input.dtype)
        if t.dtype not in (input.dtype, wider):
            allowed = " or ".join(map(str, dict.fromkeys((input.dtype, wider))))
            raise ValueError(f"{name} must have dtype {allowed} to fit input, got {t.dtype}")


def check_plain(name: str, module: nn.Module, kind: type[nn.Module]) -> None:
    """Raise a ValueError if ``module`` computes anything but what ``kind`` does."""
    if not isinstance(module, kind) or type(module).forward is not kind.forward:
        got = f"must be a plain nn.{kind.__name__}, got {type(module).__name__}"
        raise ValueError(f"{name} {got}; helpers.remat works with any module")


class FusedConvBN2d(nn.Module):
    """``nn.Conv2d`` then ``nn.BatchNorm2d`` as one layer that keeps one NCHW buffer for backward, not two.

    Takes the arguments of both, under their names and with their defaults, and ``slab_size`` (see
    `fused_conv_bn2d`). The two modules stay inside as ``conv`` and ``bn``, so that the state_dict has the
    keys ``conv.weight``, ``bn.running_mean`` and so on, and ``layer.bn.eval()`` freezes the statistics. The
    two are never called, only the layer is: put hooks on it. Shapes are those of ``nn.Conv2d``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        slab_size: int | str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        slab_argument(slab_size)
        self.slab_size, to = slab_size, {"device": device, "dtype": dtype}
        geometry = (kernel_size, stride, padding, dilation, groups)
        self.conv = nn.Conv2d(in_channels, out_channels, *geometry, bias, padding_mode, **to)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, **to)

    @classmethod
    def from_pair(cls, conv: nn.Conv2d, bn: nn.BatchNorm2d, slab_size: int | str | None = None):
        """The layer that holds these two, and so shares their parameters and buffers.

        Raises a ValueError if they are not plain modules that fit each other, or if they have hooks.
        """
        slab_argument(slab_size)
        for name, module, kind in (("conv", conv, nn.Conv2d), ("bn", bn, nn.BatchNorm2d)):
            check_plain(name, module, kind)
            if any(getattr(module, f"_{when}_hooks") for when in HOOKS):
                raise ValueError(f"{name} has hooks, which the fused layer would not call; remove them first")
        if bn.num_features != conv.out_channels:
            raise ValueError(f"bn must have conv's {conv.out_channels} channels, got {bn.num_features}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.slab_size, layer.conv, layer.bn, layer.training = slab_size, conv, bn, bn.training
        return layer

    def forward(self, input: Tensor) -> Tensor:
        conv, bn, padding = self.conv, self.bn, self.conv.padding
        check_plain("bn", bn, nn.BatchNorm2d)  # convert_sync_batchnorm makes it another
        if conv.padding_mode != "zeros" and input.dim() == 4:
            input, padding = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
        use_running = bn.track_running_stats or not bn.training
        running = (bn.running_mean, bn.running_var) if use_running else (None, None)
        norm = (bn.weight, bn.bias, *running, bn.training, bn.momentum, bn.eps)
        how = (conv.stride, padding, conv.dilation, conv.groups, self.slab_size, bn.num_batches_tracked)
        return fused_conv_bn2d(input, conv.weight, conv.bias, *norm, *how)

    def extra_repr(self) -> str:
        return f"slab_size={self.slab_size!r}"
