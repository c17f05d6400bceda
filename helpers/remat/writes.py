"""What a call changes: which tensors, and whether with a new version; and what PyTorch tells no mode."""

import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .values import Table

# After these, writes to the tensor may go unseen by autograd.
EXPOSING = (Tensor.data.__get__, Tensor.data.__set__, Tensor.numpy, Tensor.__array__, Tensor.untyped_storage,
            Tensor.data_ptr, Tensor.storage, Tensor.__dlpack__, Tensor.__cuda_array_interface__.__get__,
            Tensor.unsafe_chunk, Tensor.unsafe_split, torch.unsafe_chunk, torch.unsafe_split)  # fmt: skip
# Arguments that PyTorch 2.14 does not tell a mode, and would ignore.
LOST = {F.l1_loss: "weight", torch.chain_matmul: "out", Tensor.dim_order: "ambiguity_check"}
# The other operators in place arrive as methods whose names end in "_".
IN_PLACE = {"__setitem__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}


def targets(function, args, kwargs) -> list:
    """What a call changes, with a new version."""
    found = [kwargs["out"]] if "out" in kwargs else []
    if writes(function) or kwargs.get("inplace"):
        found += args[:1] or [*kwargs.values()][:1]
    for i, name in schema_writes(function):
        found.append(args[i] if i < len(args) else kwargs.get(name))
    if kwargs.get("max_norm") is not None:  # an embedding's weight
        found.append(args[1])
    return found


@functools.lru_cache(maxsize=4096)
def schema_writes(function) -> frozenset[tuple[int, str]]:
    """For an operator, perhaps the user's own: the arguments that it changes, by its overloads' schemas."""
    several = isinstance(function, torch._ops.OpOverloadPacket)
    overloads = [getattr(function, name) for name in function.overloads()] if several else [function]
    schemas = [schema for o in overloads if (schema := getattr(o, "_schema", None))]
    return frozenset((i, a.name) for s in schemas for i, a in enumerate(s.arguments) if a.is_write)


@functools.lru_cache(maxsize=4096)
def writes(function) -> bool:
    """Whether a function changes its first argument, by its name."""
    name = name_of(function)
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return in_place or name in IN_PLACE


@functools.lru_cache(maxsize=4096)
def unseen_change(function) -> Callable[[Table, Tensor], None] | None:
    """What to do with each tensor before a call after which it may change without a new version."""
    module = getattr(function, "__module__", None) or ""
    if function in EXPOSING or module.startswith("torch.distributed."):  # which may write later
        return Table.expose
    name = name_of(function)
    known = any(part in name for part in ("batch_norm", "instance_norm", "moving_avg"))
    return before_new_statistics if known else None


def before_new_statistics(table: Table, t: Tensor) -> None:
    if t.dim() < 2 and not t.requires_grad:
        table.before_write(t)


def lost_argument(function) -> dict:
    """The argument of a call that now runs, by name, if it is in `LOST` and was given."""
    name, frame = LOST[function], sys._getframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    value = None if frame is None else frame.f_locals.get(name)
    return {} if value is None else {name: value}


def name_of(function) -> str:
    return getattr(function, "__name__", "")
