"""The exercises' checkers, a file for each chapter. Each says in one line whether an answer is right.

A wrong answer is told what looks wrong; `helpers/tests/book/wrong_answers.py` holds mistakes that the
checkers must tell apart. Here is what they share.
"""

import functools

import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from helpers.memory import MemoryTrace
from helpers.remat.mode import alone


class Wrong(Exception):
    """What to say about an answer that is not right."""


def exercise(number: int):
    """Make a checker of ``check(answer)``, which raises `Wrong` unless the answer is right."""

    def decorate(check):
        @functools.wraps(check)
        def verdict(answer) -> str:
            try:
                check(answer)
            except Wrong as wrong:
                return f"exercise {number}: {wrong}"
            return f"exercise {number}: right"

        return verdict

    return decorate


def require(holds, words: str) -> None:
    if not holds:
        raise Wrong(words)


def attempted(got):
    """``got``, unless it is None, as in the gap on the page."""
    require(got is not None, "not attempted yet, or a `return` is missing: the answer is None")
    return got


def numbers(got) -> list[float]:
    """``got`` as a list, if it is some numbers; whole ones as ints."""
    try:
        return [int(n) if n.is_integer() else n for n in map(float, attempted(got))]
    except (TypeError, ValueError):
        raise Wrong(f"return a list of numbers, got {got!r}") from None


def call(answer, *args, **options):
    """``answer(*args, **options)``, not None, which must not overwrite a tensor in ``args``."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    before = [t._version for t in tensors]  # which counts the changes in place
    got = attempted(answer(*args, **options))
    same = before == [t._version for t in tensors]
    require(same, "a tensor that was given has been overwritten, and others may need it")
    return got


def difference(got, want, **tolerances: float) -> str:
    """In one line how ``got`` differs from ``want``, a tensor, number, list or dict; empty if it does not."""
    if isinstance(want, dict):
        if more := got.keys() - want.keys():
            return f"{', '.join(sorted(more))}: not expected"
        parts = ((name, difference(got.get(name), w, **tolerances)) for name, w in want.items())
        return next((f"{name}: {wrong}" for name, wrong in parts if wrong), "")
    if isinstance(want, Tensor):
        if not isinstance(got, Tensor):
            return f"a tensor is expected, got {got!r:.80}"
        for what, g, w in (("shape", tuple(got.shape), tuple(want.shape)), ("dtype", got.dtype, want.dtype)):
            if g != w:
                return f"the {what} is {g}, and must be {w}"
    elif isinstance(got, Tensor) and not got.dim():
        got = got.item()
    try:
        assert_close(got, want, check_dtype=False, **tolerances)  # a whole float is as good as an int
    except AssertionError:
        if not isinstance(want, Tensor):
            return f"expected {want}, got {got}"
        if not got.isfinite().all():
            return "NaN or infinity is in it"
        off, right = (t.abs().max().item() for t in (got.double() - want, want.double()))
        return f"wrong by up to {off:.2g}; the right values go up to {right:.2g}"
    except (TypeError, RuntimeError):  # the latter for a bool
        return f"expected {type(want).__name__}, got {type(got).__name__}"
    return ""


def compare(names: str, got, want, mistakes=None, note: str = "", **tolerances: float) -> None:
    """Raise `Wrong` unless ``got`` is ``want``, or each of a tuple is, named as in "dx, dw".

    ``mistakes`` maps what to say to the value that this mistake gives. ``note`` is added to what is said;
    ``tolerances`` are those of `assert_close`, rtol and atol.
    """
    attempted(got)
    pairs = [(names, got, want)]
    if isinstance(want, tuple):
        require(isinstance(got, tuple | list) and len(got) == len(want), f"return a tuple, ({names})")
        pairs = [*zip(names.split(", "), got, want, strict=True)]
    for name, g, w in pairs:
        require(g is not None or w is None, f"{name} is None")
        if wrong := difference(g, w, **tolerances):
            differs = functools.partial(difference, g, equal_nan=True, **tolerances)
            words = [said for said, value in (mistakes or {}).items() if not differs(value)]
            words += [f"{name}: that is {n}" for n, _, other in pairs if not differs(other)]
            if isinstance(g, Tensor) and isinstance(w, Tensor) and g.shape == w.shape:
                times = ((g * w).sum() / (w * w).sum()).item()
                words += [f"{name} is {times:.4g} times the right one"] * (not difference(g, times * w))
            raise Wrong((words or [f"{name}: {wrong}"])[0] + (f" ({note})" if note else ""))


def new(*shapes) -> list[Tensor]:
    """Random tensors in float64, in which rounding hides no mistake."""
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def grads(function, inputs, dy, **options) -> tuple[Tensor, ...]:
    """Autograd's gradients of ``function(*inputs, **options)``."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves, **options), leaves, dy)


