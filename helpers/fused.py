"""Convolution, then batch norm, in one autograd function that saves the convolution's input alone.

PyTorch's two layers keep x for the convolution's backward and y = conv(x) for batch norm's. This function
keeps x alone and recomputes y in backward (chapter 4), one *slab* of a few images at a time, so that backward
needs little extra memory (chapter 6).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import batch_norm as norm
from .conv import conv2d_backward

TWICE = b"FusedConvBN2d has first derivatives only; for second ones, call its two modules, conv and then bn"
VECTORS = ("conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


class Settings(NamedTuple):
    """What the kernel needs apart from tensors: the norm's ε, F.conv2d's arguments, and the slab.

    ``slab_size`` is the number of images to process at once: backward's temporary memory grows with it. None
    chooses by size, "batch" takes the whole batch, as the tutorial does.
    """

    eps: float = 1e-5
    geometry: tuple = (1, 0, 1, 1)  # stride, padding (no word), dilation, groups
    slab_size: int | str | None = None

    def slabs(self, x: Tensor, weight: Tensor) -> list[slice]:
        """The images of each slab; forward and backward cut alike."""
        check_slab_size(self.slab_size)
        if isinstance(padding := self.geometry[1], str):
            raise ValueError(f"geometry must have numbers for its padding, got {padding!r}")
        images = len(x) if self.slab_size == "batch" else self.slab_size
        if images is None:
            y_values = F.conv2d(x[:0], weight, None, *self.geometry).shape[1:].numel()
            image_bytes = max(x[0].numel(), y_values) * max(x.itemsize, 4)  # y - μ is float32 at least
            # Every slab adds a whole weight gradient to the sum: make it large enough to be worth that.
            images = max(1, max(norm.piece_bytes(x), weight.nbytes) // image_bytes)
        return [slice(start, start + images) for start in range(0, len(x), images)]


def fused_backward(
    dz: Tensor, x: Tensor, weight: Tensor, gamma: Tensor | None, mean: Tensor, var: Tensor, settings, needs
) -> tuple[Tensor | None, ...]:
    """dx, dw, db, dγ and dβ of the pair, from dz. dx and dw are None unless ``needs`` them; db is 0.

        dβ = Σ dz        dγ = Σ dz (y - μ) / σ        dy = κ (dz - λ (y - μ) - η - η')

    with chapter 3's coefficients. dy needs sums over the whole batch, so there are two sweeps over the slabs:
    the first computes y and the sums, the second turns y into dy and differentiates the convolution. In
    between, each y is stored where its dx will be written, if it fits there.
    """
    need_x, need_w = needs
    slabs, dx, dw = settings.slabs(x, weight), None, None
    if need_x and len(slabs) > 1:
        last = x.is_contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)
    waiting, sums = [], []
    for s in slabs:
        # This must be forward's y, with the same rounding: with any other, Σ (y - μ) is not 0, and a large
        # gradient leaks through it. So subtract μ afterwards, not inside the convolution.
        y = F.conv2d(x[s], weight, None, *settings.geometry)
        sums.append(norm.batch_norm_sums(dz[s], y, mean))
        if dx is not None and y.numel() <= dx[s].numel():
            y = dx[s].as_strided(y.shape, y.stride()).copy_(y)
        waiting.append(y)
        del y
    sums, var_eps, m = norm.add_up(sums), var + settings.eps, dz.numel() // dz.shape[1]
    coefficients = norm.grad_input_coefficients(norm.scale_of(gamma, var_eps), var_eps, sums, m)
    for s in slabs:
        y_centred = norm.centre(waiting.pop(0), mean, inplace=True)
        dy = norm.grad_input_(dz[s], y_centred, *coefficients).to(x.dtype)
        del y_centred  # in half precision it is not dy's memory
        dx_s, dw_s, _ = conv2d_backward(dy, x[s], weight, *settings.geometry, (need_x, need_w, False))
        if need_w:  # a sum in the statistics' dtype
            dw = dw_s.to(mean.dtype) if dw is None else dw.add_(dw_s)
        if dx is not None:
            dx[s] = dx_s
            del dx_s
        del dw_s
    dw = None if dw is None else dw.to(weight.dtype)
    dgamma, dbeta = (t.to(mean.dtype) for t in (sums[1] * torch.rsqrt(var_eps), sums[0]))
    return dx_s if dx is None else dx, dw, torch.zeros_like(mean), dgamma, dbeta


class FusedConvBN2dFunction(torch.autograd.Function):
    """``apply(x, weight, bias, gamma, beta, Settings())``: z, and the mean and variance of y, (C_out,) each.

        y = conv(x, w)        μ, var = statistics of y        z = γ (y - μ)/σ + β,  σ² = var + ε

    x is (N, C_in, H, W), weight (C_out, C_in / groups, kH, kW), of one dtype; bias, gamma and beta are
    (C_out,) or None. z is (N, C_out, H_out, W_out) in x's dtype. The statistics are the batch's own, in
    float32 at least. The bias gets a gradient of 0 and is not in y: the norm would subtract it again. The
    tensors must fit each other, as `FusedConvBN2d` checks. A gradient that is differentiated again raises an
    error.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, settings):
        with torch._C._DisableAutocast():  # backward runs outside of it, and must recompute the same y
            first, *others = settings.slabs(x, weight)
            y = F.conv2d(x[first], weight, None, *settings.geometry)
            if others:
                y_first, y = y, y.new_empty_strided((len(x), *y.shape[1:]), y.stride())
                y[first] = y_first
                del y_first
            for s in others:
                y[s] = F.conv2d(x[s], weight, None, *settings.geometry)
            mean, var = norm.batch_stats(y)
            scale = norm.scale_of(gamma, var + settings.eps)
            for piece in norm.pieces(y):  # becomes z
                z = norm.centre(piece, mean, inplace=True).mul_(norm.per_channel(scale))
                if beta is not None:
                    z.add_(norm.per_channel(beta))
                piece.copy_(z)  # in half precision z has memory of its own
        ctx.save_for_backward(x, weight, gamma, mean, var)
        ctx.mark_non_differentiable(mean, var)
        ctx.settings = settings
        return y, mean, var

    @staticmethod
    def backward(ctx, dz, *_):
        needs, made_from = ctx.needs_input_grad[:5], (dz, *ctx.saved_tensors)
        with torch.no_grad(), torch._C._DisableAutocast():  # forward has chosen the dtypes
            grads = fused_backward(*made_from, ctx.settings, needs[:2])
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        if torch.is_grad_enabled():  # with create_graph=True
            # PyTorch's once_differentiable would raise only if dz has a graph, which it has not for the loss
            # z.sum(), and only where backward runs the whole graph. Else the missing second derivative would
            # silently count as 0.
            tensors = [t for t in (*grads, *made_from) if t is not None]
            guarded = iter(torch._C._functions.DelayedError(TWICE, len(tensors))(*tensors))
            grads = [grad if grad is None else next(guarded) for grad in grads]
        return *grads, None


