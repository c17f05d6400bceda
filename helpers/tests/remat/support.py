"""What the tests of `remat` share: a step with and without it, the comparison of both, small networks."""

import contextlib
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from helpers import remat
from helpers.predict import Held
from helpers.remat import task, values
from helpers.remat.compare import same

COSTS = (0, 64, 1e9)  # no convolution twice, some, all


class Step(NamedTuple):
    """What one forward and backward leave behind."""

    outputs: list[Tensor]
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


class Net(nn.Module):
    """``forward`` is the function given, which gets the module first; its parts have names."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def under(cost):
    """`remat` with this price; PyTorch alone for None."""
    return contextlib.nullcontext() if cost is None else remat(max_cost=cost)


def randomised(model):
    """Vectors are not ones and zeros, no variance is 1."""
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.dim() <= 1 and t.is_floating_point():
                t.normal_()
        for name, t in model.named_buffers():
            if name.endswith("running_var"):
                t.uniform_(0.5, 2)
    return model


def tensors(out):
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(out, Tensor):
        return [out]
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else ()
    return [t for part in parts for t in tensors(part)]


def step(make, inputs, cost, dtype=torch.float64, layout=torch.contiguous_format, autocast=None):
    """A forward under `remat` and a backward from random gradients, on copies of model and inputs."""
    torch.manual_seed(0)
    model = randomised(make()).to(dtype=dtype, memory_format=layout)
    xs = [x.to(dtype, copy=True).requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    xs = [
        x.detach().to(memory_format=layout).requires_grad_() if isinstance(x, Tensor) and x.dim() == 4 else x
        for x in xs
    ]
    torch.manual_seed(1)
    with torch.autocast("cpu", autocast, enabled=autocast is not None), under(cost):
        outputs = tensors(model(*xs))
    torch.manual_seed(2)
    differentiable = [t for t in outputs if t.requires_grad]
    torch.autograd.backward(differentiable, [torch.randn(t.shape).to(t) for t in differentiable])
    gradients = {f"input {i}": x.grad for i, x in enumerate(xs) if isinstance(x, Tensor)}
    gradients |= {name: p.grad for name, p in model.named_parameters()}
    return Step(outputs, dict(model.named_buffers()), gradients)


def assert_same_forward(found, wanted):
    for f, w in zip(found.outputs, wanted.outputs, strict=True):
        assert torch.equal(f, w) and f.dtype == w.dtype and f.stride() == w.stride()
        assert f.requires_grad == w.requires_grad and not vars(f)
    for name, buffer in wanted.buffers.items():
        assert torch.equal(found.buffers[name], buffer), name


def assert_close(found, wanted, message=""):
    """Gradients by name, in float64. What is 0 but for rounding is measured by the others."""
    scale = max((w.abs().max().item() for w in wanted.values() if w is not None and w.numel()), default=0.0)
    for name, w in wanted.items():
        assert (found[name] is None) == (w is None), f"{message} {name}"
        if w is not None:
            torch.testing.assert_close(
                found[name], w, rtol=1e-9, atol=1e-10 * scale, msg=lambda m, n=name: f"{message} {n}: {m}"
            )


def check(make, *inputs, costs=COSTS, **how):
    """Forward, buffers and gradients in float64 are PyTorch's, at each price."""
    wanted = step(make, inputs, None, **how)
    for cost in costs:
        found = step(make, inputs, cost, **how)
        assert_same_forward(found, wanted)
        assert_close(found.gradients, wanted.gradients, f"max_cost {cost},")


def image(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def block(c_in=3, c_out=8, activation=nn.ReLU, **options):
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, **{"padding": 1, "bias": False, **options}),
        nn.BatchNorm2d(c_out),
        activation(),
    )


X = image(4, 3, 10, 9)


def frozen(module):
    return module.requires_grad_(False)


class Recorder:
    """Compares every tensor that backward recomputes with the one that forward made, bit for bit."""

    def __init__(self, monkeypatch):
        self.recomputed, self.different = set(), set()  # what made them, shapes and dtypes
        made, create = weakref.WeakKeyDictionary(), values.Value.__init__

        def noted(value, t, *args, **kwargs):
            create(value, t, *args, **kwargs)
            with torch._C.DisableTorchFunction():
                made[value] = t.detach().clone()

        def watched(method):
            def watch(task, value):
                recipe, found = value.recipe, method(task, value)
                if recipe is not None:
                    t, wanted = tensors(found)[0], made[value]
                    what = recipe.name, tuple(t.shape), t.dtype
                    self.recomputed.add(what)
                    if not same(t, wanted):
                        self.different.add(what)
                return found

            return watch

        monkeypatch.setattr(values.Value, "__init__", noted)
        for name in ("get", "start"):  # for nodes, and for recipes
            monkeypatch.setattr(task.Task, name, watched(getattr(task.Task, name)))


def counted_forward(model, x, cost):
    """What the model returns, and the count of the bytes that it adds."""
    held = Held()
    held.ignore(x, *model.parameters(), *model.buffers())
    with held, under(cost):
        return model(x), held


def held_plainly_and_under_remat(model, x, cost=0):
    """Bytes at the end of forward, without what the model returns: of plain PyTorch, and at this price."""
    pairs = [counted_forward(model, x, cost) for cost in (None, cost)]
    return [held.held - out.nbytes for out, held in pairs]


BLOCK = 4 * 8 * 32 * 32 * 4  # bytes of a tensor of a block


def network():
    torch.manual_seed(0)
    return randomised(nn.Sequential(block(), block(8, 8), nn.Conv2d(8, 4, 1)).double())


def leaf(x=X):
    return x.clone().requires_grad_()


def gradients(model):
    return {name: None if p.grad is None else p.grad.detach() for name, p in model.named_parameters()}


def check_scenario(scenario, costs=COSTS):
    """``scenario(context)`` finds tensors by name: the same, whether the context does nothing or is remat's.

    ``context()`` makes a new one.
    """
    torch.manual_seed(0)
    wanted = scenario(contextlib.nullcontext)
    for cost in costs:
        torch.manual_seed(0)
        assert_close(scenario(lambda: remat(max_cost=cost)), wanted, f"max_cost {cost},")  # noqa: B023


def named(*tensors):
    return {str(i): t for i, t in enumerate(tensors)}


def mode_stack():
    return torch.overrides._get_current_function_mode_stack()
