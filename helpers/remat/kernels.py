"""The passes of `passes` as Triton kernels: each reads every tensor once, and writes its result once."""

import torch
import triton
import triton.language as tl

from helpers.remat.passes import block_of


@triton.jit
def expm1(x):
    """e^x - 1, to the last digits near 0 too."""
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8))))))
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1)


@triton.jit
def tanh(x):
    e = expm1(-2 * tl.abs(x))
    return tl.where(x < 0, e, -e) / (e + 2)


@triton.jit
def activation(u, p, q, r, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """act(u) and act'(u). Comparisons are ATen's: a corner belongs to the same side, and NaN stays NaN."""
    if ACT == "none":
        a, slope = u, 1.0
    elif ACT == "relu":
        a, slope = tl.where(u <= 0, 0.0, u), tl.where(u <= 0, 0.0, 1.0)
    elif ACT == "hardtanh":
        a, slope = tl.where(u < p, p, tl.where(u > q, q, u)), tl.where((u <= p) | (u >= q), 0.0, 1.0)
    elif ACT == "leaky_relu":
        a, slope = tl.where(u > 0, u, u * p), tl.where(u > 0, 1.0, p)
    elif ACT == "elu":
        a = tl.where(u <= 0, expm1(u * r) * (p * q), u * q)
        slope = tl.where(u <= 0, p * q * r * tl.exp(tl.minimum(u, 0.0) * r), q)
    elif ACT == "silu":
        s = 1 / (1 + tl.exp(-u))
        a, slope = u / (1 + tl.exp(-u)), s * (1 + u * (1 - s))
    elif ACT == "hardsigmoid":
        a = tl.where(u < -3, 0.0, tl.where(u > 3, 6.0, u + 3)) / 6
        slope = tl.where((u <= -3) | (u >= 3), 0.0, 1.0 / 6)
    elif ACT == "hardswish":
        a = u * tl.where(u < -3, 0.0, tl.where(u > 3, 6.0, u + 3)) / 6
        slope = tl.where(u <= -3, 0.0, tl.where(u < 3, u / 3 + 0.5, 1.0))
    elif ACT == "mish":
        e = tl.exp(tl.minimum(u, 20.0))  # tanh(log(1 + e^u)) is n / (n + 2) with n = e^u (e^u + 2)
        t = e * (e + 2) / (e * (e + 2) + 2)
        a, slope = u * t, t + u / (1 + tl.exp(-u)) * (1 - t * t)
    elif ACT == "sigmoid":  # ATen takes the slope of these two from the rounded result
        a = (1 / (1 + tl.exp(-u))).to(DTYPE).to(tl.float32)
        slope = (1 - a) * a
    elif ACT == "tanh":
        a = tanh(u).to(DTYPE).to(tl.float32)
        slope = 1 - a * a
    elif ACT == "gelu":
        cdf = 0.5 * (1 + tl.erf(u * 0.7071067811865476))
        a, slope = u * cdf, cdf + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    elif ACT == "gelu_tanh":
        t = tanh(0.7978845608028654 * (u + 0.044715 * u * u * u))
        inner = 0.7978845608028654 * (1 + 3 * 0.044715 * u * u)
        a, slope = 0.5 * u * (1 + t), 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * inner
    return a, slope


@triton.jit
def act_of_norm(centred, added, invstd, gamma, beta, channel, known, at, there, p, q, r,
                ACT: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """act(z) and act'(z), with z = γ (y - μ) / σ + β, and + added if there is that.

    What PyTorch would write between its own kernels is rounded here as it would be there.
    """
    u = centred
    if gamma is not None:
        u = tl.load(gamma + channel, known, 0.0).to(tl.float32) * u
    u = u * tl.load(invstd + channel, known, 0.0)
    if beta is not None:
        u = u + tl.load(beta + channel, known, 0.0).to(tl.float32)
    u = u.to(DTYPE).to(tl.float32)
    if added is not None:
        u = (u + tl.load(added + at, there, 0.0).to(tl.float32)).to(DTYPE).to(tl.float32)
    return activation(u, p, q, r, ACT, DTYPE)


@triton.jit
def one_pass(da, y, added, mean, invstd, gamma, beta, sums, weight, out, p, q, r, m, ROWS, COLS, C,
             ACT: tl.constexpr, LAST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """out = act(z); with da, dz = da act'(z); with ``sums`` of dz and dz (y - μ), dy for ``weight``'s γ.

    The tensors are matrices of ROWS x COLS: channels last, (N S, C), or first, (N C, S).
    """
    dtype: tl.constexpr = out.dtype.element_ty
    i = tl.program_id(0).to(tl.int64)  # of 2³¹ values and more
    row, col = i * BR + tl.arange(0, BR), tl.program_id(1) * BC + tl.arange(0, BC)
    there, at = (row < ROWS)[:, None] & (col < COLS)[None, :], row[:, None] * COLS + col[None, :]
    if LAST:
        channel, known = col[None, :], (col < COLS)[None, :]
    elif BR == 1:
        channel, known = i % C, i < ROWS
    else:
        channel = (((i * BR) % C).to(tl.int32) + tl.arange(0, BR))[:, None] % C
        known = (row < ROWS)[:, None]
    centred = tl.load(y + at, there, 0.0).to(tl.float32) - tl.load(mean + channel, known, 0.0)
    norm = invstd, gamma, beta, channel, known
    a, slope = act_of_norm(centred, added, *norm, at, there, p, q, r, ACT, dtype)
    if da is not None:
        a = tl.where(slope == 0, 0.0, tl.load(da + at, there, 0.0).to(tl.float32) * slope)
    if sums is not None:
        scale = tl.load(invstd + channel, known, 0.0)
        a -= tl.load(sums + channel, known, 0.0) / m
        a -= centred * (tl.load(sums + C + channel, known, 0.0) / m * scale * scale)
        if weight is not None:
            scale *= tl.load(weight + channel, known, 0.0).to(tl.float32)
        a *= scale
    tl.store(out + at, a.to(dtype), there)


@triton.jit
def partial_sums(da, y, mean, invstd, gamma, beta, out, p, q, r, ROWS, COLS, C, PARTS,
                 ACT: tl.constexpr, LAST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Σ dz and Σ dz (y - μ) of one part of each channel, with dz = da act'(z): ``out`` is (2, PARTS, C).

    A program takes every PARTS-th block of rows: of one channel or, if these are last, of BC channels.
    """
    dtype: tl.constexpr = y.dtype.element_ty
    part, lane = tl.program_id(0), tl.arange(0, BC)
    sum_dz, sum_dz_y = tl.zeros((BR, BC), tl.float32), tl.zeros((BR, BC), tl.float32)
    if LAST:
        rows, cols, channel = ROWS, BC, tl.program_id(1) * BC + lane[None, :]
    else:
        rows, cols, channel = ROWS // C, COLS, tl.program_id(1) + tl.zeros((1, 1), tl.int32)
    known = channel < C
    for i in range(part, tl.cdiv(rows, BR), PARTS):
        row = (i * BR + tl.arange(0, BR))[:, None].to(tl.int64)
        for j in range(0, cols, BC):
            if LAST:
                at, there = row * COLS + channel, (row < rows) & known
            else:
                at, there = (row * C + channel) * COLS + j + lane, (row < rows) & (j + lane < cols)[None, :]
            centred = tl.load(y + at, there, 0.0).to(tl.float32) - tl.load(mean + channel, known, 0.0)
            norm = invstd, gamma, beta, channel, known
            _, slope = act_of_norm(centred, None, *norm, at, there, p, q, r, ACT, dtype)
            dz = tl.where(slope == 0, 0.0, tl.load(da + at, there, 0.0).to(tl.float32) * slope)
            sum_dz += dz
            sum_dz_y += dz * centred
    total, total_y = tl.sum(sum_dz, 0)[None, :], tl.sum(sum_dz_y, 0)[None, :]
    if not LAST:
        total, total_y = tl.sum(total, 1)[:, None], tl.sum(total_y, 1)[:, None]
    tl.store(out + part * C + channel, total, known)
    tl.store(out + (PARTS + part) * C + channel, total_y, known)


def launch(tensors, kind, matrix) -> None:
    """`one_pass` on tensors that are ``matrix``: rows, columns, and whether the columns are the channels."""
    (rows, cols, last), y = matrix, tensors[1]
    br, bc, how = options(kind, cols, last)
    sizes = rows * cols / y.shape[1], rows, cols, y.shape[1]
    with torch.cuda.device_of(y):
        one_pass[triton.cdiv(rows, br), triton.cdiv(cols, bc)](*tensors, *three(kind), *sizes, **how)


def launch_sums(tensors, kind, matrix) -> None:
    """`partial_sums` of such tensors; the last one, for the result, is (2, parts, C)."""
    (rows, cols, last), (_, parts, c) = matrix, tensors[-1].shape
    _, bc, how = options(kind, cols, last)
    with torch.cuda.device_of(tensors[-1]):
        grid = parts, triton.cdiv(c, bc) if last else c
        partial_sums[grid](*tensors, *three(kind), rows, cols, c, parts, **how)


def options(kind, cols: int, last: bool) -> tuple[int, int, dict]:
    """A block's rows and columns, and all that a kernel is compiled for."""
    br, bc, warps = block_of(cols, last)
    return br, bc, {"ACT": kind[0], "LAST": last, "BR": br, "BC": bc, "num_warps": warps}


def three(kind) -> tuple[float, ...]:
    """An activation's settings, with zeros for those that it does not have."""
    return (*kind[1], 0.0, 0.0, 0.0)[:3]
