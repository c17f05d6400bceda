"""Recomputing values in one backward pass, from what is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from helpers.remat import passes
from helpers.remat.values import Part, Recipe, Table, Value

# On a CPU, consecutive passes work on a few images at a time, which stay in the core's cache.
SLAB_BYTES = 1 << 22


class Task:
    """Recomputes values in one backward pass.

    A value that several nodes need is held from its first use to its last if there is room for it, that is,
    if holding it does not raise the peak that is coming anyway. A convolution's output is always held.
    """

    def __init__(self, table: Table, retained: bool) -> None:
        self.uses: dict[Value, int] = {}
        self.holding: dict[Value, tuple[Tensor, object]] = {}  # with the streams that computed them
        self.slack, self.now = slack(table, retained), 0  # and the number of the operation that runs

    def room(self, value: Value | None = None) -> int:
        """Bytes that may be held, now or until ``value``'s last use, without raising the peak to come."""
        first = self.now if value is None else value.first
        return min(self.slack[first : self.now + 1], default=0)

    def fits(self, value: Value) -> bool:
        """Whether ``value`` may be held from now to its last use."""
        return self.room(value) >= value.nbytes

    def end(self) -> None:
        """The backward pass is over; some of its nodes may not have run."""
        self.holding.clear()
        self.uses.clear()

    def drop(self, value: Value) -> None:
        """``value`` is not needed any more."""
        self.uses.pop(value, None)
        self.holding.pop(value, None)

    def hold(self, value: Value, t: Tensor) -> None:
        self.holding[value] = t, stream_of(t)
        if not value.recipe.price:  # a convolution's output is held in any case
            for i in range(value.first, min(self.now + 1, len(self.slack))):
                self.slack[i] -= value.nbytes

    def get(self, value: Value) -> tuple[Tensor, bool]:
        """The tensor of a value for a node that needs it, and whether the node may overwrite it."""
        t = value.held()
        if t is not None:
            return t, False
        used = self.uses[value] = self.uses.get(value, 0) + 1
        t = self.on_this_stream(value)
        if t is None:
            t = self.recompute(value)
        if used >= value.needs:
            self.drop(value)
        elif value not in self.holding and self.fits(value):
            self.hold(value, t)
        return t, value not in self.holding

    def start(self, value: Value) -> Tensor:
        """The tensor from which a pass starts; held if it cost a convolution or others will need it."""
        t = self.at_hand(value)
        if t is None:
            t = self.recompute(value)
            if value.recipe.price or (value.needs and self.fits(value)):
                self.hold(value, t)
        return t

    def at_hand(self, value: Value) -> Tensor | None:
        """The tensor for a recipe, if it need not be recomputed."""
        if value.snapshot is not None:
            return value.snapshot
        return value.held() if value.kept is not None else self.on_this_stream(value)

    def on_this_stream(self, value: Value) -> Tensor | None:
        """The held tensor, if it was recomputed on this stream: another would have to wait for it."""
        t, stream = self.holding.get(value) or (None, None)
        return t if t is None or stream == stream_of(t) else None

    def recompute(self, value: Value) -> Tensor:
        """Recompute ``value``, and before it the convolutions on its way, each once."""
        stack = [value]
        while True:
            v = stack[-1]
            steps, missing = self.plan(v)
            if missing:
                stack.extend(missing)
                continue
            if v.recipe.price:
                t = v.recipe.run(None, *[self.start(p) for p in v.parents])
                if v.view.dense and t.stride() != v.view.stride:  # its views have forward's strides
                    t = v.view.empty().copy_(t)
            else:
                t = self.passes(steps)
            stack.pop()
            if not stack:
                return t
            self.hold(v, t)
            while self.at_hand(stack[-1]) is not None:  # two paths led there
                stack.pop()

    def plan(self, value: Value) -> tuple[list[Value], list[Value]]:
        """The cheap steps to ``value``, each after those it needs; and convolutions that must run first."""
        steps, missing, done = [], [], set()
        stack = [(value, False)]
        while stack:
            v, ready = stack.pop()
            if ready:
                steps.append(v)
            elif id(v) not in done and self.at_hand(v) is None:
                done.add(id(v))
                if v.recipe.price and v is not value:
                    missing.append(v)
                    continue
                if not v.recipe.price:
                    stack.append((v, True))
                stack.extend((p, False) for p in reversed(v.parents))
        return steps, missing

    def passes(self, values: list[Value]) -> Tensor:
        """Run cheap steps, and return the last one's result; on a CPU all of them on a few images at a time."""
        steps, last = merge(values), values[-1]
        memory: list[Tensor | None] = [None] * len(steps)
        memory[-1] = result = last.view.empty()
        for i, (v, recipe, _) in enumerate(steps[:-1]):  # write out what another node will need, if there is room
            if v.needs and self.fits(v) and not isinstance(recipe, Part):
                memory[i] = v.view.empty()
                self.hold(v, memory[i])
        program = Program.of(steps, memory, self.at_hand)
        one = result.dim() == 0 or any(step.recipe.whole for step in steps)
        images = [None] if one else slabs(len(result), result)
        for some in images if len(images) > 1 else [None]:
            program.run(some)
        return result


