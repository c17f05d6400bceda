"""The context: it passes each call of forward to its operation and notes how the result was made."""

from __future__ import annotations

import contextlib
import inspect
import numbers
import threading
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._contextlib import context_decorator
from torch.utils._device import DeviceContext

from .calls import HANDLERS, leave
from .operations import Operation
from .record import Record
from .task import Task
from .values import Table, Value

TWICE = (
    b"remat's backward cannot be differentiated again: the values that it recomputes have no graph. Run the "
    b"part of the model whose gradient you differentiate outside of remat"
)
BATCHED = (
    "remat's backward takes one gradient at a time: is_grads_batched, jacobian(vectorize=True) and vmap over "
    "a backward pass are not supported. Run that part of the model outside of remat"
)


class Node(torch.autograd.Function):
    """The node of one operation, with the edges that PyTorch's node would have."""

    @staticmethod
    def forward(ctx, operation: Operation, *inputs):
        ctx.operation = operation
        ctx.set_materialize_grads(False)
        if operation.saved:
            ctx.save_for_backward(*operation.to_save(inputs))
        out = operation.forward(*inputs)
        if operation.in_place:
            ctx.mark_dirty(inputs[0])
        elif out._is_view():  # of a matrix that only the call knew: a view made here could not be written to
            out = torch.ops.aten._unsafe_view(out, out.shape)
        return out

    @staticmethod
    def backward(ctx, dz):
        saved = ctx.saved_tensors  # an error if the graph is gone
        operation, task = ctx.operation, task_of(ctx.operation.table)
        needs = wanted(ctx, operation)
        task.now = operation.number
        if dz is None or not any(needs):
            grads = [None] * len(needs)
        elif functorch.is_batchedtensor(dz) or functorch.is_legacy_batchedtensor(dz):
            raise RuntimeError(BATCHED)
        elif task.twice or task.modes:
            # Forward has chosen the dtypes; inside, a recipe may begin its autocast.
            with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
                grads = operation.backward(task, dz, needs, saved)
        else:
            grads = operation.backward(task, dz, needs, saved)
        task.holding.pop(operation.output, None)  # the value is not needed any more
        if task.twice:
            grads = guarded(ctx, dz, grads)
        if not task.retained:
            ctx.operation = None
        return None, *grads


def guarded(ctx, dz: Tensor | None, grads: list) -> list:
    """The gradients behind a node that raises, with edges to all leaves that they depend on."""
    leaves = leaves_behind(node for node, _ in ctx.next_functions)
    tensors = [*(t for t in (*grads, dz) if t is not None), *leaves]
    raising = iter(torch._C._functions.DelayedError(TWICE, len(tensors))(*tensors))
    return [g if g is None else next(raising) for g in grads]


def leaves_behind(nodes: Iterable) -> list[Tensor]:
    """The leaves that backward reaches from these nodes of the graph."""
    stack, visited, leaves = [*nodes], {None}, []
    while stack:
        if (node := stack.pop()) not in visited:
            visited.add(node)
            stack.extend(n for n, _ in node.next_functions)
            if hasattr(node, "variable"):
                leaves.append(node.variable)
    return leaves


def wanted(ctx, operation: Operation) -> list[bool]:
    """Which inputs' gradients this backward pass needs: it may be restricted to some inputs."""
    needs = list(ctx.needs_input_grad[1:])
    if operation.prunes:
        for i, (node, _) in enumerate(ctx.next_functions):  # an edge for each tensor; a bias comes last
            if node is not None:
                try:
                    needs[i] = torch._C._will_engine_execute_node(node)
                except RuntimeError:  # a leaf among the inputs of autograd.grad
                    pass
    return needs


def task_of(table: Table) -> Task:
    """The task of the current backward pass; it ends with the pass."""
    key = torch._C._current_graph_task_id()
    task = table.tasks.get(key)
    if task is None:
        task = table.tasks[key] = Task(table)
        # The engine holds it until the pass ends or fails.
        torch.autograd.Variable._execution_engine.queue_callback(task.end)
    return task


