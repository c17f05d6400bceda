"""The operations that remat knows: what each computes in forward, its recipe, and its backward.

Forward is always the caller's call. A backward is PyTorch's kernel on recomputed values, with its result in
their memory where possible. An operation is one small object: it holds the values that its backward needs and
its settings, and knows nothing of autograd (`mode.Node` does).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._prims_common import compute_elementwise_output_strides, suggest_memory_format

from ..batch_norm import add_up, batch_norm_sums, grad_input_, grad_input_coefficients, per_channel
from . import passes
from .layouts import View, in_layout, layout_of, one_image, restrided
from .task import slabs
from .values import Recipe, Value, copy_of, origin_of, storage_of

aten = torch.ops.aten
WIDE = (torch.float32, torch.float64)  # wide enough to add up parts, and for statistics


class Operation:
    """One call: ``forward(*inputs)``, and ``backward(task, dz, needs, saved)``, the inputs' gradients.

    ``task`` is the `Task` that recomputes, ``needs`` which gradients count, ``saved`` what autograd saved.
    """

    name = ""  # for people; of those that have no recipe
    saved: tuple[int, ...] = ()  # the inputs that autograd saves: parameters, whose versions it then checks
    prunes = False  # whether it is worth asking which gradients this backward pass needs
    in_place = False
    beside = False  # whether backward's result is in memory at the same time as the value that it needs
    value = None  # what its backward needs, if anything
    output = None  # the value that it made, unless that is kept
    source = None  # a weak reference to the input's value, if there is one for the output
    scratch = 0  # bytes of a library's scratch memory in backward
    # By `Mode.apply`: the context's table, the place in its order, and the parameter; bytes of the input (and
    # of its gradient) and of the output.
    table, number, weight = None, 0, None
    gradient = result = 0

    def to_save(self, inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
        return [inputs[i] for i in self.saved]

    def needed(self) -> tuple[Value, ...]:
        """The values that backward needs."""
        return () if self.value is None else (self.value,)

    def grown(self) -> int:
        """Bytes that backward adds to what is held: the weight's gradient, unless it is accumulated."""
        w = self.weight and self.weight()
        return 0 if w is None or not w.requires_grad or (w.is_leaf and w.grad is not None) else w.nbytes


