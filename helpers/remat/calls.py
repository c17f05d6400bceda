"""The calls of forward that remat knows: which function, with which arguments, becomes which operation.

A handler takes ``(mode, function, args, kwargs)`` and returns what the function would. A call that it cannot
serve goes to PyTorch unchanged. `HANDLERS` at the end is the whole list.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from operator import index
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import operations as ops
from .arguments import (
    ACTIVATIONS,
    DROPOUTS,
    ELEMENTWISE,
    MAX_POOLS,
    PADDINGS,
    TENSORS,
    Unfit,
    activation_of,
    autocast_dtype,
    fit,
    fixed,
    functions,
    has_memory,
    is_copied,
    is_mask,
    is_whole,
    needs_grad,
    numbers_or_none,
    ordinary,
    per_dimension,
    plain,
    pool_fits,
    quiet,
    starts_alike,
    vector_norm_fits,
    window,
    within_images,
)
from .convolutions import CONVOLUTIONS, Convolution, Convolve, Linear, may_run_again, setting_of
from .layouts import layout_of
from .pools import FromShape, MaxPool
from .values import SMALL, Row, Value, copy_of, storage_of
from .writes import LOST, lost_argument, targets, unseen_change, writes

if TYPE_CHECKING:
    from .mode import Mode

# A small output of an expensive convolution is always kept: dropping it saves few bytes and makes all that
# follows expensive. In multiplications per value, times the input's bytes per byte of the output.
BOTTLENECK = 4096


def handler(bind: Callable) -> Callable:
    """``bind(mode, function, *args, **kwargs)`` where remat works and the arguments fit; else PyTorch."""

    def handle(mode: Mode, function, args, kwargs):
        run = None
        if quiet():
            try:
                run = bind(mode, function, *args, **kwargs)
            except (Unfit, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError):
                pass  # not for remat; if they are wrong, PyTorch will say so
        return leave(mode, function, args, kwargs) if run is None else run()

    return handle


def convolution(mode: Mode, function, input, weight, bias=None, *given, **named):
    """Also a linear layer, which is a convolution without pixels."""
    fit(plain(input, weight, bias) and needs_grad(input, weight, bias) and input.numel() > 0)
    alike = input.dim() == weight.dim() or (function is F.linear and input.dim() > 1)
    fit(alike and (bias is None or bias.dim() == 1))
    fit(function is not F.linear or needs_grad(input, weight))  # for a bias alone PyTorch saves nothing
    fit(mode.table.is_safe(input))
    # No lists, which have no hash, and which the caller could change later.
    given = tuple([tuple(v) if isinstance(v, list) else v for v in given])
    named = tuple([(name, tuple(v) if isinstance(v, list) else v) for name, v in named.items()])
    arguments, geometry, work = setting_of(function, weight.shape, given, named)
    dtype = autocast_dtype(input)
    if dtype is None:
        fit(input.dtype == weight.dtype)
    else:  # it does not cast float64
        fit(all(t is None or t.dtype != torch.float64 for t in (input, weight, bias)))

    def run() -> Tensor:
        table, a, w, value, recipe = mode.table, input, weight, None, None
        if dtype is not None and w.dtype != dtype:
            if not w.is_leaf:
                w = w.to(dtype)  # a computed weight, of which PyTorch keeps this copy alone
            elif function is not F.linear or a.requires_grad:
                table.count_cast(w, dtype)
        if dtype is not None and input.dtype != dtype:
            value, a = table.cast(input, dtype, ops.Again("cast", lambda x: x.to(dtype), 1.0))
        if w.requires_grad:
            value = mode.needed(a, value, copied=function is F.linear and is_copied(a))
        else:
            value = value or table.find(input)
            if function is not F.linear:
                table.count_plain(value)  # PyTorch saves it all the same
        kind = Linear if function is F.linear else Convolution
        operation = kind(function, arguments, geometry, a, value if w.requires_grad else None, dtype)
        y = mode.apply(operation, input, w, bias)
        small = work * a.nbytes > BOTTLENECK * y.nbytes
        # A computed weight, which the recipe would hold, must be one that PyTorch's node saves.
        saved = weight.is_leaf or input.requires_grad or function is not F.linear
        fits = table.max_cost and saved and not small and starts_alike(a, weight)
        if fits and may_run_again(weight) and table.is_safe(weight, bias):
            recipe = Convolve(function, w, bias, arguments, work, dtype)
            for t in recipe.parameters:
                table.parameters.setdefault(id(storage_of(t)), []).append(weakref.ref(recipe))
        table.note(y, recipe, (value,), operation)
        return y

    return run


def batch_norm(
    mode, _, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    fit(plain(input, weight, bias, running_mean, running_var) and not needs_grad(running_mean, running_var))
    shape, numbers = input.shape, isinstance(momentum, float) and isinstance(eps, float)
    fit(isinstance(training, bool) and eps >= 0 and (eps > 0 or not training))  # else PyTorch's own error
    known = (running_mean is None) == (running_var is None) and (training or running_mean is not None)
    fit(needs_grad(input, weight, bias) and numbers and known and mode.table.is_safe(input))
    fit(len(shape) >= 2 and shape.numel() > 5 * shape[1])  # the recipe holds up to 5 values a channel

    def run() -> Tensor:
        need = training or (weight is not None and weight.requires_grad)
        value = mode.table.find(input)
        if need:
            mode.needed(input, value)
        else:
            mode.table.count_plain(value)  # PyTorch saves it all the same
        if training and running_mean is not None:  # they will change without a new version
            mode.table.before_write(running_mean)
            mode.table.before_write(running_var)
        statistics = running_mean, running_var, training, momentum, eps
        operation = ops.BatchNorm(value if need else None, *statistics)
        z = mode.apply(operation, input, weight, bias)
        mode.table.note(z, operation.recipe_of(weight, bias), (value,), operation)
        return z

    return run


def synchronised_norm(mode: Mode, function, args, kwargs):
    """The last step of nn.SyncBatchNorm's function, whose node holds ``input``: with these statistics."""
    z = leave(mode, function, args, kwargs)
    with torch.enable_grad():  # inside of a function it is off
        watched = quiet() and not kwargs
    if watched and plain(z, *args[:3]) and args[0].requires_grad and mode.table.is_safe(args[0]):
        input, *tensors, eps = args
        table, value, copies = mode.table, mode.table.find(input), [copy_of(t) for t in tensors]
        table.count_plain(value)
        if value.kept is None:
            table.keep_whole(value, input)
        recipe = ops.Again("norm", lambda y: function(y, *copies, eps), 1.0, tensors[0])
        table.note(z, recipe, (value,), in_function=True)
    return z


