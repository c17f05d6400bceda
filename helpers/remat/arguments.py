"""What the arguments of a call say: whether remat can serve it, and which operation it is."""

import functools
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from . import operations as ops
from .writes import writes

TENSORS = (Tensor, nn.Parameter, FakeTensor)
OTHER_NORMS = {0, "nuc"}  # one without a gradient, one that takes another algorithm without a graph


class Unfit(Exception):
    """These arguments are not for remat."""


def fit(condition: bool) -> None:
    if not condition:
        raise Unfit


def quiet() -> bool:
    """Whether forward runs in the ordinary way, so that remat's nodes may take part."""
    return (
        torch.is_grad_enabled()
        and torch._C._get_tracing_state() is None
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and forward_ad._current_level < 0
    )


def has_memory(t) -> bool:
    """Whether this is a tensor with a storage and a version."""
    return isinstance(t, Tensor) and t.layout is torch.strided and not (t.is_inference() or t.is_nested)


def ordinary(t) -> bool:
    """Whether this is a plain PyTorch tensor, of no subclass, with a storage and a version."""
    return type(t) in TENSORS and has_memory(t)


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary dense floating-point tensors (or None)."""
    for t in tensors:  # a generator would take twice as long
        # Negative: the imaginary part of a conjugate, other values in the same memory.
        if t is not None and not (ordinary(t) and t.is_floating_point() and not t.is_neg()):
            return False
    return True


def is_mask(t) -> bool:
    """Whether this is an ordinary tensor of bools or whole numbers."""
    return ordinary(t) and not (t.is_floating_point() or t.is_complex())


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether PyTorch would make a node."""
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return False


def fixed(v):
    """An argument that the caller cannot change any more, of a list a copy; Unfit if it has tensors."""
    fit(not (isinstance(v, (list, tuple)) and any(isinstance(n, Tensor) for n in v)))
    return list(v) if isinstance(v, list) else v


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """The dtype of the autocast in which a call with ``t`` runs, if any."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = t.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def functions(names: str) -> list[Callable]:
    """PyTorch's functions and methods with these names."""
    found = [getattr(owner, name, None) for name in names.split() for owner in (torch, Tensor, F)]
    return [function for function in found if callable(function)]


WITHOUT_NUMBERS = ("relu", "sigmoid", "tanh", "silu", "mish", "hardswish", "hardsigmoid")
# How an activation's kind follows from the arguments behind its input.
KINDS: dict[str, Callable[..., ops.Kind]] = {
    **{name: functools.partial(ops.Kind, name, ()) for name in WITHOUT_NUMBERS},
    "relu6": lambda: ops.Kind("hardtanh", (0.0, 6.0)),
    "hardtanh": lambda min_val=-1.0, max_val=1.0: ops.Kind("hardtanh", (min_val, max_val)),
    "leaky_relu": lambda negative_slope=0.01: ops.Kind("leaky_relu", (negative_slope,)),
    "elu": lambda alpha=1.0: ops.Kind("elu", (alpha, 1.0, 1.0)),
    "celu": lambda alpha=1.0: ops.Kind("elu", (alpha, 1.0, 1.0 / alpha)),
    "selu": lambda: ops.Kind("elu", (1.6732632423543772, 1.0507009873554805, 1.0)),
    "gelu": lambda approximate="none": ops.Kind({"none": "gelu", "tanh": "gelu_tanh"}[approximate]),
}
ACTIVATIONS = {function: kind for name, kind in KINDS.items() for function in functions(f"{name} {name}_")}


@functools.lru_cache(maxsize=1024)
def activation_of(function, args: tuple, kwargs: tuple) -> tuple[ops.Kind, bool]:
    """The activation that a call computes, and whether in place."""
    named = dict(kwargs)
    in_place = named.pop("inplace", False)
    fit(not isinstance(in_place, Tensor))  # which may change, but not its hash
    kind = ACTIVATIONS[function](*args, **named)
    # No tensors, which the cache would hold; and of NaN the result does not tell what the input was.
    fit(all(type(n) in (int, float) and n == n for n in kind.numbers))
    return kind, bool(in_place or writes(function))


OPERATIONS = {
    torch.add: "add add_ __add__ __radd__ __iadd__",
    torch.sub: "sub sub_ __sub__ __isub__",
    torch.mul: "mul mul_ __mul__ __rmul__ __imul__",
    torch.div: "div div_ __truediv__ __itruediv__",
    ops.rsub: "rsub __rsub__",
}
ELEMENTWISE = {function: operator for operator, names in OPERATIONS.items() for function in functions(names)}
DROPOUTS = {F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5}  # by channel; dimensions of a batch
PADDINGS = {"reflect": "reflection", "replicate": "replication"}
MAX_POOLS = {getattr(owner, f"max_pool{n}d"): n for n in (1, 2, 3) for owner in (F, torch)}


def is_copied(a: Tensor) -> bool:
    """Whether a linear layer copies its input first: all dimensions but the last do not merge into one."""
    rows = [(n, stride) for n, stride in zip(a.shape[:-1], a.stride(), strict=False) if n > 1]
    return any(outer != n * inner for (_, outer), (n, inner) in pairwise(rows))


def starts_alike(a: Tensor, weight: Tensor) -> bool:
    """Whether a product gives the same in new memory: its last bit depends on the address modulo 64 bytes."""
    return weight.shape[2:].numel() > 1 or a.storage_offset() * a.itemsize % 64 == 0


def is_whole(n) -> bool:
    """Whether this is a number that PyTorch takes for a size."""
    return type(n) is int or (isinstance(n, Tensor) and not (n.dim() or n.dtype == torch.bool))


def numbers_or_none(*values) -> bool:
    return all(v is None or type(v) in (int, float) for v in values)


def per_dimension(v, n: int) -> list[int]:
    """An argument of a convolution or pooling as a list of ``n``."""
    fit(isinstance(v, (int, tuple, list)))
    v = [v] * n if isinstance(v, int) else list(v)
    v = v * n if len(v) == 1 else v
    fit(len(v) == n and all(type(i) is int for i in v))
    return v


def window(input: Tensor, n: int, kernel_size, stride, padding) -> tuple[list[int], ...]:
    """Kernel, stride and padding of a pooling over the last ``n`` dimensions."""
    fit(plain(input) and input.dim() == n + 2 and input.requires_grad and input.numel() > 0)
    fit(n == 2 or autocast_dtype(input) is None)  # a CPU's casts volumes to float32
    sizes = kernel_size, kernel_size if stride is None else stride, padding
    return tuple(per_dimension(v, n) for v in sizes)


def within_images(x: Tensor, *dims) -> bool:
    """Whether ``dims``, numbers or tuples of them, name some dimensions, but not the images'."""
    dims = [d for dim in dims for d in (dim if isinstance(dim, (tuple, list)) else (dim,))]
    return len(dims) > 0 and all(d % x.dim() for d in dims)


def vector_norm_fits(x: Tensor, p=2, dim=None, keepdim=False, *, out=None, dtype=None, ord=2) -> bool:
    """The arguments of torch.norm and of torch.linalg.vector_norm."""
    return dim is not None and within_images(x, dim) and not {p, ord} & OTHER_NORMS


def pool_fits(x: Tensor, output_size) -> bool:
    """Of a pooling to one pixel PyTorch saves nothing."""
    return any(n != 1 for n in (output_size if isinstance(output_size, tuple | list) else [output_size]))
