"""[batch norm → activation →] convolution [→ batch norm] in one autograd function that saves its input alone.

Unfused, each of these operations keeps an NCHW-sized tensor until backward. This function keeps its raw
input x, the weights and per-channel vectors, and makes the rest again, one *slab* (a few images) at a
time. With u = γ₁ (x - μ₁)/σ₁ + β₁, a = act(u), y = conv(a) and z = γ₂ (y - μ₂)/σ₂ + β₂, either norm
left out at will:

- the norm before (chapter 7) costs an elementwise recomputation: a from x;
- the norm after is differentiated by one of two backwards: y is *recomputed*, which costs a second
  convolution (chapters 4 and 6), or, for a pointwise convolution, *algebra* does without y (chapter 8).

From top to bottom: how a batch is cut and laid out; `Entry`, what happens before the convolution;
`block_forward`; `block_backward` in its sweeps; then the bookkeeping: the operators, the Function, checks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.batch_norm import (
    CHANNELS,
    add_up,
    batch_norm_sums,
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
SLAB_BYTES = {"cpu": 1 << 22}
SLAB_BYTES_ACCELERATOR = 1 << 27
# A matrix product is taken for images of so many pixels, or small weights: there it was at least as fast as
# the library's convolution where it was measured.
MATRIX_PIXELS, MATRIX_WEIGHTS = 256, 1 << 15
MATRIX_GRADIENTS = 3 << 12  # up to so many weights, their gradient of each image is laid out and summed


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


def convolve(a: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, out: Tensor | None = None) -> Tensor:
    """conv(a), in ``out`` if that is given.

    On a CPU a pointwise convolution may be a matrix product, which writes where it is told to. One with a
    stride is done without, on the pixels that it sees.
    """
    a, conv = seen(a, weight, conv)
    if bias is None and is_product(a, weight, conv, a if out is None else out):
        if out is None:
            out = a.new_empty(a.shape[0], weight.shape[0], *a.shape[2:])
        torch.bmm(weight.flatten(1).expand(a.shape[0], -1, -1), a.flatten(2), out=out.flatten(2))
        return out
    y = F.conv2d(a, weight, bias, *conv)
    return y if out is None else out.copy_(y)


def seen(a: Tensor, weight: Tensor, conv: Conv) -> tuple[Tensor, Conv]:
    """On a CPU, the pixels of ``a`` that a pointwise convolution sees, and the convolution of them."""
    if not a.is_cpu or conv.stride == [1, 1] or not is_pointwise(weight, conv) or not a.is_contiguous():
        return a, conv
    return pixels_seen(a, conv), conv._replace(stride=[1, 1])


def pixels_seen(t: Tensor, conv: Conv) -> Tensor:
    """The pixels that a pointwise convolution sees; on a CPU side by side, where work on them is fast."""
    if conv.stride == [1, 1]:
        return t
    pixels = t[:, :, :: conv.stride[0], :: conv.stride[1]]
    return pixels.contiguous(memory_format=layout(t)) if t.is_cpu else pixels


def is_product(a: Tensor, weight: Tensor, conv: Conv, y: Tensor) -> bool:
    """Whether the convolution of ``a`` and its gradients are better done as matrix products."""
    if not a.is_cpu or not is_matrix(weight, conv) or a.dtype not in (torch.float32, torch.float64):
        return False
    pays = math.prod(a.shape[2:]) >= MATRIX_PIXELS or weight.numel() <= MATRIX_WEIGHTS
    return pays and a.is_contiguous() and weight.is_contiguous() and y.is_contiguous()


def seen_grads(dy: Tensor, a: Tensor, weight: Tensor, conv: Conv, needs) -> tuple[Tensor | None, ...]:
    """The convolution's gradients, as `convolve` computes it."""
    pixels, of_pixels = seen(a, weight, conv)
    if weight.numel() <= MATRIX_GRADIENTS and is_product(pixels, weight, of_pixels, dy):
        matrix, dy_n, a_n = weight.flatten(1).T.expand(len(dy), -1, -1), dy.flatten(2), pixels.flatten(2)
        da = torch.bmm(matrix, dy_n).view(pixels.shape) if needs[0] else None
        dw = torch.bmm(dy_n, a_n.transpose(1, 2)).sum(0).view(weight.shape) if needs[1] else None
        db = dy.sum(CHANNELS) if needs[2] else None
    else:
        da, dw, db = conv_grads(dy, pixels, weight, *of_pixels, needs)
    return da if da is None or da.shape == a.shape else spread(da, a, conv), dw, db


def spread(da: Tensor, a: Tensor, conv: Conv, out: Tensor | None = None) -> Tensor:
    """The gradient of ``a`` from that of the pixels that a pointwise convolution sees: 0 between them."""
    sparse = torch.zeros_like(a) if out is None else out.zero_()
    sparse[:, :, :: conv.stride[0], :: conv.stride[1]] = da
    return sparse


def is_pointwise(weight: Tensor, conv: Conv) -> bool:
    """Whether the convolution looks at one pixel at a time, though perhaps not at every one."""
    return weight.shape[2:] == (1, 1) and not any(conv.padding)


def is_matrix(weight: Tensor, conv: Conv) -> bool:
    """Whether the convolution multiplies each pixel with one matrix."""
    return is_pointwise(weight, conv) and conv.stride == [1, 1] and conv.groups == 1


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
    group: str = ""  # name of the process group whose whole batch the statistics are of


