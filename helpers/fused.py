"""[batch norm → activation →] convolution [→ batch norm] in one autograd function that saves its input alone.

Unfused, each of these operations keeps an NCHW-sized tensor until backward. This function keeps its raw
input x, the weights and per-channel vectors, and makes the rest again, one *slab* (a few images) at a
time. With u = γ₁ (x - μ₁)/σ₁ + β₁, a = act(u), y = conv(a) and z = γ₂ (y - μ₂)/σ₂ + β₂, either norm
left out at will:

- the norm before (chapter 7) costs an elementwise recomputation: a from x;
- the norm after is differentiated by one of two backwards: y is *recomputed*, which costs a second
  convolution (chapters 4 and 6), or, for a pointwise convolution, *algebra* does without y (chapter 8).

From top to bottom: how a batch is cut and laid out; `enter`, what happens before the convolution;
`block_forward`; `block_backward` in its sweeps; then the bookkeeping: the operators, the Function, checks.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

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
    partial_stats,
    per_channel,
    stats_dtype,
    update_running_stats,
    wide_dtype,
)
from helpers.conv import conv_grads, pair_of_ints

__all__ = [
    "BatchNorm",
    "FusedBlock2d",
    "FusedBlockFunction",
    "FusedConvBN2d",
    "FusedConvBN2dFunction",
    "fused_block2d",
    "fused_conv_bn2d",
]

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


class Norm(NamedTuple):
    """One of the two norms. Its statistics are None where they are the batch's own."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float


class Conv(NamedTuple):
    """The geometry of a convolution, in F.conv2d's order."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


aten = torch.ops.aten
# name -> act(u, p) and its backward da, u, p -> du, where p is the slope of leaky_relu
ACTIVATIONS = {
    "none": (lambda u, p: u, lambda da, u, p: da),
    "relu": (lambda u, p: u.relu(), lambda da, u, p: aten.threshold_backward(da, u, 0)),
    "relu6": (lambda u, p: u.clamp(0, 6), lambda da, u, p: aten.hardtanh_backward(da, u, 0, 6)),
    "leaky_relu": (F.leaky_relu, lambda da, u, p: aten.leaky_relu_backward(da, u, p, False)),
    "silu": (lambda u, p: F.silu(u), lambda da, u, p: aten.silu_backward(da, u)),
    "hardswish": (lambda u, p: F.hardswish(u), lambda da, u, p: aten.hardswish_backward(da, u)),
    "gelu": (lambda u, p: F.gelu(u), lambda da, u, p: aten.gelu_backward(da, u)),
    "gelu_tanh": (
        lambda u, p: F.gelu(u, approximate="tanh"),
        lambda da, u, p: aten.gelu_backward(da, u, approximate="tanh"),
    ),
}


class Act(NamedTuple):
    """An activation of ACTIVATIONS and its parameter."""

    name: str = "none"
    parameter: float = 0.0

    def forward(self, u: Tensor) -> Tensor:
        return ACTIVATIONS[self.name][0](u, self.parameter)

    def backward(self, da: Tensor, u: Tensor) -> Tensor:
        return ACTIVATIONS[self.name][1](da, u, self.parameter)


def scale_of(norm: Norm) -> Tensor:
    """γ/σ."""
    inv_std = torch.rsqrt(norm.var + norm.eps)
    return inv_std if norm.gamma is None else norm.gamma * inv_std


def fold(weight: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals conv, then a norm with constant statistics.

    γ (w∗x + b - μ)/σ + β  =  (γ/σ w)∗x  +  β + γ/σ (b - μ), with ∗ the convolution.
    """
    scale = scale_of(norm)
    shift = scale * (-norm.mean if bias is None else bias - norm.mean)
    if norm.beta is not None:
        shift = shift + norm.beta
    return (weight * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)


def enter(x_s: Tensor, pre: Norm | None, act: Act) -> tuple[Tensor, Tensor, Tensor]:
    """What happens to a slab before the convolution: x - μ₁, u = γ₁ (x - μ₁)/σ₁ + β₁ and a = act(u)."""
    if pre is None:
        return x_s, x_s, act.forward(x_s)
    x_centred = centre(x_s, pre.mean)
    u = x_centred * per_channel(scale_of(pre))
    if pre.beta is not None:
        u += per_channel(pre.beta)
    return x_centred, u, act.forward(u).to(x_s.dtype)


