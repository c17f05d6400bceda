"""Convolutions and linear layers under remat: their settings, and the operations that count as work."""

from __future__ import annotations

import functools
import math
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .arguments import fit, per_dimension
from .layouts import in_layout, layout_of
from .operations import WIDE, Operation, to
from .values import Recipe, Value, copy_of, origin_of, storage_of

aten = torch.ops.aten
# A CPU's kernel for one image with at most so many values unfolds it; of no values it may refuse it.
UNFOLDED = 20480
conv_backward = aten.convolution_backward.default  # whose overload need not be looked for at each call
# function -> how many dimensions an image has, and whether it is the transposed one
CONVOLUTIONS = {
    getattr(torch, f"conv{transposed}{n}d"): (n, bool(transposed))
    for n in (1, 2, 3)
    for transposed in ("", "_transpose")
} | {F.linear: (0, False)}


class Geometry(NamedTuple):
    """The settings of a convolution, in the order of aten.convolution."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    @classmethod
    def of(
        cls, kernel: tuple[int, ...], transposed, stride=1, padding=0, dilation=1, groups=1, output_padding=0
    ) -> Geometry:
        """From the arguments of a call, which may be numbers, "same" or "valid"."""
        n = len(kernel)
        stride, dilation, extra = (per_dimension(v, n) for v in (stride, dilation, output_padding))
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            fit(all(t % 2 == 0 for t in total))  # else PyTorch pads one side more
            padding = [t // 2 for t in total]
        padding = [0] * n if padding == "valid" else per_dimension(padding, n)
        return cls(stride, padding, dilation, transposed, extra, groups)


@functools.lru_cache(maxsize=4096)
def setting_of(function, shape: torch.Size, given: tuple, named: tuple) -> tuple[dict, Geometry, float]:
    """What a call with a weight of this shape says behind its tensors, and the work for a value.

    Raises:
        Unfit: arguments that remat leaves to PyTorch.
    """
    dims, transposed = CONVOLUTIONS[function]
    fit(len(shape) == dims + 2)
    rest = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    names = ("stride", "padding", *rest)
    arguments = {**dict(zip(names, given, strict=False)), **dict(named)}
    geometry = Geometry.of(shape[2:], transposed, **arguments)
    work = shape.numel() / shape[0]  # C_in / groups · Π k; for a transposed one, the mean
    if transposed:
        work = shape.numel() / (shape[1] * geometry.groups) / math.prod(geometry.stride)
    return arguments, geometry, work


def state_of(t: Tensor) -> tuple[int, int, int]:
    """What is different once ``t`` was changed, got other memory, or was freed as in sharded training."""
    storage = storage_of(t)
    return t._version, storage._cdata, storage.nbytes()


class Convolve(Recipe):
    """y = conv(a), by forward's call on the whole batch, so that it equals y to the bit."""

    passes = 0.0

    def __init__(self, function, weight: Tensor, bias: Tensor | None, arguments, work: float, dtype) -> None:
        self.function, self.arguments, self.dtype = function, arguments, dtype
        self.name, self.work, self.origin = function.__name__, work, origin_of(weight)
        parameters = (weight,) if bias is None else (weight, bias)
        self.parameters = [t if t.is_leaf else t.detach().requires_grad_(t.requires_grad) for t in parameters]
        self.states = [state_of(t) for t in parameters]

    def copy_parameters(self) -> None:
        """Before one of them changes; not what has changed already."""
        for i, (t, state) in enumerate(zip(self.parameters, self.states, strict=True)):
            if state_of(t) == state:
                self.parameters[i] = copy_of(t).requires_grad_(t.requires_grad)
                self.states[i] = state_of(self.parameters[i])

    def run(self, out, a):
        for name, t, state in zip(("weight", "bias"), self.parameters, self.states, strict=False):
            if (now := state_of(t)) != state:
                what = "freed" if now[:2] == state[:2] else "changed"
                raise RuntimeError(
                    f"{self.name} must be recomputed in backward, but its {name} of shape {tuple(t.shape)} "
                    f"was {what} after forward. Run backward before that, or use remat(max_cost=0), which "
                    "recomputes no convolution"
                )
        return self.function(a, *(to(t, self.dtype) for t in self.parameters), **self.arguments)


