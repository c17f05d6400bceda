"""Recomputing values in one backward pass, from what is kept."""

from __future__ import annotations

from collections import Counter
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
        t, stream = self.holding.get(value, (None, None))
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
                t = self.passes(steps, v)
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

    def passes(self, steps: list[Value], last: Value) -> Tensor:
        """Run cheap steps up to the last; on a CPU all of them on a few images at a time."""
        t = self.at_hand(last)
        if t is not None:
            return t
        merged = merge(steps)
        steps = [v for v in steps if id(v) in merged]
        whole = {id(last): last.view.empty()}
        for v in steps[:-1]:  # write out what another node will need, if there is room
            if v.needs and self.fits(v) and not isinstance(v.recipe, Part):
                whole[id(v)] = v.view.empty()
                self.hold(v, whole[id(v)])
        given = {id(p): self.at_hand(p) for v in steps for p in merged[id(v)][1] if id(p) not in merged}
        program = Program(steps, merged, whole, given, places_of(steps, merged, whole))
        result = whole[id(last)]
        n = result.shape[0] if result.dim() else 1
        one = any(v.recipe.whole for v in steps)
        for images in [slice(0, n)] if one else slabs(n, result):
            program.run(None if images == slice(0, n) else images)
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
    tensors, everything = [], []  # how high each operation's backward rises, the last one's first
    for i, operation in reversed([*enumerate(operations)]):
        level += change[i] - gradients.pop(i, 0)
        if operation is None:
            tensors.append(level)
            everything.append(level)
            continue
        high, both = level, operation.gradient + operation.result  # of each, a gradient or the value
        for v in reversed(convolutions_before(operation.needed(), seen)):  # as they are computed
            level += v.nbytes
            change[v.when - 1] -= v.nbytes
            high = max(high, level + operation.result + sum(p.nbytes for p in v.parents if p.kept is None))
        level += operation.grown()
        values = sum(v.nbytes for v in operation.needed() if v.kept is None and not v.recipe.price)
        beside = level + values * operation.beside
        tensors.append(max(high, beside + both))
        everything.append(max(high, beside + both + operation.scratch))
        for taker, nbytes in takers(operation):
            taker, before = min(taker, i - 1), gradients.get(taker, 0)
            gradients[taker] = max(before, nbytes)
            level += gradients[taker] - before
    pairs = zip(reversed(tensors), reversed(everything), strict=True)
    return [min(max(tensors) - t, max(everything) - e) for t, e in pairs]


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


def convolutions_before(values: tuple[Value, ...], seen: set[Value]) -> list[Value]:
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


class Program(NamedTuple):
    """Steps, each after those that it needs, to run on all images at once or on some of them.

    Attributes:
        merged: the recipe and the parents of each step, which may stand for some steps before it too.
        whole: memory for all images of the steps whose results are wanted.
        given: the tensors that the steps start from.
        places: for each step, the step in whose memory it is computed.
    """

    steps: list[Value]
    merged: dict[int, tuple[Recipe, tuple[Value, ...]]]
    whole: dict[int, Tensor]
    given: dict[int, Tensor]
    places: dict[int, int]

    def run(self, images: slice | None) -> None:
        made: dict[int, Tensor] = {}
        room: dict[int, Tensor] = {}
        for v in self.steps:
            key, place, inputs = id(v), self.places[id(v)], []
            recipe, parents = self.merged[key]
            for p in parents:
                t = made.get(id(p))
                inputs.append(part(self.given[id(p)], v, images) if t is None else t)
            out = room.get(place)
            if out is None and place in self.whole:
                out = room[place] = part(self.whole[place], v, images)
            if isinstance(v.recipe, Part):
                made[key] = v.recipe.run(None, *inputs)
                if out is not None:
                    out.copy_(made[key])
                continue
            if out is None:
                out = room[place] = v.view.empty(None if images is None else images.stop - images.start)
            made[key] = recipe.run(out, *inputs)


def merge(steps: list[Value]) -> dict[int, tuple[Recipe, tuple[Value, ...]]]:
    """Recipe and parents of each step that is left where later ones do the work of earlier ones."""
    if not passes.has_kernel(steps[-1].view.device.type):
        return {id(v): (v.recipe, v.parents) for v in steps}
    readers = readers_of(v.parents for v in steps)
    merged, gone = {}, set()
    for v in reversed(steps):
        if id(v) not in gone:
            found = v.recipe.merged(v.parents, lambda p: readers.get(id(p)) == 1)
            merged[id(v)] = found or (v.recipe, v.parents)
            stack = [p for p in v.parents if found and p not in found[1]]
            while stack:
                p = stack.pop()
                gone.add(id(p))
                stack.extend(q for q in p.parents if q not in found[1])
    return merged


def readers_of(parents) -> dict[int, int]:
    """How often each value is read."""
    return Counter(id(p) for some in parents for p in some)


def slabs(n: int, like: Tensor) -> list[slice]:
    """Slices of the batch; for fake tensors the first alone, which has the memory of any."""
    if like.device.type != "cpu" or n == 0:
        return [slice(0, n)]
    per_slab = max(1, SLAB_BYTES // max(1, like.nbytes // n))
    cut = [slice(i, min(i + per_slab, n)) for i in range(0, n, per_slab)]
    return cut[:1] if isinstance(like, FakeTensor) else cut


def places_of(steps: list[Value], merged: dict, whole: dict[int, Tensor]) -> dict[int, int]:
    """For each step, the id of the step in whose memory it is computed: itself, or its only reader."""
    readers = readers_of(merged[id(v)][1] for v in steps)
    places = {id(v): id(v) for v in steps}
    for v in reversed(steps):
        recipe, (first, *_) = merged[id(v)]
        if recipe.reuse and id(first) in places and id(first) not in whole and readers[id(first)] == 1:
            if first.view[:3] == v.view[:3] and not isinstance(first.recipe, Part):
                places[id(first)] = places[id(v)]
    return places


def stream_of(t: Tensor):
    """The current stream of the device of ``t``; None on a CPU."""
    return None if t.is_cpu or t.is_meta else torch.accelerator.current_stream(t.device)


def part(t: Tensor, reader: Value, images: slice | None) -> Tensor:
    """Those images of ``t``, or all of ``t`` if it is a vector that all images share."""
    if images is None:
        return t
    alike = t.dim() == len(reader.view.shape) or isinstance(reader.recipe, Part)
    return t[images] if alike and t.shape[0] == reader.view.shape[0] else t
