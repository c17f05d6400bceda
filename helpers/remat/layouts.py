"""Memory formats: where the values of a tensor lie, and what a size of 1 leaves open."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._prims_common import make_channels_last_strides_for, make_contiguous_strides_for

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions


class View(NamedTuple):
    """Shape, strides, dtype and device of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, t: Tensor) -> View:
        return view_of(t.shape, t.stride(), t.dtype, t.device)

    def empty(self, images: int | None = None) -> Tensor:
        """Memory for a tensor of this form, or for some images of it."""
        shape = self.shape if images is None else (images, *self.shape[1:])
        return torch.empty_strided(
            shape, packed(self.shape, self.stride), dtype=self.dtype, device=self.device
        )

    def like(self, t: Tensor) -> Tensor:
        """``t``, all images or some, with this dtype and layout: itself, or a copy."""
        alike = t.dtype == self.dtype and t.stride() == packed(self.shape, self.stride)
        return t if alike else self.empty(len(t)).copy_(t)

    def with_gaps(self, t: Tensor) -> Tensor:
        """``t``, all images or some, with these strides, by which kernels choose an order: it, or a copy."""
        if self.dense or t.stride() == self.stride:
            return t
        out = torch.empty_strided(t.shape, self.stride, dtype=t.dtype, device=t.device)
        once = tuple(slice(1 if stride == 0 else None) for stride in self.stride)  # of an expanded dimension
        out[once] = t[once]
        return out

    @property
    def dense(self) -> bool:
        """Whether its values fill their memory without gaps or overlaps."""
        return packed(self.shape, self.stride) == self.stride


# One for all tensors of a form: the fewer objects a step makes, the less often Python looks for cycles.
view_of = functools.lru_cache(maxsize=4096)(View)


@functools.lru_cache(maxsize=4096)
def packed(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, ...]:
    """The strides without gaps, with the dimensions in the same order: forward's layout."""
    strides, step = [0] * len(shape), 1
    for i in sorted(range(len(shape)), key=lambda i: (stride[i], -i)):
        strides[i], step = step, step * shape[i]
    if shape[:1] == (1,):
        strides[0] = step  # of one image it may be anything, but kernels conclude a layout from it
    alike = all(n == 1 or s == t for n, s, t in zip(shape, stride, strides, strict=True))
    return stride if alike else tuple(strides)


def span(shape, stride) -> int:
    """The distance from the first value to the last."""
    return sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def layout_of(t: Tensor) -> torch.memory_format | None:
    """The memory format in which the values of ``t`` have no gaps, if there is one."""
    if t.is_contiguous():  # cheap: nearly all are
        return torch.contiguous_format
    last = CHANNELS_LAST.get(t.dim())
    return last if last and t.is_contiguous(memory_format=last) else None


def one_image(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Of one image the stride of the batch may be anything; if all have one layout, that of a larger batch.

    PyTorch's elementwise kernels give it to their results then. Gradients that leave remat's nodes need it,
    since the backward of a norm outside of remat may conclude a layout from it (see `in_layout`).
    """
    layouts = {layout_of(t) for t in tensors} if len(tensors[0]) == 1 else ()
    if len(layouts) != 1 or None in layouts:
        return tensors
    return tuple(t.as_strided(t.shape, (t.numel(), *t.stride()[1:])) for t in tensors)


def in_layout(t: Tensor, like: Tensor) -> Tensor:
    """``t``, with the strides of `restrided` in ``like``'s layout if a size of 1 leaves some open.

    PyTorch's backward of batch norm reads a layout from these strides, too. If it finds different ones for y
    and dz, it pairs the wrong values.
    """
    layout = layout_of(like) if 1 in t.shape else None
    return t if layout is None else restrided(t, layout)


def restrided(t: Tensor, layout: torch.memory_format) -> Tensor:
    """``t`` in this layout, with a new tensor's strides also where a dimension of size 1 may have any."""
    last = layout is not torch.contiguous_format
    strides = (make_channels_last_strides_for if last else make_contiguous_strides_for)(t.shape)
    return t.contiguous(memory_format=layout).as_strided(t.shape, strides)
