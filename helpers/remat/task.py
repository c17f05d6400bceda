"""Recomputing values in one backward pass, from what is kept."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import passes
from .values import Part, Table, Value

# On a CPU, consecutive passes work on a few images at a time, which stay in the core's cache.
SLAB_BYTES = 1 << 22
WHEN = operator.attrgetter("when")


class Task:
    """Recomputes values in one backward pass.

    A value that several nodes need is held from its first use to its last if there is room for it, that is,
    if holding it does not raise the peak that is coming anyway. A convolution's output is always held.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.holding: dict[Value, tuple[Tensor, object]] = {}  # with the streams that computed them
        self.retained = torch._C._autograd._get_current_graph_task_keep_graph()  # for another pass
        self.twice = torch.is_grad_enabled()  # whether the gradients may be differentiated again
        self.modes = torch._C._is_any_autocast_enabled() or torch.is_inference_mode_enabled()
        self.slack = slack(table, self.retained)
        self.now = 0  # the number of the operation that runs

    def room(self, value: Value | None = None) -> int:
        """Bytes that may be held, now or until ``value``'s last use, without raising the peak to come."""
        first = self.now if value is None else value.first
        return min(self.slack[first : self.now + 1], default=0)

    def fits(self, value: Value) -> bool:
        """Whether ``value`` has a use to come, and may be held until then."""
        return value.first is not None and value.first < self.now and self.room(value) >= value.nbytes

    def end(self) -> None:
        """The backward pass is over; some of its nodes may not have run."""
        self.holding.clear()

    def hold(self, value: Value, t: Tensor) -> None:
        self.holding[value] = t, stream_of(t)
        if not value.recipe.work:  # a convolution's output is held in any case
            for i in range(value.first, min(self.now + 1, len(self.slack))):
                self.slack[i] -= value.nbytes

    def get(self, value: Value) -> tuple[Tensor, bool]:
        """The tensor of a value for a node that needs it, and whether the node may overwrite it."""
        t = value.held()
        if t is not None:
            return t, False
        if isinstance(value.recipe, Part) and (whole := self.at_hand(value.parents[0])) is not None:
            return value.recipe.run(None, whole), False
        t = self.start(value)
        if self.now == value.first:  # backward runs from the last operation to the first
            self.holding.pop(value, None)
        return t, value not in self.holding

    def start(self, value: Value) -> Tensor:
        """The tensor from which a pass starts; held if it cost a convolution or others will need it."""
        t = self.at_hand(value)
        if t is None:
            t = self.recompute(value)
            if value.recipe.work or self.fits(value):
                self.hold(value, t)
        return t

    def at_hand(self, value: Value) -> Tensor | None:
        """The tensor for a recipe, if it need not be recomputed."""
        if value.snapshot is not None:
            return value.snapshot
        if value.kept is not None:
            return value.held()
        t, stream = self.holding.get(value) or (None, None)
        # If another stream computed it, this one would have to wait.
        return t if t is None or stream == stream_of(t) else None

    def recompute(self, value: Value) -> Tensor:
        """Recompute ``value``, and before it the convolutions on its way, each once."""
        while True:
            v = value
            while (program := Program(self, v)).missing:
                v = program.missing[-1]
            if v.recipe.work:
                t = v.recipe.run(None, *[p.view.with_gaps(self.start(p)) for p in v.parents])
                t = v.view.like(t)  # its views have forward's strides
            else:
                t = program.run()
            if v is value:
                return t
            self.hold(v, t)


class Program:
    """The cheap steps to a value, each after those it needs. On a CPU they run on a few images at a time."""

    def __init__(self, task: Task, value: Value) -> None:
        self.task, self.last = task, value
        self.given: dict[Value, Tensor] = {}  # what they start from
        self.steps = {}  # for each value to compute, its recipe and the values that this reads
        self.read: dict[Value, int] = {}  # how many steps read a value
        self.missing: list[Value] = []  # convolutions on the way that must run first
        for v in value.parents if value.recipe.work else (value,):
            self.add(v)

    def add(self, v: Value) -> None:
        """One more step reads ``v``: add the steps to it, unless it is at hand."""
        if v in self.read:
            self.read[v] += 1
            return
        self.read[v], t = 1, self.task.at_hand(v)
        if t is not None:
            self.given[v] = v.view.with_gaps(t)
        elif v.recipe.work:
            self.missing.append(v)
        else:
            # In forward's order: of a chain of sums only one is in memory, next to what is added to it.
            for p in sorted(v.parents, key=WHEN) if len(v.parents) > 1 else v.parents:
                self.add(p)
            self.steps[v] = v.recipe, v.parents

    def run(self) -> Tensor:
        """The value; on the way, other steps' results are written out that a node needs, if there is room."""
        last, steps, task = self.last, self.steps, self.task
        if passes.has_kernel(last.view.device):
            self.merge()
        result = last.view.empty()
        memory, places = {last: result}, {}  # for whole results; a step's only reader, whose memory it takes
        self.last_reader = {p: v for v, (_, parents) in steps.items() for p in parents}
        for v in steps:
            if v is not last and not isinstance(v.recipe, Part) and task.fits(v):
                memory[v] = v.view.empty()
                task.hold(v, memory[v])
        for v, (recipe, parents) in reversed(steps.items()):
            p = None if recipe.reuse is None else parents[recipe.reuse]
            if p in steps and self.read[p] == 1 and p not in memory:
                if p.view[:3] == v.view[:3] and not isinstance(p.recipe, Part):
                    places[p] = places.get(v, v)
        images = [] if self.whole() else slabs(result)
        if not images or images[0].stop == len(result):
            if not isinstance(last.recipe, Part):
                del memory[last], result  # a step may give its own
            return self.run_some(memory, places, None)
        tensors = {v: t for v, t in (self.given | memory).items() if t.shape[:1] == result.shape[:1]}
        for slab in images:
            self.run_some({v: t[slab] for v, t in tensors.items()}, places, slab.stop - slab.start)
        return result

    def whole(self) -> bool:
        """Whether all images must be computed at once."""
        return any(
            recipe.whole or any(p in self.steps and not by_image(p, v) for p in parents)
            for v, (recipe, parents) in self.steps.items()
        )

    def run_some(self, tensors: dict, places: dict, images: int | None) -> Tensor:
        """The value, of all images or of as many.

        By value, ``tensors`` has what is given and memory for results; ``places`` whose memory a step takes.
        """
        made = {}
        for v, (recipe, parents) in self.steps.items():
            place = places.get(v, v)
            out = tensors.pop(place, None)
            if out is None and not recipe.gives:
                out = v.view.empty(images)
            inputs = [
                made[p] if p in made else tensors[p] if p in tensors and by_image(p, v) else self.given[p]
                for p in parents
            ]
            made[v] = recipe.run(out, *inputs)
            if out is None and not isinstance(recipe, Part):
                made[v] = v.view.like(made[v])
            if place is not v:
                tensors[place] = made[v]
            for p in parents:
                if self.last_reader[p] is v:  # nothing reads it any more
                    made.pop(p, None)
            del out, inputs
        return made[self.last]

    def merge(self) -> None:
        """On an accelerator, let later steps do the work of earlier ones that nothing else reads."""
        for v in reversed([*self.steps]):
            recipe, parents = self.steps[v]
            if not self.read[v]:
                del self.steps[v]
            elif merged := recipe.merged(parents, lambda p: p in self.steps and self.read[p] == 1):
                self.steps[v] = merged
                for p in merged[1]:
                    self.add(p)
            else:
                continue
            for p in parents:
                self.read[p] -= 1


