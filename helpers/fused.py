"""Convolution and batch norm in one autograd function that saves the convolution's input alone.

An unfused pair keeps two NCHW-sized tensors until backward: the convolution's input x and its output y,
the norm's input. This one keeps x and computes y again, one *slab* (a few images) at a time. Chapter 4
derives it, chapter 6 explains its memory. From top to bottom:

    slabs                    how a batch is cut
    conv_bn_forward          y in slabs, its statistics, z in y's own memory
    conv_bn_backward         the recomputation, the two sums, the gradients
    FusedConvBN2dFunction    bookkeeping for autograd
    fused_conv_bn2d          checks, autocast, running statistics
    FusedConvBN2d            the layer
"""

from __future__ import annotations

from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from helpers.batch_norm import (
    CHANNELS,
    batch_stats,
    centre,
    grad_input_,
    grad_input_coefficients,
    merge_stats,
    per_channel,
    stats_dtype,
    update_running_stats,
    wide_dtype,
)
from helpers.conv import conv_grads, pair_of_ints

__all__ = ["FusedConvBN2d", "FusedConvBN2dFunction", "fused_conv_bn2d"]

# Bytes of one slab where `slab_size` is None. On a CPU a slab should stay in a core's cache between the
# steps that use it; on an accelerator it must be large enough to fill the device.
SLAB_BYTES = {"cpu": 1 << 21}
SLAB_BYTES_ACCELERATOR = 1 << 27


def slabs(n: int, image_bytes: int, weight: Tensor, slab_size: int) -> list[slice]:
    """Cut n images into slices of ``slab_size`` images; 0 means about SLAB_BYTES, -1 the whole batch."""
    if slab_size == 0:
        # Every slab adds a whole weight gradient to the sum, so it should be worth one.
        target = max(SLAB_BYTES.get(weight.device.type, SLAB_BYTES_ACCELERATOR), weight.nbytes)
        slab_size = max(1, target // image_bytes)
    elif slab_size < 0:
        slab_size = n
    return [slice(start, min(start + slab_size, n)) for start in range(0, n, slab_size)]


def layout(*tensors: Tensor) -> torch.memory_format:
    """channels_last if one of the tensors is, as F.conv2d chooses for its output."""
    last = torch.channels_last
    if any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in tensors):
        return last
    return torch.contiguous_format


def output_size(x: Tensor, weight: Tensor, stride, padding, dilation) -> list[int]:
    """Height and width of conv(x, weight)."""
    return [
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]


def empty_output(x: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
    """Uninitialised memory for conv(x, weight)."""
    size = (x.shape[0], weight.shape[0], *output_size(x, weight, stride, padding, dilation))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout(x, weight))


def conv_bn_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    slab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """z = γ (y - μ)/σ + β with y = conv(x, weight) and σ² = var + ε; also returns μ and var.

    Without ``mean`` and ``var``, they are y's own, and ``bias`` does not matter: the norm would subtract
    it again. With them the norm is a scale and a shift, which fold into the convolution.
    """
    conv = (stride, padding, dilation, groups)
    if mean is not None:
        return F.conv2d(x, *fold(weight, bias, gamma, beta, mean, var, eps), *conv), mean.clone(), var.clone()

    y = empty_output(x, weight, stride, padding, dilation)
    # Off the CPU one large convolution is as good as many small ones, and y has to be whole in the end.
    cut = slabs(x.shape[0], y[:1].nbytes, weight, slab_size if y.is_cpu else -1)
    stats = []
    for s in cut:
        y_s = F.conv2d(x[s], weight, None, *conv)
        stats.append((s.stop - s.start, *batch_stats(y_s)))
        if len(cut) > 1:
            y[s] = y_s
        else:
            y = y_s
    mean, var = merge_stats(stats, stats_dtype(x.dtype))
    scale = scale_of(gamma, var, eps)
    shift = torch.zeros_like(mean) if beta is None else beta.to(mean.dtype)
    for s in cut:
        z_s = centre(y[s], mean, inplace=True)
        z_s.mul_(per_channel(scale)).add_(per_channel(shift))
        if z_s.dtype != y.dtype:
            y[s] = z_s
    return y, mean, var