def block_forward(x, weight, bias, pre: Norm | None, act: Act, post: Norm | None, conv: Conv, slab_size: int):
    """z, and the statistics μ₁, var₁, μ₂, var₂ that were used; empty ones for a norm that is not there.

    With batch statistics after it, the convolution's bias does not matter: the norm subtracts it again.
    A norm with constant statistics folds into the convolution.
    """
    none = x.new_empty(0, dtype=stats_dtype(x.dtype))
    if pre is not None and pre.mean is None:
        mean, var = batch_stats(x)
        pre = pre._replace(mean=mean, var=var)
    own = post is not None and post.mean is None
    if post is not None:
        weight, bias = (weight, None) if own else fold(weight, bias, post)
    y = empty_output(x, weight, *conv[:3])
    # Off the CPU one large convolution is as good as many small ones, and y has to be whole in the end.
    slices = slabs(len(x), max(x[:1].nbytes, y[:1].nbytes), weight, slab_size)
    cut = slices if y.is_cpu or pre is not None else [slice(0, len(x))]
    stats = []
    for s in cut:
        y_s = F.conv2d(enter(x[s], pre, act)[2], weight, bias, *conv)
        if own:
            stats += partial_stats(y_s)
        if len(cut) > 1:
            y[s] = y_s
        else:
            y = y_s
    if own:
        mean, var = merge_stats(stats, none.dtype)
        post = post._replace(mean=mean, var=var)
        for s in slices:
            z_s = centre(y[s], mean, inplace=True).mul_(per_channel(scale_of(post)))
            if post.beta is not None:
                z_s += per_channel(post.beta)
            if z_s.dtype != y.dtype:
                y[s] = z_s
    # Outputs of an operator must be memory of their own, so given statistics are copied.
    used = [
        t if t is not None else none for norm in (pre, post) for t in (norm[2:4] if norm else (none, none))
    ]
    return y, *(t.clone() for t in used)


