"""`fuse_conv_bn`: the kernel of `helpers.fused` in a model that exists.

The model is traced with torch.fx, twice: in training and in eval mode. In each graph a convolution takes
the norm and activation before it and the norm after it into one call, and the graph becomes the model's
forward. Modules, parameters, buffers and their names stay as and where they are: the new forward looks
them up by name.

From top to bottom: tracing, and what makes a trace unsafe; finding the groups; the new forward and when it
is traced again; the report.
"""

from __future__ import annotations

import copy
import enum
import functools
import inspect
import random
import sys
import types
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.fused import (
    HOOKS,
    Act,
    activation_of,
    algebra_pays_for,
    call_block,
    group_argument,
    has_hooks,
    slab_argument,
)
from helpers.memory import saved_by

__all__ = ["FusionReport", "fuse_conv_bn", "unfuse"]

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# A convolution of more multiplications a value is not computed a second time to save the value's bytes: that
# would take seconds for the memory that others give for tenths.
RECOMPUTE_AT_MOST = 4096
REPORTED = (nn.Conv2d, nn.GroupNorm, nn.modules.batchnorm._NormBase)  # the kinds that a report speaks of


# Tracing -------------------------------------------------------------------------------------------------


class NotCertain(Exception):
    """Why a graph of a module's forward would not always compute what the forward computes."""


class Value(fx.Proxy):
    """A value of which nothing but its name is known while tracing."""

    @property
    def __class__(self):  # isinstance asks for it, autograd.Function.apply too
        if sys._getframe(1).f_globals["__name__"].startswith(("torch.fx", "torch.nn", __name__)):
            return fx.Proxy
        raise NotCertain("its forward depends on the type of a value")


class Tracer(fx.Tracer):
    """torch.fx's tracer, which stops where its graph would be a guess.

    Its graph replaces the forward of the module that is traced and of the containers inside it, so a module
    with hooks is never looked into.
    """

    proxy_buffer_attributes = True  # a forward may not decide by what is in a buffer

    def trace(self, *arguments):
        self.surroundings = surroundings()
        return super().trace(*arguments)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        whole = has_hooks(module) or isinstance(module, (Fused, nn.Conv2d, nn.modules.batchnorm._NormBase))
        return whole or super().is_leaf_module(module, name)

    def proxy(self, node: fx.Node) -> Value:
        return Value(node, self)

    def create_node(self, *arguments, **keywords) -> fx.Node:
        if surroundings() != self.surroundings:
            raise NotCertain("a part of it runs under another grad mode, autocast or another context")
        return super().create_node(*arguments, **keywords)

    def create_arg(self, a):
        if isinstance(a, fx.Proxy):
            return a.node
        if type(a) is OrderedDict:
            items = [self.create_arg(list(item)) for item in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise NotCertain("its forward makes a tensor that does not depend on the input")
        known = type(a) in (list, tuple, dict) or type(a).__module__.startswith("torch.")
        if isinstance(a, (list, tuple, dict)) and not known and not hasattr(a, "_fields"):
            raise NotCertain(f"its forward makes a {type(a).__name__}")
        return super().create_arg(a)


def surroundings() -> tuple:
    """What a graph does not say: the contexts in which its operations run."""
    autocast = [
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        for device in ("cpu", "cuda", "mps", "xpu")
    ]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # checkpoints have them
    modes = torch._C._len_torch_function_stack()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, hooks, modes


@contextmanager
def attributes_read() -> Iterator[set[str]]:
    """The names of all attributes of modules that are read meanwhile."""
    names = set()

    def note(self, name: str):
        names.add(name)
        return object.__getattribute__(self, name)

    nn.Module.__getattribute__ = note
    try:
        yield names
    finally:
        del nn.Module.__getattribute__


def required_parameters(module: nn.Module) -> list[str]:
    """Names of the arguments that ``module.forward`` cannot be called without."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(plain_class(module).forward).parameters.values())[1:]
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        raise NotCertain("its forward has a required keyword-only argument")
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]


def containers(module: nn.Module) -> list[nn.Module]:
    """``module`` and those inside it that a trace may run through: all but PyTorch's own layers."""
    inside = (m for m in module.modules() if m is not module)
    return [module, *(m for m in inside if not m.__module__.startswith("torch.nn") or list(m.children()))]


# nn.Module's own attributes that a forward does not decide by (its modules and hooks are watched elsewhere),
# and those in which a name may stand for None
OWN = {*vars(nn.Module()), "_plan", "fusion_report"} - {"training"}
TENSORS = {"_parameters", "_buffers"}
SETTINGS = (bool, int, float, str, types.NoneType)
PLAIN = (*SETTINGS, complex, bytes, enum.Enum, type, torch.dtype, torch.device)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)


