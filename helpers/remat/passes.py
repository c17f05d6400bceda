"""An accelerator's passes: a norm's activation made again, and its backward, each in one pass over memory.

PyTorch needs two kernels for a = act(z) of a norm's z, and the whole of z or a for the backward. Here both
start from y, the norm's input: in a Triton kernel where there is one, else in PyTorch's (`reference`).

A norm's own forward and backward stay PyTorch's, cuDNN's or ATen's: the same to the bit as without remat, and
in as few passes (the sums read dz and y; the last pass reads them again and writes dy).

Nothing here waits for the device, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import make_contiguous_strides_for
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from .operations import Kind

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels, which compute in float32
FROM_RESULT = ("relu", "hardtanh", "sigmoid", "tanh")  # PyTorch's backward can take a in place of z


@functools.cache
def takes_result(kind: Kind, dtype: torch.dtype) -> bool:
    """Whether the backward may take a in place of z: not where half precision rounds hardtanh's limits."""
    rounded = [torch.tensor(n, dtype=dtype, device="cpu").item() for n in kind.numbers]
    return kind.name in FROM_RESULT and (dtype.itemsize > 2 or rounded == [*kind.numbers])


class Norm(NamedTuple):
    """z = γ (y - μ) / σ + β: a value for each channel, in float32 where y is in half precision."""

    mean: Tensor
    invstd: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None


def normalise(y: Tensor, norm: Norm, out: Tensor | None = None) -> Tensor:
    """z from the norm's input y (N, C, ...), in ``out`` if it is given."""
    mean, invstd, gamma, beta = norm
    if y.is_cuda:
        return torch.batch_norm_elemt(y, gamma, beta, mean, invstd, 0.0, out=out)
    # With γ/σ for a weight, a variance of 1 and no ε, the CPU's kernel for constant statistics computes what
    # forward's did: y scale + (β - μ scale), with scale = γ · (1/σ).
    scale = invstd if gamma is None else invstd * gamma
    how = y, scale, beta, mean, torch.ones_like(mean), False, 0.0, 0.0
    # Into another layout it would write in y's order; and MPS's kernel divides by the size of `none`.
    if out is not None and y.stride() == out.stride() and not y.is_mps:
        none = mean.new_empty(0)
        if not isinstance(y, FakeTensor):  # it has no memory, and would take a dozen operations here
            torch.native_batch_norm(*how, out=(out, none, none))
        return out
    z = torch.native_batch_norm(*how)[0]
    return z if out is None else out.copy_(z)


def norm_act(
    y: Tensor, norm: Norm, kind: Kind, added: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """a = act(z) from the norm's input y, or act(z + added): all (N, C, ...), of one dtype.

    Rounded to that dtype wherever PyTorch's own kernels, one after the other, would write: it is their result
    up to float32's last digits, and in general not to the bit. ``out`` may be ``added``.
    """
    if one_pass(y, added, out):
        return launch(None, y, added, norm, kind, out)
    z = reference(y, norm, added)
    return kind.forward(z, z if out is None else out)


def act_backward(da: Tensor, y: Tensor, norm: Norm, kind: Kind, added: Tensor | None = None) -> Tensor:
    """dz = da act'(z), or da act'(z + added), with the z of `norm_act`: neither z nor a is made whole.

    Where z is within rounding of a corner, such as ReLU's 0, the slope may be that of the other side.
    """
    if da.dtype == y.dtype and one_pass(y, added):
        da = da if matrix(da) == matrix(y) else torch.empty_like(y).copy_(da)
        return launch(da, y, added, norm, kind, None)
    z = reference(y, norm, added)
    x = kind.forward(z, z) if takes_result(kind, z.dtype) else z
    return kind.backward(da, x, x)


def reference(y: Tensor, norm: Norm, added: Tensor | None) -> Tensor:
    """z, or z + added, by PyTorch's kernels."""
    z = normalise(y, norm)
    return z if added is None else z.add_(added)


def one_pass(y: Tensor, *others: Tensor | None) -> bool:
    """Whether there is a kernel for these, all of one dtype and one dense layout."""
    if not (y.dtype in DTYPES and has_kernel(y.device)):
        return False
    rows = matrix(y)
    same = [t is None or (t.dtype, t.shape, matrix(t)) == (y.dtype, y.shape, rows) for t in others]
    return bool(rows) and all(same)


@functools.cache
def has_kernel(device: torch.device) -> bool:
    """Whether Triton runs there. "meta" plays an accelerator, and a CPU interprets if told to."""
    kinds = ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda", "xpu")
    if device.type == "meta":
        return True
    if device.type not in kinds or importlib.util.find_spec("triton") is None:
        return False
    try:  # it compiles its driver at first use, with a C compiler that a machine may lack
        from triton.runtime import driver

        return device.type == "cpu" or driver.active is not None
    except Exception as error:
        warnings.warn(f"Triton does not run, so remat uses PyTorch's kernels: {error}", stacklevel=2)
        return False


def matrix(y: Tensor) -> tuple[int, ...]:
    """y as a matrix: rows, columns, and whether the columns are the channels; () if y is not dense."""
    return matrix_of(y.shape, y.stride())


@functools.lru_cache(maxsize=4096)
def matrix_of(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, ...]:
    n, c, pixels = (*shape[:2], math.prod(shape[2:])) if len(shape) > 1 else (0, 0, 0)
    if n * c * pixels and without_gaps((n, *shape[2:], c), (stride[0], *stride[2:], stride[1])):
        return n * pixels, c, True
    return (n * c, pixels, False) if n * c * pixels and without_gaps(shape, stride) else ()


def without_gaps(shape, stride) -> bool:
    """Whether these are the strides of a contiguous tensor."""
    steps = make_contiguous_strides_for(shape)
    return all(n == 1 or s == t for n, s, t in zip(shape, stride, steps, strict=True))


def launch(da, y, added, norm: Norm, kind: Kind, out: Tensor | None) -> Tensor:
    """What `kernels.one_pass` computes, in ``out`` if it is given."""
    out = torch.empty_like(y) if out is None else out
    if not (y.is_meta or isinstance(y, FakeTensor)):  # these have no memory
        from . import kernels  # only now: it imports Triton

        kernels.launch((da, y, added, *norm, out), kind, matrix(y))
    return out


def block_of(cols: int, last: bool) -> tuple[int, int, int]:
    """Rows and columns of what a program of a kernel takes at once, and its warps."""
    columns = 1 << (cols - 1).bit_length()
    if last:
        columns, values = min(columns, 256), 4096
    else:  # an image's channel in one block if it fits
        columns = min(columns, 4096 if cols <= 4096 else 1024)
        values = max(columns, 1024)
    return values // columns, columns, 8 if values > 1024 else 4