def slack(table: Table, retained: bool) -> list[int]:
    """For each operation, the bytes that may be held in its backward without raising the peak to come.

    That peak is the one of a backward that holds only what it must. Every gradient of a weight adds to the
    level; every kept value leaves it with its operation, unless the graph is retained. The output of a
    convolution to recompute comes with the first operation whose backward leads to it. A value's gradient
    comes with the first that reads it, and leaves with the operation that made it.
    """
    operations = [ref() for ref in table.operations]
    change, seen = [0] * (len(operations) + 1), set()  # of the level, before each operation's backward
    for value in [] if retained else table.alive():
        change[value.when - 1] -= value.nbytes
    level, gradients = 0, {}  # bytes; of gradients, by the operation whose backward takes them
    tensors, everything = [0] * len(operations), [0] * len(operations)  # how high each backward rises
    for i in reversed(range(len(operations))):
        operation = operations[i]
        level += change[i] - gradients.pop(i, 0)
        tensors[i] = everything[i] = level
        if operation is None:
            continue
        high, rise = level, operation.gradient + operation.result  # of each, a gradient or the value
        unkept = [v for v in operation.needed() if v.kept is None]
        for v in reversed(convolutions_before(unkept, seen)):  # as they are computed
            level += v.nbytes
            change[v.when - 1] -= v.nbytes
            high = max(high, level + operation.result + sum(p.nbytes for p in v.parents if p.kept is None))
        level += operation.grown()
        if operation.beside:
            rise += sum(v.nbytes for v in unkept if not v.recipe.price)
        tensors[i], everything[i] = max(high, level + rise), max(high, level + rise + operation.scratch)
        for taker, nbytes in takers(operation):
            taker, before = min(taker, i - 1), gradients.get(taker, 0)
            if nbytes > before:
                gradients[taker] = nbytes
                level += nbytes - before
    peaks = max(tensors, default=0), max(everything, default=0)
    return [min(peaks[0] - t, peaks[1] - e) for t, e in zip(tensors, everything, strict=True)]


def takers(operation) -> list[tuple[int, int]]:
    """The operations whose backward takes the gradient that this one's gives, and how many bytes of it."""
    source, found = operation.source and operation.source(), []
    if source is None:
        return [(operation.number - 1, operation.gradient)]
    stack = [source]
    while stack:
        v = stack.pop()
        if v.recipe is not None and v.recipe.joins:
            stack.extend(v.parents)
        else:
            found.append((v.start, v.nbytes))
    return found


def convolutions_before(values: list[Value], seen: set[Value]) -> list[Value]:
    """The convolutions' outputs that must be recomputed for ``values``, without those behind ``seen``."""
    found, stack = [], [*values]
    while stack:
        v = stack.pop()
        if v.kept is None and v not in seen:
            seen.add(v)
            stack.extend(v.parents)
            if v.recipe is not None and v.recipe.price:
                found.append(v)
    return found


