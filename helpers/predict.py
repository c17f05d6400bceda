"""How much memory a training step will take, without taking it.

    predict_memory(model, (256, 3, 224, 224), max_cost=0)  # Prediction(forward=…, peak=…)
    largest_batch(model, (3, 224, 224), 80e9)
    max_cost_for(model, (256, 3, 224, 224), memory=16 * 2**30)  # a price for remat

The step runs on *fake* tensors, which have a shape, a dtype and a storage size but no memory; under `remat`
if a price is given, with the decisions of a real step. A storage counts from the operation that makes it
until its last tensor is gone, in forward and in backward.

The prediction covers what PyTorch and this package allocate for tensors, which is the same on every machine.
A library's own memory (oneDNN's copies and what its LSTM keeps, cuDNN's workspace) depends on the algorithm
that it chooses and is not counted; nor are the allocator's fragmentation, the state of the random numbers
that a checkpoint stores (5 KB), the 8 bytes of a number that autograd saves, as for ``x * 2``, and tensors
that forward makes from Python's lists. The backward of a few operations takes another way for tensors
without values, and more memory: ``cumprod``, ``prod``, ``quantile``, ``nan_to_num``, ``clamp`` by tensors,
``max``, ``min`` and ``median`` of a whole tensor, and ``binary_cross_entropy_with_logits`` with
``pos_weight``. That of ``var_mean`` and ``std_mean`` counts one tensor too few, as does that of an
operation in place on a view of a whole tensor, such as ``nn.ReLU(inplace=True)`` after a linear layer of
images or sequences. What an operator that is not PyTorch's own allocates inside, such as torchvision's
``deform_conv2d``, is not seen.
"""

import bisect
import functools
import math
import numbers
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .remat import remat
from .remat.compare import (
    OnlyCopies,
    attributes,
    check_outside,
    deep_copy,
    ends_of,
    same_numbers_again,
    without_others_gradients,
)
from .remat.mode import alone
from .remat.record import check_module
from .remat.values import storage_of

# What stands in for a device, since backward on a fake "cuda" tensor needs a real GPU; and the bytes to a
# multiple of which its allocator rounds up.
DEVICES = {"cpu": ("cpu", 1), "cuda": ("meta", 512)}
# Losses that write a value for each of the input's, and return their mean in the same memory.
RESIZED = ("mse_loss", "smooth_l1_loss", "binary_cross_entropy", "soft_margin_loss")
# What PyTorch's formulas of backward do in place to a temporary tensor of their own, unless it is fake: these
# operators in all of them, and all operators in some.
ON_TEMPORARIES = ("index_add", "index_put", "masked_scatter", "put", "scatter", "scatter_add")
IN_PLACE_FORMULAS = "BinaryCrossEntropyWithLogits", "Fmax", "Fmin", "Maximum", "Minimum"
ENGINE_CALL = torch.autograd.graph._engine_run_backward.__code__


class Prediction(NamedTuple):
    """Bytes that a step adds: at the end of forward, and the most at any moment."""

    forward: int
    peak: int


