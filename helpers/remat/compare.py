"""Is a model the same function under `remat`, and what does it save?"""

import contextlib
import copy
import dataclasses
import functools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..memory import MemoryTrace
from .mode import Mode, alone, leaves_behind, remat
from .record import check_module


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found; of each pair the first is plain PyTorch's. ``print`` shows it.

    Attributes:
        max_cost: of the step under remat.
        equal: whether all that the model returned, and its buffers afterwards, are equal to the bit, but that
            0 is equal to -0, and one NaN to another.
        difference: the largest ‖remat's - plain's‖ / ‖plain's‖ of all gradients; in place of a smaller norm,
            1/100 of the largest gradient's, since a bias before a batch norm gets only rounding errors.
        rounding: the same between plain and ``reference``: "float64", or "a second run" if the model draws
            PyTorch's random numbers or does not run in float64.
        held, peak: bytes that a step adds, at the end of forward and at its highest moment; on a CPU the
            peak of tensors alone, as in `predict_memory`, without what libraries take inside an operation.
        seconds: of a step; medians.
    """

    max_cost: float
    equal: bool
    difference: float
    rounding: float
    reference: str
    held: tuple[int, int]
    peak: tuple[int, int]
    seconds: tuple[float, float]

    def __str__(self) -> str:
        verdict = "equal" if self.equal else "NOT EQUAL"
        lines = [
            f"remat(max_cost={self.max_cost:g}): forward {verdict} to the bit",
            f"gradients: remat differs from plain by {self.difference:.1e}, "
            f"plain from {self.reference} by {self.rounding:.1e}",
            f"{'':9}{'plain':>10}{'remat':>10}{'ratio':>7}",
        ]
        rows = ("held MiB", self.held, 2**20), ("peak MiB", self.peak, 2**20), ("time ms", self.seconds, 1e-3)
        for name, (plain, ours), unit in rows:
            ratio = ours / plain if plain else math.nan
            lines.append(f"{name:9}{plain / unit:10,.1f}{ours / unit:10,.1f}{ratio:7.2f}")
        return "\n".join(lines)


def compare(model: nn.Module, *inputs, max_cost: float = 0, rounds: int = 3, **kwargs) -> Comparison:
    """Run ``model(*inputs, **kwargs)`` and its backward, plainly and under ``remat(max_cost)``.

    Each step runs on a deep copy of the model and of its arguments, from the same random numbers; backward
    starts from all tensors returned, with random gradients. The originals do not change, nor do the default
    generators of PyTorch, Python and NumPy, even if the model raises. Under ``torch.autocast`` both run
    forward in autocast.

    Args:
        model: on any device that `MemoryTrace` can measure. It may return tensors in lists, tuples, dicts and
            whatever else ``torch.utils._pytree`` knows, and in dataclasses.
        max_cost: see `remat`.
        rounds: pairs of steps that are timed.

    Raises:
        ValueError: an argument that does not fit, or cannot be copied: a function in it stays the same
            function, which may lead to the original's tensors.
        RuntimeError: called inside of ``remat`` or of saved-tensor hooks, where plain would not be plain; or
            the model enters ``remat`` itself.
    """
    check_module(model)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be an int, at least 1, got {rounds!r}")
    check_outside("compare")
    contexts, given = (contextlib.nullcontext(), remat(max_cost)), (inputs, kwargs)
    tensors = [*model.parameters(), *model.buffers(), *tensors_in(given)]
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    if device.type == "meta":
        raise ValueError("model and inputs must have values, got device meta, which predict_memory takes")
    step, traces = functools.partial(one_step, device), (MemoryTrace(device), MemoryTrace(device))
    with torch.inference_mode(False), torch.enable_grad():
        try:  # libraries allocate at first use
            start = step(model, given, guard=OnlyCopies(model)).start
        except RuntimeError:  # the model's own, or of a higher-order operator, which takes no such mode
            start = step(model, given).start
        plain, ours = (step(model, given, start, *how) for how in zip(contexts, traces, strict=True))
        equal = len(plain.values) == len(ours.values) and all(map(same, plain.values, ours.values))
        exact, reference = None, "a second run"
        if plain.fixed:
            with contextlib.suppress(Exception):  # whatever a model may find wrong with float64
                arguments = each(lambda t: t.double() if t.is_floating_point() else t, (given, start))
                no_autocast = torch.autocast(device.type, enabled=False)
                wide_model = deep_copy("model", model, computed(model)).double()
                exact, reference = step(wide_model, *arguments, no_autocast), "float64"
        exact = exact or step(model, given, start)
        difference, rounding = apart(ours.grads, plain.grads), apart(plain.grads, exact.grads)
        del plain, ours, exact
        times = [[step(model, given, start, context).seconds for context in contexts] for _ in range(rounds)]
    held = tuple(t.marks["held"] for t in traces)
    peak = tuple(t.peak if t.tensor_peak is None else t.tensor_peak for t in traces)
    seconds = tuple(map(statistics.median, zip(*times, strict=True)))
    return Comparison(contexts[1].max_cost, equal, difference, rounding, reference, held, peak, seconds)


def check_outside(name: str) -> None:
    """Raise a RuntimeError where plain PyTorch would not be plain."""
    inside = any(isinstance(mode, Mode) for mode in _get_current_function_mode_stack())
    if inside or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        raise RuntimeError(f"{name} must be called outside of remat and of saved-tensor hooks")


class Step(NamedTuple):
    """What one step returned, with the buffers; the gradients; those that backward started from."""

    values: list[Tensor]
    grads: list[Tensor]
    start: list[Tensor]
    fixed: bool  # whether it drew none of PyTorch's random numbers
    seconds: float


def one_step(device, model, given, start=None, context=None, trace=None, guard=None) -> Step:
    """Forward within ``context``, and backward, of copies of ``model`` and ``given``, its arguments.

    ``trace``, a `MemoryTrace`, and ``guard``, an `OnlyCopies`, see both.
    """
    given = each(lambda t: t.detach().requires_grad_(t.requires_grad), given)
    model, (args, kwargs) = deep_copy("model and its arguments", (model, given), computed(model))
    leaves = [t for t in (*model.parameters(), *tensors_in((args, kwargs))) if t.requires_grad]
    torch.clear_autocast_cache()
    with same_numbers_again(device), guard or contextlib.nullcontext():
        before, since = random_state(device), clock(device)
        with trace or contextlib.nullcontext():
            with alone("compare", context or contextlib.nullcontext()):
                out = model(*args, **kwargs)
            torch.clear_autocast_cache()  # as at the end of an autocast around forward alone
            if trace:
                trace.mark("held")
            ends = ends_of(out)
            if start is None:
                noise = torch.Generator().manual_seed(0)
                normal = [torch.randn(t.shape, generator=noise, device="cpu") for t in ends]
                start = [torch.empty_like(t).copy_(n) for t, n in zip(ends, normal, strict=True)]
            with torch.autocast(device.type, enabled=False), without_others_gradients(ends, leaves):
                torch.autograd.backward(ends, start)
        seconds, fixed = clock(device) - since, before == random_state(device)
    values = [t.detach() for t in (*tensors_in(out), *model.buffers())]
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    return Step(values, grads, start, fixed, seconds)


def ends_of(out) -> list[Tensor]:
    """The tensors in what a model returned that backward can start from; a ValueError if there are none."""
    ends = [t for t in tensors_in(out) if t.requires_grad]
    if not ends:
        got = "one without a gradient" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(f"model must return a tensor that requires a gradient, got {got}")
    return ends


@contextlib.contextmanager
def without_others_gradients(ends: list[Tensor], own: list[Tensor]):
    """Inside, leaves behind ``ends`` that are not ``own`` have no gradients yet; afterwards theirs again."""
    ids = {id(t) for t in own}
    others = [leaf for leaf in leaves_behind(t.grad_fn for t in ends) if id(leaf) not in ids]
    before = [leaf.grad for leaf in others]
    try:
        for leaf in others:
            leaf.grad = None
        yield
    finally:
        for leaf, grad in zip(others, before, strict=True):
            leaf.grad = grad


def attributes(model: nn.Module) -> list[Tensor]:
    """The modules' tensors that are neither parameters nor buffers."""
    return [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]