class Step(NamedTuple):
    """A value to recompute, by a recipe that may stand for some steps before it too, with its own parents."""

    value: Value
    recipe: Recipe
    parents: tuple[Value, ...]


class Program(NamedTuple):
    """Steps, each after those that it needs, to run on all images at once or on some of them.

    Attributes:
        memory: for each step, memory for all images if its result is wanted.
        inputs: for each step, what it is computed from: a tensor, or the position of an earlier step.
        places: for each step, the position of the one in whose memory it is computed.
    """

    steps: list[Step]
    memory: list[Tensor | None]
    inputs: list[list[Tensor | int]]
    places: list[int]

    @classmethod
    def of(cls, steps: list[Step], memory: list[Tensor | None], at_hand: Callable) -> Program:
        position = {step.value: i for i, step in enumerate(steps)}
        inputs = [[position[p] if p in position else at_hand(p) for p in step.parents] for step in steps]
        places, read = [*range(len(steps))], Counter(i for some in inputs for i in some if type(i) is int)
        for i in reversed(places):  # into the memory of its only reader, if that can write over its input
            v, first = steps[i].value, inputs[i][0]
            if steps[i].recipe.reuse and type(first) is int and read[first] == 1 and memory[first] is None:
                source = steps[first]
                if source.value.view[:3] == v.view[:3] and not isinstance(source.recipe, Part):
                    places[first] = places[i]
        return cls(steps, memory, inputs, places)

    def run(self, images: slice | None) -> None:
        count = None if images is None else images.stop - images.start
        made, memory = [], [t if t is None or images is None else t[images] for t in self.memory]
        for (v, recipe, _), inputs, place in zip(self.steps, self.inputs, self.places, strict=True):
            inputs = [made[t] if type(t) is int else part(t, v, images) for t in inputs]
            out = memory[place]
            if isinstance(recipe, Part):
                made.append(recipe.run(None, *inputs))
                if out is not None:
                    out.copy_(made[-1])
                continue
            if out is None:
                out = memory[place] = v.view.empty(count)
            made.append(recipe.run(out, *inputs))


def merge(values: list[Value]) -> list[Step]:
    """The steps that are left where later ones do the work of earlier ones, on an accelerator."""
    if not passes.has_kernel(values[-1].view.device.type):
        return [Step(v, v.recipe, v.parents) for v in values]
    readers = Counter(p for v in values for p in v.parents)
    steps, gone = [], set()
    for v in reversed(values):
        if v not in gone:
            found = v.recipe.merged(v.parents, lambda p: readers[p] == 1)
            steps.append(Step(v, *(found or (v.recipe, v.parents))))
            stack = [p for p in v.parents if found and p not in found[1]]
            while stack:
                p = stack.pop()
                gone.add(p)
                stack.extend(q for q in p.parents if q not in found[1])
    return steps[::-1]


def slabs(n: int, like: Tensor) -> list[slice]:
    """Slices of the batch; for fake tensors the first alone, which has the memory of any."""
    if like.device.type != "cpu" or n == 0:
        return [slice(0, n)]
    per_slab = max(1, SLAB_BYTES // max(1, like.nbytes // n))
    cut = [slice(i, min(i + per_slab, n)) for i in range(0, n, per_slab)]
    return cut[:1] if isinstance(like, FakeTensor) else cut


def stream_of(t: Tensor):
    """The current stream of the device of ``t``; None on a CPU."""
    return None if t.is_cpu or t.is_meta else torch.accelerator.current_stream(t.device)


def part(t: Tensor, reader: Value, images: slice | None) -> Tensor:
    """Those images of ``t``, or all of ``t`` if it is a vector that all images share."""
    if images is None:
        return t
    alike = t.dim() == len(reader.view.shape) or isinstance(reader.recipe, Part)
    return t[images] if alike and t.shape[0] == reader.view.shape[0] else t