def one_tensor(got) -> Tensor:
    known = isinstance(attempted(got), Tensor) and got.requires_grad
    require(known, f"forward must return one tensor with a graph, got a {type(got).__name__}")
    return got


def compare_nets(base, network, x, contexts, atol: float) -> list[MemoryTrace]:
    """Check that ``network`` computes what ``base`` does; the memory of a step of each, in its context."""
    steps = []
    network.load_state_dict(base.state_dict())
    for model, context in zip((base, network), contexts, strict=True):
        torch.manual_seed(0)  # dropout's
        with MemoryTrace() as trace:
            try:
                with alone("forward", context()):
                    out = one_tensor(model(x))
            except RuntimeError as error:
                words = "the checker's context is to be the only one"
                require("enters remat itself" not in str(error), words)
                raise
            trace.mark("end of forward")
            out.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        steps.append((out, grads, dict(model.named_buffers()), trace))
    (want, right, counted, before), (got, mine, counted_here, after) = steps
    compare("the output", got, want, rtol=0, atol=atol)
    compare("a gradient", mine, right, note="is something detached?", rtol=1e-3, atol=1e-4)
    compare("running statistics", counted_here, counted, note="does a norm run twice?", rtol=1e-4, atol=1e-5)
    return [before, after]


def measured(function, *args, **options):
    """``(function(*args, **options), the trace of its memory, operations of its convolutions)``."""
    with FlopCounterMode(display=False) as counter, MemoryTrace() as trace:
        out = function(*args, **options)
    flops = counter.get_flop_counts().get("Global", {})
    return out, trace, sum(count for operation, count in flops.items() if "convolution" in str(operation))


def compare_function(function, reference, names, inputs, mistakes=None, kept=0, note="", copies=False):
    """Check that a differentiable ``function`` is ``reference``: output, memory and gradients.

    It may keep ``kept`` bytes a value for backward, and its inputs unless it gets ``copies`` of them.
    ``note`` is as in `compare`, and so are ``mistakes``, but for values that are functions of dout.
    """
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    with MemoryTrace() as trace:
        given = [t + 0 for t in leaves] if copies else leaves
        out = one_tensor(call(function, *given)) + 0  # a copy: a kept output counts, too
        del given
    compare("the output", out, reference(*inputs), note=note)
    more = (trace.timeline[-1][1] - out.nbytes) / out.numel()
    words = f"the output is right, but {more:.1f} bytes a value are kept for backward, and {kept} would do"
    require(more < kept + 0.5, words)
    attributes = getattr(out.grad_fn.next_functions[0][0], "__dict__", {}).items()
    tensors = [(name, t) for name, v in attributes for t in tree_leaves(v) if isinstance(t, Tensor)]
    random_state = torch.get_rng_state().shape  # ctx may hold one: nobody changes it in place
    wrong = [f"ctx.{name}" for name, t in tensors if t.shape != random_state]
    words = "pass it to save_for_backward, which notices if it is changed before backward"
    require(not wrong, f"a tensor is in {', '.join(wrong)}: {words}")
    dout = torch.randn_like(out)
    if dout.dim() == 4:  # some layers' gradients have this layout
        dout = dout.contiguous(memory_format=torch.channels_last)
    try:
        got = call(torch.autograd.grad, out, leaves, dout, allow_unused=True)
    except RuntimeError as error:
        words = "backward must return a tuple (no list), with one gradient for each argument of forward"
        require("number of grad" not in str(error) and "expected Variable" not in str(error), words)
        words = "backward: the gradient that comes is not contiguous here, and need not be: use reshape"
        require("view size is not compatible" not in str(error), words)
        require("returned an invalid grad" not in str(error), f"backward: {error}")
        raise
    known = {words: value(dout) for words, value in (mistakes or {}).items()}
    compare(names, got, grads(reference, inputs, dout), known, note)