def activation(mode: Mode, function, u, /, *args, **kwargs):
    fit(plain(u) and u.requires_grad and u.numel() > 0 and u.dim() > 1 and mode.table.is_safe(u))
    kind, in_place = activation_of(function, args, tuple(kwargs.items()))
    fit(not (in_place and (u._is_view() or u.is_leaf)))

    def run() -> Tensor:
        source = mode.table.find(u)
        operation = ops.Activation((function, args, kwargs), kind, source, in_place)
        of_input = kind.name == "hardtanh"  # whose node saves the input
        if of_input and not in_place and source.kept is None and not mode.table.affordable(source):
            operation.from_result = False  # it is held by PyTorch, perhaps for others too
        if not operation.from_result:
            mode.needed(u, source)
        if in_place:
            mode.table.before_write(u)
        a = mode.apply(operation, u)
        value = mode.table.note(a, ops.Activate(kind), (source,), operation)
        if operation.from_result:
            mode.table.count_plain(source if of_input else value)
            operation.value = mode.table.need(value, a)
            value.first, value.private = operation.number, of_input
        return a

    return run


def elementwise(mode: Mode, function, p, q, **kwargs):
    """PyTorch's own node, but for two factors, or a dividend and a divisor, with gradients; and a recipe."""
    tensors = [p, q] if isinstance(q, Tensor) else [p]
    if not (all(map(ordinary, tensors)) and needs_grad(*tensors)):
        return None  # a counter of batches, for example
    operator, in_place = ELEMENTWISE[function], writes(function)
    scales = operator in ops.PAIRS
    fit(plain(*tensors) or (scales and all(plain(t) or is_mask(t) for t in tensors)))
    fit(not kwargs and mode.table.is_safe(*tensors))
    fit(type(q) in (int, float) or (len(tensors) == 2 and operator is not ops.rsub))
    if in_place:  # forward may write to a place before it reads it, or several times
        fit(not p._is_view() and (len(tensors) == 1 or storage_of(p) is not storage_of(q)))
    kind = ops.PAIRS.get(operator) if len(tensors) == 2 and p.requires_grad and q.requires_grad else None
    fit(not (kind and in_place) and (operator is not torch.div or p.requires_grad))
    if operator in (torch.add, torch.mul):
        tensors.sort(key=Tensor.numel, reverse=True)  # the result has the first one's shape
    first = tensors[0]
    fit(first.dim() > 1)

    def run() -> Tensor:
        operation, values = None, [(mode.needed if kind else mode.table.find)(t) for t in tensors]
        if kind:
            forward = function if first is p else lambda q, p: function(p, q)
            operation = kind(forward, *values)
            out = mode.apply(operation, *tensors)
        else:
            for t, value in zip(tensors, values, strict=True):
                if value.recipe is not None or value.kept is not None:
                    continue
                saved = scales and not t.requires_grad and not (in_place and t is p)
                if saved:  # by PyTorch's node, too: a mask
                    mode.table.count_plain(value)
                if t.numel() * SMALL <= first.numel() and values[0].terms + t.nbytes <= first.nbytes / 8:
                    # It may change after the context.
                    mode.table.keep(value, copy_of(t))
                elif saved:
                    mode.table.keep(value, t, shared=True)
            if in_place:
                mode.table.before_write(p)
            out = function(p, q)
        if first.shape == out.shape:
            recipe = ops.Elementwise(operator, None if len(tensors) == 2 else q)
            mode.table.note(out, recipe, tuple(values), operation)
        return out

    return run


