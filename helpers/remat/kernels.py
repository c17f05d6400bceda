"""The pass of `passes` as a Triton kernel: it reads every tensor once, and writes its result once."""

import torch
import triton
import triton.language as tl

from .passes import block_of


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
    if ACT == "relu":
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
def one_pass(da, y, added, mean, invstd, gamma, beta, out, p, q, r, ROWS, COLS, C,
             ACT: tl.constexpr, LAST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """out = act(z), or da act'(z) if there is da; z = γ (y - μ) / σ + β, and + added if there is that.

    The tensors are matrices of ROWS x COLS: channels last, (N S, C), or first, (N C, S). What PyTorch would
    write between its own kernels is rounded here as it would be there.
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
    u = tl.load(y + at, there, 0.0).to(tl.float32) - tl.load(mean + channel, known, 0.0)
    if gamma is not None:
        u = tl.load(gamma + channel, known, 0.0).to(tl.float32) * u
    u = u * tl.load(invstd + channel, known, 0.0)
    if beta is not None:
        u = u + tl.load(beta + channel, known, 0.0).to(tl.float32)
    u = u.to(dtype).to(tl.float32)
    if added is not None:
        u = (u + tl.load(added + at, there, 0.0).to(tl.float32)).to(dtype).to(tl.float32)
    a, slope = activation(u, p, q, r, ACT, dtype)
    if da is not None:
        a = tl.where(slope == 0, 0.0, tl.load(da + at, there, 0.0).to(tl.float32) * slope)
    tl.store(out + at, a.to(dtype), there)


def launch(tensors, kind, matrix) -> None:
    """`one_pass` on tensors that are ``matrix``: rows, columns, and whether the columns are the channels."""
    (rows, cols, last), y = matrix, tensors[1]
    br, bc, warps = block_of(cols, last)
    numbers, how = (*kind[1], 0.0, 0.0, 0.0)[:3], {"LAST": last, "BR": br, "BC": bc, "num_warps": warps}
    with torch.cuda.device_of(y):
        grid = triton.cdiv(rows, br), triton.cdiv(cols, bc)
        one_pass[grid](*tensors, *numbers, rows, cols, y.shape[1], ACT=kind[0], **how)
