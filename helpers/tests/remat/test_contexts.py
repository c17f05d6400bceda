"""The context itself, and what it leaves alone: other modes, transforms, hooks, threads."""

import contextlib
import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from helpers import remat
from helpers.predict import Held
from helpers.remat import task
from helpers.tests.remat.examples import Swish
from helpers.tests.remat.support import (
    COSTS,
    X,
    assert_close,
    block,
    check_scenario,
    gradients,
    image,
    leaf,
    mode_stack,
    named,
    network,
    randomised,
)


def test_without_gradients():
    model = network()
    with remat():
        with torch.no_grad():
            a = model(X)
        with torch.inference_mode():
            b = model(X)
        assert a.grad_fn is None and b.is_inference()
        with torch.inference_mode():
            x = X * 1
        out = model(x.clone())
    out.sum().backward()


def test_transforms():
    """torch.func's grad, vmap, jvp and what they are composed to, forward-mode AD."""
    model = network().eval()
    state = {name: p.detach() for name, p in model.named_parameters()}

    def loss(state, x):
        return torch.func.functional_call(model, state, (x,)).square().mean()

    def scenario(context):
        with context():
            grads = torch.func.grad(loss)(state, X)
            per_image = torch.func.vmap(torch.func.grad(loss), (None, 0))(state, X[:, None])
            value, tangent = torch.func.jvp(lambda x: loss(state, x), (X,), (torch.ones_like(X),))
            with torch.autograd.forward_ad.dual_level() as _:
                dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
                out = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent.detach()
        return grads | named(*per_image.values(), value, tangent, out)

    check_scenario(scenario)


def test_traced_inside():
    model = network().eval()
    with remat():
        traced = torch.jit.trace(model, X)
    torch.testing.assert_close(traced(X), model(X))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.relu(F.conv2d(F.pad(x, (1, 1)), w)),
        lambda x, w: F.linear(x, w, w[0]) * w + F.dropout2d(x, 0.5),
        lambda x, w: F.batch_norm(x, w, w) + F.group_norm(x, 1),
        lambda x, w: F.max_pool2d(torch.cat([F.avg_pool2d(x, 2), F.interpolate(w, scale_factor=2)]), 2),
        lambda x, w: x.mul_(w) + F.glu(x) + torch.prelu(x, w),
    ],
    ids="pad linear norms pools products".split(),
)
def test_a_symbolic_trace(call):
    """Of the model alone, without what `remat` asks."""
    wanted = torch.fx.symbolic_trace(call)
    with remat():
        assert torch.fx.symbolic_trace(call).code == wanted.code


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_step_is_traced(mode, monkeypatch):
    """Backward's operators in a graph of their own: of all images, and differentiable as PyTorch's are."""
    monkeypatch.setattr(task, "SLAB_BYTES", 1)
    model = nn.Sequential(block(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)).eval().double()
    state = dict(model.state_dict())

    def gradient(x, state, context=contextlib.nullcontext):
        with context():
            loss = torch.func.functional_call(model, state, (x,)).square().sum()
        return torch.autograd.grad(loss, x)[0]

    for cost in COSTS:
        step = functools.partial(gradient, context=functools.partial(remat, cost))
        traced = make_fx(step, tracing_mode=mode)(leaf(), state)
        torch.testing.assert_close(traced(leaf(), state), gradient(leaf(), state))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled(fullgraph):
    """A compiled model under `remat` runs as it does without."""

    def scenario(context):
        model = network()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        with context():
            out = compiled(X)
        out.square().sum().backward()
        return gradients(model)

    check_scenario(scenario, costs=[0])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_checkpoint(reentrant, inside):
    """A part that is checkpointed, `remat` around it or in it."""

    def scenario(context):
        model, x = network(), leaf()

        def part(h):
            with context() if inside else contextlib.nullcontext():
                return model[1](h)

        with contextlib.nullcontext() if inside else context():
            out = model[2](checkpoint(part, model[0](x), use_reentrant=reentrant))
        out.square().sum().backward()
        return named(x.grad) | gradients(model)

    check_scenario(scenario)


def test_saved_tensor_hooks():
    """They see what PyTorch saves, and nothing of `remat`."""

    def scenario(context):
        model, x, seen = network(), leaf(), []

        def pack(t):
            seen.append(t.numel())
            return t

        with context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            h = model[1](model[0](x))
        with context(), torch.autograd.graph.save_on_cpu():
            out = model[2](h)
        out.square().sum().backward()
        return named(x.grad, torch.tensor(seen, dtype=torch.float64)) | gradients(model)

    check_scenario(scenario)


def test_saved_tensor_hooks_around_backward():
    """A backward that calls forward again saves nothing that the caller could see."""
    norm = randomised(nn.GroupNorm(2, 4).double())

    def refuse(t):
        raise AssertionError("backward has saved a tensor")

    def scenario(context):
        x = leaf(image(2, 4, 6, 5))
        with context():
            out = F.softplus(norm(x * 2))
        with torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t):
            out.backward(image(2, 4, 6, 5))
        return named(x.grad) | gradients(norm)

    check_scenario(scenario)


def test_nested_contexts():
    """The inner price holds inside; the outer one afterwards."""
    model = network()
    with remat() as outer:
        h = model[0](X)
        with remat(max_cost=1e9) as inner:
            h = model[1](h)
        out = model[2](h)
    assert outer.rows and inner.rows
    out.square().sum().backward()
    plain = network()
    plain(X).square().sum().backward()
    assert_close(gradients(model), gradients(plain))


