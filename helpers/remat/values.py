"""Recipes: how a tensor of forward was made, what it costs to recompute it, and what is therefore kept.

A `Value` is one tensor of forward: it knows its recipe and, if the price says so, keeps the tensor. `Table`
finds the value of a tensor and decides what is kept.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from .layouts import View, span

# A recipe of cheap operations may take at most this many passes over a tensor of its result's size: longer
# ones would run again and again where backward has no room to hold intermediate values.
MOST_PASSES = 16
# Recomputed outputs of convolutions are held until their convolution's backward. On the way to one value they
# may take at most this many times the bytes of the largest.
MOST_MADE = 3.0
MOST_STEPS = 256  # to one value: each may be a level of recursion
MOST_VALUES = 64  # of a storage, tried as the base of a view; of a concatenation, asked about one by one
MUCH_SMALLER = 0.75  # of a value's bytes: what may be kept in its place, which others may hold anyway
SMALL = 16  # a factor with fewer values than 1/16 of its product is kept at once
MUCH_LARGER = 4  # times a value: so large a tensor is not held for it alone, unless it saves a convolution
NO_VERSION = -1  # of a value whose tensor may have changed: it cannot be kept any more


class Recipe:
    """How one value is made from others."""

    name = ""  # of the operation, for people
    work = 0.0  # multiplications per value; 0 for one that only passes over its inputs
    passes = 1.0  # over tensors of the result's size, for a recipe without work
    reuse: int | None = None  # which input ``run`` may write its result over
    origin: tuple[int, tuple[int, ...]] | None = None  # id and shape of the weight that it applies
    whole = False  # whether it must see all images at once
    reshapes = False  # whether it takes each image's values in another shape
    joins = False  # whether its result has its parents' values in one tensor; they are often read again
    gives = False  # whether ``run`` needs no ``out``: it gives a tensor of its own, or a view

    def run(self, out: Tensor | None, *inputs: Tensor) -> Tensor:
        """The value from its parents' tensors, of all images or of some; in ``out`` if given."""
        raise NotImplementedError

    def merged(self, parents: tuple[Value, ...], alone: Callable[[Value], bool]):
        """``(recipe, its parents)`` that does this step and some before it in one pass, or None.

        ``alone(v)`` says whether ``v`` is not at hand and no other step reads it.
        """
        return None


class Part(Recipe):
    """A view: some channels, or the same values in another shape, which may be across images (``whole``)."""

    name, passes, gives, reshapes = "view", 0.0, True, True

    def __init__(self, shape, stride, offset: int, whole: bool) -> None:
        self.shape, self.stride, self.offset, self.whole = shape, stride, offset, whole

    def run(self, out, whole):
        shape = self.shape if self.whole else (whole.shape[0], *self.shape[1:])
        part = whole.as_strided(shape, self.stride, whole.storage_offset() + self.offset)
        return part if out is None else out.copy_(part)


@dataclass(eq=False)
class Row:
    """What `print(record)` says about one value. Holds no tensor."""

    recipe: str
    origin: tuple[int, tuple[int, ...]] | None
    shape: torch.Size
    nbytes: int
    kept: bool = False
    cost: float = 0.0


class Value:
    """One tensor of forward: ``recipe`` and ``parents`` recompute it, unless it is kept or was made outside.

    ``when`` is how many operations there were when it was made, and ``start`` the number of the one that made
    it, or of the first of those that made its parents.
    """

    name = "given"  # of what made it, if there is no recipe
    kept = None  # the tensor, if it is held from forward to backward; ``version`` is its version then
    snapshot = None  # a copy, taken when something got a way to write to the tensor unseen by autograd
    row = None  # its line in the record
    origin = None  # id and shape of the parameter of the last convolution or norm on the way here
    operation = None  # a weak reference to the one that made it, whose node holds the recipe, if there is one
    first = None  # the number of the first operation whose node needs it, if one does
    read = False  # whether a recipe reads it, or a node that computes from it again
    counted = False  # whether `Table.plain_bytes` has it
    cast = None  # a weak reference to the value of autocast's copy, if there is one for all readers
    private = False  # whether PyTorch's node would not see a write to the tensor, since it saves another
    terms = 0  # bytes of small factors and terms that its recipe holds, back to what a node needs

    def __init__(
        self, t: Tensor, recipe: Recipe | None = None, parents: tuple[Value, ...] = (), when: int = 0
    ) -> None:
        self.view = View.of(t)
        self.version, self.size, self.nbytes, self.live = t._version, t.numel(), t.nbytes, weakref.ref(t)
        if 0 in self.view.stride:  # expanded, as a mask for all channels
            self.nbytes = min(t.nbytes, storage_of(t).nbytes())
        self.recipe, self.parents, self.when, self.start = recipe, parents, when, when - 1
        if recipe is not None:
            self.origin, small = recipe.origin or parents[0].origin, 0
            for parent in parents:
                parent.read = True
                self.start = min(self.start, parent.start)
                if parent.kept is None:
                    self.terms = max(self.terms, parent.terms)
                elif parent.first is None and parent.size * SMALL <= self.size:
                    small += parent.nbytes
            self.terms += small

    def held(self) -> Tensor | None:
        """The kept tensor; a RuntimeError if it was changed after forward."""
        if self.kept is not None and self.kept._version != self.version:
            raise RuntimeError(
                "a tensor that remat keeps for backward was changed by an inplace operation: "
                f"{self.row.recipe} of shape {tuple(self.view.shape)} is at version {self.kept._version}, "
                f"and forward left it at version {self.version}. Change a clone, or change it before remat's "
                "context ends"
            )
        return self.kept