def scale_of(gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """γ/σ."""
    inv_std = torch.rsqrt(var + eps)
    return inv_std if gamma is None else gamma * inv_std


def fold(weight, bias, gamma, beta, mean, var, eps) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals conv, then norm with constant statistics.

    γ (w∗x + b - μ)/σ + β  =  (γ/σ w)∗x  +  β + γ/σ (b - μ), with ∗ the convolution.
    """
    scale = scale_of(gamma, var, eps)
    shift = scale * (-mean if bias is None else bias - mean)
    if beta is not None:
        shift = shift + beta
    return (weight * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)


def conv_bn_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    slab_size: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dw, dγ and dβ; those not in ``needs`` come back empty.

    With dz = ``grad_out``, in two sweeps over the slabs: (1) recompute y - μ and collect the sums Σ dz and
    Σ dz (y - μ); (2) overwrite y - μ with dy (``grad_input_``) and run the convolution's
    backward on it. With frozen statistics, dy needs no sum and only dγ asks for y.
    """
    need_x, need_w, need_gamma, need_beta = needs
    need_dy = need_x or need_w
    need_y = need_gamma or (training and need_dy)
    m = grad_out.numel() // grad_out.shape[1]
    cut = slabs(x.shape[0], max(grad_out[:1].nbytes, x[:1].nbytes), weight, slab_size)
    scale = scale_of(gamma, var, eps)
    # y must be forward's y to the last bit, or Σ (y - μ) is not 0 and a large gradient leaks through
    # it. So it is rounded where forward rounded it, and μ is subtracted after that, in float32 at least.
    half = x.dtype != mean.dtype

    def centred(y_s: Tensor) -> Tensor:
        return centre(y_s, mean) if half else y_s

    many = len(cut) > 1
    dx = torch.empty_like(x, memory_format=layout(x)) if need_x and many else x.new_empty(0)
    dw = None
    sum_dz, sum_dz_y = (mean.new_zeros(mean.numel(), dtype=wide_dtype(mean)) for _ in (0, 1))
    waiting: deque[Tensor] = deque()

    for s in cut if need_y or need_beta else ():
        sum_dz += grad_out[s].sum(CHANNELS, dtype=mean.dtype)
        if need_y:
            y_s = F.conv2d(x[s], weight, None, stride, padding, dilation, groups)
            y_s = y_s if half else centre(y_s, mean, inplace=True)
            sum_dz_y += (grad_out[s] * centred(y_s)).sum(CHANNELS)
            if training and need_dy:
                waiting.append(wait_in(dx, s, y_s) if many else y_s)

    coefficients = (scale, None, None)
    if training:
        coefficients = grad_input_coefficients(scale, var + eps, (sum_dz, sum_dz_y), m)
    for s in cut if need_dy else ():
        y_s = centred(waiting.popleft()) if training else torch.empty_like(grad_out[s], dtype=mean.dtype)
        dy_s = grad_input_(grad_out[s], y_s, *coefficients)
        dx_s, dw_s, _ = conv_grads(
            dy_s.to(x.dtype), x[s], weight, stride, padding, dilation, groups, (need_x, need_w, False)
        )
        del y_s, dy_s
        if need_x and many:
            dx[s] = dx_s
        elif need_x:
            dx = dx_s
        if need_w:
            dw = dw_s.to(mean.dtype) if dw is None else dw.add_(dw_s)
    dw = dw.to(weight.dtype) if need_w else weight.new_empty(0)
    dgamma = (sum_dz_y * torch.rsqrt(var + eps)).to(mean.dtype) if need_gamma else mean.new_empty(0)
    return dx, dw, dgamma, sum_dz.to(mean.dtype) if need_beta else mean.new_empty(0)


def wait_in(dx: Tensor, s: slice, y_s: Tensor) -> Tensor:
    """Move ``y_s`` into the part of ``dx`` that its slab's gradient will overwrite, if it fits there.

    So no second buffer exists: the recomputed outputs wait where the result goes. An output that is larger
    than the input (or whose input needs no gradient) stays in its own memory.
    """
    if y_s.numel() > dx[s].numel():
        return y_s
    room = torch.as_strided(dx, y_s.shape, y_s.stride(), dx[s].storage_offset())
    return room.copy_(y_s)


def _opaque(name: str, function, arguments: str, results: str):
    """Register ``function`` as an operator, so that torch.compile calls it and does not look inside.

    It would see that the recomputed convolution equals the first one, and keep the first instead. The
    function also runs outside autocast: its arguments have their final dtypes.
    """

    def run(x, *args):
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args)

    settings = "float eps, int[] stride, int[] padding, int[] dilation, int groups, int slab_size"
    schema = f"({arguments}, {settings}{', bool[] needs' if name == 'backward' else ''}) -> ({results})"
    return torch.library.custom_op(f"fused_conv_bn::{name}", run, mutates_args=(), schema=schema)