def dropout(mode, function, input, p=0.5, training=True, inplace=False):
    """By channel it is a product with one random number for each channel of each image."""
    fit(training is True and not inplace and type(p) is float and 0 < p < 1)
    fit(plain(input) and input.requires_grad and input.numel() > 0 and mode.table.is_safe(input))
    if function is not F.dropout:
        fit(input.dim() == DROPOUTS[function])
        ones = input.new_ones(*input.shape[:2], *[1] * (input.dim() - 2))
        return lambda: elementwise(mode, torch.mul, input, function(ones, p))()
    fit(input.dim() > 1 and input.device.type in ("cpu", "cuda", "meta"))

    def run() -> Tensor:
        table, source, operation = mode.table, mode.table.find(input), ops.Dropout(p)
        z = mode.apply(operation, input)
        mask = operation.value = Value(operation.mask, when=operation.number)
        mask.name = "mask"
        table.keep(mask, operation.mask)
        operation.mask = None
        table.note(z, operation.recipe, (source, mask), operation)
        table.plain_bytes += z.nbytes if input.is_cpu else mask.nbytes
        return z

    return run


def concatenate(mode, function, tensors, dim=0):
    fit(isinstance(tensors, (tuple, list)) and len(tensors) > 0 and plain(*tensors) and type(dim) is int)
    first, join = tensors[0], torch.stack if function is torch.stack else torch.cat
    dim = dim if dim >= 0 else dim + first.dim() + (join is torch.stack)
    fit(dim >= 0 and all(t.dim() == first.dim() > 0 for t in tensors))
    parts = [t for t in tensors if t.numel()]
    fit(any(t.requires_grad for t in parts) and mode.table.is_safe(*parts))

    def run() -> Tensor:
        values = [mode.table.find(t) for t in parts]
        out = function(tensors, dim)
        made, waiting = mode.table.note(out, ops.Join(join, dim), tuple(values)), mode.table.waiting
        for other in {*waiting} - {*values}:  # that nothing needed so far
            del waiting[other]
        waiting[made] = [t for t, v in zip(parts, values, strict=True) if v.kept is None]
        return out

    return run