class Mode(TorchFunctionMode):
    """Handles the calls of one thread between `remat`'s enter and exit."""

    def __init__(self, max_cost: float, owner: remat) -> None:
        super().__init__()
        self.owner = owner
        self.price = str(max_cost)  # a string: the compiler would turn a number into an input
        self.table = Table(max_cost)
        # Inside a mode that may change what a function computes, nothing is known of the results.
        around = {type(mode) for mode in _get_current_function_mode_stack()}
        self.handlers = HANDLERS if around <= {Mode, DeviceContext} else {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if torch.compiler.is_compiling():
            # One graph of forward and backward, cut by the compiler.
            from .compiled import compile_by_price

            price = self.price  # noqa: F841  a graph for each price
            torch._dynamo.comptime.comptime(compile_by_price)
            return function(*args, **(kwargs or {}))
        if torch._C._are_functorch_transforms_active():
            return function(*args, **(kwargs or {}))
        return self.handlers.get(function, leave)(self, function, args, kwargs or {})

    # The compiler traces through the method, but must not compile it alone, as it would for the calls of a
    # frame that it has given up: its guards miss ``function``, so one call would get the graph of another.
    set_code_exec_strategy(
        __torch_function__.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    )

    def apply(self, operation: Operation, *inputs: Tensor | None) -> Tensor:
        """The operation's result, from its node."""
        table = operation.table = self.table
        operation.number = len(table.operations)
        out = Node.apply(operation, *inputs)
        operation.gradient, operation.result = inputs[0].nbytes, out.nbytes
        if operation.saved and (weight := inputs[operation.saved[0]]) is not None:
            operation.weight = weakref.ref(weight)
        table.operations.append(weakref.ref(operation))
        return out

    def needed(self, t: Tensor, value: Value | None = None, copied: bool = False) -> Value:
        """A node needs ``t``, as PyTorch's node would."""
        value = value or self.table.find(t)
        self.table.count_plain(value, copied)
        return self.table.need(value, t, copied)


TOOL = threading.local()  # ``now``: the name of a tool that runs, and the one context that it enters itself


@contextlib.contextmanager
def alone(name: str, context):
    """The tool ``name`` runs a model in ``context``, within which the model must not enter another one."""
    before, TOOL.now = getattr(TOOL, "now", None), (name, context)
    try:
        with context as entered:
            yield entered
    finally:
        TOOL.now = before


class remat:  # noqa: N801
    """Train the same function in less memory: backward recomputes cheap values instead of keeping them.

        with remat(max_cost=0) as record:       # around forward alone, as torch.autocast
            loss = criterion(model(images), targets)
        loss.backward()
        print(record.names(model))

    Also a decorator: ``@remat(max_cost=150)``. Forward is PyTorch's, bit for bit. Convolutions, linear
    layers, norms (of vectors, too), activations, products, quotients, squares, cubes, sines, clamps,
    poolings, paddings and dropout get nodes that keep inputs as *recipes*: backward recomputes a norm, an
    activation, a concatenation, a cast, a copy or a sum from what is kept. Everything else runs as always:
    other operations, ``no_grad``, torch.func, tracing, regions with saved-tensor hooks such as a checkpoint,
    other threads such as those of `nn.DataParallel`, subclasses of `Tensor`, and whatever runs inside another
    `TorchFunctionMode` (but ``torch.device``) that is entered before remat. Of two contexts the inner one
    decides. Nothing in the model changes. Under torch.compile the compiler decides by the same price; by its
    own rules for what is compiled inside a checkpoint. Its backward may read an input of the graph, such as a
    buffer, again: if that was changed in place after the graph had run, it is PyTorch's error.

    `nn.TransformerEncoder` and `nn.MultiheadAttention`, in eval mode and without gradients, look for modes
    such as remat's and then leave their fast path: results differ in the last digits, and at padded
    positions, where the fast path writes zeros. Run a frozen encoder before the context.

    Autograd counts the changes of a tensor in place, but not all: ``weight.data.mul_()`` and a fused
    optimizer's step are not counted. remat does not notice such a write, and recomputes with the new values,
    if it happens after the context or in a backward inside it; through an alias taken before the context, or
    by ``Tensor.set_``; in TorchScript or a torch.func transform; through the older
    ``torch.utils.dlpack.to_dlpack``; or, in PyTorch 2.9, by ``torch.distributed.broadcast``.

    What a change in place inside the context would spoil is copied first, also where PyTorch raises an error;
    so is a tensor that ``t.data``, ``t.numpy()`` or ``t.data_ptr()`` makes writable unseen, and what is
    computed from it is left to PyTorch. A hook that logs activations should take ``t.detach().mean()``.

    A hook on a node of the graph (``grad_fn.register_hook``, or a module's older ``register_backward_hook``)
    is called for remat's node, which may have other inputs. Compiled autograd is an error.

    Args:
        max_cost: multiplications per value that backward may repeat, at least 0. A convolution costs C_in /
            groups · kH · kW per value of its output. A value costs the multiplications of all convolutions
            and linear layers that must run again for it, divided by its number of values; that of a norm, an
            activation or a product may be a sixteenth more. At 0 no convolution is computed twice; 64 allows
            a 1x1 convolution of 64 channels. It is a limit: what is at the end of a long path, small and very
            expensive, or made from something much larger, is kept at any price (chapter 8).

    Raises:
        ValueError: ``max_cost`` is no number, or below 0.
        RuntimeError: in backward, if a needed value was changed in place after forward, if the weight or bias
            of a convolution to recompute was changed or is gone, or if a gradient is differentiated again.
    """

    def __init__(self, max_cost: float = 0) -> None:
        if isinstance(max_cost, bool) or not isinstance(max_cost, numbers.Real) or not max_cost >= 0:
            hint = " (write @remat(), or with remat(): model(x))" if callable(max_cost) else ""
            raise ValueError(
                "max_cost must be a number of multiplications per value, at least 0, "
                f"got {max_cost!r:.80}{hint}"
            )
        self.max_cost = float(max_cost)

    def __enter__(self) -> Record:
        name, context = getattr(TOOL, "now", None) or ("", self)
        if context is not self:
            raise RuntimeError(f"{name} enters remat itself: pass it a model that does not")
        mode = Mode(self.max_cost, self)
        _push_mode(mode)
        return Record(mode.table)

    def __exit__(self, *exception) -> None:
        others = []
        try:  # another thread, which may close a suspended generator, has modes of its own
            while getattr(mode := _pop_mode(), "owner", None) is not self:
                others.append(mode)
        finally:
            for other in reversed(others):
                _push_mode(other)
        mode.table.clear()

    def __call__(self, function: Callable) -> Callable:
        is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
        if not callable(function) or is_async:
            raise TypeError(f"remat decorates a function that is not async, got {function!r}")
        return context_decorator(lambda: remat(self.max_cost), function)