def block_backward(
    dz,
    x,
    weight,
    bias,
    pre: Norm | None,
    act: Act,
    post: Norm | None,
    conv: Conv,
    slab_size,
    constant,
    algebra,
    needs,
):
    """dx, dw, db, dγ₁, dβ₁, dγ₂ and dβ₂ from dz; those not in ``needs`` come back empty.

    Three sweeps over the slabs: the sums that the norm after needs (`sums_by_recomputing` or
    `sums_by_algebra`); dy, the convolution's backward and the activation's; the norm before, in dx's memory.

    ``pre`` and ``post`` have their statistics here. ``constant`` says of each norm whether they were given:
    then no gradient passes through them.
    """
    need_x, need_w, need_b, need_gamma_1, need_beta_1, need_gamma, need_beta = needs
    need_a = need_x or need_gamma_1 or need_beta_1
    need_dy, own = need_a or need_w, post is not None and not constant[1]
    cut = slabs(len(x), max(dz[:1].nbytes, x[:1].nbytes), weight, slab_size)
    m, dtype, many = dz.numel() // dz.shape[1], stats_dtype(x.dtype), len(cut) > 1
    dx = torch.empty_like(x, memory_format=layout(x)) if need_x and many else x.new_empty(0)
    # The bias moves y; from here on, μ₂ is the mean of the y without it.
    if post is not None and bias is not None and constant[1]:
        post = post._replace(mean=post.mean - bias)

    # Sweep 1: Σ dz, Σ dz (y - μ₂), and the coefficients s, a, b of dy = s dz + a (y - μ₂) + b.
    s = a = b = gram = None
    waiting: deque[Tensor] = deque()
    forms = (pre, act, post, conv)
    if algebra and own:
        sum_dz, *gram = sums_by_algebra(dz, x, cut, weight, *forms)
        sum_dz_y = (weight.flatten(1) * gram[0]).sum(1)
    else:
        need_y = post is not None and (need_gamma or (own and need_dy))
        keep = (
            (lambda *slab: waiting.append(wait_in(dx, *slab) if many else slab[1]))
            if own and need_dy
            else None
        )
        need_sum = need_beta or need_b
        sum_dz, sum_dz_y = sums_by_recomputing(dz, x, cut, weight, *forms, need_y, need_sum, keep)
    if post is not None:
        s = scale_of(post)
    if own:
        s, a, b = grad_input_coefficients(s, post.var + post.eps, (sum_dz, sum_dz_y), m)

    # Sweep 2.
    dw, sums_1 = None, (wide_zeros(x.shape[1], x), wide_zeros(x.shape[1], x))
    s_1 = None if pre is None else scale_of(pre)
    if gram:
        G, R, a_mean = gram
        W = weight.flatten(1).to(G.dtype)
        W_s, W_a = s[:, None] * W, a[:, None] * W
        dw = (s[:, None] * G + W_a @ R).reshape(weight.shape) if need_w else None
        kernels = [k.T[:, :, None, None].to(x.dtype) for k in (W_s, W_a.T @ W)] + [
            (W.T @ b.to(W.dtype)).to(x.dtype)
        ]
    for i in cut if need_a or (need_dy and not gram) else ():
        x_centred, u, a_i = enter(x[i], pre, act)
        if gram:
            da = algebra_grad_input(dz[i], a_i, a_mean, kernels, conv)
        else:
            dy = dz[i]
            if post is not None:
                y = waiting.popleft() if own else torch.empty_like(dy, dtype=dtype)
                y = centre(y, post.mean) if own and y.dtype != dtype else y
                dy = grad_input_(dy, y, s, a, b).to(x.dtype)
                del y
            da, dw_i, _ = conv_grads(dy, a_i, weight, *conv, (need_a, need_w, False))
            del dy
            if need_w:
                dw = dw_i.to(dtype) if dw is None else dw.add_(dw_i)
        if not need_a:
            continue
        du = act.backward(da if pre is None else da.to(dtype), u)
        if pre is not None:
            sums_1[0].add_(du.sum(CHANNELS))
            sums_1[1].add_((du * x_centred).sum(CHANNELS))
            du = du.mul_(per_channel(s_1)) if constant[0] else du
        if need_x and many:
            dx[i] = du
        elif need_x:
            dx = du.to(x.dtype)

    # Sweep 3: the norm before, from du, which waits in dx.
    if need_x and pre is not None and not constant[0]:
        coefficients = grad_input_coefficients(s_1, pre.var + pre.eps, sums_1, x.numel() // x.shape[1])
        for i in cut:
            dx[i] = grad_input_(dx[i], centre(x[i], pre.mean), *coefficients)

    none = x.new_empty(0, dtype=dtype)
    db = none
    if need_b:  # with batch statistics the norm after subtracts the bias again
        db = torch.zeros_like(bias, dtype=dtype) if own else (sum_dz if s is None else s * sum_dz)
    gammas = [
        t * torch.rsqrt(norm.var + norm.eps) if need else none
        for t, norm, need in ((sums_1[1], pre, need_gamma_1), (sum_dz_y, post, need_gamma))
    ]
    betas = [t if need else none for t, need in ((sums_1[0], need_beta_1), (sum_dz, need_beta))]
    # An operator's outputs must not share memory.
    small = (t.to(dtype, copy=True) for t in (db, gammas[0], betas[0], gammas[1], betas[1]))
    return dx, dw.to(weight.dtype) if need_w else x.new_empty(0), *small


def wide_zeros(channels: int, like: Tensor) -> Tensor:
    """A per-channel sum to add slabs to."""
    return torch.zeros(channels, dtype=wide_dtype(like), device=like.device)


def sums_by_recomputing(dz, x, cut, weight, pre, act, post, conv, need_y: bool, need_sum: bool, keep):
    """Σ dz and Σ dz (y - μ₂), with y = conv(a) computed again.

    ``keep(slab, y_s)`` takes charge of each recomputed slab: y - μ₂ in full precision, y in half.
    """
    sum_dz, sum_dz_y = (wide_zeros(dz.shape[1], dz) for _ in "12")
    dtype = stats_dtype(x.dtype)
    for s in cut if need_y or need_sum else ():
        sum_dz += dz[s].sum(CHANNELS, dtype=dtype)
        if need_y:
            y_s = F.conv2d(enter(x[s], pre, act)[2], weight, None, *conv)
            # y must be forward's y to the last bit, or Σ (y - μ) is not 0 and a large gradient leaks through
            # it. So it is rounded where forward rounded it, and μ is subtracted after that.
            y_centred = centre(y_s, post.mean, inplace=True)
            sum_dz_y += (dz[s] * y_centred).sum(CHANNELS)
            del y_centred
            if keep is not None:
                keep(s, y_s)
    return sum_dz, sum_dz_y


def wait_in(dx: Tensor, s: slice, y_s: Tensor) -> Tensor:
    """Move ``y_s`` into the part of ``dx`` that its slab's gradient will overwrite, if it fits there.

    So no second buffer exists: the recomputed outputs wait where the result goes. An output that is larger
    than the input (or whose input needs no gradient) stays in its own memory.
    """
    if not dx.numel() or y_s.numel() > dx[s].numel():
        return y_s
    room = torch.as_strided(dx, y_s.shape, y_s.stride(), dx[s].storage_offset())
    return room.copy_(y_s)


def columns(t: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    """The inputs of every output pixel, (N, C_in kH kW, H_out, W_out): then the convolution is a matrix."""
    if weight.shape[2:] == (1, 1) and not any(conv.padding):
        return t[:, :, :: conv.stride[0], :: conv.stride[1]]
    size = output_size(t, weight, *conv[:3])
    return F.unfold(t, weight.shape[2:], conv.dilation, conv.padding, conv.stride).unflatten(2, size)


def product(p: Tensor, q: Tensor) -> Tensor:
    """Σ p qᵀ over images and pixels, (N, P, H, W) and (N, Q, H, W) -> (P, Q): a pointwise weight gradient."""
    weight = q.new_empty(p.shape[1], q.shape[1], 1, 1)
    return conv_grads(p, q, weight, [1, 1], [0, 0], [1, 1], 1, (False, True, False))[1].flatten(1)


def sums_by_algebra(dz, x, cut, weight, pre, act, post, conv):
    """Σ dz, G = Σ dz ãᵀ, R = Σ ã ãᵀ and the mean of a, where ã = a - mean(a): y is not needed.

    As y - μ₂ = W ã, Σ dz (y - μ₂) = rowsum(W∘G). Each slab is centred by its own mean first, which keeps the
    digits, and the slabs are merged as in `merge_stats`: with d = mean of the slab - mean of all,
    G = Σ_s G_s + (Σ dz)_s dᵀ and R = Σ_s R_s + n_s d dᵀ.
    """
    dtype, wide, G, R, parts = stats_dtype(x.dtype), wide_dtype(x), 0, 0, []
    for s in cut:
        a_s = columns(enter(x[s], pre, act)[2], weight, conv).to(dtype)
        dz_s = dz[s].to(dtype)
        mean_s = a_s.mean(CHANNELS)
        a_s = a_s - per_channel(mean_s)
        rest = a_s.mean(CHANNELS)  # the rounding error of mean_s
        G, R = G + product(dz_s, a_s).to(wide), R + product(a_s, a_s).to(wide)
        parts.append((a_s.numel() // a_s.shape[1], mean_s, rest, dz_s.sum(CHANNELS)))
    sizes, *vectors = zip(*parts, strict=True)
    sizes = torch.tensor(sizes, dtype=wide, device=x.device)[:, None]
    means, rests, sums = (torch.stack(v).to(wide) for v in vectors)
    mean = (sizes * (means + rests)).sum(0) / sizes.sum()
    d = means - mean
    return sums.sum(0), G + sums.T @ d, R + (sizes * d).T @ d, mean.to(dtype)


def algebra_grad_input(
    dz_s: Tensor, a_s: Tensor, a_mean: Tensor, kernels: list[Tensor], conv: Conv
) -> Tensor:
    """da = Wᵀ diag(s) dz + (Wᵀ diag(a) W) ã + Wᵀ b for a pointwise convolution, as two of its kind."""
    kernel_dz, kernel_a, bias = kernels
    rows, columns = (slice(None, None, step) for step in conv.stride)
    a_centred = centre(a_s[:, :, rows, columns], a_mean).to(a_s.dtype)
    da = F.conv2d(dz_s, kernel_dz).add_(F.conv2d(a_centred, kernel_a, bias))
    if da.shape == a_s.shape:
        return da
    sparse = torch.zeros_like(a_s)
    sparse[:, :, rows, columns] = da
    return sparse


# The two functions as operators. torch.compile would otherwise see that the recomputed convolution equals
# the first one, keep the first instead, and with it the memory that this file saves.
SETTINGS = (
    "float[] eps, str act, float act_parameter, "
    "int[] stride, int[] padding, int[] dilation, int groups, int slab_size"
)


def _unpack(norms: list[Tensor | None], there: list[bool], eps: list[float], settings) -> tuple:
    """pre, act, post, conv and slab_size from the operators' flat arguments."""
    pre, post = (Norm(*norms[4 * i : 4 * i + 4], eps[i]) if there[i] else None for i in (0, 1))
    name, parameter, stride, padding, dilation, groups, slab_size = settings
    return pre, Act(name, parameter), post, Conv(stride, padding, dilation, groups), slab_size


@torch.library.custom_op(
    "fused_block::forward",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, Tensor?[] norms, bool[] there, {SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(x, weight, bias, norms, there, eps, *settings):
    with torch.autocast(x.device.type, enabled=False):  # the arguments have their final dtypes
        return block_forward(x, weight, bias, *_unpack(norms, there, eps, settings))


@torch.library.custom_op(
    "fused_block::backward",
    mutates_args=(),
    schema="(Tensor dz, Tensor x, Tensor weight, Tensor? bias, Tensor?[] norms, bool[] there, "
    f"bool[] constant, bool algebra, bool[] needs, {SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(dz, x, weight, bias, norms, there, constant, algebra, needs, eps, *settings):
    with torch.autocast(x.device.type, enabled=False):
        forms = _unpack(norms, there, eps, settings)
        return block_backward(dz, x, weight, bias, *forms, constant, algebra, needs)


@_forward.register_fake
def _(x, weight, bias, norms, there, eps, act, act_parameter, stride, padding, dilation, *_):
    sizes = (x.shape[1] * there[0],) * 2 + (weight.shape[0] * there[1],) * 2
    stats = (torch.empty(size, dtype=stats_dtype(x.dtype), device=x.device) for size in sizes)
    return empty_output(x, weight, stride, padding, dilation), *stats


@_backward.register_fake
def _(dz, x, weight, bias, norms, there, constant, algebra, needs, *_):
    sizes = (weight.shape[0], x.shape[1], x.shape[1], weight.shape[0], weight.shape[0])
    small = [torch.empty(size, dtype=stats_dtype(x.dtype), device=x.device) for size in sizes]
    large = [torch.empty_like(t, memory_format=layout(t)) for t in (x, weight)]
    return tuple(t if need else t.new_empty(0) for t, need in zip(large + small, needs, strict=True))


class FusedBlockFunction(torch.autograd.Function):
    """``apply(x, weight, bias, γ₁, β₁, γ₂, β₂, μ₁, var₁, μ₂, var₂, there, algebra, *settings)``.

    ``there`` says which of the two norms exist; statistics that are None are the batch's own. Returns z
    and the statistics that were used. Its backward cannot be differentiated again: trying raises.
    """

    @staticmethod
    def forward(x, weight, bias, g_1, b_1, g_2, b_2, mean_1, var_1, mean_2, var_2, there, algebra, *settings):
        norms = [g_1, b_1, mean_1, var_1, g_2, b_2, mean_2, var_2]
        return _forward(x, weight, bias, norms, there, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, g_1, b_1, g_2, _, mean_1, _, mean_2, _, ctx.there, ctx.algebra, *ctx.settings = (
            inputs
        )
        ctx.constant = [mean_1 is not None, mean_2 is not None]
        ctx.save_for_backward(x, weight, bias, g_1, b_1, g_2, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, dz, *_):
        x, weight, bias, g_1, b_1, g_2, mean_1, var_1, mean_2, var_2 = ctx.saved_tensors
        norms = [g_1, b_1, mean_1, var_1, g_2, None, mean_2, var_2]
        needs = list(ctx.needs_input_grad[:7])
        grads = _backward(
            dz, x, weight, bias, norms, ctx.there, ctx.constant, ctx.algebra, needs, *ctx.settings
        )
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * (
            6 + len(ctx.settings)
        )


class FusedConvBN2dFunction:
    """The pair's case of `FusedBlockFunction`: convolution, then batch norm, recomputed in backward."""

    @staticmethod
    def apply(x, weight, bias, gamma, beta, mean, var, eps, stride, padding, dilation, groups, slab_size):
        """z, and the statistics that were used: ``mean`` and ``var``, or where they are None y's own."""
        norms = (None, None, gamma, beta, None, None, mean, var)
        settings = ([0.0, eps], *Act(), stride, padding, dilation, groups, slab_size)
        z, _, _, *stats = FusedBlockFunction.apply(x, weight, bias, *norms, [False, True], False, *settings)
        return z, *stats


class BatchNorm(NamedTuple):
    """The arguments of F.batch_norm but its input; `of` reads them from an nn.BatchNorm2d."""

    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None

    @classmethod
    def of(cls, bn: nn.BatchNorm2d) -> BatchNorm:
        stats = (bn.running_mean, bn.running_var, bn.training, bn.momentum, bn.eps, bn.num_batches_tracked)
        return cls(bn.weight, bn.bias, *stats)

    def constants(self) -> tuple[Tensor | None, Tensor | None]:
        """The running statistics where they are used, and None where the batch's own are."""
        own = self.training or self.running_mean is None
        return (None, None) if own else (self.running_mean, self.running_var)

    @torch.no_grad()
    def update(self, mean: Tensor, var: Tensor, m: int) -> None:
        """Move the running statistics, if this is a training step and there are any."""
        if not self.training or self.running_mean is None:
            return
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()
        update_running_stats(self.running_mean, self.running_var, mean, var, m, momentum)


def fused_block2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_before: BatchNorm | None = None,
    activation: Act = Act(),  # noqa: B008
    norm_after: BatchNorm | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    slab_size: int | str | None = None,
    backward: str = "auto",
) -> Tensor:
    """norm_after(F.conv2d(activation(norm_before(input)), weight, bias, ...)) that saves ``input`` alone.

    Args:
        input: (N, C_in, H, W), floating point. Under autocast it and the weights are cast as F.conv2d's.
        weight: (C_out, C_in / groups, kH, kW), the dtype and device of ``input``.
        bias: the convolution's, (C_out,) or None. Before batch statistics it only moves the running mean.
        norm_before, norm_after: batch norms of C_in and C_out channels, or None. Running statistics are
            updated in place in training.
        activation: between ``norm_before`` and the convolution.
        stride, padding, dilation, groups: as in ``F.conv2d``, padding "same" and "valid" included.
        slab_size: images that backward works on at once: the memory that it needs for a moment grows with
            it. None chooses by size (see SLAB_BYTES), "batch" takes the whole batch, as the tutorial does.
        backward: how ``norm_after`` is differentiated: "recompute" computes the convolution again,
            "algebra" does without its output, "auto" chooses (see `algebra_pays`).

    Returns:
        (N, C_out, H_out, W_out) in the dtype of ``input`` (under autocast, autocast's).

    Raises:
        ValueError: an argument that does not fit, before anything is computed or changed.
    """
    stride, dilation = pair_of_ints("stride", stride, 1), pair_of_ints("dilation", dilation, 1)
    slab_size = slab_argument(slab_size)
    if activation.name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation.name!r}")
    check_backward(backward)
    input, weight, bias = autocast(input, weight, bias)
    check_tensors(input, weight, bias, groups)
    check_norm("norm_before", norm_before, input.shape[1], input.device)
    check_norm("norm_after", norm_after, weight.shape[0], input.device)
    plain = norm_before is None and activation.name == "none"
    input, padding = explicit_padding(input, weight, padding, dilation, stride, plain)
    size = output_size(input, weight, stride, padding, dilation)
    if min(size) < 1:
        raise ValueError(
            f"weight: a kernel of {tuple(weight.shape[2:])}, dilation {dilation}, is larger than the padded "
            f"input of {tuple(s + 2 * p for s, p in zip(input.shape[2:], padding, strict=True))}"
        )
    norms = (norm_before, norm_after)
    constants = [norm.constants() if norm is not None else (None, None) for norm in norms]
    values = (input.shape[0] * input.shape[2] * input.shape[3], input.shape[0] * size[0] * size[1])
    for name, norm, m, (mean, _) in zip(("before", "after"), norms, values, constants, strict=True):
        if norm is not None and mean is None and m == 1:
            raise ValueError(
                f"input: batch statistics need more than 1 value per channel, norm_{name} gets 1"
            )
    conv = Conv(stride, padding, dilation, groups)
    if len(input) == 0:
        return empty_batch(input, weight, bias, norm_before, activation, norm_after, conv)
    can = norm_after is not None and constants[1][0] is None and algebra_applies(input, weight, conv, plain)
    if backward == "algebra" and not can:
        raise ValueError(
            'backward="algebra" needs norm_after with batch statistics, groups=1, and a 1x1 kernel without '
            "padding (or an input that needs no gradient and nothing before the convolution)"
        )
    algebra = can and (backward == "algebra" or (backward == "auto" and algebra_pays(input, weight, size)))
    affine = [t for norm in norms for t in (norm[:2] if norm is not None else (None, None))]
    there, eps = [norm is not None for norm in norms], [0.0 if norm is None else norm.eps for norm in norms]
    z, *stats = FusedBlockFunction.apply(
        input,
        weight,
        bias,
        *affine,
        *constants[0],
        *constants[1],
        there,
        algebra,
        eps,
        *activation,
        *conv,
        slab_size,
    )
    if norm_before is not None:
        norm_before.update(*stats[:2], values[0])
    if norm_after is not None:
        norm_after.update(stats[2] if bias is None else stats[2] + bias, stats[3], values[1])
    return z


def algebra_applies(input: Tensor, weight: Tensor, conv: Conv, plain: bool) -> bool:
    """Whether y - μ is a matrix times ã: pointwise, or a first layer, whose input needs no gradient."""
    pointwise = weight.shape[2:] == (1, 1) and not any(conv.padding)
    return conv.groups == 1 and (pointwise or (plain and not input.requires_grad))


def algebra_pays(input: Tensor, weight: Tensor, size: list[int]) -> bool:
    """The rule of "auto": the two products with R and with ã must cost less than the convolution saved.

    They cost about 2 C_in² a pixel (columns for a larger kernel), the convolution C_in C_out.
    """
    c_out, columns = weight.shape[0], weight[0].numel()
    pixels = input.shape[0] * size[0] * size[1]
    if weight.shape[2:] != (1, 1):
        return c_out >= 2 * columns
    return c_out >= 1.5 * columns and pixels >= 8 * columns


def empty_batch(input, weight, bias, norm_before, activation: Act, norm_after, conv: Conv) -> Tensor:
    """The operations one by one: an empty batch has no slab, and moves the counters alone."""

    def norm(t: Tensor, bn: BatchNorm | None) -> Tensor:
        if bn is None:
            return t
        if bn.training and bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        own = bn.constants()[0] is None
        return F.batch_norm(t, bn.running_mean, bn.running_var, bn.gamma, bn.beta, own, 0.0, bn.eps)

    return norm(F.conv2d(activation.forward(norm(input, norm_before)), weight, bias, *conv), norm_after)


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

    `fused_block2d` without a norm before, which describes shapes and errors. ``gamma`` and ``beta`` are the
    norm's weight and bias; ``momentum`` None is the cumulative average, which needs ``num_batches_tracked``.
    """
    norm = BatchNorm(gamma, beta, running_mean, running_var, training, momentum, eps, num_batches_tracked)
    geometry = (stride, padding, dilation, groups)
    return fused_block2d(input, weight, bias, None, Act(), norm, *geometry, slab_size, "recompute")


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


def check_backward(backward: str) -> None:
    """Raise a ValueError for a way to differentiate the norm after that does not exist."""
    if backward not in ("auto", "recompute", "algebra"):
        raise ValueError(f'backward must be "auto", "recompute" or "algebra", got {backward!r}')


def pad_first(conv: nn.Conv2d, input: Tensor):
    """The input and padding to call the function with: a mode other than zeros pads ``input`` beforehand."""
    if conv.padding_mode == "zeros" or input.dim() != 4:
        return input, conv.padding
    return F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0


def explicit_padding(input: Tensor, weight: Tensor, padding, dilation, stride, plain: bool):
    """Padding as two ints; "same" with an even kernel pads ``input`` by one more on the far side first."""
    if padding == "valid":
        return input, [0, 0]
    if padding != "same":
        return input, pair_of_ints("padding", padding, 0)
    if stride != [1, 1]:
        raise ValueError(f'padding="same" needs stride 1, got stride {stride}')
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        if not plain:
            raise ValueError(
                'padding="same" with an even kernel pads one side more, after the norm and the activation; '
                f"got a kernel of {tuple(weight.shape[2:])}: pad and convolve on your own here"
            )
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, [t // 2 for t in total]


def check_tensors(input, weight, bias, groups) -> None:
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
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, t in {"weight": weight, "bias": bias}.items():
        if t is not None and t.device != input.device:
            raise ValueError(f"{name} must be on input's device {input.device}, got {t.device}")
        if t is not None and t.dtype != input.dtype:
            raise ValueError(f"{name} must have input's dtype {input.dtype}, got {t.dtype}")


def check_norm(which: str, norm: BatchNorm | None, channels: int, device: torch.device) -> None:
    """Raise a ValueError that names the tensor of a norm that does not fit."""
    if norm is None:
        return
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{which}: running_mean and running_var must both be given or both be None")
    for name in ("gamma", "beta", "running_mean", "running_var"):
        t = getattr(norm, name)
        if t is not None and tuple(t.shape) != (channels,):
            raise ValueError(f"{which}: {name} must have shape ({channels},), got {tuple(t.shape)}")
        if t is not None and t.device != device:
            raise ValueError(f"{which}: {name} must be on input's device {device}, got {t.device}")


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
        check_modules(conv=(conv, nn.Conv2d), bn=(bn, nn.BatchNorm2d))
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
        conv, bn = self.conv, self.bn
        input, padding = pad_first(conv, input)
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


def check_modules(**modules: tuple[nn.Module | None, type]) -> None:
    """Each must be a plain module of its kind (or None), without hooks, which no fused layer would call."""
    for name, (module, kind) in modules.items():
        if module is None:
            continue
        if not isinstance(module, kind) or type(module).forward is not kind.forward:
            raise ValueError(f"{name} must be a plain nn.{kind.__name__}, got {type(module).__name__}")
        if has_hooks(module):
            raise ValueError(f"{name} has hooks, which the fused layer would not call; remove them first")


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has a hook that runs when it is called or differentiated."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)


def activation_of(module: nn.Module | None) -> Act:
    """The Act that computes what ``module`` does; a ValueError for one that is not in ACTIVATIONS."""
    kinds = {
        nn.Identity: "none",
        nn.ReLU: "relu",
        nn.ReLU6: "relu6",
        nn.SiLU: "silu",
        nn.Hardswish: "hardswish",
    }
    if module is None:
        return Act()
    if type(module) in kinds:
        return Act(kinds[type(module)])
    if type(module) is nn.LeakyReLU:
        return Act("leaky_relu", module.negative_slope)
    if type(module) is nn.GELU:
        return Act("gelu" if module.approximate == "none" else "gelu_tanh")
    raise ValueError(
        "activation must be None or one of ReLU, ReLU6, LeakyReLU, SiLU, Hardswish, GELU, Identity, "
        f"got {type(module).__name__}"
    )


class FusedBlock2d(nn.Module):
    """[norm → activation →] conv [→ norm] from modules that exist, as one layer that keeps its input alone.

    The modules stay inside under the names of the arguments, and so share their parameters and buffers;
    only this layer is called, though: hooks belong on it.

    Args:
        conv: an nn.Conv2d.
        norm_before, norm_after: nn.BatchNorm2d of its input and of its output channels, or None.
        activation: an nn.ReLU, ReLU6, LeakyReLU, SiLU, Hardswish, GELU or Identity, or None.
        slab_size, backward: see `fused_block2d`.

    Raises:
        ValueError: modules that are not of these kinds, do not fit, or have hooks.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm_before: nn.BatchNorm2d | None = None,
        activation: nn.Module | None = None,
        norm_after: nn.BatchNorm2d | None = None,
        slab_size: int | str | None = None,
        backward: str = "auto",
    ) -> None:
        super().__init__()
        slab_argument(slab_size)
        norms = {"norm_before": (norm_before, nn.BatchNorm2d), "norm_after": (norm_after, nn.BatchNorm2d)}
        check_modules(conv=(conv, nn.Conv2d), **norms)
        for (name, (norm, _)), channels in zip(
            norms.items(), (conv.in_channels, conv.out_channels), strict=True
        ):
            if norm is not None and norm.num_features != channels:
                raise ValueError(f"{name} must have {channels} channels to fit conv, got {norm.num_features}")
        act = activation_of(activation)
        plain = norm_before is None and act.name == "none"
        if conv.padding_mode != "zeros" and not plain:
            raise ValueError(f'conv must have padding_mode "zeros" behind a norm, got {conv.padding_mode!r}')
        check_backward(backward)
        self.norm_before, self.activation, self.conv, self.norm_after = (
            norm_before,
            activation,
            conv,
            norm_after,
        )
        self.slab_size, self.backward = slab_size, backward

    def forward(self, input: Tensor) -> Tensor:
        conv = self.conv
        input, padding = pad_first(conv, input)
        norms = [None if bn is None else BatchNorm.of(bn) for bn in (self.norm_before, self.norm_after)]
        geometry = (conv.stride, padding, conv.dilation, conv.groups)
        act = activation_of(self.activation)
        tail = (*geometry, self.slab_size, self.backward)
        return fused_block2d(input, conv.weight, conv.bias, norms[0], act, norms[1], *tail)

    def extra_repr(self) -> str:
        return f"slab_size={self.slab_size!r}, backward={self.backward!r}"