def computed(model: nn.Module) -> dict[int, Tensor]:
    """Copies of those that have a graph, as an older weight_norm's, by their ids: deepcopy takes none."""
    return {id(t): t.detach().clone() for t in attributes(model) if not t.is_leaf}


def deep_copy(name: str, original, copies: dict):
    """A deep copy, with these copies of some parts by their ids; a ValueError if there can be none."""
    try:
        return copy.deepcopy(original, copies)
    except Exception as error:  # whatever a part may have against it
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} must allow copy.deepcopy, got {what}") from error


class OnlyCopies(TorchDispatchMode):
    """Inside, an operation on a parameter or buffer of ``original`` is an error.

    ``copy.deepcopy`` does not copy functions: one that is called instead of a module's forward, such as a
    wrapper around it, goes on with the original.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.originals = {id(t): t for t in (*original.parameters(), *original.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.originals.keys().isdisjoint(map(id, tree_leaves((args, kwargs)))):
            raise ValueError(
                "model must allow copy.deepcopy, got one whose copy still leads to the original's tensors, "
                "perhaps by a wrapped forward, a lambda or a hook: pass it without, or write it as a method"
            )
        return func(*args, **(kwargs or {}))


def same(p: Tensor, q: Tensor) -> bool:
    """Whether all values are equal, 0 to -0, and a NaN to a NaN."""
    p, q = (t if t.layout is torch.strided else t.to_dense() for t in (p, q))
    return p.dtype == q.dtype and p.shape == q.shape and torch.allclose(p, q, 0, 0, equal_nan=True)


def random_state(device: torch.device) -> list:
    """Of PyTorch's generators, to be compared: in another dtype they draw other numbers."""
    others = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [t.tolist() for t in (torch.get_rng_state(), *others)]


@contextlib.contextmanager
def same_numbers_again(device: torch.device):
    """Afterwards the generators of PyTorch, on a CPU and ``device``, of Python and of NumPy are as before."""
    others, numpy = [] if device.type == "cpu" else [device], sys.modules.get("numpy")
    state, of_numpy = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(others, device_type=device.type if others else "cuda"):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(of_numpy)


def clock(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def each(function: Callable[[Tensor], Tensor], tree):
    """``tree`` with ``function`` of each tensor, made once, so that one that is passed twice stays one."""
    return tree_map_only(Tensor, functools.cache(function), tree)


def tensors_in(tree) -> list[Tensor]:
    """All tensors in lists, tuples, dicts, PyTorch's other trees, and dataclasses."""
    found = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
    return found


def apart(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference, as `Comparison` defines it; NaN if one is NaN."""
    norms = [wide(q).norm().item() for q in exact]
    least = max(norms, default=0.0) / 100 or 1.0
    parts = [(wide(p) - q).norm() / max(norm, least) for p, q, norm in zip(found, exact, norms, strict=True)]
    return torch.tensor(parts or [0.0], device="cpu").max().item()


def wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float64))