class Held(TorchDispatchMode):
    """Follows the bytes of all storages made while it is active: ``held`` now, ``peak`` the most so far."""

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.block, self.known, self.ignored = block, set(), {}
        self.waiting, self.in_linear = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():  # a counter, which PyTorch 2.9 would not read in fake mode
                return func(*args)
        if not self.in_linear:
            self.settle()
        number = 8 * takes_number(func, args) * (self.block == 1)  # a CPU's tensor
        self.held += number
        self.peak = max(self.peak, self.held)
        out = as_real(func, args, func(*args, **(kwargs or {})))
        made = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        if func.is_view and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
            for t in made:
                self.follow(storage_of(t), 0)  # of a constant that was there before
        if isinstance(out, Tensor) and self.in_place_if_real(func, *args[:2]):
            self.waiting.append(out)  # to be counted once the first argument has had the chance to go
        else:
            for t in made:
                self.count(t)
        self.held -= number
        return out

    def settle(self) -> None:
        """Count what waits."""
        while self.waiting:
            self.count(self.waiting.pop())

    def in_place_if_real(self, func, first, second=None) -> bool:
        """Whether PyTorch, which called ``func`` on these, would write over a real ``first``."""
        adds = func is torch.ops.aten.add.Tensor
        if not called_by_engine():
            return adds and self.in_linear  # a bias
        if adds:
            # Two gradients of one tensor, if nothing else holds the first, such as the base of a view.
            elsewhere = {storage_of(second)._cdata, *self.ignored}
            return not first._is_view() and storage_of(first)._cdata not in elsewhere
        node = torch._C._current_autograd_node()
        in_place = func.overloadpacket.__name__ in ON_TEMPORARIES
        return in_place or (node is not None and node.name().startswith(IN_PLACE_FORMULAS))

    def count(self, t: Tensor) -> None:
        """Count the storage of ``t`` from now on, unless it counts already (``t`` is a view)."""
        if t.layout is not torch.strided:
            raise ValueError(f"model must make strided tensors alone, got one with layout {t.layout}")
        storage = storage_of(t)
        self.follow(storage, math.ceil(storage.nbytes() / self.block) * self.block)

    def follow(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """It holds ``nbytes`` from now on until it is gone, unless it is known."""
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.held += nbytes
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self.release, key, nbytes).atexit = False

    def release(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.held -= nbytes

    def ignore(self, *tensors: Tensor) -> None:
        """These exist before the step. Their storages live on, so that no new one gets the number of one."""
        self.ignored |= {(storage := storage_of(t))._cdata: storage for t in tensors}
        self.known |= self.ignored.keys()


class Linears(TorchFunctionMode):
    """Tells ``held`` when ``F.linear`` runs."""

    def __init__(self, held: Held) -> None:
        super().__init__()
        self.held = held

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.held.in_linear = function is torch.nn.functional.linear
        out = function(*args, **(kwargs or {}))
        self.held.in_linear = False
        self.held.settle()
        return out


def takes_number(func, args: tuple) -> bool:
    """Whether a Python number is passed where the operator takes a tensor: PyTorch wraps it during the call.

    The 8 bytes are not followed any further if autograd saves them, as for x * 2.
    """
    pairs = zip(args, func._schema.arguments, strict=False)
    return any(type(a) in (int, float) and isinstance(wanted.type, torch.TensorType) for a, wanted in pairs)


def as_real(func, args: tuple, out):
    """A fake ``out`` with the dtypes, layout, storage and number of tensors of the real operator's result."""
    if not (args and isinstance(args[0], FakeTensor)):
        return out  # real
    name = func.overloadpacket.__name__
    if name in ("native_batch_norm", "native_group_norm", "native_layer_norm"):
        (z, *stats), x = out, args[0]
        if z.is_cpu and "batch" in name:  # of one pixel, which is channels_last too, contiguous
            layout = torch.contiguous_format if x.is_contiguous() else suggest_memory_format(x)
            z = torch.empty(x.shape, dtype=z.dtype, memory_format=layout)
        elif z.is_cpu and "group" in name:
            z = torch.empty_like(x, dtype=z.dtype)
        if z.is_cpu and any(isinstance(t, Tensor) and t.dtype == torch.float32 for t in args):
            stats = [t.float() for t in stats]  # of half-precision values
        return z, *stats
    elif name in ("native_batch_norm_backward", "native_group_norm_backward", "native_layer_norm_backward"):
        (dx, *others), x, mask = out, args[1], args[-1]
        if dx is not None and dx.is_cpu:  # whatever the layout of the gradient that came
            layout = torch.contiguous_format if "layer" in name else suggest_memory_format(x)
            dx = torch.empty(x.shape, dtype=x.dtype, memory_format=layout)
        if "batch" not in name:  # in the weight's dtype, where the fake ones have the gradient's
            weight = args[4 if "group" in name else 5]
            others = [t if t is None or weight is None else t.to(weight.dtype) for t in others]
        return tuple(t if wanted else None for t, wanted in zip((dx, *others), mask, strict=True))
    elif name == "hardswish_backward":  # its layout is the gradient's
        return torch.empty_like(args[0], dtype=out.dtype)
    elif name == "log_sigmoid_forward":
        return tuple(t.contiguous() if t.is_cpu else t for t in out)
    elif name == "convolution_backward" and args[1].is_cpu and args[-1][1:] == [False, True]:
        dx, _, db = out
        with unset_fake_temporarily():  # oneDNN gives the weight's gradient, too
            like = (torch.empty(1, dtype=t.dtype).expand(t.shape) for t in args[1:3])
            kernel = torch._C._select_conv_backend(*like, None, *args[4:10], args[3])
        # Of oneDNN's two kernels PyTorch's enum names one alone; "???" is the transposed one.
        return dx, torch.empty_like(args[2]) if str(kernel).endswith(("Mkldnn", "???")) else None, db
    elif name == "col2im":  # its memory is made for the columns
        return torch.empty_like(args[0]).resize_(out.shape)
    elif name in RESIZED and out.dim() < args[0].dim():
        return torch.empty_like(torch.broadcast_tensors(*args[:2])[0]).resize_(())
    return out


def called_by_engine() -> bool:
    """Whether the autograd engine itself called this operator: no Python function is between the two."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") in (__name__, "torch._compile", "torch._dynamo.eval_frame"):
        frame = frame.f_back  # PyTorch wraps modes
    return frame.f_code is ENGINE_CALL


def predict_memory(
    model: nn.Module,
    *inputs: Tensor | tuple[int, ...],
    max_cost: float | None = None,
    autocast: torch.dtype | None = None,
    device_type: str = "cpu",
) -> Prediction:
    """The memory of ``out = model(*inputs)`` and ``out.backward(grad)``, without running them.

    On a CPU ``forward`` is what `helpers.memory.MemoryTrace` counts at the end of forward, and ``peak`` is
    its ``tensor_peak``, with one difference: a composite operation, such as ``F.kl_div``, counts here as its
    parts, while the trace sees only what there is between operations. Parameters, buffers, inputs and
    ``grad`` exist before and are not counted; gradients of parameters are, as after ``zero_grad()``. Nothing
    is computed, and nothing in ``model`` changes: this runs a copy, without the parameters' hooks.

    Args:
        model: in training or eval mode, on any device, "meta" included. It may return several tensors, in
            whatever `compare` knows; backward starts from all that have a gradient.
        inputs: tensors, of which only shape and dtype matter, or shapes, in the dtype of the parameters.
        max_cost: if given, forward runs under ``remat(max_cost)``.
        autocast: if given, forward runs under autocast to this dtype; for ``device_type`` "cpu" alone.
        device_type: "cpu", or "cuda", which needs no GPU (the model sees tensors on "meta"); decides on slabs
            and the allocator's block size.

    Raises:
        ValueError: an argument that does not fit, or a model that cannot be copied (see `compare`) or asks
            for values, as in ``if x.sum() > 0``.
        PyTorch's or the model's own error: shapes that the model does not take.
        RuntimeError: called inside of ``remat`` or of saved-tensor hooks, where plain would not be plain; or
            the model enters ``remat`` itself.
    """
    return predicted(model, inputs, max_cost, autocast, device_type)[0]


@torch.inference_mode(False)
@torch.enable_grad()
def predicted(model, inputs, max_cost=None, autocast=None, device_type="cpu") -> tuple[Prediction, float]:
    """The prediction, and the lowest price at which `remat` would recompute more; infinite without remat."""
    check_outside("predict_memory")
    if device_type not in [*DEVICES]:  # a list, so that what cannot be hashed is named, too
        raise ValueError(f"device_type must be one of {', '.join(DEVICES)}, got {device_type!r}")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be None, torch.bfloat16 or torch.float16, got {autocast!r}")
    device, block = DEVICES[device_type]
    if autocast is not None and device != device_type:
        raise ValueError(
            f"autocast needs device_type='cpu', whose prediction is close, got {device_type!r}: "
            "what autocast keeps there, only the device itself can tell"
        )
    precision = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None)
    recomputation = nullcontext() if max_cost is None else remat(max_cost)
    inputs, held = as_tensors(model, inputs), Held(block)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(t: Tensor) -> Tensor:
        how = {"dtype": t.dtype, "device": device, "requires_grad": t.requires_grad}
        with fakes:
            made = torch.empty_strided(t.shape, t.stride(), **how)
        made._is_param = isinstance(t, nn.Parameter)
        return made

    guard, (model, args) = OnlyCopies(model), fake_copy(model, inputs, fake)
    held.ignore(*model.parameters(), *model.buffers(), *args)
    with same_numbers_again(torch.device("cpu")), fakes, torch.autograd.set_detect_anomaly(False):
        try:
            run = alone("predict_memory", recomputation)
            with guard, held, precision, run as record, Linears(held):
                out = model(*args)
            torch.clear_autocast_cache()  # which would last as long as an autocast of the caller's
            ends = ends_of(out)
            forward, grads = held.held, [torch.empty_like(t) for t in ends]
            held.ignore(*grads)
            own = [*model.parameters(), *args]
            with guard, held, torch.autocast("cpu", enabled=False), without_others_gradients(ends, own):
                torch.autograd.backward(ends, grads)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(f"model must not ask for its tensors' values, got {error}") from error
    return Prediction(forward, held.peak), math.inf if record is None else record._table.next_cost


def fake_copy(model: nn.Module, inputs: list[Tensor], fake: Callable[[Tensor], Tensor]) -> tuple:
    """Copies of ``model`` and ``inputs`` with fake tensors: what forward changes or stores, it does there.

    Single whole numbers stay real: a batch norm without momentum divides by its counter. So do constants on
    a CPU that are no buffers, unless they are computed, as by an older weight_norm: these cannot be copied.
    """
    others = (t for t in attributes(model) if not (t.is_leaf and t.is_cpu))
    copies = {id(t): fake(t) for t in (*model.parameters(), *model.buffers(), *others, *inputs)}
    for t in model.buffers():
        if t.dim() == 0 and not t.is_floating_point():
            copies[id(t)] = torch.ones_like(t, device="cpu") if t.is_meta else t.detach().cpu().clone()
    return deep_copy("model", (model, inputs), copies)


def as_tensors(model: nn.Module, inputs) -> list[Tensor]:
    """``inputs`` with a tensor without memory, in the dtype of the parameters, in place of each shape."""
    check_module(model)
    if isinstance(model, nn.parallel.DistributedDataParallel):  # a copy would talk to the other processes
        raise ValueError("model must be the module inside of DistributedDataParallel, got the wrapper")
    if any(map(nn.parameter.is_lazy, (*model.parameters(), *model.buffers()))):
        raise ValueError("model must have run once, got one with lazy parameters, whose shapes are not known")
    for part in model.modules():
        scripted = isinstance(part, torch.jit.ScriptModule)
        if scripted or part._compiled_call_impl or hasattr(part, "_orig_mod"):  # torch.compile's wrapper
            got = f"a compiled {type(part).__name__}, and what a compiler keeps is not known before"
            raise ValueError(f"model must be one that PyTorch runs operation by operation, got {got}")
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    how = {"dtype": next(floats, torch.get_default_dtype()), "device": "meta"}
    other = "inputs (other than tensors)"
    inputs = [t if isinstance(t, Tensor) else torch.empty(checked(other, t), **how) for t in inputs]
    if layouts := {t.layout for t in inputs} - {torch.strided}:
        raise ValueError(f"inputs must be strided tensors, got one with layout {layouts.pop()}")
    return inputs


def checked(name: str, shape):
    """``shape``, or a ValueError if it is none."""
    whole = isinstance(shape, (tuple, list)) and all(isinstance(n, numbers.Integral) for n in shape)
    if not whole or any(isinstance(n, bool) or n < 0 for n in shape):
        raise ValueError(f"{name} must be a shape of whole numbers, at least 0, got {shape!r:.80}")
    return shape


def bytes_needed(model: nn.Module, inputs: list[Tensor], optimizer_copies: int, **how) -> tuple[int, float]:
    """Bytes of a step and of all that is there before it, as `largest_batch` lists it; and the next price."""
    if isinstance(optimizer_copies, bool) or not isinstance(optimizer_copies, int) or optimizer_copies < 0:
        raise ValueError(f"optimizer_copies must be an int, at least 0, got {optimizer_copies!r:.80}")
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    there = sum({t: t.nbytes for t in (*model.parameters(), *model.buffers(), *inputs)}.values())
    prediction, next_cost = predicted(model, inputs, **how)
    return there + optimizer_copies * trained + prediction.peak, next_cost


def largest_batch(
    model: nn.Module,
    image_shape: tuple[int, ...],
    memory: float,
    optimizer_copies: int = 1,
    device_type: str = "cuda",
    max_cost: float | None = None,
    autocast: torch.dtype | None = None,
) -> int:
    """The largest batch whose training step is predicted to fit into ``memory``.

    This counts parameters and buffers, the optimizer's tensors, the batch of images, and the peak of
    `predict_memory`, which includes the gradients of the parameters. It does not count labels, the gradient
    of the output, averaged copies of the model, and what the driver and libraries take: leave room for these.

    Args:
        image_shape: of one image, (C, H, W), in the dtype of the parameters.
        memory: bytes for the step and all that is there before it.
        optimizer_copies: what the optimizer keeps for each trained parameter: 0 tensors of its size for plain
            SGD, 1 with momentum, 2 for Adam.
        model, device_type, max_cost, autocast: see `predict_memory`.

    Raises:
        ValueError: ``memory`` is too little for one image, or an argument does not fit.
        Other errors: see `predict_memory`.
    """
    image_shape = checked("image_shape", image_shape)
    check_memory(memory)
    how = {"max_cost": max_cost, "autocast": autocast, "device_type": device_type}

    @functools.cache
    def needed(n: int) -> int:
        return bytes_needed(model, as_tensors(model, [(n, *image_shape)]), optimizer_copies, **how)[0]

    least = 1
    try:
        needed(1)
    except ValueError:  # batch norm may need more than one value per channel
        least = 2
    if needed(least) > memory:
        step = f"a step of batch size {least}, {needed(least):,} bytes"
        raise ValueError(f"memory must hold {step}, got {float(memory):,.0f}")
    low, high = least, 16
    while needed(high) <= memory:
        low, high = high, 2 * high
    return bisect.bisect_right(range(high), memory, low, key=needed) - 1


def max_cost_for(
    model: nn.Module,
    *inputs: Tensor | tuple[int, ...],
    memory: float,
    optimizer_copies: int = 1,
    autocast: torch.dtype | None = None,
    device_type: str = "cuda",
) -> int:
    """The smallest whole ``max_cost`` at which a training step is predicted to fit into ``memory`` bytes.

        with remat(max_cost_for(model, images, memory=16 * 2**30)):

    What is held at the end of forward usually falls as the price rises; the peak need not. So this tries each
    price at which `remat` decides anything differently, from 0 upwards, until one fits: one prediction for
    each, which may take a minute in all. Where 0 fits, so may plain PyTorch: see `predict_memory`.

    Args:
        model, inputs, autocast, device_type: see `predict_memory`.
        memory, optimizer_copies: see `largest_batch`.

    Raises:
        ValueError: no price makes it fit (the message names the price that takes least), or an argument that
            does not fit.
        Other errors: see `predict_memory`.
    """
    check_memory(memory)
    how = {"autocast": autocast, "device_type": device_type}
    inputs, needed, cost, further = as_tensors(model, inputs), {}, 0, 0.0
    while further < math.inf:
        cost = max(cost, math.ceil(further))
        # At 0 nothing that has a price gets a recipe; just above, the same is kept, and prices are known.
        price = cost or sys.float_info.min
        needed[cost], further = bytes_needed(model, inputs, optimizer_copies, max_cost=price, **how)
        if needed[cost] <= memory:
            return cost
        cost += 1
    least_at = min(needed, key=needed.get)
    plain, _ = bytes_needed(model, inputs, optimizer_copies, **how)
    least = f"{needed[least_at]:,} bytes, what this step takes at max_cost={least_at}"
    least += f" ({plain:,} in plain PyTorch)"
    raise ValueError(f"memory must be at least {least}, got {float(memory):,.0f}")


def check_memory(memory) -> None:
    """Raise a ValueError unless ``memory`` is a number of bytes, of which a tensor may have 2⁶³."""
    if isinstance(memory, bool) or not isinstance(memory, numbers.Real) or not 0 < memory < 1 << 62:
        raise ValueError(f"memory must be a number of bytes above 0 and below 2**62, got {memory!r}")