class Table:
    """The values of all tensors that are alive, and the decision of what is kept.

    A tensor is found by its storage, its position there and its version, so a tensor changed in place is
    another value. So is a detached alias: the graph behind it may go first, and with it all that its recipe
    would start from. A value lives as long as a node that holds it or, where there is none, as its tensor.
    """

    def __init__(self, max_cost: float) -> None:
        self.max_cost, self.rows = max_cost, []
        self.next_cost = math.inf  # the lowest price at which a value that was too expensive is not
        self.plain_bytes, self._cast = 0, set()  # ids of the weights whose copies by autocast it includes
        self.parameters: dict[int, list[weakref.ref[Recipe]]] = {}  # by the storage of a weight or bias
        self.operations = []  # weak references, in forward's order
        self.alive = 0  # the number of the first that is not known to be gone
        self.looked_at = 0  # how many the backward passes have looked at, in all
        self.tasks = weakref.WeakValueDictionary()  # of backward passes, by the engine's number
        # Of concatenations: their parts, held until it is decided whether to keep these or the whole.
        self.waiting: weakref.WeakKeyDictionary[Value, list[Tensor]] = weakref.WeakKeyDictionary()
        self._storages: dict[int, tuple[weakref.ref, dict]] = {}  # with weak references to values
        self._living: dict[int, Value] = {}  # those that no node holds, until their tensor is gone
        self._exposed: dict[int, weakref.ref] = {}  # storages

    def clear(self) -> None:
        """The context ends: what the living operations need stays, with its recipes; see `take_over`."""
        operations = [ref() for ref in self.operations[self.alive :]]
        operations = [operation for operation in operations if operation is not None]
        needed = dict.fromkeys(v for operation in operations for v in operation.needed())  # in this order
        self.take_over(needed.keys())
        reached = sources(needed)
        for operation in operations:
            if operation.output not in reached:
                operation.output = None
        for lookup in (self._storages, self._exposed, self._living, self.parameters, self.waiting):
            lookup.clear()

    # Finding --------------------------------------------------------------------------------------------

    def forget(self, t: Tensor) -> list[Value]:
        """All values in the storage of ``t``, which may change now: a tensor there will be another value.

        Recipes copy the parameters that are there.
        """
        key = id(storage_of(t))
        for ref in self.parameters.pop(key, ()):
            if (recipe := ref()) is not None:
                recipe.copy_parameters()
        entry = self._storages.pop(key, None)
        if entry is None:
            return []
        refs = [*entry[1].values()]
        for ref in refs:
            self._living.pop(id(ref()), None)  # one that nothing else holds is gone then
        return [value for ref in refs if (value := ref()) is not None]

    def find(self, t: Tensor) -> Value:
        """The value of ``t``; a new one, without a recipe or as part of another, if ``t`` is unknown."""
        entry = self._storages.get(id(storage_of(t)))
        ref = entry and entry[1].get(key_of(t, t.is_leaf))
        return (ref and ref()) or self.note(t, *self._part(t))

    def follow(self, t: Tensor) -> None:
        """``t`` is a view: note which part of its base it is, while that is known."""
        if id(storage_of(t)) in self._storages:
            self.find(t)

    def _part(self, t: Tensor) -> tuple[Recipe | None, tuple[Value, ...]]:
        """The recipe of ``t``, and its parent, if it is a view of a known value: by image, or of it all."""
        _, values = self._storages.get(id(storage_of(t))) or (None, {})
        for key, ref in itertools.islice(values.items(), MOST_VALUES):
            start, shape, stride, dtype, version, leaf = key
            whole, offset = ref(), t.storage_offset() - start
            if whole is None or isinstance(whole.recipe, Part) or not whole.view.dense or leaf < t.is_leaf:
                continue
            if (version, dtype) != (t._version, t.dtype) or not (t.dim() and shape):
                continue
            outermost = t.stride(0) == stride[0] > span(shape[1:], stride[1:])
            per_image = t.shape[0] == shape[0] and (outermost or shape[0] == 1)
            if (per_image or t.numel() == whole.size) and offset >= 0 and 0 not in t.stride():
                first = 1 if per_image else 0
                if offset + span(t.shape[first:], t.stride()[first:]) <= span(shape[first:], stride[first:]):
                    return Part(t.shape, t.stride(), offset, not per_image), (whole,)
        return None, ()

    def note(
        self, t: Tensor, recipe: Recipe | None, parents: tuple[Value, ...], operation=None, in_function=False
    ) -> Value:
        """``t`` was made by this recipe, which lives as long as the operation's node, or else as ``t``.

        Without a recipe, of an operation that cannot run again, the record still tells what made it. What an
        autograd.Function is about to return (``in_function``) will have a graph behind it.
        """
        value, storage = Value(t, recipe, parents, len(self.operations)), storage_of(t)
        storages, key = self._storages, id(storage)
        entry = storages.get(key)
        if entry is None:
            entry = storages[key] = weakref.ref(storage, lambda _: storages.pop(key, None)), {}
        entry[1][key_of(t, not in_function and t.is_leaf)] = weakref.ref(value)
        if operation is None:
            living, number = self._living, id(value)
            living[number], value.live = value, weakref.ref(t, lambda _: living.pop(number, None))
        else:
            operation.output, value.operation = value, weakref.ref(operation)
            operation.source, value.start = weakref.ref(parents[0]), operation.number
            if recipe is None:
                value.parents, value.name = (), operation.name
                value.origin = operation.weight and origin_of(operation.weight())
        return value

    def cast(self, t: Tensor, dtype: torch.dtype, recipe: Recipe) -> tuple[Value, Tensor]:
        """Autocast's copy of ``t``, by ``recipe``: one for all readers of a trained leaf, if it is kept."""
        source = self.find(t)
        value = source.cast and source.cast()
        if value is not None and value.kept is not None and value.kept.dtype == dtype:
            return value, value.kept
        a = recipe.run(None, t.detach())
        value = Value(a, recipe, (source,), len(self.operations))
        if t.is_leaf and t.requires_grad:
            source.cast = weakref.ref(value)
        return value, a

    # Deciding -------------------------------------------------------------------------------------------

    def need(self, value: Value, t: Tensor, copied: bool = False) -> Value:
        """A node needs ``value``, whose tensor is ``t``: decide what to keep for it.

        Where PyTorch's node would save a copy (``copied``), so do we, if ``t`` is part of a larger tensor, or
        once something may write to it.
        """
        if value.first is not None:
            return value
        value.first, value.private, value.terms = len(self.operations), copied, 0
        self.add_row(value)
        if value.kept is None:
            if not self.affordable(value):
                self.keep_least(value, t, copied)
            if self.waiting:  # to clear nothing would take longer
                self.waiting.clear()
        return value

    def add_row(self, value: Value) -> None:
        """The value's line in the record, unless it has one."""
        if value.row is None:
            name = value.name if value.recipe is None else value.recipe.name
            value.row = Row(name, value.origin, value.view.shape, value.nbytes)
            self.rows.append(value.row)

    def affordable(self, value: Value, also: Collection[Value] = (), limited: bool = True) -> bool:
        """Whether recomputing ``value`` from what is kept (and ``also``) costs at most `max_cost` each.

        Not ``limited``: whatever the memory of recomputed convolutions' outputs on the way.
        """
        if value.recipe is None:
            return False
        margin, most_passes, most_made = 17 / 16, MOST_PASSES, MOST_MADE  # a little for squeeze-and-excite
        if value.recipe.work:  # leave some for the values computed from it
            margin, most_passes, most_made = 1.0, MOST_PASSES - 4, MOST_MADE - 0.5
        # Parts of a value share what it takes to recompute it, and it is there until the last is used.
        size = value.parents[0].size if isinstance(value.recipe, Part) else value.size
        work = passes = made = source = 0.0
        largest, path, visited = value.nbytes, [value], {value}
        for v in path:  # it grows
            if (recipe := v.recipe) is None:
                return False
            work, passes = work + recipe.work * v.size, passes + recipe.passes * v.size
            if passes > most_passes * size or len(path) > MOST_STEPS:
                return False
            if recipe.work:
                made, largest = made + v.nbytes, max(largest, v.nbytes)
            for p in v.parents:
                if p.kept is not None:
                    source = max(source, p.nbytes)
                elif p not in visited and p not in also:
                    visited.add(p)
                    path.append(p)
        if limited and made > most_made * largest:
            return False
        if size == value.size and source > (SMALL if work else MUCH_LARGER) * value.nbytes:
            return False  # a large tensor would be held for a small value, after its own node is gone
        cost = work / max(size, 1)
        if work > self.max_cost * margin * size:
            self.next_cost = min(self.next_cost, cost / margin)
            return False
        if value.row is not None:
            value.row.cost = cost
        return True

    def keep_least(self, value: Value, t: Tensor, copied: bool) -> None:
        """Keep ``value``, or the values that it is computed from, if these are smaller and still alive.

        Much smaller: an operation that remat does not know may hold ``value`` anyway. But the parts of a
        concatenation, even one that it is a mere copy of, as in a dense block's first layer, are read again.
        """
        # If the price would do, but not the limit, convolutions may lead to a small value.
        through = self.max_cost > 0 and self.affordable(value, limited=False)
        parts = None if value.recipe is None else self.parts(value, {}, through)
        if parts and value.recipe.joins:  # of a list of features some need not be kept: they are affordable
            for part in sorted(parts, key=lambda part: part.nbytes, reverse=True)[:MOST_VALUES]:
                if self.affordable(part) and self.affordable(value, parts.keys() - {part}):
                    del parts[part]
        if parts:
            most = value.nbytes + (len(parts) == 1) if value.recipe.joins else MUCH_SMALLER * value.nbytes
            held = {id(storage := storage_of(t)): storage.nbytes() for t in parts.values()}  # whole ones
            if sum(held.values()) < most and self.affordable(value, parts):
                for part, tensor in parts.items():
                    self.keep_whole(part, tensor)
                return
        if copied and storage_of(t).nbytes() > t.nbytes:
            self.keep(value, t.detach().clone())  # with the strides that its views count on
        else:
            self.keep_whole(value, t)

    def keep_whole(self, value: Value, t: Tensor) -> None:
        """Keep ``value``, or what it is a part of: ``t`` holds the memory of the whole in any case."""
        if isinstance(value.recipe, Part):
            at, (value,) = t.storage_offset() - value.recipe.offset, value.parents
            t = t.detach().as_strided(value.view.shape, value.view.stride, at)
        self.keep(value, t)

    def parts(self, value: Value, known: dict, through: bool, depth: int = 8) -> dict[Value, Tensor] | None:
        """The smallest set of live values from which ``value`` can be computed; None if there is none.

        ``known`` holds what was found on other paths. Looks at most ``depth`` operations up, and ``through``
        convolutions whose output is gone.
        """
        found: dict[Value, Tensor] = {}
        for v in value.parents:
            if v.kept is None and v not in known:
                t = v.live()
                # To keep a small part of a large tensor would hold much more than its own bytes.
                usable = t is not None and t._version == v.version and storage_of(t).nbytes() <= 2 * t.nbytes
                known[v] = mine = {v: t} if usable else None
                if v.recipe is not None and depth and (mine is None if through else not v.recipe.work):
                    below = self.parts(v, known, through, depth - 1)
                    if below is not None and (mine is None or sum(p.nbytes for p in below) < v.nbytes):
                        known[v] = below
            parts = known[v] if v.kept is None else {}
            if parts is None:
                return None
            found.update(parts)
        return found

    def keep(self, value: Value, t: Tensor, shared: bool = False) -> None:
        """Hold ``t`` until backward, as long as a node holds the value.

        ``shared``: with a caller who may use it again, so that the value is also there as long as ``t`` is.
        """
        value.kept, value.version = t.detach(), t._version
        self.add_row(value)
        value.row.kept = True
        value.recipe, value.parents, value.terms = None, (), 0
        if not shared:
            self._living.pop(id(value), None)
        if value.operation and (operation := value.operation()):  # its node outlives those that need it
            operation.output = None

    def take_over(self, needed: Set[Value]) -> None:
        """Keep what is in memory anyway, since nodes that remat does not know hold it, and not its sources.

        That is, those that no other value needs, unless they are much smaller. In forward nobody knew
        that such a node would come. (A view of the tensor may hold it as well.)
        """
        held = {}
        for v in needed:
            t = v.live() if v.kept is None and not v.private else None
            if t is not None:
                t._fix_weakref()  # else PyTorch 2.9 counts Python's reference to what C++ owns as none
                if t._version == v.version and t._use_count() > 1:
                    held[v] = t
        if not held:
            return
        others, gone = needed | sources(needed - held.keys()), set()
        for v, t in held.items():
            whole = v.parents[0] if isinstance(v.recipe, Part) else v
            alone = {p.row for p in sources([v]) - {whole} if p.kept is not None and p not in others}
            if MUCH_LARGER * sum(row.nbytes for row in alone) >= whole.nbytes:
                self.keep_whole(v, t)
                gone |= alone
        self.rows[:] = [row for row in self.rows if row not in gone]

    # What others write ----------------------------------------------------------------------------------

    def before_write(self, t: Tensor) -> None:
        """``t`` is about to be changed in place: copy what is kept there."""
        for value in self.forget(t):
            if value.kept is None:
                value.version = NO_VERSION
            elif value.kept._version == value.version:
                self.keep(value, copy_of(value.kept))

    def expose(self, t: Tensor) -> None:
        """From now on ``t`` may be written to unseen. Nodes see that, as PyTorch's do.

        Recipes must not, nor nodes that compute from it again.
        """
        key, exposed = id(storage := storage_of(t)), self._exposed
        exposed[key] = weakref.ref(storage, lambda _: exposed.pop(key, None))
        for value in self.forget(t):
            needed, now = value.first is not None and value.kept is None, value.live()
            if needed and now is None and isinstance(value.recipe, Part) and not value.private:
                # The view is gone, but PyTorch's node would hold it and see the write: make it again.
                (base,) = value.parents
                base = base.live() if base.kept is None else base.kept
                now = None if base is None else value.recipe.run(None, base)
            if needed and now is not None and now._version == value.version:
                self.keep(value, now)
            if value.kept is None:
                value.version = NO_VERSION
            elif value.kept._version == value.version:
                if value.private:
                    self.keep(value, copy_of(value.kept))
                elif value.read:
                    value.snapshot = copy_of(value.kept)

    def is_safe(self, *tensors: Tensor | None) -> bool:
        """Whether there is no unseen way to write to these: else no recipe may start from them."""
        exposed = self._exposed
        return not exposed or all(t is None or id(storage_of(t)) not in exposed for t in tensors)

    def count_plain(self, value: Value, copied: bool = False) -> None:
        """PyTorch would save this value or, if ``copied``, a copy; of a view, the memory behind it."""
        (value,) = value.parents if isinstance(value.recipe, Part) and not copied else (value,)
        if not value.counted:
            value.counted, self.plain_bytes = True, self.plain_bytes + value.nbytes

    def count_cast(self, weight: Tensor, dtype: torch.dtype) -> None:
        """PyTorch would save autocast's copy of this weight, one for all calls if it is trained."""
        if id(weight) not in self._cast:
            if weight.requires_grad:
                self._cast.add(id(weight))
            self.plain_bytes += weight.numel() * dtype.itemsize


def sources(values: Iterable[Value]) -> set[Value]:
    """These values, and all from which their recipes compute them."""
    found, stack = set(), [*values]
    while stack:
        if (v := stack.pop()) not in found:
            found.add(v)
            stack.extend(v.parents)
    return found


def storage_of(t: Tensor) -> torch.UntypedStorage:
    """Its storage; a context around this one must not take the question for one of the user's."""
    if not torch._C._len_torch_function_stack():
        return t.untyped_storage()
    with torch._C.DisableTorchFunction():
        return t.untyped_storage()


def copy_of(t: Tensor | None) -> Tensor | None:
    """A copy without a graph, but with a version: one made in inference mode would have none."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return copy_of(t)
    return None if t is None else t.detach().clone()


def origin_of(weight: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    """What a record needs of a weight. No weak reference: ``swap_tensors`` refuses a tensor that has one."""
    return None if weight is None else (id(weight), tuple(weight.shape))


def key_of(t: Tensor, leaf: bool) -> tuple:
    """Position, form and version of a tensor within its storage, and whether it has no graph behind it."""
    return t.storage_offset(), t.shape, t.stride(), t.dtype, t._version, leaf