def may_run_again(weight: Tensor) -> bool:
    """Whether ``weight`` will still exist in backward: sharded training frees it after forward.

    FSDP1's weights are parts of a larger storage; where FSDP2 shards a module, no convolution runs again.
    """
    part = storage_of(weight).nbytes() != weight.nbytes
    if part or (weight._is_view() and weight._base.is_leaf) or hasattr(weight, "ds_id"):
        return False
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return True
    modules = sys.modules["torch.distributed._composable_state"]._module_state_mapping
    return not any(isinstance(module, fsdp.FSDPModule) for module in list(modules))


class Convolution(Operation):
    """dw needs a and is computed first; da does not, and can use the memory that a leaves."""

    saved, prunes = (1,), True

    def __init__(
        self, function, arguments: dict, geometry: Geometry, a: Tensor, value: Value | None, dtype
    ) -> None:
        self.function, self.arguments, self.geometry = function, arguments, geometry
        self.value, self.dtype = value, dtype
        self.name, self.layout = function.__name__, None
        self.input, self.shape = a, a.shape  # until `forward`: nothing here may hold the input

    def forward(self, a, w, b):
        a, self.input = self.input, None
        y = self.function(a, to(w, self.dtype), to(b, self.dtype), **self.arguments)
        # That of da: of images, PyTorch chose it for y, by a and w.
        if w.dim() < 4:
            self.layout = layout_of(a)
        elif y.stride(1) > 1:  # cheap: most are
            self.layout = torch.contiguous_format
        else:
            self.layout = suggest_memory_format(y)
        if y.is_cpu and y.is_contiguous() and w.dim() > 2:  # a linear layer's input is read in place
            strided = max(self.geometry.stride) > 1 and not self.skips_pixels(y, w)
            copies = a.nbytes + (max(a.nbytes, y.nbytes) if strided else y.nbytes)
            self.scratch = 2 * w.nbytes + (copies // 4 if worth_a_cut(copies, w) else copies)
        return y

    def backward(self, task, dz, needs, saved):
        w, (need_a, need_w, need_b) = to(saved[0], self.dtype), needs
        da = dw = db = None
        layout = None if dz.is_meta else self.layout  # there a convolution knows none
        room = task.room()
        a = task.get(self.value)[0] if need_w else None
        if need_a and layout is not None:
            dz = dz.contiguous(memory_format=layout)  # as PyTorch does
        parts = self.parts(dz, w, room)
        if need_w:
            dw = self.grad_weight(dz, a, w, parts)
            del a
        if need_b:
            db = dz.sum([0, *range(2, dz.dim())])
        skips = self.skips_pixels(dz, w)
        if need_a and (skips or parts > 1):
            da = read = (dz.new_zeros if skips else dz.new_empty)(self.shape)
            if skips:
                read = da[(..., *(slice(None, None, s) for s in self.geometry.stride))]
            for read_i, dz_i in zip(read.chunk(parts), dz.chunk(parts), strict=True):
                read_i.copy_(self.grad_input(dz_i, w, skips))
        elif need_a:
            da = self.grad_input(dz, w)
        if need_a and layout is not None:
            da = da.contiguous(memory_format=layout)  # as PyTorch's: some backward kernels rely on that
        return [da, dw, db]

    def skips_pixels(self, dz: Tensor, w: Tensor) -> bool:
        """Whether it reads only some pixels of an image, on a CPU: the gradients of the others are 0.

        The library takes much longer, and twice the memory, for the gradient of all of them at once.
        """
        g, contiguous = self.geometry, self.layout is torch.contiguous_format and dz.is_contiguous()
        return self.pointwise(w) and max(g.stride) > 1 and not g.transposed and contiguous and dz.is_cpu

    def pointwise(self, w: Tensor) -> bool:
        """Whether a value depends on one pixel."""
        return w.shape[2:].numel() == 1 and not any(self.geometry.padding)

    def parts(self, dz: Tensor, w: Tensor, room: int) -> int:
        """4 where a CPU library's copies of dz and a would raise the peak, to cut the batch; else 1.

        It copies both into its own layout, unless they are channels_last. A sum of parts needs two more
        weights, and would lose digits in half precision.
        """
        copies = dz.nbytes + self.shape.numel() * dz.element_size()
        pays = copies >= room and worth_a_cut(copies, w)
        wide = dz.dtype in WIDE and dz.is_cpu and dz.is_contiguous()
        return 4 if pays and wide and len(dz) >= 4 else 1

    def grad_weight(self, dz: Tensor, a: Tensor, w: Tensor, parts: int) -> Tensor:
        how = (w, None, *self.geometry, [False, True, False])
        if parts == 1:
            return conv_backward(dz, a, *how)[1]
        pairs = zip(dz.chunk(parts), a.chunk(parts), strict=True)
        return functools.reduce(Tensor.add_, (conv_backward(*pair, *how)[1] for pair in pairs))

    def grad_input(self, dz: Tensor, w: Tensor, read: bool = False) -> Tensor:
        """The transposed convolution, without a, for which the library's backward would need memory.

        With ``read`` of those pixels alone that a 1x1 convolution reads.
        """
        g, size = self.geometry, self.shape[2:]
        if g.groups > 1:  # else the library may misread a weight of a single row or column
            w = in_layout(w, w)
        if read:
            g, size = g._replace(stride=[1] * len(size)), dz.shape[2:]
        alone = dz.is_cpu and self.pointwise(w) and size == dz.shape[2:]
        if alone and not g.transposed and g.groups == 1 and dz.is_contiguous() and multiplied(dz):
            da = torch.bmm(w.flatten(1).T.expand(len(dz), -1, -1), dz.flatten(2))
            return aten._unsafe_view(da, (*da.shape[:2], *size))  # not a view: the engine may add to it
        if alone and len(size) == 3:  # as images: the kernel for volumes needs more memory
            how = [1, 1], [0, 0], [1, 1], not g.transposed, [0, 0], g.groups
            da = torch.convolution(dz.flatten(2, 3), w.flatten(2, 3), None, *how)
            return aten._unsafe_view(da, (*da.shape[:2], *size))
        rest, da = [0] * len(size), None
        if not g.transposed:
            by_dimension = zip(size, g.padding, g.dilation, w.shape[2:], g.stride, strict=True)
            rest = [(n + 2 * p - d * (k - 1) - 1) % s for n, p, d, k, s in by_dimension]
        if dz.numel() and not (dz.is_cpu and len(dz) == 1 and dz.numel() <= UNFOLDED):
            da = torch.convolution(dz, w, None, *g[:3], not g.transposed, rest, g.groups)
        if da is None or da.shape[2:] != size:  # an output padding of a whole stride or more
            like = dz.new_empty(1).expand(len(dz), self.shape[1], *size)
            da = conv_backward(dz, like, w, None, *g, [True, False, False])[0]
        # One of the CPU's kernels for volumes leaves its result in the memory of a padded one.
        return da.clone() if len(size) == 3 and storage_of(da).nbytes() > da.nbytes else da


def worth_a_cut(copies: int, w: Tensor) -> bool:
    """Whether it pays to cut a batch of which these bytes are copied: each part has its own dw."""
    return copies >= max(1 << 24, 3 * w.nbytes)


def multiplied(dz: Tensor) -> bool:
    """Whether PyTorch multiplies matrices for a 1x1 convolution; a transposed one then takes longer.

    Not for images of one pixel, as in squeeze-and-excite: a batch of matrices times vectors is slow.
    """
    few = len(dz) < 16 and torch.get_num_threads() == 1 and dz.dtype in WIDE
    return few and dz.shape[2:].numel() > 1


class Linear(Convolution):
    """y = a wᵀ + b, a 1x1 convolution in another layout."""

    def forward(self, a, w, b):
        x = self.input  # in the dtype that is computed in
        # Whether each channel is contiguous, as where one image's pixels became tokens. PyTorch's gradient
        # then has this layout, and ours must: for another one, some norms' kernels give other values.
        self.in_columns = not x.is_contiguous() and x.movedim(-1, 0).is_contiguous()
        return super().forward(a, w, b)

    def to_save(self, inputs):
        """As PyTorch does: nothing where the input needs no gradient, else a view of the weight."""
        a, w, _ = inputs
        return [w.detach()] if a.requires_grad else []

    def backward(self, task, dz, needs, saved):
        need_a, need_w, need_b = needs
        rows, dw = dz.reshape(-1, dz.shape[-1]), None
        if need_w:
            a, _ = task.get(self.value)
            dw = rows.T @ a.reshape(-1, a.shape[-1])
            del a
        da = None
        if need_a:
            w = to(saved[0], self.dtype)
            if self.in_columns:
                da = aten._unsafe_view(w.T @ rows.T, (w.shape[1], *dz.shape[:-1])).movedim(0, -1)
            else:
                da = dz @ w
        return [da, dw, rows.sum(0) if need_b else None]