class Conv(NamedTuple):
    """The geometry of a convolution, in F.conv2d's order."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


aten = torch.ops.aten
# name -> act(u, p) and its backward (da, u, p, out) -> du, where p is the slope of leaky_relu. Those of
# FROM_RESULT overwrite u with a, and their backward takes a for u.
ACTIVATIONS = {
    "none": (lambda u, p: u, lambda da, u, p, out: out.copy_(da) if out is not da else da),
    "relu": (
        lambda u, p: u.relu_(),
        lambda da, u, p, out: aten.threshold_backward.grad_input(da, u, 0, grad_input=out),
    ),
    "relu6": (
        lambda u, p: u.clamp_(0, 6),
        lambda da, u, p, out: aten.hardtanh_backward.grad_input(da, u, 0, 6, grad_input=out),
    ),
    "leaky_relu": (
        lambda u, p: F.leaky_relu(u, p),
        lambda da, u, p, out: aten.leaky_relu_backward.grad_input(da, u, p, False, grad_input=out),
    ),
    "silu": (
        lambda u, p: F.silu(u),
        lambda da, u, p, out: aten.silu_backward.grad_input(da, u, grad_input=out),
    ),
    "hardswish": (
        lambda u, p: F.hardswish(u),
        lambda da, u, p, out: aten.hardswish_backward.out(da, u, out=out),
    ),
    "gelu": (
        lambda u, p: F.gelu(u),
        lambda da, u, p, out: aten.gelu_backward.grad_input(da, u, grad_input=out),
    ),
    "gelu_tanh": (
        lambda u, p: F.gelu(u, approximate="tanh"),
        lambda da, u, p, out: aten.gelu_backward.grad_input(da, u, approximate="tanh", grad_input=out),
    ),
}
FROM_RESULT = ("none", "relu", "relu6")


class Act(NamedTuple):
    """An activation of ACTIVATIONS and its parameter."""

    name: str = "none"
    parameter: float = 0.0

    def forward(self, u: Tensor) -> Tensor:
        """act(u), in u's memory where backward needs no u."""
        return ACTIVATIONS[self.name][0](u, self.parameter)

    def backward(self, da: Tensor, u: Tensor, out: Tensor | None = None) -> Tensor:
        """du, in ``out`` or, without one, in da's memory."""
        return ACTIVATIONS[self.name][1](da, u, self.parameter, da if out is None else out)