class FusedConvBN2d(nn.Module):
    """``nn.Conv2d`` then ``nn.BatchNorm2d`` as one layer that keeps only its input for backward.

    Takes the arguments of ``nn.Conv2d`` (``bias`` is its own), by name the other ones of ``nn.BatchNorm2d``,
    and ``slab_size`` (`Settings`). The two modules stay inside as ``conv`` and ``bn``, so that the state_dict
    has the keys ``conv.weight``, ``bn.running_mean`` and so on, and ``layer.bn.eval()`` freezes the
    statistics. The two are never called, only the layer is: put hooks on it. Input (N, C_in, H, W) and output
    (N, C_out, H_out, W_out) are those of ``nn.Conv2d``, and under autocast the output has its dtype, too. In
    eval mode the norm is folded into the weight: dγ has fewer digits than the pair's where the running mean
    is hundreds of σ from 0, and in half precision the folded numbers may overflow before the pair's output
    does. In training mode the layer breaks the graph under torch.compile, and cannot be exported.

    Raises:
        ValueError, or PyTorch's own RuntimeError: an argument that does not fit, before anything is computed
            or changed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        *conv,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        slab_size: int | str | None = None,
        **conv_by_name,
    ) -> None:
        super().__init__()
        check_slab_size(slab_size)
        self.slab_size = slab_size
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, *conv, **conv_by_name)
        to = {"device": self.conv.weight.device, "dtype": self.conv.weight.dtype}
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, **to)

    @classmethod
    def from_pair(cls, conv: nn.Conv2d, bn: nn.BatchNorm2d, slab_size: int | str | None = None):
        """The layer that holds these two, and so shares their parameters and buffers.

        Raises a ValueError if they are not plain modules that fit each other, or if they have hooks.
        """
        check_modules(conv, bn, ("forward", "forward_pre", "backward", "backward_pre"))
        if bn.num_features != conv.out_channels:
            raise ValueError(f"bn must have conv's {conv.out_channels} channels, got {bn.num_features}")
        layer = cls(1, 1, 1, slab_size=slab_size, device="meta")
        layer.conv, layer.bn, layer.training = conv, bn, bn.training
        return layer

    def forward(self, input: Tensor) -> Tensor:
        conv, bn = self.conv, self.bn
        # prepare_qat and convert_sync_batchnorm make them others; prune computes the weight in a hook.
        check_modules(conv, bn, ("forward_pre",))
        self.check(input)
        weight, bias = conv.weight, conv.bias  # once: a parametrization computes them at each access
        y = self.output_of_no_images(input, weight)
        m = input.shape[0] * y.shape[2] * y.shape[3]  # not len() or numel(), which would fix exported sizes
        if m == 0:  # no statistics
            return bn.forward(conv._conv_forward(input, weight, bias))
        if not bn.training and bn.running_mean is not None:
            weight, shift = fold(weight, bias, bn)
            if shift.dtype == y.dtype or not (torch.is_grad_enabled() and shift.requires_grad):
                return conv._conv_forward(input, weight, shift.to(weight.dtype))
            return Shifted.apply(conv._conv_forward(input, weight, shift.detach().to(weight.dtype)), shift)
        if m == 1:
            raise ValueError("input: batch statistics need more than 1 value per channel, got 1")
        x, padding = padded(input, conv)
        x = x.to(y.dtype)  # only now: under autocast some paddings return float32
        settings = Settings(bn.eps, (conv.stride, padding, conv.dilation, conv.groups), self.slab_size)
        run = FusedConvBN2dFunction.apply
        if torch.compiler.is_compiling():
            # The compiler would notice that backward repeats forward's convolution, compute it once, and keep
            # y: the very tensor that this layer avoids keeping.
            run = torch.compiler.disable(run)
        z, mean, var = run(x, weight.to(y.dtype), bias, bn.weight, bn.bias, settings)
        if bn.training and bn.track_running_stats:
            counter, momentum = bn.num_batches_tracked, bn.momentum
            if counter is not None:
                counter.add_(1)
            if bn.running_mean is not None:
                if momentum is None:  # PyTorch's share without a counter is 0
                    momentum = 0.0 if counter is None else 1 / counter.to(bn.running_mean.dtype).view(())
                mean = mean if bias is None else mean + bias.detach()
                norm.update_running_stats(bn.running_mean, bn.running_var, mean, var, m, momentum)
        return z

    def check(self, input: Tensor) -> None:
        """Raise a ValueError if something does not fit that can be seen without the weight."""
        bn = self.bn
        norm.check_norm(input, bn.eps)
        if bn.momentum is not None:
            norm.check_momentum(bn.momentum, input.device)
        if (bn.running_mean is None) != (bn.running_var is None):
            raise ValueError("bn must have both running_mean and running_var, or neither, got one")
        if bn.eps == 0 and (bn.training or bn.running_mean is None):
            raise ValueError(f"eps must be above 0 for batch statistics, got {bn.eps}")

    def output_of_no_images(self, input: Tensor, weight: Tensor) -> Tensor:
        """conv of none of the images: its shape and, under autocast, its dtype. Raises what does not fit."""
        y = self.conv._conv_forward(input[:0].detach(), weight.detach(), None)  # with PyTorch's checks
        for name, t in (*self.named_parameters(), *self.named_buffers()):
            allowed = {y.dtype, torch.promote_types(y.dtype, torch.float32)}
            if name.startswith("conv."):  # under autocast any, since they are cast
                allowed = {t.dtype if torch._C._is_any_autocast_enabled() else input.dtype}
            elsewhere = t.device != input.device and t.dim() > 0  # a counter may be anywhere
            if elsewhere or (t.is_floating_point() and t.dtype not in allowed):
                must = f"{' or '.join(sorted(map(str, allowed)))} on {input.device}"
                raise ValueError(f"{name} must be {must} to fit input, got {t.dtype} on {t.device}")
            if self.bn.training and name.startswith(("bn.running_", "bn.num_")):
                norm.check_changeable(name, t)
            if name in VECTORS:
                norm.check_vectors(y.shape[1], input.device, **{name: t})
        return y

    def extra_repr(self) -> str:
        return f"slab_size={self.slab_size!r}"


def check_slab_size(slab_size) -> None:
    if slab_size not in (None, "batch") and (type(slab_size) is not int or slab_size < 1):
        allowed = 'None, "batch" or a number of images, at least 1'
        raise ValueError(f"slab_size must be {allowed}, got {slab_size!r}")


def check_modules(conv: nn.Module, bn: nn.Module, hooks: tuple[str, ...]) -> None:
    """Raise a ValueError if they compute anything but what nn's do, or have hooks of these kinds."""
    functions = ("forward", "_conv_forward", "_check_input_dim", "__call__", "_call_impl")
    for name, module, kind in (("conv", conv, nn.Conv2d), ("bn", bn, nn.BatchNorm2d)):
        same = all(getattr(type(module), f, None) is getattr(kind, f, None) for f in functions)
        if not (isinstance(module, kind) and same) or any(f in module.__dict__ for f in functions):
            got = f"must be a plain nn.{kind.__name__}, got {type(module).__name__}"
            raise ValueError(f"{name} {got}; helpers.remat works with any module")
        if any(getattr(module, f"_{when}_hooks") for when in hooks):
            raise ValueError(f"{name} has hooks, which the fused layer would not call; remove them first")


