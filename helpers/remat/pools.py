"""Pooling, and padding by an image's own pixels."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .layouts import View, layout_of
from .operations import Operation
from .task import slabs

aten = torch.ops.aten


class FromShape(Operation):
    """An average pooling, or a padding by the image's own pixels; ``name`` is that of PyTorch's operator.

    Of the input, backward needs the shape and the layout: those of the gradient, which is at hand.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], name: str, how: tuple, x: Tensor) -> None:
        self.forward, self.name, self.how = call, name, how
        self.shape, self.layout = x.shape, suggest_memory_format(x)

    def backward(self, task, dz, needs, saved):
        dx = torch.empty(self.shape, dtype=dz.dtype, device=dz.device, memory_format=self.layout)
        return [getattr(aten, f"{self.name}_backward").grad_input(dz, dx, *self.how, grad_input=dx)]


class MaxPool(Operation):
    """Keeps each maximum's position in its window, one byte; PyTorch keeps eight bytes, and the input.

    On an accelerator, or in three dimensions, it is the position in the image, in two bytes if that will do:
    one pass instead of four.
    """

    def __init__(self, how: tuple, x: Tensor) -> None:
        self.how = how  # kernel, stride, padding, dilation, ceil_mode
        self.shape, self.offsets, self.in_window = x.shape, None, x.is_cpu and x.dim() == 4
        self.gap = x.shape[-1] - how[0][-1]  # pixels between two rows of a window

    def forward(self, x):
        pool = getattr(torch._C._nn, f"max_pool{x.dim() - 2}d_with_indices")
        if not self.in_window:
            y, index = pool(x, *self.how)
            self.offsets = index.to(torch.int16 if x.shape[2:].numel() <= 1 << 15 else torch.int32)
            return y
        y = None
        for images in slabs(x, 8):  # of an index
            y_s, index = pool(x[images], *self.how)
            if y is None:
                y = y_s if len(y_s) == len(x) else View.of(y_s).empty(len(x))
                self.offsets = torch.empty_like(y, dtype=torch.uint8)
                starts = self.starts(index)
            if y is not y_s:
                y[images] = y_s
            self.offsets[images] = self.to_window(index, starts)
            y_s = index = None  # before the next ones are made
        return y

    def starts(self, like: Tensor) -> Tensor:
        """The first pixel of each window, as an index into the image."""
        (rows, columns), (s, t), (p, q) = like.shape[2:], *self.how[1:3]
        i = torch.arange(rows, device=like.device) * s - p
        return i[:, None] * self.shape[3] + torch.arange(columns, device=like.device) * t - q

    def to_window(self, index: Tensor, starts: Tensor) -> Tensor:
        """Positions in the windows from those in the image, which are overwritten.

        By floats, exact below 2²⁴: to divide integers takes five times as long.
        """
        place = index.sub_(starts).float()
        return place.sub_(place.div(self.shape[3], rounding_mode="trunc"), alpha=self.gap)

    def to_image(self, offsets: Tensor, starts: Tensor | None) -> Tensor:
        """The positions in the image that are kept as ``offsets``."""
        if starts is None:
            return offsets.long()
        place = offsets.float()
        place.add_(place.div(self.how[0][1], rounding_mode="trunc"), alpha=self.gap)
        return place.long().add_(starts)

    def backward(self, task, dz, needs, saved):
        how = {"dtype": dz.dtype, "device": dz.device, "memory_format": layout_of(self.offsets)}
        dx = torch.empty(self.shape, **how)
        kernel = getattr(aten, f"max_pool{dx.dim() - 2}d_with_indices_backward")
        starts = self.starts(self.offsets) if self.in_window else None
        for images in slabs(dx, 8):
            dx_s = dx[images]
            # Of the input the library reads the shape and the layout: those of its result.
            kernel.grad_input(
                dz[images], dx_s, *self.how, self.to_image(self.offsets[images], starts), grad_input=dx_s
            )
        return [dx]