def again(
    name: str,
    passes: float = 1.0,
    node: bool = True,
    fits: Callable[..., bool] | None = None,
    saves: int = 2,
    reads_layout: bool = False,
    whole: bool = False,
) -> Callable:
    """The handler of a cheap function of each image alone and of parameters, which backward calls again.

    Args:
        name: of the recipe, for people.
        passes: over a tensor of its input's or output's size, the larger.
        node: whether remat's node takes the place of PyTorch's; not where that saves nothing.
        fits: whether one image alone can be computed, from all arguments, where not always.
        saves: how many of the parameters PyTorch's node saves; the others may change before backward.
        reads_layout: whether its backward does, see `layouts.in_layout`.
        whole: whether a value's last bit depends on its position in memory.
    """

    def bind(mode: Mode, function, x, /, *args, **named):
        fit(plain(x) and x.requires_grad and x.dim() > 1 and x.numel() > 0 and mode.table.is_safe(x))
        arguments = (*args, *named.values())
        parameters = [v for v in arguments if isinstance(v, Tensor)]
        given = [Tensor if isinstance(v, Tensor) else fixed(v) for v in arguments]  # Tensor: a parameter
        fit(plain(*parameters) and named.get("out") is None and (fits is None or fits(x, *args, **named)))
        device, dtype = x.device.type, autocast_dtype(x)

        def call(x: Tensor, *tensors: Tensor) -> Tensor:
            rest = iter(tensors)
            values = [next(rest) if v is Tensor else v for v in given]
            with nullcontext() if dtype is None else torch.autocast(device, dtype, cache_enabled=False):
                return function(x, *values[: len(args)], **dict(zip(named, values[len(args) :], strict=True)))

        def run() -> Tensor:
            operation, table = None, mode.table
            value = table.find(x)
            # The recipe keeps copies, which must be small: a layer norm's γ may be as large as an image.
            small = sum(t.nbytes for t in parameters) <= x.nbytes / 4
            copies = [copy_of(t) if small or i >= saves else None for i, t in enumerate(parameters)]
            if node:
                # An instance norm's node has a copy, unless it is contiguous.
                value = table.need(value, x, copied=reads_layout and not x.is_contiguous())
                value.read = True  # by backward, which computes the result again
                operation = ops.Rerun(call, value, len(parameters[:saves]), copies[saves:], reads_layout)
            out = mode.apply(operation, x, *parameters) if node else call(x, *parameters)
            if node and out.dtype == x.dtype:
                table.count_plain(value)
            elif node:  # PyTorch saves what autocast casts
                table.plain_bytes += x.numel() * out.itemsize
            alike = type(out) in TENSORS and out.shape[:1] == x.shape[:1] and out.numel() > 0
            if small and alike and storage_of(out) is not storage_of(x):
                steps = passes * max(1.0, x.numel() / out.numel())
                recipe = ops.Again(name, lambda x: call(x, *copies), steps, *parameters[:1])
                recipe.whole, recipe.reshapes = whole, out.dim() != x.dim()
                table.note(out, recipe, (value,), operation)
            return out

        return run

    return handler(bind)


def addcmul(mode: Mode, _, p, q, x, **named):
    """p + q x, of images ``x`` and of small tensors that are the same for all of them."""
    fit(all(t.dim() < x.dim() or len(t) == 1 for t in (p, q)))
    fit(set(named) <= {"value"} and numbers_or_none(*named.values()))
    fit((p.numel() + q.numel()) * SMALL <= x.numel() and q.requires_grad)  # else PyTorch does not save x
    return lambda: ADDCMUL(mode, lambda x, q, p: torch.addcmul(p, q, x, **named), (x, q, p), {})


def copied(mode: Mode, function, x, /, *args, **named):
    """The same values: a view, or a copy that backward can make again, by image if their number stays."""
    fit(plain(x) and x.requires_grad and x.dim() > 1 and x.numel() > 0 and mode.table.is_safe(x))

    def run() -> Tensor:
        out = leave(mode, function, (x, *args), named)
        if plain(out) and out.device == x.device and storage_of(out) is not storage_of(x):
            shape, dtype = out.shape[1:], out.dtype
            name = "cast" if dtype != x.dtype else "copy" if out.shape == x.shape else "reshape"
            make = (lambda x: x.to(dtype).reshape(-1, *shape)) if name == "reshape" else lambda x: x.to(dtype)
            recipe = ops.Again(name, make, 1.0)  # a needless reshape may give one image another stride
            recipe.reshapes, recipe.whole = True, out.shape[0] != x.shape[0]
            mode.table.note(out, recipe, (mode.table.find(x),))
        return out

    return run