def padded(input: Tensor, conv: nn.Conv2d) -> tuple[Tensor, tuple[int, ...]]:
    """Input and padding of the same convolution, with as many zeros on one side as on the other."""
    if conv.padding_mode != "zeros":
        return F.pad(input, conv._reversed_padding_repeated_twice, conv.padding_mode), (0, 0)
    if conv.padding != "same":
        return input, (0, 0) if conv.padding == "valid" else conv.padding
    rows, columns = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    if rows % 2 or columns % 2:  # one more on the far side
        input = F.pad(input, (0, columns % 2, 0, rows % 2))
    return input, (rows // 2, columns // 2)


def fold(weight: Tensor, bias: Tensor | None, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals this one, then a norm with constant statistics.

    γ (w∗x + b - μ)/σ + β  =  (γ/σ w)∗x  +  β + γ/σ (b - μ), with ∗ the convolution. dγ follows from two
    gradients that cancel where |μ| is many times σ: there it has fewer digits than the pair's, which keeps y.
    """
    mean, var = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (bn.running_mean, bn.running_var))
    scale, beta = norm.scale_of(bn.weight, var + bn.eps), bn.bias
    shift = scale * (-mean if bias is None else bias - mean)
    shift = shift if beta is None else shift + beta
    return (weight * scale[:, None, None, None]).to(weight.dtype), shift


class Shifted(torch.autograd.Function):
    """y, to which the convolution has added the shift. Its gradient is a sum in float32.

    The convolution's own would be in y's dtype, and overflow in half precision.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y, shift):
        return torch.ops.aten._unsafe_view(y, y.shape)  # what autograd calls a view could not be changed

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dz):
        return dz, norm.channel_sums(dz, torch.float32)