def slack(table: Table, retained: bool) -> list[int]:
    """For each operation, the bytes that may be held in its backward without raising the peak to come.

    That peak is the one of a backward that holds only what it must. Every gradient of a weight adds to the
    level; every kept value leaves it with its operation, unless the graph is retained. The output of a
    convolution to recompute comes with the first operation whose backward leads to it. A value's gradient
    comes with the first that reads it, and leaves with the operation that made it.
    """
    while table.alive < len(table.operations) and table.operations[table.alive]() is None:
        table.alive += 1  # of steps before this one, in a long context
    gone = table.alive
    table.looked_at += len(table.operations) - gone
    if table.looked_at > 10_000 + 32 * len(table.operations):  # in many small passes: there is no room
        return []
    operations = [None] * gone + [ref() for ref in table.operations[gone:]]
    change, visited = [0] * (len(operations) + 1), set()  # of the level, before each operation's backward
    level, gradients = 0, {}  # bytes; of gradients, by the operation whose backward takes them
    tensors, everything = [0] * len(operations), [0] * len(operations)  # how high each backward rises
    for i in reversed(range(gone, len(operations))):
        operation = operations[i]
        stack = [] if operation is None else [*operation.needed()]
        unkept, convolutions = [v for v in stack if v.kept is None], []
        while stack:
            v = stack.pop()
            if v not in visited:
                visited.add(v)
                stack.extend(v.parents)
                if v.kept is not None:
                    change[v.when - 1] -= 0 if retained else v.nbytes
                elif v.recipe is not None and v.recipe.work:
                    convolutions.append(v)
        level += change[i] - gradients.pop(i, 0)
        tensors[i] = everything[i] = level
        if operation is None:
            continue
        high, rise = level, operation.gradient + operation.result  # of each, a gradient or the value
        for v in reversed(convolutions):  # as they are computed
            level += v.nbytes
            change[v.when - 1] -= v.nbytes
            high = max(high, level + operation.result + sum(p.nbytes for p in v.parents if p.kept is None))
        level += operation.grown()
        if operation.beside:
            rise += sum(v.nbytes for v in unkept if not v.recipe.work)
        tensors[i], everything[i] = max(high, level + rise), max(high, level + rise + operation.scratch)
        for taker, nbytes in takers(operation):
            taker, before = min(taker, i - 1), gradients.get(taker, 0)
            if nbytes > before:
                gradients[taker] = nbytes
                level += nbytes - before
    peaks = max(tensors, default=0), max(everything, default=0)
    highs = zip(tensors[gone:], everything[gone:], strict=True)
    found = [min(peaks[0] - t, peaks[1] - e) for t, e in highs]
    return found[:1] * gone + found


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


def slabs(like: Tensor, bytes_each: int = 0) -> list[slice]:
    """Slices of images to compute at once; for fake tensors the first alone, which has the memory of any.

    On the way there are ``bytes_each`` for a value, if that is more than its own.
    """
    images = per_slab = len(like)
    if like.is_cpu and like.nbytes:
        per_slab = max(1, SLAB_BYTES * images // (like.numel() * max(like.itemsize, bytes_each)))
    cut = [slice(i, min(i + per_slab, images)) for i in range(0, images, per_slab or 1)]
    return cut[:1] if isinstance(like, FakeTensor) else cut


def stream_of(t: Tensor):
    """The current stream of the device of ``t``; None on a CPU."""
    return None if t.is_cpu or t.is_meta else torch.accelerator.current_stream(t.device)


def by_image(v: Value, reader: Value) -> bool:
    """Whether some images of ``reader`` need those of ``v`` alone: it is nothing that all images share."""
    shape, wanted = v.view.shape, reader.view.shape
    return shape[:1] == wanted[:1] and (len(shape) == len(wanted) or reader.recipe.reshapes)
