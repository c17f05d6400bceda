"""Memory formats: where the values of a tensor lie, and what a size of 1 leaves open."""

import torch
from torch import Tensor
from torch._prims_common import make_channels_last_strides_for, make_contiguous_strides_for

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions


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