def scales(norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """σ² = var + ε, 1/σ and γ/σ."""
    var_eps = norm.var + norm.eps
    inv_std = var_eps.rsqrt()
    return var_eps, inv_std, inv_std if norm.gamma is None else norm.gamma * inv_std


def fold(weight: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals conv, then a norm with constant statistics.

    γ (w∗x + b - μ)/σ + β  =  (γ/σ w)∗x  +  β + γ/σ (b - μ), with ∗ the convolution.
    """
    *_, scale = scales(norm)
    shift = scale * (-norm.mean if bias is None else bias - norm.mean)
    if norm.beta is not None:
        shift = shift + norm.beta
    return (weight * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)


def normalise(y: Tensor, norm: Norm) -> Tensor:
    """γ (y - μ)/σ + β, by the library."""
    return torch.batch_norm(y, norm.gamma, norm.beta, norm.mean, norm.var, False, 0.0, norm.eps, False)


def normalise_(y: Tensor, norm: Norm, slices: list[slice]) -> None:
    """The same in y's own memory, slab by slab."""
    scale, beta = per_channel(scales(norm)[2]), None if norm.beta is None else per_channel(norm.beta)
    for s in slices:
        z_s = centre(y[s], norm.mean, inplace=True).mul_(scale)
        if beta is not None:
            z_s.add_(beta)
        if z_s.dtype != y.dtype:
            y[s] = z_s


class Entry(NamedTuple):
    """The way from x to the convolution's input a, with what is the same for every slab."""

    pre: Norm | None
    scale: Tensor | None  # γ₁/σ₁ and β₁, (C, 1, 1), where they are needed
    beta: Tensor | None
    act: Act

    @classmethod
    def of(cls, pre: Norm | None, act: Act, x: Tensor, scale: Tensor | None = None) -> Entry:
        """For inputs like ``x``; ``scale`` is γ₁/σ₁ where that is known already."""
        if pre is None or (x.is_cpu and x.dtype == pre.mean.dtype):
            return cls(pre, None, None, act)
        beta = None if pre.beta is None else per_channel(pre.beta)
        return cls(pre, per_channel(scales(pre)[2] if scale is None else scale), beta, act)

    def __call__(self, x_s: Tensor) -> tuple[Tensor, Tensor]:
        """u = γ₁ (x - μ₁)/σ₁ + β₁, or a where the activation's backward takes that for u; and a = act(u)."""
        pre = self.pre
        if pre is None:
            u = x_s if self.act.name == "none" else x_s.clone()
        elif self.scale is None:  # on a CPU, one sweep instead of three
            u = normalise(x_s, pre)
        else:
            u = centre(x_s, pre.mean).mul_(self.scale)
            if self.beta is not None:
                u.add_(self.beta)
        return u, self.act.forward(u).to(x_s.dtype)


class Once:
    """A function's first result, for good."""

    def __init__(self, function: Callable) -> None:
        self.function, self.result = function, None

    def __call__(self, *arguments):
        if self.result is None:
            self.result = self.function(*arguments)
        return self.result


def over_group(group: str, *vectors: Tensor) -> list[Tensor]:
    """The sums of ``vectors`` over the processes of a group, in one message; as they are without a group."""
    if not group:
        return list(vectors)
    message = torch.cat([v.flatten().to(wide_dtype(v)) for v in vectors])
    torch.distributed.all_reduce(message, group=group_called(group))
    return [t.view_as(v) for t, v in zip(message.split([v.numel() for v in vectors]), vectors, strict=True)]


def group_called(name: str):
    """The process group of that name; looked up here, since PyTorch may be built without any."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


def whole_stats(stats: list[tuple], group: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean, variance and (with a group) number of values, from the parts of this process' batch.

    With a group they are those of all its processes' batches together.
    """
    if not group:
        return *merge_stats(stats, dtype), None
    mean, var = merge_stats(stats, wide_dtype(stats[0][1]))
    mine = torch.cat([mean, var, mean.new_tensor([sum(size for size, *_ in stats)])])
    processes = group_called(group)
    rows = [torch.empty_like(mine) for _ in range(processes.size())]
    torch.distributed.all_gather(rows, mine, group=processes)
    sizes = torch.stack([row[-1] for row in rows])
    parts = [(size, *row[:-1].chunk(2)) for size, row in zip(sizes, rows, strict=True)]
    return *merge_stats(parts, dtype), sizes.sum()


def block_forward(x, weight, bias, pre: Norm | None, act: Act, post: Norm | None, conv: Conv, slab_size: int):
    """z, and what was used of each norm: μ₁, var₁, m₁, μ₂, var₂, m₂.

    None for a norm that is not there; the number of values m only where a process group made it.
    With batch statistics after it, the convolution's bias does not matter: the norm subtracts it again.
    A norm with constant statistics folds into the convolution.
    """
    dtype, m_1, m_2 = stats_dtype(x.dtype), None, None
    if pre is not None and pre.mean is None:
        mean, var, m_1 = whole_stats(partial_stats(x), pre.group, dtype)
        pre = pre._replace(mean=mean, var=var)
    own = post is not None and post.mean is None
    if post is not None:
        weight, bias = (weight, None) if own else fold(weight, bias, post)
    size = (weight.shape[0], *output_size(x, weight, *conv[:3]))
    # Off the CPU one large convolution is as good as many small ones, and y has to be whole in the end.
    n = x.shape[0]
    slices = slabs(n, max(x.nbytes // n, math.prod(size) * x.element_size()), weight, slab_size)
    cut = slices if x.is_cpu or pre is not None else [slice(0, n)]
    y = empty_output(x, weight, *conv[:3]) if len(cut) > 1 else None
    enter, stats = Entry.of(pre, act, x), []
    for s in cut:
        y_s = convolve(enter(x[s])[1], weight, bias, conv, y[s] if len(cut) > 1 else None)
        if own:
            stats += partial_stats(y_s)
        y = y if len(cut) > 1 else y_s
    if own:
        mean, var, m_2 = whole_stats(stats, post.group, dtype)
        post = post._replace(mean=mean, var=var)
        if len(slices) == 1 and slab_size == 0 and x.is_cpu and y.dtype == dtype:
            y = normalise(y, post)
        else:
            normalise_(y, post, slices)
    return y, *statistics(pre, m_1), *statistics(post, m_2)


def statistics(norm: Norm | None, m: Tensor | None) -> tuple:
    """What `block_forward` returns of a norm."""
    return (None, None, None) if norm is None else (norm.mean, norm.var, m)


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
    counts,
    constant,
    algebra,
    needs,
):
    """dx, dw, db, dγ₁, dβ₁, dγ₂ and dβ₂ from dz; None for those not in ``needs``.

    Three sweeps over the slabs: the sums that the norm after needs (`sums_by_recomputing` or
    `sums_by_algebra`); dy, the convolution's backward and the activation's; the norm before, in dx's memory.

    ``pre`` and ``post`` have their statistics here. ``constant`` says of each norm whether they were given:
    then no gradient passes through them. ``counts`` has the m of those that a process group made.
    """
    need_x, need_w, need_b, need_gamma_1, need_beta_1, need_gamma, need_beta = needs
    need_a = need_x or need_gamma_1 or need_beta_1
    need_dy, own = need_a or need_w, post is not None and not constant[1]
    cut = slabs(x.shape[0], max(dz.nbytes, x.nbytes) // x.shape[0], weight, slab_size)
    dtype, many = stats_dtype(x.dtype), len(cut) > 1
    if not many and slab_size == 0 and not algebra and library_serves(dz, x, pre, post):
        return backward_at_once(dz, x, weight, bias, pre, act, post, conv, constant, needs)
    m_1, m_2 = (
        t.numel() // t.shape[1] if count is None or not count.numel() else count
        for count, t in zip(counts, (x, dz), strict=True)
    )
    dx = torch.empty_like(x, memory_format=layout(x)) if need_x and many else None
    var_1, inv_std_1, scale_1 = (None, None, None) if pre is None else scales(pre)
    var_2, inv_std_2, kappa_dz = (None, None, None) if post is None else scales(post)
    enter = Entry.of(pre, act, x, scale_1)
    if not many and slab_size == 0:  # so small a batch is entered once, a larger one in each sweep
        enter = Once(enter)
    # The bias moves y; from here on, μ₂ is the mean of the y without it.
    if post is not None and bias is not None and constant[1]:
        post = post._replace(mean=post.mean - bias)

    # Sweep 1: Σ dz, Σ dz (y - μ₂), and the coefficients of dy = κ_dz dz + κ_y (y - μ₂) + κ_0.
    kappa_y = kappa_0 = gram = None
    waiting: deque[Tensor] = deque()
    if algebra and own:
        sum_dz, *gram = sums_by_algebra(dz, x, cut, weight, enter, post, conv)
        sum_dz_y = (weight.flatten(1) * gram[0]).sum(1)
    else:
        need_y = post is not None and (need_gamma or (own and need_dy))
        keep = (
            (lambda *slab: waiting.append(wait_in(dx, *slab) if many else slab[1]))
            if own and need_dy
            else None
        )
        need_sum = need_beta or need_b
        sum_dz, sum_dz_y = sums_by_recomputing(dz, x, cut, weight, enter, post, conv, need_y, need_sum, keep)
    if own and need_dy:
        sums = over_group(post.group, sum_dz, sum_dz_y)
        kappa_dz, kappa_y, kappa_0 = grad_input_coefficients(kappa_dz, var_2, sums, m_2)

    # Sweep 2.
    dw, sums_1 = None, None
    if gram and need_dy:
        G, R, about, delta = gram
        W = weight.flatten(1).to(G.dtype)
        W_dz, W_y = kappa_dz[:, None] * W, kappa_y[:, None] * W
        kernel_a = W_y.T @ W
        dw = G.mul_(kappa_dz[:, None]).addmm_(W_y, R).view(weight.shape) if need_w else None
        kernels = [t.to(x.dtype) for t in (W_dz.T, kernel_a, W.T @ kappa_0 + kernel_a @ delta)]
    direct = need_x and many and dtype == x.dtype
    for i in cut if need_a or (need_dy and not gram) else ():
        x_i, dz_i, dx_i = x[i], dz[i], dx[i] if direct else None
        u, a_i = enter(x_i)
        if gram:
            da = algebra_grad_input(dz_i, a_i, about, kernels, conv, dx_i if act.name == "none" else None)
        else:
            dy = dz_i
            if post is not None:
                y = waiting.popleft() if own else torch.empty_like(dy, dtype=dtype)
                y = centre(y, post.mean, inplace=True) if own else y
                dy = grad_input_(dy, y, kappa_dz, kappa_y, kappa_0).to(x.dtype)
                del y
            da, dw_i, _ = seen_grads(dy, a_i, weight, conv, (need_a, need_w, False))
            del dy
            if need_w:
                dw = dw_i.to(dtype) if dw is None else dw.add_(dw_i)
        if not need_a:
            continue
        du = act.backward(da if pre is None else da.to(dtype), u, dx_i)
        if pre is not None:
            sums_1 = add_up(sums_1, batch_norm_sums(du, x_i, pre.mean))
            du = du.mul_(per_channel(scale_1)) if constant[0] else du
        if need_x and many and not direct:
            dx[i] = du
        elif need_x and not many:
            dx = du.to(x.dtype)

    # Sweep 3: the norm before, from du, which waits in dx.
    if need_x and pre is not None and not constant[0]:
        sums = over_group(pre.group, *sums_1)
        coefficients = grad_input_coefficients(scale_1, var_1, sums, m_1)
        room, mean = torch.empty_like(x[cut[0]], dtype=dtype), per_channel(pre.mean)  # the same for each slab
        for i in cut:
            dx_i, x_centred = dx[i], torch.sub(x[i], mean, out=room[: i.stop - i.start])
            if dtype == x.dtype:
                grad_input_(dx_i, x_centred, *coefficients, out=dx_i)
            else:
                dx[i] = grad_input_(dx_i, x_centred, *coefficients)

    db = dgamma_1 = dbeta_1 = dgamma = dbeta = None
    if need_b:  # with batch statistics the norm after subtracts the bias again
        if own:
            db = torch.zeros_like(bias, dtype=dtype)
        else:
            db = sum_dz if kappa_dz is None else kappa_dz * sum_dz
    if need_gamma_1:
        dgamma_1 = sums_1[1] * inv_std_1
    if need_beta_1:
        dbeta_1 = sums_1[0]
    if need_gamma:
        dgamma = sum_dz_y * inv_std_2
    if need_beta:
        dbeta = sum_dz
    small = (None if t is None else t.to(dtype) for t in (db, dgamma_1, dbeta_1, dgamma, dbeta))
    return dx, dw.to(weight.dtype) if need_w else None, *small


def library_serves(dz: Tensor, x: Tensor, *norms: Norm | None) -> bool:
    """Whether the library's batch norm backward may take a whole batch, as exact as the sweeps are."""
    grouped = any(norm is not None and norm.group for norm in norms)
    wide = x.is_cpu and dz.dtype == x.dtype == stats_dtype(x.dtype)
    return wide and not grouped and x.is_contiguous() and dz.is_contiguous()


def backward_at_once(
    dz, x, weight, bias, pre: Norm | None, act: Act, post: Norm | None, conv, constant, needs
):
    """`block_backward` for one slab, with y computed again: each operation's own backward, in one call."""
    need_x, need_w, need_b, need_gamma_1, need_beta_1, need_gamma, need_beta = needs
    need_a, own = need_x or need_gamma_1 or need_beta_1, post is not None and not constant[1]
    need_conv = (need_a, need_w, need_b and not own)
    dx = dw = db = dgamma_1 = dbeta_1 = dgamma = dbeta = None
    u, a = Entry.of(pre, act, x)(x)
    if post is not None:
        y = convolve(a, weight, None if own else bias, conv)
        dz, dgamma, dbeta = norm_grads(dz, y, post, constant[1], (any(need_conv), need_gamma, need_beta))
        del y  # as soon as it is used: the next operation takes memory of its own
    if any(need_conv):
        dx, dw, db = seen_grads(dz, a, weight, conv, need_conv)
    if need_b and own:  # the norm after subtracts the bias again
        db = torch.zeros_like(bias)
    if need_a:
        dx = act.backward(dx, u)
    del u, a
    if need_a and pre is not None:
        dx, dgamma_1, dbeta_1 = norm_grads(dx, x, pre, constant[0], (need_x, need_gamma_1, need_beta_1))
    return dx, dw, db, dgamma_1, dbeta_1, dgamma, dbeta


def norm_grads(dz: Tensor, y: Tensor, norm: Norm, constant: bool, needs: tuple[bool, bool, bool]):
    """dy, dγ and dβ of a norm, by the library."""
    given = (norm.mean, norm.var, None, None) if constant else (None, None, norm.mean, scales(norm)[1])
    return aten.native_batch_norm_backward(dz, y, norm.gamma, *given, not constant, norm.eps, needs)


def sums_by_recomputing(dz, x, cut, weight, enter: Entry, post, conv, need_y: bool, need_sum: bool, keep):
    """Σ dz and Σ dz (y - μ₂), with y computed again. ``keep(slab, y_s)`` takes charge of each y_s."""
    total = None
    for s in cut if need_y or need_sum else ():
        if not need_y:
            total = add_up(total, (dz[s].sum(CHANNELS, dtype=stats_dtype(x.dtype)),))
            continue
        # y must be forward's y to the last bit, or Σ (y - μ) is not 0 and a large gradient leaks through
        # it. So it is rounded where forward rounded it, and μ is subtracted after that.
        y_s = convolve(enter(x[s])[1], weight, None, conv)
        total = add_up(total, batch_norm_sums(dz[s], y_s, post.mean))
        if keep is not None:
            keep(s, y_s)
    return *(total or ()), *(None,) * (2 - len(total or ()))


def wait_in(dx: Tensor, s: slice, y_s: Tensor) -> Tensor:
    """Move ``y_s`` into the part of ``dx`` that its slab's gradient will overwrite, if it fits there.

    So no second buffer exists: the recomputed outputs wait where the result goes. An output that is larger
    than the input (or whose input needs no gradient) stays in its own memory.
    """
    if dx is None or y_s.numel() > dx[s].numel():
        return y_s
    room = torch.as_strided(dx, y_s.shape, y_s.stride(), dx[s].storage_offset())
    return room.copy_(y_s)


def columns(t: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    """The inputs of every output pixel, (N, C_in kH kW, H_out, W_out): then the convolution is a matrix."""
    if is_pointwise(weight, conv):
        return pixels_seen(t, conv)
    size = output_size(t, weight, *conv[:3])
    return F.unfold(t, weight.shape[2:], conv.dilation, conv.padding, conv.stride).unflatten(2, size)


def product(p: Tensor, q: Tensor) -> Tensor:
    """Σ p qᵀ over images and pixels, (N, P, H, W) and (N, Q, H, W) -> (P, Q): a pointwise weight gradient."""
    weight = q.new_empty(p.shape[1], q.shape[1], 1, 1)
    return conv_grads(p, q, weight, [1, 1], [0, 0], [1, 1], 1, (False, True, False))[1].flatten(1)


def sums_by_algebra(dz, x, cut, weight, enter: Entry, post: Norm, conv):
    """Σ dz, G = Σ dz ãᵀ and R = Σ ã ãᵀ, where ã = a - mean(a); ``about`` and δ with ã = (a - about) + δ.

    As y - μ₂ = W ã, Σ dz (y - μ₂) = rowsum(W∘G): y is not needed. The digits are kept by subtracting a value
    amid the a before multiplying: ``about``, the first slab's mean. What it is off by, δ = about - mean(a),
    is known once all slabs are through, and then made good: G = Σ dz (a - about)ᵀ + Σ dz δᵀ, and R likewise.
    The mean is that of the process group's batch: then the dw of all processes together are the gradient,
    though not each by itself.
    """
    dtype, total, about = stats_dtype(x.dtype), None, None
    for s in cut:
        a_s, dz_s = columns(enter(x[s])[1], weight, conv).to(dtype), dz[s].to(dtype)
        about = a_s.mean(CHANNELS) if about is None else about
        a_s = a_s - per_channel(about)
        of_slab = product(dz_s, a_s), product(a_s, a_s), dz_s.sum(CHANNELS), a_s.sum(CHANNELS)
        total = of_slab if len(cut) == 1 else add_up(total, of_slab)
    G, R, sum_dz, sum_a = total
    n = dz.numel() // dz.shape[1]
    delta = sum_a / -n
    if post.group:
        sum_all, m = over_group(post.group, n * (about.to(wide_dtype(x)) - delta), sum_a.new_tensor(n))
        delta = (about - sum_all / m).to(delta.dtype)
        R.addr_(delta, sum_a + n * delta)
    G.addr_(sum_dz, delta)
    R.addr_(sum_a, delta)
    return sum_dz, G.to(dtype), R.to(dtype), about, delta.to(dtype)


def algebra_grad_input(
    dz_s: Tensor,
    a_s: Tensor,
    about: Tensor,
    kernels: tuple[Tensor, Tensor, Tensor],
    conv: Conv,
    out: Tensor | None,
) -> Tensor:
    """da = Wᵀ diag(κ_dz) dz + (Wᵀ diag(κ_y) W) (a - about) + shift, as two pointwise convolutions.

    In ``out``, where that is given and of use.
    """
    kernel_dz, kernel_a, shift = kernels
    a_centred = centre(pixels_seen(a_s, conv), about).to(a_s.dtype)
    sparse, plain = a_centred.shape != a_s.shape, dz_s.is_contiguous() and a_centred.is_contiguous()
    if dz_s.is_cpu and dz_s.dtype == about.dtype and plain:
        n, here = dz_s.shape[0], out is not None and out.is_contiguous() and not sparse
        da = out if here else torch.empty_like(a_centred)
        da_n = torch.baddbmm(shift[:, None], kernel_dz.expand(n, -1, -1), dz_s.flatten(2), out=da.flatten(2))
        da_n.baddbmm_(kernel_a.expand(n, -1, -1), a_centred.flatten(2))
    else:
        da = F.conv2d(dz_s, kernel_dz[:, :, None, None])
        da.add_(F.conv2d(a_centred, kernel_a[:, :, None, None], shift))
    return spread(da, a_s, conv, out) if sparse else da


# The two functions as operators. torch.compile would otherwise see that the recomputed convolution equals
# the first one, keep the first instead, and with it the memory that this file saves. Elsewhere they are
# called directly, which costs less. The compiler's cache knows them by name: other outputs, another name.
SETTINGS = (
    "str[] process_groups, float[] eps, str act, float act_parameter, "
    "int[] stride, int[] padding, int[] dilation, int groups, int slab_size"
)


def _unpack(norms: list[Tensor | None], there: list[bool], settings) -> tuple:
    """pre, act, post, conv and slab_size from the operators' flat arguments."""
    process_groups, eps, name, parameter, stride, padding, dilation, groups, slab_size = settings
    pre = Norm(*norms[:4], eps[0], process_groups[0]) if there[0] else None
    post = Norm(*norms[4:], eps[1], process_groups[1]) if there[1] else None
    return pre, Act(name, parameter), post, Conv(stride, padding, dilation, groups), slab_size


def _forward(x, weight, bias, norms, there, *settings):
    return without_autocast(block_forward, x, weight, bias, *_unpack(norms, there, settings))


def _backward(dz, x, weight, bias, norms, counts, there, constant, algebra, needs, *settings):
    forms = _unpack(norms, there, settings)
    return without_autocast(block_backward, dz, x, weight, bias, *forms, counts, constant, algebra, needs)


def without_autocast(run: Callable, *arguments):
    """``run(*arguments)``, whose tensors have their final dtypes."""
    if not torch._C._is_any_autocast_enabled():  # the quickest of questions
        return run(*arguments)
    device = arguments[0].device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        return run(*arguments)


def own_memory(run: Callable) -> Callable:
    """An operator's outputs are tensors that share memory neither with one another nor with its inputs."""

    def operator(x, *arguments):
        large, *small = (x.new_empty(0) if t is None else t for t in run(x, *arguments))
        return large, *(t.clone() for t in small)

    return operator


_forward_operator = torch.library.custom_op(
    "conv_bn_block::forward",
    own_memory(_forward),
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, Tensor?[] norms, bool[] there, {SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_backward_operator = torch.library.custom_op(
    "conv_bn_block::backward",
    own_memory(_backward),
    mutates_args=(),
    schema="(Tensor dz, Tensor x, Tensor weight, Tensor? bias, Tensor?[] norms, Tensor[] counts, "
    f"bool[] there, bool[] constant, bool algebra, bool[] needs, {SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_forward_operator.register_fake
def _(x, weight, bias, norms, there, process_groups, eps, act, act_parameter, stride, padding, dilation, *_):
    outputs = [empty_output(x, weight, stride, padding, dilation)]
    for i, channels in enumerate((x.shape[1], weight.shape[0])):
        own = there[i] and norms[4 * i + 2] is None
        stats = [
            x.new_empty(channels, dtype=stats_dtype(x.dtype)) if there[i] else x.new_empty(0) for _ in "12"
        ]
        grouped = own and process_groups[i]
        outputs += [*stats, x.new_empty((), dtype=wide_dtype(x)) if grouped else x.new_empty(0)]
    return tuple(outputs)


@_backward_operator.register_fake
def _(dz, x, weight, bias, norms, counts, there, constant, algebra, needs, *_):
    sizes = (weight.shape[0], x.shape[1], x.shape[1], weight.shape[0], weight.shape[0])
    small = [torch.empty(size, dtype=stats_dtype(x.dtype), device=x.device) for size in sizes]
    large = [torch.empty_like(t, memory_format=layout(t)) for t in (x, weight)]
    return tuple(t if need else x.new_empty(0) for t, need in zip(large + small, needs, strict=True))


class FusedBlockFunction(torch.autograd.Function):
    """``apply(x, weight, bias, γ₁, β₁, γ₂, β₂, μ₁, var₁, μ₂, var₂, (there, algebra, settings))``.

    ``there`` says which of the two norms exist; statistics that are None are the batch's own. Returns z
    and the statistics that were used. Its gradients cannot be differentiated: trying raises (`FirstOnly`).
    """

    @staticmethod
    def forward(x, weight, bias, g_1, b_1, g_2, b_2, mean_1, var_1, mean_2, var_2, form):
        # By their names, since torch.compile counts the arguments.
        run = _forward_operator if torch.compiler.is_compiling() else _forward
        return forward_of(run, x, weight, bias, g_1, b_1, g_2, b_2, mean_1, var_1, mean_2, var_2, form)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, g_1, b_1, g_2, _, mean_1, _, mean_2, _, ctx.form = inputs
        ctx.constant = [mean_1 is not None, mean_2 is not None]
        ctx.save_for_backward(x, weight, bias, g_1, b_1, g_2, *output[1:])
        ctx.mark_non_differentiable(*[t for t in output[1:] if t is not None])
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # no zeros for those

    @staticmethod
    def backward(ctx, dz, *_):
        if not torch.compiler.is_compiling():
            return grads_of(_backward, ctx, dz)
        grads = grads_of(_backward_operator, ctx, dz)
        needs = ctx.needs_input_grad
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def forward_of(run: Callable, x, weight, bias, g_1, b_1, g_2, b_2, mean_1, var_1, mean_2, var_2, form):
    """z and the statistics, by ``run``: `_forward` or the operator made of it."""
    there, _, settings = form
    norms = [g_1, b_1, mean_1, var_1, g_2, b_2, mean_2, var_2]
    z, *stats = run(x, weight, bias, norms, there, *settings)
    for i, given in ((0, mean_1), (3, mean_2)):
        if given is not None:  # an output is no input
            stats[i : i + 2] = stats[i].clone(), stats[i + 1].clone()
    return z, *stats


def grads_of(run: Callable, ctx, dz: Tensor | None) -> tuple:
    """The gradients of `forward_of`'s inputs, by ``run``: `_backward` or the operator made of it."""
    if dz is None:
        return (None,) * 12
    x, weight, bias, g_1, b_1, g_2, mean_1, var_1, m_1, mean_2, var_2, m_2 = ctx.saved_tensors
    norms = [g_1, b_1, mean_1, var_1, g_2, None, mean_2, var_2]
    there, algebra, settings = ctx.form
    flags = ([m_1, m_2], there, ctx.constant, algebra, list(ctx.needs_input_grad[:7]))
    with torch.no_grad():
        grads = run(dz, x, weight, bias, norms, *flags, *settings)
    if torch.is_grad_enabled():  # somebody may want to differentiate them, too
        grads = FirstOnly.apply(*grads, dz, x, weight, bias, g_1, b_1, g_2)
    return *grads, *(None,) * 5


class FirstOnly(torch.autograd.Function):
    """``apply(*grads, *origins)``: the seven gradients as they are, and as made of the seven ``origins``.

    Whoever differentiates them by an origin gets an error. (PyTorch's once_differentiable raises only if dz
    has a graph: of the loss z.sum() it has none, and all that is missing would be taken for 0.)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors):
        return tuple(None if g is None else g.view_as(g) for g in tensors[:7])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "FusedConvBN2d and FusedBlock2d have first derivatives only, and one of these was to be "
            "differentiated; where you need that, call the modules unfused, conv and then bn "
            "(helpers.unfuse undoes fuse_conv_bn)"
        )


class FusedBlock(torch.autograd.Function):
    """`FusedBlockFunction` where nothing is compiled or transformed: with fewer calls."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward_of(_forward, *inputs)
        FusedBlockFunction.setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, dz, *_):
        return grads_of(_backward, ctx, dz)


def apply_block(*inputs):
    """``FusedBlockFunction.apply``; torch.compile and torch.func need its steps apart."""
    apart = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return (FusedBlockFunction if apart else FusedBlock).apply(*inputs)


class FusedConvBN2dFunction:
    """The pair's case of `FusedBlockFunction`: convolution, then batch norm, recomputed in backward."""

    @staticmethod
    def apply(x, weight, bias, gamma, beta, mean, var, eps, stride, padding, dilation, groups, slab_size):
        """z, and the statistics that were used: ``mean`` and ``var``, or where they are None y's own."""
        norms = (None, None, gamma, beta, None, None, mean, var)
        settings = (["", ""], [0.0, eps], *Act(), stride, padding, dilation, groups, slab_size)
        form = ([False, True], False, settings)
        z, *_, mean, var, _ = apply_block(x, weight, bias, *norms, form)
        return z, mean, var


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
    process_group: str = ""  # name of the group over whose batch the statistics are taken

    @classmethod
    def of(cls, bn: nn.BatchNorm2d | nn.SyncBatchNorm, process_group: str = "") -> BatchNorm:
        tracks = bn.track_running_stats or not bn.training
        running = (bn.running_mean, bn.running_var) if tracks else (None, None)
        stats = (*running, bn.training, bn.momentum, bn.eps, bn.num_batches_tracked)
        return cls(bn.weight, bn.bias, *stats, process_group_of(bn, process_group))

    def constants(self) -> tuple[Tensor | None, Tensor | None]:
        """The running statistics where they are used, and None where the batch's own are."""
        own = self.training or self.running_mean is None
        return (None, None) if own else (self.running_mean, self.running_var)

    @staticmethod
    def arguments(norm: BatchNorm | None) -> tuple:
        """γ, β, the constant mean and variance, ε and the group, as the kernel takes them."""
        if norm is None:
            return None, None, None, None, 0.0, ""
        return norm.gamma, norm.beta, *norm.constants(), norm.eps, norm.process_group

    def update(self, mean: Tensor, var: Tensor, m: int | Tensor) -> None:
        """Move the running statistics, if this is a training step and there are any."""
        if not self.training or self.running_mean is None:
            return
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()
        update_running_stats(self.running_mean, self.running_var, mean, var, m, momentum)


def process_group_of(bn: nn.Module, name: str = "") -> str:
    """Name of the group that ``bn`` is synchronised over: an nn.SyncBatchNorm's own, else ``name``."""
    synchronised = isinstance(bn, nn.SyncBatchNorm)
    if not bn.training or not (name or synchronised):
        return ""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return ""
    return group_argument(bn.process_group or torch.distributed.group.WORLD) if synchronised else name


def group_argument(process_group) -> str:
    """``process_group`` by its name, "" for None and for a group of one process."""
    if process_group is None:
        return ""
    if not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        kind = type(process_group).__name__
        raise ValueError(f"process_group must be None or a torch.distributed.ProcessGroup, got {kind}")
    return process_group.group_name if process_group.size() > 1 else ""


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
    check_norm("norm_before", norm_before, input.shape[1], input)
    check_norm("norm_after", norm_after, weight.shape[0], input)
    plain = norm_before is None and activation.name == "none"
    input, padding = explicit_padding(input, weight, padding, dilation, stride, plain)
    size = output_size(input, weight, stride, padding, dilation)
    if min(size) < 1:
        raise ValueError(
            f"weight: a kernel of {tuple(weight.shape[2:])}, dilation {dilation}, is larger than the padded "
            f"input of {tuple(s + 2 * p for s, p in zip(input.shape[2:], padding, strict=True))}"
        )
    gamma_1, beta_1, *stats_1, eps_1, group_1 = BatchNorm.arguments(norm_before)
    gamma_2, beta_2, *stats_2, eps_2, group_2 = BatchNorm.arguments(norm_after)
    n = len(input)
    m_1, m_2 = n * input.shape[2] * input.shape[3], n * size[0] * size[1]
    for name, norm, m in (("before", norm_before, m_1), ("after", norm_after, m_2)):
        if m == 1 and norm is not None and norm.constants()[0] is None and not norm.process_group:
            raise ValueError(
                f"input: batch statistics need more than 1 value per channel, norm_{name} gets 1"
            )
    conv = Conv(stride, padding, dilation, groups)
    if n == 0 and (group_1 or group_2):
        raise ValueError("input: an empty batch has nothing to add to its process group's statistics")
    if n == 0:
        return empty_batch(input, weight, bias, norm_before, activation, norm_after, conv)
    can = norm_after is not None and stats_2[0] is None and algebra_applies(input, weight, conv, plain)
    if backward == "algebra" and not can:
        raise ValueError(
            'backward="algebra" needs norm_after with batch statistics, groups=1, and a 1x1 kernel without '
            "padding (or an input that needs no gradient and nothing before the convolution)"
        )
    algebra = can and (backward == "algebra" or (backward == "auto" and algebra_pays(input, weight, size)))
    there = [norm_before is not None, norm_after is not None]
    form = (there, algebra, ([group_1, group_2], [eps_1, eps_2], *activation, *conv, slab_size))
    z, mean_1, var_1, whole_1, mean_2, var_2, whole_2 = apply_block(
        input, weight, bias, gamma_1, beta_1, gamma_2, beta_2, *stats_1, *stats_2, form
    )
    if norm_before is not None:
        norm_before.update(mean_1, var_1, whole_1 if group_1 else m_1)
    if norm_after is not None:
        mean_2 = mean_2 if bias is None else mean_2 + bias.detach()
        norm_after.update(mean_2, var_2, whole_2 if group_2 else m_2)
    return z


def algebra_applies(input: Tensor, weight: Tensor, conv: Conv, plain: bool) -> bool:
    """Whether y - μ is a matrix times ã: pointwise, or a first layer, whose input needs no gradient."""
    return conv.groups == 1 and (is_pointwise(weight, conv) or (plain and not input.requires_grad))


def algebra_pays(input: Tensor, weight: Tensor, size: list[int]) -> bool:
    """The rule of "auto": the two products with R and with ã must cost less than the convolution saved.

    They cost 2 C_in² a pixel and 2 C_in² C_out once (with the columns of a larger kernel for C_in), the
    convolution C_in C_out a pixel. A larger kernel needs no input gradient, but its columns laid out.
    """
    c_out, columns = weight.shape[0], weight.numel() // weight.shape[0]
    pixels = input.shape[0] * size[0] * size[1]
    if weight.shape[2:] != (1, 1):
        return c_out >= 2 * columns
    return 2 * columns * (pixels + c_out) <= 1.25 * pixels * c_out


def algebra_pays_for(input: Tensor, conv: nn.Conv2d, plain: bool, norm_after: nn.Module) -> bool:
    """Whether "auto" chooses the algebra for these modules; ``plain`` with nothing before the convolution."""
    own = norm_after.training or norm_after.running_mean is None
    if not own or input.dim() != 4 or isinstance(conv.padding, str):
        return False
    w, geometry = conv.weight, Conv(list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    size = output_size(input, w, *geometry[:3])
    return algebra_applies(input, w, geometry, plain) and algebra_pays(input, w, size)


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
    process_group=None,
) -> Tensor:
    """``F.batch_norm(F.conv2d(input, weight, bias, ...), ...)`` that saves ``input`` and no output.

    `fused_block2d` without a norm before, which describes shapes and errors. ``gamma`` and ``beta`` are the
    norm's weight and bias; ``momentum`` None is the cumulative average, which needs ``num_batches_tracked``.
    In training the statistics are those of the whole ``process_group``'s batch, a
    torch.distributed.ProcessGroup, or of this process' alone.
    """
    name = group_argument(process_group)
    norm = BatchNorm(gamma, beta, running_mean, running_var, training, momentum, eps, num_batches_tracked)
    norm = norm._replace(process_group=name if training else "")
    geometry = (stride, padding, dilation, groups)
    return fused_block2d(input, weight, bias, None, Act(), norm, *geometry, slab_size, "recompute")


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Under autocast, cast what F.conv2d would: every float32 or half tensor, to autocast's dtype."""
    if not torch._C._is_any_autocast_enabled():  # the quickest of questions
        return list(tensors)
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


def check_norm(which: str, norm: BatchNorm | None, channels: int, input: Tensor) -> None:
    """Raise a ValueError that names the tensor of a norm that does not fit."""
    if norm is None:
        return
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{which}: running_mean and running_var must both be given or both be None")
    allowed = input.dtype, stats_dtype(input.dtype)
    for name, t in zip(norm._fields[:4], norm[:4], strict=True):
        if t is None:
            continue
        if t.shape != (channels,):
            raise ValueError(f"{which}: {name} must have shape ({channels},), got {tuple(t.shape)}")
        if t.device != input.device:
            raise ValueError(f"{which}: {name} must be on input's device {input.device}, got {t.device}")
        if name in ("gamma", "beta") and t.dtype not in allowed:
            names = " or ".join(map(str, dict.fromkeys(allowed)))
            raise ValueError(f"{which}: {name} must have dtype {names}, got {t.dtype}")


class FusedConvBN2d(nn.Module):
    """``nn.Conv2d`` then ``nn.BatchNorm2d`` as one layer that keeps one NCHW buffer for backward, not two.

    Takes the arguments of both, under their names and with their defaults. The two modules stay inside as
    ``conv`` and ``bn``, so that the state_dict has the keys ``conv.weight``, ``bn.running_mean`` and so on,
    and ``layer.bn.eval()`` freezes the statistics. Only this layer is called, though, not the two: hooks
    belong on it. Its gradients cannot be differentiated: a RuntimeError says so where that is tried.

    Args:
        slab_size: images that backward works on at once; None chooses, "batch" takes all (see
            ``fused_conv_bn2d``).
        process_group: a torch.distributed.ProcessGroup whose whole batch the statistics are taken over in
            training, as nn.SyncBatchNorm does; None for this process' batch alone.

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
        process_group=None,
    ) -> None:
        super().__init__()
        slab_argument(slab_size)
        self.slab_size, self.process_group = slab_size, group_argument(process_group)
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
        cls,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d,
        slab_size: int | str | None = None,
        process_group=None,
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
        layer.slab_size, layer.process_group = slab_size, group_argument(process_group)
        layer.conv, layer.bn = conv, bn
        layer.training = bn.training
        return layer

    def forward(self, input: Tensor) -> Tensor:
        how = (self.slab_size, "recompute", self.process_group)
        return call_block(input, self.conv, None, None, self.bn, *how)

    def extra_repr(self) -> str:
        return f"slab_size={self.slab_size!r}"


def check_modules(**modules: tuple[nn.Module | None, type]) -> None:
    """Each must be a plain module of its kind (or None), without hooks, which no fused layer would call."""
    for name, (module, kind) in modules.items():
        if module is None:
            continue
        plain = isinstance(module, kind) and type(module).forward is kind.forward
        if not plain and not (kind is nn.BatchNorm2d and type(module) is nn.SyncBatchNorm):
            raise ValueError(f"{name} must be a plain nn.{kind.__name__}, got {type(module).__name__}")
        if has_hooks(module):
            raise ValueError(f"{name} has hooks, which the fused layer would not call; remove them first")


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has a hook that runs when it is called or differentiated."""
    return any(getattr(module, kind) for kind in HOOKS)


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


def call_block(
    input: Tensor,
    conv: nn.Conv2d,
    norm_before: nn.Module | None = None,
    activation: nn.Module | Act | None = None,
    norm_after: nn.Module | None = None,
    slab_size: int | str | None = None,
    backward: str = "auto",
    process_group: str = "",
) -> Tensor:
    """`fused_block2d` with the parameters, buffers and settings of modules, as they stand now."""
    input, padding = pad_first(conv, input)
    norms = (norm_before, norm_after)
    before, after = (None if bn is None else BatchNorm.of(bn, process_group) for bn in norms)
    act = activation if isinstance(activation, Act) else activation_of(activation)
    geometry = (conv.stride, padding, conv.dilation, conv.groups)
    return fused_block2d(input, conv.weight, conv.bias, before, act, after, *geometry, slab_size, backward)


class FusedBlock2d(nn.Module):
    """[norm → activation →] conv [→ norm] from modules that exist, as one layer that keeps its input alone.

    The modules stay inside under the names of the arguments, and so share their parameters and buffers;
    only this layer is called, though: hooks belong on it.

    Args:
        conv: an nn.Conv2d.
        norm_before, norm_after: nn.BatchNorm2d of its input and of its output channels, or None.
        activation: an nn.ReLU, ReLU6, LeakyReLU, SiLU, Hardswish, GELU or Identity, or None.
        slab_size, backward: see `fused_block2d`.
        process_group: see `FusedConvBN2d`.

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
        process_group=None,
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
        self.process_group = group_argument(process_group)

    def forward(self, input: Tensor) -> Tensor:
        modules = (self.conv, self.norm_before, self.activation, self.norm_after)
        return call_block(input, *modules, self.slab_size, self.backward, self.process_group)

    def extra_repr(self) -> str:
        return f"slab_size={self.slab_size!r}, backward={self.backward!r}"