def test_nested_contexts_hold_no_more_than_one():
    """An inner context's look at a tensor is no way to write to it."""
    found = []
    for contexts in ((), (0,), (0, 0), (0, 100)):
        x, held = leaf(), Held()
        with held, contextlib.ExitStack() as outside, contextlib.ExitStack() as inside:
            for cost in contexts[:1]:
                outside.enter_context(remat(cost))
            a = F.silu(x.exp())
            b = F.silu(a)
            for cost in contexts[1:]:
                inside.enter_context(remat(cost))
            out = b.sum() + (a + 1).sum()
            del a, b
        found.append(round(held.held / x.nbytes))
        out.backward()
    assert found == [2, 1, 1, 1]


class Doubles(TorchFunctionMode):
    """Changes what one function computes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is self.function else out


@pytest.mark.parametrize("function", [F.relu, F.batch_norm, torch.conv2d, F.dropout])
def test_modes_of_the_users(function):
    """One around the context sees what it sees without remat, and so does one inside of it."""

    def scenario(context):
        found = {}
        for inside in (False, True):
            model = nn.Sequential(network(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Dropout(0.4)).double()
            torch.manual_seed(0)
            outer, inner = (context(), Doubles(function)) if inside else (Doubles(function), context())
            with outer, inner:
                out = model(X)
            out.square().sum().backward()
            found |= {f"{inside}, {name}": t for name, t in (gradients(model) | {"output": out}).items()}
        return found

    check_scenario(scenario)


def test_a_device_around_the_context():
    with torch.device("cpu"), remat() as record:
        network()(X).sum().backward()
    assert record.rows


def test_left_in_another_order():
    before = mode_stack()
    first, second = remat(), remat(max_cost=64)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert len(mode_stack()) == len(before) + 1
    model = network()
    out = model(X)
    second.__exit__(None, None, None)
    assert mode_stack() == before
    out.sum().backward()
    assert type(model(X).grad_fn).__name__ == "ConvolutionBackward0"


def test_left_in_a_thread_that_has_not_entered():
    """Such as one that closes a suspended generator: an error, and the thread's own modes stay."""
    context, other = remat(), remat(max_cost=64)
    with other:
        before = mode_stack()
        with pytest.raises(RuntimeError, match="empty mode stack"):
            context.__exit__(None, None, None)
        assert mode_stack() == before


def test_one_object_used_again_and_in_itself():
    context = remat()
    for _ in range(2):
        with context, context:
            out = network()(X)
        assert not mode_stack()
        out.sum().backward()


def test_one_object_in_several_threads():
    """Each thread leaves the context that it has entered itself."""
    context, entered, both, left = remat(), threading.Event(), threading.Event(), []

    def first():
        with context:
            entered.set()
            both.wait()
        left.append(not mode_stack())

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    with context:
        both.set()
        thread.join()
    assert left == [True] and not mode_stack()


def test_decorator():
    """On a function, each call is a context of its own; on a generator, between its values there is none."""

    @remat(max_cost=64)
    def forward(model, x):
        """Documented."""
        assert len(mode_stack()) == 1
        return model(x)

    @remat()
    def forwards(model):
        for i in range(2):
            assert len(mode_stack()) == 1
            yield model(X + i)

    model = network()
    forward(model, X).square().sum().backward()
    assert forward.__name__ == "forward" and forward.__doc__ == "Documented."
    for out in forwards(model):
        assert not mode_stack()
        out.sum().backward()
    assert not mode_stack()

    wanted = network()
    wanted(X).square().sum().backward()
    for i in range(2):
        wanted(X + i).sum().backward()
    assert_close(gradients(model), gradients(wanted))


def test_tensors_that_are_not_ordinary():
    """Subclasses, complex numbers, empty batches and a function of the user's that writes in place."""

    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, *args, **kwargs):
            asked.append(function)
            return super().__torch_function__(function, *args, **kwargs)

    def scenario(context):
        model, empty, conv = network(), network().eval(), nn.Conv2d(3, 2, 3).to(torch.complex128)
        asked.clear()
        with context():
            out = model(X.as_subclass(Mine))
            assert isinstance(out, Mine)
            calls.append([*asked])
            none = empty(X[:0])
            numbers = conv(X.to(torch.complex128))
            swish = Swish.apply(model[0](X))
        out.as_subclass(torch.Tensor).square().sum().backward()
        (none.sum() + numbers.abs().sum() + swish.sum()).backward()
        found = {n: g.as_subclass(torch.Tensor) for n, g in gradients(model).items()}
        return found | named(torch.view_as_real(conv.weight.grad), empty[0][0].weight.grad)

    asked, calls = [], []
    check_scenario(scenario)
    assert calls[0] and all(other == calls[0] for other in calls)  # nothing else is asked of a subclass


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    """They have no shape."""

    def scenario(context):
        linear, rows = nn.Linear(4, 4).double(), [leaf(image(2, 4)), leaf(image(3, 4))]
        with context():
            nested = torch.nested.as_nested_tensor(rows, layout=layout)
            out = F.relu(linear(nested)) * 2.0
            parts = out.unbind()
        sum(part.square().sum() for part in parts).backward()
        return named(*parts, linear.weight.grad, *(row.grad for row in rows))

    check_scenario(scenario)


def test_backward_in_inference_mode():
    """It makes no graph, but the norms that backward calls again need one."""

    def scenario(context):
        model = nn.Sequential(network(), nn.GroupNorm(2, 4), nn.PReLU()).double()
        with context():
            loss = model(X).square().sum()
        with torch.inference_mode():
            loss.backward()
        return gradients(model)

    check_scenario(scenario)


def test_aliases_and_detached_tensors():
    def scenario(context):
        model = network()
        with context():
            h = model[0](X)
            d = h.detach().requires_grad_()
            out = model[1](d) * model[1](h.view_as(h)) + torch.ops.aten.alias(h)
        out.square().sum().backward()
        return named(d.grad) | gradients(model)

    check_scenario(scenario)