def to(t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """``t`` in this dtype; it requires a gradient like ``t``, by which PyTorch chooses a product's kernel."""
    return t if t is None or dtype in (None, t.dtype) else t.to(dtype).requires_grad_(t.requires_grad)


def unhooked():
    """A context in which the caller's saved-tensor hooks do not see what autograd saves."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


# Norms -----------------------------------------------------------------------------------------------------


class Normalise(Recipe):
    """z = γ (y - μ)/σ + β with forward's statistics, equal to the last bit."""

    name, passes = "norm", 1.0

    def __init__(self, gamma, beta, mean: Tensor, invstd: Tensor) -> None:
        # The statistics must be the recipe's alone; γ and β belong to the model, and may change.
        self.origin, self.norm = origin_of(gamma), passes.Norm(mean, invstd, copy_of(gamma), copy_of(beta))

    def run(self, out, y):
        return passes.normalise(y, self.norm, out)


class Again(Recipe):
    """Forward's call once more, without its side effects."""

    gives = True

    def __init__(self, name: str, call: Callable[[Tensor], Tensor], passes: float, parameter=None) -> None:
        self.name, self.call, self.passes, self.origin = name, call, passes, origin_of(parameter)

    def run(self, out, x):
        z = self.call(x)
        if out is not None:
            return out.copy_(z)
        return z.clone() if storage_of(z) is storage_of(x) else z


class BatchNorm(Operation):
    """PyTorch's forward and backward, by the kernel that it chose."""

    saved = (1,)

    def __init__(
        self, value: Value | None, running_mean, running_var, training: bool, momentum: float, eps: float
    ) -> None:
        self.value, self.running, self.training = value, (running_mean, running_var), training
        self.momentum, self.eps, self.layout = momentum, eps, None
        self.mean = self.invstd = self.reserve = self.kernel = self.format = None

    def forward(self, y, gamma, beta):
        how = (*self.running, self.training, self.momentum, self.eps, torch.backends.cudnn.enabled)
        results = torch._batch_norm_impl_index(y, gamma, beta, *how)
        z, self.mean, self.invstd, self.reserve, self.kernel = results
        self.layout = layout_of(y)
        self.format = suggest_memory_format(y) if self.kernel else None
        alike = y.is_contiguous() and y.dtype in WIDE
        self.beside = not (y.is_cpu and alike and self.training)  # else dy may be written over y
        return z

    def recipe_of(self, gamma: Tensor | None, beta: Tensor | None) -> Recipe:
        """The result's, once there is one."""
        buffers = self.running
        if self.training:
            self.running, mean, invstd = (None, None), self.mean, self.invstd
        else:
            self.running = buffers = mean, var = tuple(map(copy_of, self.running))
            invstd = (var + self.eps).rsqrt()
        alike = all(t is None or t.dtype == invstd.dtype for t in (gamma, beta))
        if invstd.dtype in WIDE and alike and self.layout is not None:
            return Normalise(gamma, beta, mean, invstd)
        # Entirely in half precision, or with gaps in its input: only the kernel knows how it rounds.
        values = copy_of(gamma), copy_of(beta)
        if self.training:  # the kernel depends on the buffers' dtype, and writes to them
            buffers = [t if t is None else torch.zeros_like(t) for t in buffers]
        how = (*buffers, self.training, 0.0, self.eps, torch.backends.cudnn.enabled)
        recipe = Again("norm", lambda y: torch._batch_norm_impl_index(y, *values, *how)[0], 3.0, gamma)
        recipe.whole = self.training or self.layout is None  # one image may have no gaps
        return recipe

    def backward(self, task, dz, needs, saved):
        (gamma,) = saved
        if self.value is None:  # constant statistics and no dγ: any tensor of y's form will do
            y = dz if self.layout is None else dz.contiguous(memory_format=self.layout)
        else:
            y, mine = task.get(self.value)
        if self.kernel and self.training:  # a GPU's library must get what it got in forward
            y, dz = restrided(y, self.format), restrided(dz, self.format)
        else:
            y, dz = in_layout(y, y), in_layout(dz, y)
        gamma = gamma if gamma is None else gamma.contiguous()  # kernels read it without its stride
        alike = y.is_contiguous() and dz.is_contiguous()
        if not self.beside and alike and needs[0] and task.room() < y.nbytes:
            grads = grads_in_slabs(dz, y, mine, gamma, self.mean, self.invstd)
            return [g if need else None for g, need in zip(grads, needs, strict=True)]
        reserve = self.reserve.clone() if task.retained else self.reserve  # the kernel may write to it
        how = (*self.running, self.mean, self.invstd, self.training, self.eps, needs, reserve)
        return list(aten._batch_norm_impl_index_backward.default(self.kernel, y, dz, gamma, *how))


def grads_in_slabs(dz: Tensor, y: Tensor, mine: bool, gamma: Tensor | None, mean, invstd) -> list:
    """dy, dγ and dβ of a norm with batch statistics (chapter 3), with no temporary tensor of dy's size.

    The CPU library's backward allocates dy twice. Here dy is computed some images at a time, over y if that
    is ``mine``.
    """
    dz, images, parts = dz.view(*y.shape[:2], -1, 1), y.view(*y.shape[:2], -1, 1), slabs(y)
    sum_dz, sum_dz_y = sums = add_up([batch_norm_sums(dz[part], images[part], mean) for part in parts])
    scale, m = invstd if gamma is None else invstd * gamma, y.numel() // y.shape[1]
    coefficients = grad_input_coefficients(scale, invstd.double() ** -2, sums, m)
    dy = images if mine else torch.empty_like(images)
    for part in parts:
        torch.sub(images[part], per_channel(mean), out=dy[part])
        grad_input_(dz[part], dy[part], *coefficients)
    return [dy.view(y.shape), (sum_dz_y * invstd).to(scale.dtype), sum_dz.to(scale.dtype)]


class Rerun(Operation):
    """A cheap function of a value and of parameters: backward calls it again, and differentiates that.

    For norms by group, layer and image, PReLU, and what else `calls.again` serves. Like PyTorch's node it
    saves the first ``saves`` parameters; of the others it has ``copies``. ``reads_layout``: see
    `layouts.in_layout`.
    """

    beside = True

    def __init__(self, call, value: Value, saves: int, copies: list[Tensor], reads_layout: bool) -> None:
        self.forward, self.value, self.copies, self.reads_layout = call, value, copies, reads_layout
        self.saved = tuple(range(1, 1 + saves))

    def backward(self, task, dz, needs, saved):
        x, mine = task.get(self.value)
        if self.value.snapshot is not None:  # what forward read
            x, mine = self.value.snapshot, False
        if mine and self.reads_layout:  # what reads it is a copy
            x = x.contiguous()
        given = (x, *saved, *self.copies)
        inputs = [t.detach().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
        # Backward may run inside remat's context, or of saved-tensor hooks.
        with torch.enable_grad(), torch._C.DisableTorchFunction(), unhooked():
            z = self.forward(*inputs)
            if self.reads_layout:  # of images and channels in one dimension, as z is contiguous
                dz = in_layout(dz.contiguous(), z)
            edge = torch.autograd.graph.get_gradient_edge(z)
            del z
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        grads = iter(torch.autograd.grad([edge], wanted, dz))
        return [next(grads) if need else None for need in needs]


# Activations -----------------------------------------------------------------------------------------------


def library(name: str, *last, **named) -> tuple[Callable, Callable]:
    """Forward and backward kernel of an activation with the usual signature; ``last`` is for backward."""
    forward, backward = getattr(aten, name).out, getattr(aten, f"{name}_backward").grad_input
    return (
        lambda u, *numbers, out: forward(u, *numbers, out=out, **named),
        lambda da, x, *numbers, out: backward(da, x, *numbers, *last, grad_input=out, **named),
    )


def elu_backward(da, x, *numbers, out, from_result=False):
    return aten.elu_backward.grad_input(da, *numbers, from_result, x, grad_input=out)


# By name: a = forward(u, *numbers, out=a), and du = backward(da, u or a, *numbers, out=du).
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    **{name: library(name) for name in ("hardsigmoid", "hardtanh", "sigmoid", "silu", "tanh")},
    "gelu": library("gelu", approximate="none"),
    "gelu_tanh": library("gelu", approximate="tanh"),
    "relu": (
        lambda u, out: torch.clamp_min(u, 0, out=out),
        lambda da, a, out: aten.threshold_backward.grad_input(da, a, 0, grad_input=out),
    ),
    "leaky_relu": library("leaky_relu", False),
    "elu": (aten.elu.out, elu_backward),
    "hardswish": (aten.hardswish.out, lambda da, u, out: aten.hardswish_backward(da, u)),
    "mish": (aten.mish.out, lambda da, u, out: aten.mish_backward(da, u)),
}
# Those that PyTorch differentiates from a if they were in place: du, or an error for a negative slope.
IN_PLACE: dict[str, Callable] = {
    "leaky_relu": library("leaky_relu", True)[1],
    "elu": partial(elu_backward, from_result=True),
}
NEW = ("hardswish", "mish")  # whose backward has no kernel with ``out``: it gives a new tensor
EXACT = ("relu", "hardtanh", "leaky_relu")  # a value's last bit does not depend on its position in memory


class Kind(NamedTuple):
    """An activation: its name in `ACTIVATIONS` and its settings, in the order of its kernel."""

    name: str
    numbers: tuple[float, ...] = ()

    def forward(self, u: Tensor, out: Tensor) -> Tensor:
        return ACTIVATIONS[self.name][0](u, *self.numbers, out=out)

    def backward(self, da: Tensor, x: Tensor, out: Tensor) -> Tensor:
        return ACTIVATIONS[self.name][1](da, x, *self.numbers, out=out)


class Activate(Recipe):
    """a = act(u)."""

    reuse = 0

    def __init__(self, kind: Kind) -> None:
        self.name, self.kind, self.whole = kind.name, kind, kind.name not in EXACT

    def run(self, out, u):
        return self.kind.forward(u, out)

    def merged(self, parents, alone):
        """On an accelerator: with the norm before it, and with what is added to the norm's result."""
        (z,), added = parents, ()
        if not passes.has_kernel(z.view.device) or not alone(z):
            return None
        if isinstance(z.recipe, Elementwise) and z.recipe.function is torch.add and len(z.parents) == 2:
            for norm, other in (z.parents, z.parents[::-1]):
                forms = {(v.view.shape, v.view.dtype) for v in (norm, other, z)}
                if len(forms) == 1 and isinstance(norm.recipe, Normalise) and alone(norm):
                    z, added = norm, (other,)
                    break
        if not isinstance(z.recipe, Normalise):
            return None
        return NormActivate(z.recipe, self.kind, 1 if added else None), (*z.parents, *added)


class NormActivate(Recipe):
    """a = act(norm(y)), or act(norm(y) + added), in one pass."""

    def __init__(self, normalise: Normalise, kind: Kind, reuse: int | None) -> None:
        self.normalise, self.kind, self.reuse = normalise, kind, reuse

    def run(self, out, y, added=None):
        return passes.norm_act(y, self.normalise.norm, self.kind, added, out)


class Activation(Operation):
    """Its backward takes the result where possible: it is often held already."""

    def __init__(self, call: tuple, kind: Kind, value: Value, in_place: bool) -> None:
        self.call, self.kind, self.value, self.in_place = call, kind, value, in_place
        self.backward_in_place = IN_PLACE.get(kind.name) if in_place else None
        # Then `value` is to be the result's.
        self.from_result = self.backward_in_place is not None or passes.takes_result(kind, value.view.dtype)

    def forward(self, u):
        (function, args, kwargs), self.call = self.call, None
        return function(u, *args, **kwargs)

    def backward(self, task, dz, needs, saved):
        if task.at_hand(self.value) is None:  # an accelerator can do without it
            recipe = self.value.recipe if self.from_result else Activate(self.kind)
            parents = self.value.parents if self.from_result else (self.value,)
            if merged := recipe.merged(parents, lambda v: task.at_hand(v) is None):
                recipe, parents = merged
                y, *added = (task.start(v) for v in parents)
                return [passes.act_backward(dz, y, recipe.normalise.norm, self.kind, *added)]
        x, mine = task.get(self.value)
        x, dz = one_image(x, dz)
        # In PyTorch's layout: some norms' backward takes another one for the wrong values.
        first, other = (x, dz) if self.kind.name in ("relu", "leaky_relu") or 0 in dz.stride() else (dz, x)
        strides = ()
        if 1 in x.shape and x.stride() != dz.stride():  # else those of the first, without gaps
            strides = compute_elementwise_output_strides(first, other)
        alike = x.dtype == dz.dtype and x.stride() == (strides or first.stride())
        if mine and alike or self.kind.name in NEW:
            out = x
        elif strides:
            out = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
        else:
            out = torch.empty_like(first, dtype=x.dtype)
        if self.backward_in_place:
            return [self.backward_in_place(dz, x, *self.kind.numbers, out=out)]
        return [self.kind.backward(dz, x, out)]


# Products, dropout, and what PyTorch's own nodes do --------------------------------------------------------


class Product(Operation):
    """x = p q, where both need gradients: squeeze-and-excite, gates."""

    prunes = True

    def __init__(self, function, p: Value, q: Value) -> None:
        self.forward, self.values, self.shapes = function, (p, q), (p.view.shape, q.view.shape)

    def needed(self):
        return self.values

    def backward(self, task, dz, needs, saved):
        grads = [None, None]
        for i in (1, 0):  # the smaller first: its gradient is a sum, and what it is made of goes again
            if needs[i]:
                t, mine = task.get(self.values[1 - i])
                # Only in PyTorch's layout: some norms' backward takes another one for the wrong values.
                mine = mine and View.of(t) == View.of(dz)
                t, dz_i = one_image(t, dz) if mine else (t, dz)
                grads[i] = torch.mul(dz_i, t, out=t if mine else None).sum_to_size(self.shapes[i])
                del t, dz_i
        return grads


class Quotient(Product):
    """x = p / q, where both need gradients: a norm that is written out."""

    def backward(self, task, dz, needs, saved):
        (q, _), dq = task.get(self.values[1]), None
        if needs[1]:
            p, _ = task.get(self.values[0])
            dq = (-dz * (p / q).div_(q)).sum_to_size(self.shapes[1])  # in PyTorch's order: dz has the layout
        return [(dz / q).sum_to_size(self.shapes[0]) if needs[0] else None, dq]


# Of functions whose node saves one tensor for the other's gradient: the operation if both need gradients.
PAIRS = {torch.mul: Product, torch.div: Quotient}


class Dropout(Operation):
    """Keeps one byte a value. On a CPU PyTorch keeps the noise that it multiplies by."""

    def __init__(self, p: float) -> None:
        self.mask, self.recipe = None, Drop(p)

    def forward(self, x):
        p = self.recipe.p
        if not x.is_cpu:
            z, self.mask = torch.native_dropout(x, p, True)
            return z
        noise = torch.empty_like(x).bernoulli_(1 - p)  # PyTorch's steps, and random numbers
        self.mask = noise.bool()
        noise.div_(1 - p)
        return x * noise if 1 in x.shape else noise.mul_(x)  # where strides are ambiguous, PyTorch's call

    def backward(self, task, dz, needs, saved):
        return [self.recipe.run(None, dz, task.get(self.value)[0])]


class Drop(Recipe):
    """x times 1/(1-p) where the mask says so, else times 0."""

    name, passes, gives = "dropout", 2.0, True

    def __init__(self, p: float) -> None:
        self.p = p

    def run(self, out, x, mask):
        share = 1 - self.p
        if not x.is_cpu:  # forward's kernel rounds the share to the dtype in which it computes
            share = share if x.dtype == torch.float64 else array("f", [share])[0]
            z = aten.native_dropout_backward(x, mask, 1 / share)
            return z if out is None else out.copy_(z)
        noise = (mask.to(x.dtype) if out is None else out.copy_(mask)).div_(share)
        # A gradient must have PyTorch's layout.
        if out is None and noise.stride() != x.stride():
            return x * noise
        return one_image(noise.mul_(x))[0]


def rsub(p: Tensor, q: float, out: Tensor | None = None) -> Tensor:
    """q - p: torch.rsub has no ``out``."""
    return torch.neg(p, out=out).add_(q)


class Elementwise(Recipe):
    """p + q, p - q, p q or p / q, of tensors or a tensor and a number; or a number less a tensor."""

    reuse = 0

    def __init__(self, function, number=None) -> None:
        self.function, self.number, self.name = function, number, function.__name__

    def run(self, out, p, *q):
        return self.function(p, *(q or (self.number,)), out=out)


class Join(Recipe):
    """torch.cat or torch.stack, of channels or of images."""

    joins = reshapes = True

    def __init__(self, function, dim: int) -> None:
        self.function, self.name, self.dim, self.whole = function, function.__name__, dim, dim == 0

    def run(self, out, *parts):
        return self.function(parts, self.dim, out=out)