def avg_pool(
    mode, function, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
    divisor_override=None,
):  # fmt: skip
    n = 3 if function is F.avg_pool3d else 2
    sizes = window(input, n, kernel_size, stride, padding)
    fit(mode.table.is_safe(input))
    # CUDA's backward knows these layouts alone.
    fit(layout_of(input) in (torch.contiguous_format, torch.channels_last))
    how = *sizes, ceil_mode, count_include_pad, divisor_override
    return from_shape(mode, f"avg_pool{n}d", how, input, lambda x: function(x, *how))


def pad(context: Mode, function, x, /, pad, mode="constant", value=None):
    """With zeros, or with what is in the image."""
    fit(plain(x) and x.requires_grad and x.numel() > 0 and context.table.is_safe(x))
    fit(isinstance(pad, (tuple, list)) and all(is_whole(n) for n in pad))
    how, n = tuple(map(index, pad)), x.dim() - 2
    fit(len(how) < 2 * x.dim())  # not across images
    known = mode in PADDINGS and len(how) == 2 * n and value in (None, 0)
    fits = x.is_cpu or x.is_contiguous()  # CUDA's kernels know no other layout
    if not (known and fits) or torch.are_deterministic_algorithms_enabled():
        return lambda: RESIZE(context, function, (x, how, mode, value), {})
    return from_shape(context, f"{PADDINGS[mode]}_pad{n}d", (how,), x, lambda x: function(x, how, mode))


def from_shape(mode: Mode, name: str, how: tuple, x: Tensor, call: Callable[[Tensor], Tensor]) -> Callable:
    """Runs ``call(x)``, of which PyTorch keeps the input and needs its shape."""

    def run() -> Tensor:
        value, operation = mode.table.find(x), FromShape(call, name, how, x)
        mode.table.count_plain(value)
        y = mode.apply(operation, x)
        recipe = ops.Again(name, call, max(1.0, x.numel() / y.numel()))
        mode.table.note(y, recipe, (value,), operation)
        return y

    return run


def max_pool(
    mode, function, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False,
    return_indices=False,
):  # fmt: skip
    n = MAX_POOLS[function]
    k, s, p = window(input, n, kernel_size, stride, padding)
    fit(not return_indices and set(per_dimension(dilation, n)) == {1} and mode.table.is_safe(input))
    fit(isinstance(ceil_mode, bool) and min(*k, *s) > 0 and not input.is_mps)  # MPS's backward reads x
    fit(all(0 <= 2 * p_i <= k_i for p_i, k_i in zip(p, k, strict=True)))
    if n == 1:  # PyTorch pools images of one row
        k, s, p = [1, *k], [1, *s], [0, *p]
    width = input.shape[-1]
    fit(n == 3 or (k[0] * k[1] <= 256 and k[1] <= width and k[0] * width <= 1 << 24))

    def run() -> Tensor:
        table, x = mode.table, input.unsqueeze(2) if n == 1 else input
        value = table.find(input)
        table.count_plain(value)
        operation = MaxPool((k, s, p, [1] * len(k), ceil_mode), x)
        y = mode.apply(operation, x)
        if n > 1 and x.numel() < 2 * y.numel():  # else the result is so small that it may be kept
            recipe = ops.Again("max_pool", lambda x: function(x, k, s, p, 1, ceil_mode), 2.0)
            table.note(y, recipe, (value,), operation)
        table.plain_bytes += 8 * y.numel()
        offsets = operation.offsets
        table.rows.append(Row("offsets", None, offsets.shape, offsets.nbytes, kept=True))
        return y.squeeze(2) if n == 1 else y

    return run