def plain_values(modules: list[nn.Module], names: set[str] | None = None) -> tuple:
    """The attributes of ``modules`` (those in ``names``), to be compared.

    A forward may depend on them, ``training`` above all, so a graph holds for one set of them only.
    """
    return tuple(
        (name, plain_value(value))
        for module in modules
        for name, value in vars(module).items()
        if name in TENSORS or (name not in OWN and (names is None or name in names))
    )


def plain_value(value, depth: int = 4):
    """What a forward could decide by in ``value``: numbers, flags, texts, functions, and what holds such."""
    if isinstance(value, fx.Proxy):
        return fx.Proxy
    if isinstance(value, (*PLAIN, *FUNCTIONS)):
        return value
    if isinstance(value, types.MethodType):
        return value.__func__, id(value.__self__)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, (Tensor, nn.Module)) or not depth:
        return type(value)
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        if len(value) > 100:  # no settings
            return type(value), len(value)
        items = value.items() if isinstance(value, dict) else value
        return type(value), *(plain_value(item, depth - isinstance(value, dict)) for item in items)
    return type(value), plain_value(vars(value), depth - 1) if hasattr(value, "__dict__") else None


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """All generators of random numbers are put back to where they were.

    Raises:
        NotCertain: numbers were drawn from one.
    """
    generators = [(random.getstate, random.setstate), (torch.get_rng_state, torch.set_rng_state)]
    if torch.cuda.is_initialized():
        generators.append((torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        generators.append((numpy.get_state, numpy.set_state))
    before = [get() for get, _ in generators]
    try:
        yield
        if any(differ(get(), state) for (get, _), state in zip(generators, before, strict=True)):
            raise NotCertain("its forward draws random numbers that decide what it does")
    finally:
        for (_, put_back), state in zip(generators, before, strict=True):
            put_back(state)


def differ(a, b) -> bool:
    """Whether two states of a generator are not the same."""
    if isinstance(a, tuple):
        return any(differ(*pair) for pair in zip(a, b, strict=True))
    return bool((a != b).any()) if hasattr(a, "any") else a != b


def skeleton(module: nn.Module) -> nn.Module:
    """A copy that shares the parameters, of its plain class: tracing cannot change the module through it."""
    memo = {id(p): p for p in module.parameters()}
    memo |= {id(b): b.detach().clone() for b in module.buffers()}
    fused_as = type(module)
    module.__class__ = plain_class(module)
    try:
        return copy.deepcopy(module, memo)
    finally:
        module.__class__ = fused_as


def trace(
    module: nn.Module, mode: bool | None = None, names: set[str] | None = None
) -> tuple[fx.Graph, list[nn.Module]]:
    """The graph of ``module``'s forward, and copies of the modules whose attributes it depends on.

    Args:
        module: stays as it is; a copy that shares its parameters is traced.
        mode: trace in this training mode; None for the mode that each module is in.
        names: if given, those of the attributes that the forward reads are added.

    Raises:
        NotCertain: the graph would not always be right.
    """
    required = ", ".join(required_parameters(module))
    try:
        copied = skeleton(module)
        if mode is not None:
            copied.train(mode)
    except Exception as error:  # a module may hold anything
        raise NotCertain(f"it cannot be copied: {first_line(error)}") from None
    everything = list(copied.modules())
    before = plain_values(everything)
    # The tracer makes a placeholder of each argument of the forward that it finds.
    plain = type(copied)
    forward = eval(f"lambda self, {required}: forward(self, {required})", {"forward": plain.forward})
    copied.__class__ = type(plain.__name__, (plain,), {"forward": forward})
    try:
        with random_numbers_kept(), attributes_read() as read:
            graph = Tracer().trace(copied)
    except NotCertain:
        raise
    except Exception as error:  # whatever a forward does that cannot be traced
        raise NotCertain(f"it cannot be traced: {first_line(error)}") from None
    if plain_values(everything) != before:
        raise NotCertain("its forward changes its own state")
    if names is not None:
        names |= read
    return graph, containers(copied)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


# Groups --------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """What becomes one call: names of modules, and the activation between."""

    conv: str
    before: str | None = None
    act: Act = Act()
    act_module: str | None = None
    after: str | None = None
    nodes: list[fx.Node] = field(default_factory=list, repr=False)

    def names(self) -> tuple[str | None, ...]:
        """Of the modules, in the order in which `call_group` takes them."""
        return self.conv, self.before, self.act_module, self.after


def activation_at(node: fx.Node, modules: dict[str, nn.Module]) -> Act | None:
    """The activation that ``node`` computes of its first argument, if the kernel has it."""
    if node.op == "call_module":
        module = modules[node.target]
        other = has_hooks(module) or "forward" in vars(module) or isinstance(module, nn.Identity)
        try:
            return None if other else activation_of(module)
        except ValueError:
            return None
    functions = {
        "relu": ("relu", "relu_", F.relu, F.relu_, torch.relu, torch.relu_),
        "relu6": (F.relu6,),
        "silu": (F.silu,),
        "hardswish": (F.hardswish,),
    }
    if node.op not in ("call_method", "call_function") or set(node.kwargs) - {"inplace", "input"}:
        return None
    if any(isinstance(a, fx.Node) for a in node.args[1:]):
        return None
    return next((Act(name) for name, targets in functions.items() if node.target in targets), None)


def why_not(node: fx.Node, modules: dict[str, nn.Module], calls: Counter) -> str | None:
    """Why the module called at ``node`` must be called as it is, or None."""
    module = modules[node.target]
    if has_hooks(module):
        return "it has hooks"
    if calls[id(module)] > 1:
        return f"it is called {calls[id(module)]} times"
    if len(node.args) != 1 or node.kwargs:
        return "it is not called with one input"
    if "forward" in vars(module):
        return "its forward was replaced"
    return None


def find_groups(graph: fx.Graph, module: nn.Module) -> tuple[list[Group], dict[str, str]]:
    """The groups in ``graph``, and why other convolutions and batch norms are left alone, by name.

    A norm goes to the convolution behind it where it can: that costs no second convolution. Its result,
    and the activation's, must go nowhere else, and nothing may happen between the three: what runs there
    could change the norm's input in place.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    called = [node for node in graph.nodes if node.op == "call_module"]
    calls = Counter(id(modules[node.target]) for node in called)
    alone: dict[str, str] = {}
    convs, norms = {}, {}
    for node in called:
        kind = type(modules[node.target])
        if not issubclass(kind, REPORTED):
            continue
        reason = why_not(node, modules, calls)
        if kind is not nn.Conv2d and kind not in NORMS:
            reason = f"it is a {kind.__name__}"
        if reason:
            alone[node.target] = reason
        else:
            (convs if kind is nn.Conv2d else norms)[node] = node.target
    groups, taken = [], {}
    for node, name in convs.items():
        group = Group(name, nodes=[node])
        source, act, act_module = node.args[0], Act(), None
        if source not in norms and isinstance(source, fx.Node) and (found := activation_at(source, modules)):
            act, act_module = found, source.target if source.op == "call_module" else None
            source = source.args[0] if source.args else source.kwargs.get("input")
        between = nodes_between(source, node)
        padded = modules[name].padding_mode != "zeros" or modules[name].padding == "same"
        if source in norms and not padded and len(between) == 1 + (act != Act()):
            if all(len(n.users) == 1 for n in between):
                group.before, group.act, group.act_module = norms[source], act, act_module
                group.nodes = [*between, node]
                taken[source] = name
        groups.append(group)
    for group in groups:
        node, users = group.nodes[-1], list(group.nodes[-1].users)
        behind = users[0] if len(users) == 1 and users[0] in norms else None
        if behind is not None and behind not in taken:
            group.after = norms[behind]
            group.nodes.append(behind)
            taken[behind] = group.conv
        elif group.before is None:
            alone[group.conv] = (
                f"the norm behind it goes to {taken[behind]}"
                if behind is not None
                else f"its output goes to {len(users)} places"
                if len(users) > 1
                else "no batch norm is next to it"
            )
    for node, name in norms.items():
        if node not in taken:
            alone[name] = "no convolution before or behind it takes its input or its result alone"
    for name, m in modules.items():
        if isinstance(m, REPORTED) and not calls[id(m)]:
            alone.setdefault(name, "this forward does not call it by itself")
    return [g for g in groups if g.before or g.after], alone


def nodes_between(first, last: fx.Node) -> list[fx.Node]:
    """``first`` and those behind it in the graph's order, up to ``last``; none if ``first`` is no node."""
    nodes = []
    while isinstance(first, fx.Node) and first.op != "root" and first is not last:
        nodes.append(first)
        first = first.next
    return nodes


def compile_forward(graph: fx.Graph, groups: list[Group], options: dict, name: str) -> Callable:
    """``graph`` as a function of the module and its inputs, each group one call of the kernel."""
    for group in groups:
        first, last = group.nodes[0], group.nodes[-1]
        with graph.inserting_before(next(n for n in group.nodes if n.target == group.conv)):
            conv, before, act, after = (graph.get_attr(n) if n else None for n in group.names())
            act = act or (tuple(group.act) if group.act.name != "none" else None)
            call = graph.call_function(call_group, (first.args[0], conv, before, act, after), options)
        last.replace_all_uses_with(call)
        for node in reversed(group.nodes):
            graph.erase_node(node)
        group.nodes.clear()
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<forward of {name}, fused>", "exec"), namespace)
    return namespace["forward"]


def call_group(
    input: Tensor,
    conv: nn.Conv2d,
    norm_before: nn.Module | None,
    activation: nn.Module | tuple | None,
    norm_after: nn.Module | None,
    recompute_conv: bool,
    slab_size: int | str | None,
    process_group: str = "",
) -> Tensor:
    """One group, by the kernel where it still can be."""
    act = Act(*activation) if isinstance(activation, tuple) else activation
    norms = [n for n in (norm_before, norm_after) if n is not None]
    plain = type(conv) is nn.Conv2d and all(type(n) in NORMS for n in norms)
    modules = [conv, *norms, *([act] if isinstance(act, nn.Module) else [])]
    if not plain or any("forward" in vars(m) for m in modules):  # parametrised since, for example
        refuse_alone(process_group, norms)
        return one_by_one(input, conv, norm_before, act, norm_after)
    backward = "auto"
    if norm_after is not None and not is_worth(conv, norm_after, recompute_conv, process_group):
        if algebra_pays_for(input, conv, norm_before is None and act is None, norm_after):
            backward = "algebra"
        elif not is_constant(norm_after):
            y = call_group(input, conv, norm_before, activation, None, True, slab_size)
            return norm_after(y)
    if norm_before is None and norm_after is None:
        return conv(input)
    return call_block(input, conv, norm_before, act, norm_after, slab_size, backward, process_group)


def is_worth(conv: nn.Conv2d, norm_after: nn.Module, recompute_conv: bool, process_group: str) -> bool:
    """Whether a second convolution may be computed for the norm after, where the algebra does not apply.

    A norm that is taken over several processes must not be left alone, whatever it costs.
    """
    few = conv.weight.numel() // conv.out_channels <= RECOMPUTE_AT_MOST
    return recompute_conv and (few or bool(process_group) or isinstance(norm_after, nn.SyncBatchNorm))


def one_by_one(
    input: Tensor,
    conv: nn.Conv2d,
    norm_before: nn.Module | None,
    act: nn.Module | Act | None,
    norm_after: nn.Module | None,
) -> Tensor:
    """One group, unfused."""
    x = input if norm_before is None else norm_before(input)
    if act is not None:
        x = act(x) if isinstance(act, nn.Module) else act.forward(x)
    return conv(x) if norm_after is None else norm_after(conv(x))


def refuse_alone(process_group: str, modules: Iterable[nn.Module]) -> None:
    """Raise a RuntimeError if norms among ``modules`` would run by themselves, and not over the group."""
    if process_group and any(isinstance(m, nn.BatchNorm2d) and m.training for m in modules):
        raise RuntimeError(
            "a batch norm that fuse_conv_bn was given a process_group for would run unfused, over its own "
            "process alone: the model or its hooks have changed since; use nn.SyncBatchNorm, or fuse again"
        )


def is_constant(norm: nn.Module) -> bool:
    """Whether backward needs nothing of the norm's input: constant statistics, and no gradient for γ."""
    fixed = norm.weight is None or not norm.weight.requires_grad or not torch.is_grad_enabled()
    return fixed and not norm.training and norm.running_mean is not None


# The new forward -----------------------------------------------------------------------------------------


KEPT = 16  # forwards of one module


class Plan:
    """The forwards of one module: a graph for each set of attributes that its containers have had."""

    def __init__(self, recompute_conv: bool, slab_size: int | str | None, process_group: str) -> None:
        self.options = dict(recompute_conv=recompute_conv, slab_size=slab_size, process_group=process_group)
        self.forwards: dict[tuple, Callable | None] = {}

    def __reduce__(self):
        return Plan, tuple(self.options.values())

    def prepare(self, module: nn.Module) -> Plan:
        """Trace ``module`` in both modes.

        Raises:
            NotCertain: from `trace`.
        """
        self.forwards.clear()
        self.names: set[str] = set()
        self.required = required_parameters(module)
        self.containers = containers(module)
        self.children = [(m._modules, tuple(m._modules.values())) for m in self.containers]
        inside = [m for m in module.modules() if m is not module]
        self.hooks = [getattr(m, kind) for m in inside for kind in HOOKS]
        traces = []
        for mode in (False, True):  # the groups that are kept for the report are those of training
            with torch.set_grad_enabled(mode):
                traces.append((*trace(module, mode, self.names), mode))
        for graph, copies, mode in traces:
            with torch.set_grad_enabled(mode):
                self.add(module, graph, copies)
        self.settings = [
            (m, name)
            for m in self.containers
            for name, value in vars(m).items()
            if name in self.names - OWN
            if isinstance(value, SETTINGS)
        ]
        return self

    def add(self, module: nn.Module, graph: fx.Graph, copies: list[nn.Module]) -> None:
        """Keep the forward that ``graph`` makes, for the attributes that ``copies`` have."""
        self.groups, self.alone = find_groups(graph, module)
        forward = compile_forward(graph, self.groups, self.options, type(module).__name__)
        taken = {norm for g in self.groups for norm in (g.before, g.after) if norm}
        inner = tuple(f"{n}." for n, m in module.named_modules() if n and isinstance(m, Fused))
        inside = (m for n, m in module.named_modules() if n not in taken and not n.startswith(inner))
        forward.left = [m for m in inside if isinstance(m, nn.BatchNorm2d)]
        self.keep(self.key(copies), forward)

    def keep(self, key: tuple, forward: Callable | None) -> None:
        while len(self.forwards) >= KEPT:  # an attribute changes all the time
            del self.forwards[next(iter(self.forwards))]
        self.forwards[key] = forward

    def key(self, modules: list[nn.Module]) -> tuple:
        """What a graph depends on: attributes, gradients, and hooks, since modules with hooks are called."""
        hooked = tuple(i for i, hooks in enumerate(self.hooks) if hooks)
        return plain_values(modules, self.names), torch.is_grad_enabled(), hooked

    def forward(self, module: nn.Module) -> Callable | None:
        """The forward for ``module`` as it stands now; None where its own must do."""
        if torch.compiler.is_compiling():
            for m, name in self.settings:  # the compiler watches what is compared
                getattr(m, name, None) == 0  # noqa: B015
            return getattr(self, name_of_forward(self, module))
        return self.now(module)

    def now(self, module: nn.Module) -> Callable | None:
        if nn.modules.module._has_any_global_hook():
            return None
        key = None
        try:
            if any(tuple(now.values()) != then for now, then in self.children):
                self.prepare(module)
            key = self.key(self.containers)
            if key not in self.forwards:
                self.add(module, *trace(module, None, self.names))
        except NotCertain as reason:
            warnings.warn(f"{type(module).__name__} runs unfused from here on: {reason}", stacklevel=3)
            self.keep(key or self.key(self.containers), None)
            return None
        if (forward := self.forwards[key]) is not None:
            refuse_alone(self.options["process_group"], forward.left)
        return forward


@torch._dynamo.assume_constant_result
def name_of_forward(plan: Plan, module: nn.Module) -> str:
    """The attribute of ``plan`` that is ``module``'s forward, found once, while it is compiled."""
    forward = plan.now(module)
    name = f"compiled_{id(forward)}"
    setattr(plan, name, forward)  # an attribute each: a list that grows would be compiled anew
    return name


class Fused(nn.Module):
    """Mixed into the class of a module whose forward is fused."""

    def forward(self, *args, **kwargs):
        plan = vars(self).get("_plan")  # a slice of a Sequential, say, has none
        if plan is None:
            return super().forward(*args, **kwargs)
        missing = plan.required[len(args) :]
        if len(args) + len(kwargs) == len(plan.required) and all(name in kwargs for name in missing):
            inputs = (*args, *(kwargs[name] for name in missing))
            # A forward may ask whether an argument is None or True, which a trace does not see.
            known = all(isinstance(t, (Tensor, list, tuple, dict)) for t in inputs)
            if known and (run := plan.forward(self)):
                return run(self, *inputs)
        refuse_alone(plan.options["process_group"], self.modules())
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        return new_fused, (plain_class(self),), vars(self)

    def __setstate__(self, state):
        super().__setstate__(state)
        try:
            if "_plan" in vars(self):
                self._plan.prepare(self)
        except NotCertain:  # any more, of a model that was changed after it was fused
            del self._plan


@functools.cache
def fused_class(plain: type[nn.Module]) -> type[Fused]:
    return type("Fused" + plain.__name__, (Fused, plain), {"__module__": plain.__module__})


def new_fused(plain: type[nn.Module]) -> Fused:
    cls = fused_class(plain)
    return cls.__new__(cls)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` without `Fused`."""
    mro = type(module).__mro__
    return mro[mro.index(Fused) + 1] if isinstance(module, Fused) else type(module)


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse_conv_bn`, in place."""
    for module in model.modules():
        vars(module).pop("_plan", None)
        if isinstance(module, Fused) and type(module).__mro__[1] is Fused:  # and of no other's class since
            module.__class__ = plain_class(module)
    vars(model).pop("fusion_report", None)
    return model


def fuse_conv_bn(
    model: nn.Module,
    recompute_conv: bool = True,
    slab_size: int | str | None = None,
    process_group=None,
) -> nn.Module:
    """Fuse the convolutions and batch norms of ``model``, in place, and return it.

    The model computes the same function. Modules, parameters, buffers, state_dict keys and an optimizer
    that holds the parameters stay as they are; the class becomes a subclass whose forward calls the kernel.
    Where a forward cannot be traced, or a trace would be a guess, the modules inside are tried one by one.
    What was done is in ``model.fusion_report``. `unfuse` undoes it.

    Attributes, hooks and modules may change afterwards: the model is traced anew, or runs unfused with a
    warning. Under torch.compile only attributes that are numbers, flags or texts are watched.

    On several processes, an nn.SyncBatchNorm is fused as one, and may be made before or after fusing
    (``convert_sync_batchnorm``). With FSDP2, fuse each module before it is given to ``fully_shard``: one that
    is sharded cannot be copied to be traced, so a model fused as a whole and sharded in parts runs unfused.

    Args:
        model: any module; fused already, it is fused anew with these settings.
        recompute_conv: True for the least memory: a convolution is computed twice for the norm behind it, but
            for one of more than RECOMPUTE_AT_MOST multiplications a value. False if none may be: then a norm
            behind a convolution is fused only where it is differentiated by algebra.
        slab_size: see `helpers.fused_block2d`.
        process_group: a torch.distributed.ProcessGroup whose whole batch all norms take their statistics over
            in training, on any device. nn.SyncBatchNorm has its own, and needs no such argument.

    Raises:
        ValueError: ``slab_size`` or ``process_group`` is none of those; or a batch norm would be left alone,
            and so not take part in ``process_group``.
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    slab_argument(slab_size)
    name = group_argument(process_group)
    if name and not recompute_conv:
        raise ValueError(
            "process_group needs recompute_conv=True: without, some norms are left to themselves"
        )
    unfuse(model)
    report = FusionReport(recompute_conv, name)
    fuse_inside(
        model, "", report, dict(recompute_conv=recompute_conv, slab_size=slab_size, process_group=name)
    )
    for prefix, group in report.groups:
        for module in group.names():
            report.alone.pop(f"{prefix}{module}", None)
    taken = {prefix + norm for prefix, group in report.groups for norm in (group.before, group.after) if norm}
    single = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and n not in taken]
    if name and single:
        unfuse(model)
        raise ValueError(
            f"process_group: {', '.join(single)} would be left to one process; use convert_sync_batchnorm"
        )
    model.fusion_report = report
    return model


def fuse_inside(module: nn.Module, name: str, report: FusionReport, options: dict) -> None:
    """Fuse ``module``, or where it cannot be traced, what is in it."""
    prefix = name + "." if name else ""
    children = list(module.named_children())
    if not children or "_plan" in vars(module):  # one that stands in two places is fused already
        return
    try:
        if "forward" in vars(module):  # later on, it may be wrapped in another
            raise NotCertain("its forward was replaced")
        plan = Plan(**options).prepare(module)
    except NotCertain as reason:
        report.untraced[name or "the model"] = str(reason)
        report.alone |= {prefix + n: "" for n, m in children if isinstance(m, REPORTED)}
        for child_name, child in children:
            fuse_inside(child, prefix + child_name, report, options)
        return
    if plan.groups:
        module._plan = plan
        module.__class__ = fused_class(type(module))
        report.groups += [(prefix, group) for group in plan.groups]
    report.alone |= {prefix + n: reason for n, reason in plan.alone.items()}
    for child_name, child in outermost_with_hooks(module):  # it is called as it is
        fuse_inside(child, prefix + child_name, report, options)


def outermost_with_hooks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules inside ``module`` that have hooks, but none of those inside them."""
    for name, child in module.named_children():
        if has_hooks(child):
            yield prefix + name, child
        else:
            yield from outermost_with_hooks(child, prefix + name + ".")


# The report ----------------------------------------------------------------------------------------------


@dataclass
class FusionReport:
    """What `fuse_conv_bn` did: print it. With bytes for an input: print ``report.measured(model, input)``."""

    recompute_conv: bool
    process_group: str = ""
    groups: list[tuple[str, Group]] = field(default_factory=list)  # with the prefix of their names
    alone: dict[str, str] = field(default_factory=dict)  # name -> why
    untraced: dict[str, str] = field(default_factory=dict)  # name -> why
    saved: list[tuple[int, int, str]] | None = None  # of each group: bytes unfused and fused, and how

    def __str__(self) -> str:
        rows = []
        for i, (prefix, group) in enumerate(self.groups):
            before, conv, after = (
                n and n.rpartition(".")[2] for n in (group.before, group.conv, group.after)
            )
            act = group.act.name if group.act.name != "none" else None
            chain = " → ".join(n for n in (before, act, conv, after) if n)
            rows.append([prefix + group.conv, chain, *(self._measured(i))])
        text = [f"fused: {len(rows)} groups", *columns_of(rows)]
        if self.saved:
            text.append(f"saved in all: {mib(sum(a - b for a, b, _ in self.saved))}")
        reasons = [[name, why] for name, why in self.alone.items() if why]
        text += [f"left alone: {len(self.alone)} convolutions and norms", *columns_of(reasons)]
        if self.untraced:
            text += ["not traced, so fused inside only:", *columns_of(list(map(list, self.untraced.items())))]
        return "\n".join(text)

    def _measured(self, i: int) -> list[str]:
        if self.saved is None:
            return []
        unfused, fused, how = self.saved[i]
        return [how, f"{mib(unfused)} → {mib(fused)}"]

    def measured(self, model: nn.Module, *inputs: Tensor) -> FusionReport:
        """The same report with what each group keeps for ``inputs``, unfused and fused.

        Counted beside its input, if both keep that. Nothing is computed: the tensors are fake.
        """
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            inputs = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in inputs]
            plain = unfuse(skeleton(model))
            modules, entries, handles = dict(plain.named_modules()), {}, []
            names = [tuple(n and prefix + n for n in group.names()) for prefix, group in self.groups]
            for of_group in names:
                first = next(n for n in (of_group[1], of_group[0]) if n)
                note = functools.partial(lambda first, module, args: entries.update({first: args[0]}), first)
                handles.append(modules[first].register_forward_pre_hook(note))
            plain(*inputs)
            for handle in handles:
                handle.remove()
            saved = [
                self._of_group(entries.get(before or conv), group, [n and modules[n] for n in of_group])
                for of_group, (_, group) in zip(names, self.groups, strict=True)
                for conv, before, *_ in [of_group]
            ]
        return replace(self, saved=saved)

    def _of_group(self, x: Tensor | None, group: Group, modules: list[nn.Module | None]):
        if x is None:
            return 0, 0, "not called"
        conv, before, act_module, after = modules
        x = x.detach().requires_grad_(x.requires_grad)
        act = act_module or (group.act if group.act.name != "none" else None)
        mine = [b for m in modules if m is not None for b in m.buffers()]
        tuple_or_module = tuple(act) if isinstance(act, Act) else act

        def fused() -> Tensor:
            if self.process_group:  # everything is fused then
                return call_block(x, conv, before, act, after)
            return call_group(x, conv, before, tuple_or_module, after, self.recompute_conv, None)

        saved = [
            saved_bytes(lambda: one_by_one(x, conv, before, act, after), *mine),
            saved_bytes(fused, *mine),
        ]
        if all(id_of(x) in bytes_of for bytes_of in saved):
            for bytes_of in saved:
                del bytes_of[id_of(x)]
        unfused_bytes, fused_bytes = (sum(bytes_of.values()) for bytes_of in saved)
        algebra = after is not None and algebra_pays_for(x, conv, before is None and act is None, after)
        how = "no convolution twice" if after is None else "by algebra" if algebra else "recomputed"
        if (
            after is not None
            and not algebra
            and not is_worth(conv, after, self.recompute_conv, self.process_group)
        ):
            how = f"without {group.after.rpartition('.')[2]}"
        return unfused_bytes, fused_bytes, how


def saved_bytes(run: Callable[[], Tensor], *others: Tensor) -> dict[int, int]:
    """The bytes of each memory that autograd keeps of ``run()`` beside parameters and ``others``."""
    outside = {id_of(t) for t in others}
    kept = [t for t in saved_by(run)[1] if not isinstance(t, nn.Parameter)]
    return {id_of(t): t.untyped_storage().nbytes() for t in kept if id_of(t) not in outside}


def id_of(t: Tensor) -> int:
    """What tells the memory of a fake tensor, which has no address, from others."""
    return t.untyped_storage()._cdata


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


def columns_of(rows: list[list[str]]) -> list[str]:
    """Rows of text as lines, the columns below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in rows]