_forward = _opaque(
    "forward",
    conv_bn_forward,
    "Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var",
    "Tensor, Tensor, Tensor",
)
_backward = _opaque(
    "backward",
    conv_bn_backward,
    "Tensor grad_out, Tensor x, Tensor weight, Tensor? gamma, Tensor mean, Tensor var, bool training",
    "Tensor, Tensor, Tensor, Tensor",
)


@_forward.register_fake
def _(x, weight, bias, gamma, beta, mean, var, eps, stride, padding, dilation, groups, slab_size):
    stats = torch.empty(2, weight.shape[0], dtype=stats_dtype(x.dtype), device=x.device)
    return empty_output(x, weight, stride, padding, dilation), stats[0].clone(), stats[1].clone()


@_backward.register_fake
def _(grad_out, x, weight, gamma, mean, var, *settings):
    like = (x, weight, mean, mean)
    return tuple(
        torch.empty_like(t, memory_format=layout(t)) if need else t.new_empty(0)
        for t, need in zip(like, settings[-1], strict=True)
    )


class FusedConvBN2dFunction(torch.autograd.Function):
    """``apply(x, weight, bias, gamma, beta, mean, var, eps, stride, padding, dilation, groups, slab_size)``.

    Returns ``(z, mean, var)``; see ``conv_bn_forward`` for shapes and for what ``mean`` and ``var`` decide.
    Saves x, the weights and per-channel vectors. Its backward cannot be differentiated again: trying
    raises.
    """

    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, gamma, _, mean, _, *ctx.settings = inputs
        ctx.training = mean is None
        ctx.save_for_backward(x, weight, bias, gamma, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, *_):
        x, weight, bias, gamma, mean, var = ctx.saved_tensors
        need_x, need_w, need_bias, need_gamma, need_beta = ctx.needs_input_grad[:5]
        # The bias moves y; the function below wants the mean of y without it.
        if bias is not None and not ctx.training:
            mean = mean - bias
        need_sum = need_beta or (need_bias and not ctx.training)
        needs = [need_x, need_w, need_gamma, need_sum]
        saved = (x, weight, gamma, mean, var)
        dx, dw, dgamma, dbeta = _backward(grad_out, *saved, ctx.training, *ctx.settings, needs)
        dbias = None
        if need_bias:  # with batch statistics the norm subtracts the bias again
            dbias = torch.zeros_like(bias)
            if not ctx.training:
                dbias += dbeta * scale_of(gamma, var, ctx.settings[0])
        grads = (dx if need_x else None, dw if need_w else None, dbias)
        grads += (dgamma if need_gamma else None, dbeta if need_beta else None)
        return grads + (None,) * 8


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
        weight: (C_out, C_in / groups, kH, kW), the dtype and device of ``input``.
        bias: the convolution's, (C_out,) or None. In training it only moves the running mean.
        gamma, beta: the norm's weight and bias, (C_out,) or None for 1 and 0.
        running_mean, running_var: (C_out,) or None. Updated in place in training.
        training: normalise with the batch's statistics. Also done where there are no running ones.
        momentum: weight of the batch in the running statistics; None for their cumulative average, which
            needs ``num_batches_tracked``.
        eps: ε, added to the variance inside the root.
        stride, padding, dilation, groups: as in ``F.conv2d``, padding "same" and "valid" included.
        slab_size: images that backward works on at once: the memory that it needs for a moment grows with
            it. None chooses by size (see SLAB_BYTES), "batch" takes the whole batch, as the tutorial does.
        num_batches_tracked: counts the batches that the running statistics have seen.

    Returns:
        (N, C_out, H_out, W_out) in the dtype of ``input`` (under autocast, autocast's).

    Raises:
        ValueError: an argument that does not fit, before anything is computed or changed.
    """
    stride, dilation = pair_of_ints("stride", stride, 1), pair_of_ints("dilation", dilation, 1)
    batch_stats = training or running_mean is None
    slab_size = slab_argument(slab_size)
    input, weight, bias = autocast(input, weight, bias)
    check_tensors(input, weight, bias, gamma, beta, running_mean, running_var, groups)
    input, padding = explicit_padding(input, weight, padding, dilation, stride)
    h, w = output_size(input, weight, stride, padding, dilation)
    if min(h, w) < 1:
        raise ValueError(
            f"weight: a kernel of {tuple(weight.shape[2:])}, dilation {dilation}, is larger than the padded "
            f"input of {tuple(s + 2 * p for s, p in zip(input.shape[2:], padding, strict=True))}"
        )
    m = input.shape[0] * h * w
    if batch_stats and m == 1:
        raise ValueError(
            "input: batch statistics need more than 1 value per channel, got 1 (N=1, output 1x1)"
        )
    if m == 0:  # an empty batch has no slab, and moves the counter alone
        if training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return F.batch_norm(y, running_mean, running_var, gamma, beta, batch_stats, momentum or 0.0, eps)
    mean, var = (None, None) if batch_stats else (running_mean, running_var)
    z, mean, var = FusedConvBN2dFunction.apply(
        input, weight, bias, gamma, beta, mean, var, eps, stride, padding, dilation, groups, slab_size
    )
    if training and running_mean is not None:
        with torch.no_grad():
            if num_batches_tracked is not None:
                num_batches_tracked.add_(1)
            if momentum is None:
                momentum = num_batches_tracked.to(running_mean.dtype).reciprocal()
            update_running_stats(
                running_mean, running_var, mean if bias is None else mean + bias, var, m, momentum
            )
    return z


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Under autocast, cast what F.conv2d would: every float32 or half tensor, to autocast's dtype."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(dtype) if t is not None and t.dtype in narrow else t for t in tensors]


def slab_argument(slab_size: int | str | None) -> int:
    """``slab_size`` as the operators take it: 0 for None, -1 for "batch"."""
    if slab_size is None or slab_size == "batch":
        return 0 if slab_size is None else -1
    if isinstance(slab_size, int) and not isinstance(slab_size, bool) and slab_size >= 1:
        return slab_size
    raise ValueError(f'slab_size must be None, "batch" or a number of images from 1 on, got {slab_size!r}')


def explicit_padding(input: Tensor, weight: Tensor, padding, dilation, stride) -> tuple[Tensor, list[int]]:
    """Padding as two ints; "same" with an even kernel pads ``input`` by one more on the far side first."""
    if padding == "valid":
        return input, [0, 0]
    if padding != "same":
        return input, pair_of_ints("padding", padding, 0)
    if stride != [1, 1]:
        raise ValueError(f'padding="same" needs stride 1, got stride {stride}')
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, [t // 2 for t in total]


def check_tensors(input, weight, bias, gamma, beta, running_mean, running_var, groups) -> None:
    """Raise a ValueError that names the first argument that does not fit the others."""
    if input.dim() != 4:
        hint = " (batch norm needs a batch: pass input[None])" if input.dim() == 3 else ""
        raise ValueError(f"input must be (N, C, H, W), got shape {tuple(input.shape)}{hint}")
    if not input.is_floating_point():
        raise ValueError(f"input must be floating point, got {input.dtype}")
    if weight.dim() != 4 or groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"weight must be (C_out, C_in / groups, kH, kW) with C_out divisible by groups={groups}, "
            f"got shape {tuple(weight.shape)}"
        )
    if input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"input must have {weight.shape[1] * groups} channels to fit weight {tuple(weight.shape)} with "
            f"groups={groups}, got {input.shape[1]}"
        )
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given or both be None")
    vectors = {
        "bias": bias,
        "gamma": gamma,
        "beta": beta,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, t in vectors.items():
        if t is not None and tuple(t.shape) != (weight.shape[0],):
            raise ValueError(f"{name} must have shape ({weight.shape[0]},), got {tuple(t.shape)}")
    for name, t in {"weight": weight, **vectors}.items():
        if t is not None and t.device != input.device:
            raise ValueError(f"{name} must be on input's device {input.device}, got {t.device}")
        if t is not None and name in ("weight", "bias") and t.dtype != input.dtype:
            raise ValueError(f"{name} must have input's dtype {input.dtype}, got {t.dtype}")


class FusedConvBN2d(nn.Module):
    """``nn.Conv2d`` then ``nn.BatchNorm2d`` as one layer that keeps one NCHW buffer for backward, not two.

    Takes the arguments of both, under their names and with their defaults. The two modules stay inside as
    ``conv`` and ``bn``, so that the state_dict has the keys ``conv.weight``, ``bn.running_mean`` and so on,
    and ``layer.bn.eval()`` freezes the statistics. Only this layer is called, though, not the two: hooks
    belong on it.

    Args:
        slab_size: images that backward works on at once; None chooses, "batch" takes all (see
            ``fused_conv_bn2d``).

    Shape: input (N, C_in, H, W), output (N, C_out, H_out, W_out) as ``nn.Conv2d`` has it.
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
        self.slab_size = slab_size
        to = {"device": device, "dtype": dtype}
        conv_args = (
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
        )
        self.conv = nn.Conv2d(*conv_args, **to)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, **to)

    @classmethod
    def from_pair(
        cls, conv: nn.Conv2d, bn: nn.BatchNorm2d, slab_size: int | str | None = None
    ) -> FusedConvBN2d:
        """Fuse two modules that exist; the layer holds them, and so shares their parameters and buffers.

        Raises:
            ValueError: they are not a plain conv and a plain batch norm of its output channels, they are on
                different devices, or they have hooks, which the fused layer would not call.
        """
        slab_argument(slab_size)
        for name, module, kind in (("conv", conv, nn.Conv2d), ("bn", bn, nn.BatchNorm2d)):
            if not isinstance(module, kind) or type(module).forward is not kind.forward:
                raise ValueError(f"{name} must be a plain nn.{kind.__name__}, got {type(module).__name__}")
            if has_hooks(module):
                raise ValueError(f"{name} has hooks, which the fused layer would not call; remove them first")
        if bn.num_features != conv.out_channels:
            raise ValueError(
                f"bn must have conv's {conv.out_channels} output channels, got {bn.num_features}"
            )
        tensors = [*bn.parameters(), *bn.buffers()]
        if any(t.device != conv.weight.device for t in tensors):
            raise ValueError(f"bn must be on conv's device {conv.weight.device}, got {tensors[0].device}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.slab_size = slab_size
        layer.conv, layer.bn = conv, bn
        layer.training = bn.training
        return layer

    def forward(self, input: Tensor) -> Tensor:
        conv, bn, padding = self.conv, self.bn, self.conv.padding
        if conv.padding_mode != "zeros" and input.dim() == 4:
            input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = 0
        return fused_conv_bn2d(
            input,
            conv.weight,
            conv.bias,
            bn.weight,
            bn.bias,
            bn.running_mean,
            bn.running_var,
            bn.training,
            bn.momentum,
            bn.eps,
            conv.stride,
            padding,
            conv.dilation,
            conv.groups,
            self.slab_size,
            bn.num_batches_tracked,
        )

    def extra_repr(self) -> str:
        return f"slab_size={self.slab_size!r}"


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has a hook that runs when it is called or differentiated."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)