def leave(mode: Mode, function, args, kwargs):
    """PyTorch's call. Copies what is kept before the call changes it in place; follows views."""
    written, change = targets(function, args, kwargs), unseen_change(function)
    if written or change:
        with torch._C.DisableTorchFunction():  # these questions are no calls for a tensor subclass to handle
            for t in filter(has_memory, tree_leaves(written)):
                mode.table.before_write(t)
            for t in filter(has_memory, tree_leaves((args, kwargs)) if change else ()):
                change(mode.table, t)
    out = function(*args, **kwargs)
    for t in out if type(out) in (tuple, list) else (out,):
        if type(t) in TENSORS and t.requires_grad and t._is_view() and plain(t):
            mode.table.follow(t)
    return out


def with_lost_argument(mode: Mode, function, args, kwargs):
    return leave(mode, function, args, {**kwargs, **lost_argument(function)})


COPIES = "reshape flatten contiguous clone to type_as double float half bfloat16"
RESIZE = again("resize", node=False)
UNARY = {name: again(name, node=name != "neg", fits=lambda x: True) for name in ("abs", "cos", "neg", "sin")}
# Of other exponents, a value's last bit may depend on its position in memory.
POWER = again("pow", fits=lambda x, exponent=2: numbers_or_none(exponent) and exponent in (2, 3))
CLAMP = again("clamp", fits=lambda x, *limits, **named: numbers_or_none(*limits, *named.values()))
ADDCMUL = again("addcmul", saves=1)
VECTOR_NORM = again("vector norm", fits=vector_norm_fits)
ADAPTIVE_POOL = again("pool", fits=pool_fits)
LAYER_NORM = again("norm", 3.0, fits=lambda x, shape, *_, **__: len(shape) < x.dim())
NORMALIZE = again("normalize", 3.0, fits=lambda x, p=2, dim=1, eps=0, out=None: vector_norm_fits(x, p, dim))
ROLL = again("roll", node=False, fits=lambda x, shifts, dims=(): within_images(x, dims))
FLIP = again("flip", node=False, fits=lambda x, *args, dims=(): within_images(x, *args, dims))
HANDLERS: dict[Callable, Callable] = {
    **dict.fromkeys(CONVOLUTIONS, handler(convolution)),
    **dict.fromkeys(ACTIVATIONS, handler(activation)),
    **dict.fromkeys(ELEMENTWISE, handler(elementwise)),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate, torch.stack), handler(concatenate)),
    **dict.fromkeys((F.interpolate, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle), RESIZE),
    **dict.fromkeys(functions(COPIES), handler(copied)),
    **{function: made for name, made in UNARY.items() for function in functions(f"{name} __{name}__")},
    **dict.fromkeys(functions("roll"), ROLL),
    **dict.fromkeys(functions("flip"), FLIP),
    F.pad: handler(pad),
    **dict.fromkeys(LOST, with_lost_argument),
    F.batch_norm: handler(batch_norm),
    torch.batch_norm_elemt: synchronised_norm,
    F.group_norm: again("norm", 3.0, fits=lambda x, groups, *_, **__: x.numel() > groups * len(x), saves=1),
    **dict.fromkeys((F.layer_norm, F.rms_norm), LAYER_NORM),
    F.instance_norm: again(
        "norm",
        3.0,
        fits=lambda x, running_mean=None, *_, **__: running_mean is None,
        saves=0,
        reads_layout=True,
    ),
    **dict.fromkeys(functions("pow __pow__ square"), POWER),
    **dict.fromkeys(functions("clamp clip clamp_min clamp_max"), CLAMP),
    **dict.fromkeys(functions("addcmul"), handler(addcmul)),
    **dict.fromkeys((torch.norm, Tensor.norm, torch.linalg.vector_norm), VECTOR_NORM),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), ADAPTIVE_POOL),
    F.normalize: NORMALIZE,
    torch.prelu: again("prelu"),
    F.softplus: again("softplus", whole=True),
    F.glu: again("glu", fits=lambda x, dim=-1: dim % x.dim() > 0),
    **dict.fromkeys((F.dropout, *DROPOUTS), handler(dropout)),
    **dict.fromkeys((F.avg_pool2d, F.avg_pool3d), handler(avg_pool)),
    **dict.fromkeys(MAX_POOLS, handler(max_pool)),
}
