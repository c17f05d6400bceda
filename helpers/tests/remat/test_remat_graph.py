"""`remat` in autograd's company: hooks, versions, release, threads, other contexts, other processes."""

import contextlib
import copy
import functools
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules._functions import SyncBatchNorm as sync_batch_norm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from helpers import remat
from helpers.predict import Held
from helpers.remat import task
from helpers.tests.remat.test_distributed import needs_gloo, two_processes
from helpers.tests.remat.test_remat import (
    BLOCK,
    COSTS,
    Swish,
    X,
    assert_close,
    block,
    chain,
    image,
    randomised,
    under,
)


def network():
    torch.manual_seed(0)
    return randomised(nn.Sequential(block(), block(8, 8), nn.Conv2d(8, 4, 1)).double())


def leaf(x=X):
    return x.clone().requires_grad_()


def gradients(model):
    return {name: None if p.grad is None else p.grad.detach() for name, p in model.named_parameters()}


def check(scenario, costs=COSTS):
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


# Hooks -------------------------------------------------------------------------------------------


def test_module_hooks():
    """Forward, backward and backward-pre hooks of every module see what they always see."""

    def scenario(context):
        model, x, seen = network(), leaf(), []
        for module in [m for m in model.modules() if not list(m.children())]:
            module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
            module.register_forward_hook(lambda m, args, out: seen.append(out.detach().clone()))
            module.register_full_backward_pre_hook(lambda m, dz: seen.extend(dz))
            module.register_full_backward_hook(lambda m, dx, dz: seen.extend((*dx, *dz)))
        with context():
            out = model(x)
        out.square().sum().backward()
        return named(*seen, x.grad) | gradients(model)

    check(scenario)


def test_a_forward_hook_that_returns_another_tensor():
    def scenario(context):
        model = network()
        model[0][1].register_forward_hook(lambda m, args, out: out * 2)
        model[1][0].register_forward_pre_hook(lambda m, args: (args[0].tanh(),))
        with context():
            out = model(X)
        out.square().sum().backward()
        return gradients(model)

    check(scenario)


def test_tensor_hooks_and_retained_gradients():
    """At every tensor; some change the gradient, some in place."""

    def scenario(context):
        model, x, kept = network(), leaf(), []
        with context():
            h = x
            for i, layer in enumerate([*model[0], *model[1], model[2]]):
                h = layer(h)
                h.register_hook([lambda g: None, lambda g: 2 * g, lambda g: g.mul_(3)][i % 3])
                h.retain_grad()
                kept.append(h)
        h.square().sum().backward()
        return named(x.grad, *(t.grad for t in kept)) | gradients(model)

    check(scenario)


def test_hooks_on_nodes_and_parameters():
    def scenario(context):
        model, seen = network(), []
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        with context():
            h = model[0](X)
            out = model[2](model[1](h))
        h.grad_fn.register_prehook(lambda dz: seen.append(dz[0].clone()))
        out.square().sum().backward()
        return named(*seen)

    check(scenario)


# Which gradients ---------------------------------------------------------------------------------


def test_gradients_of_some_inputs():
    """Of parameters, leaves and tensors between, one after another on the same graph."""

    def scenario(context):
        model, x = network(), leaf()
        with context():
            h = model[0](x)
            k = model[1](h)
            out = model[2](k).square().sum()
        grad = functools.partial(torch.autograd.grad, out, retain_graph=True)
        found = [*grad(x), *grad([h, model[1][0].weight]), *grad([k, h, x]), *grad([model[0][1].weight])]
        out.backward(inputs=[model[1][1].bias, x])
        return named(*found, x.grad) | gradients(model)

    check(scenario)


def test_two_outputs_of_which_one_is_used():
    def scenario(context):
        model, x = network(), leaf()
        with context():
            h = model[0](x)
            model[1](h), (out := model[2](h))
        out.square().sum().backward()
        return named(x.grad) | gradients(model)

    check(scenario)


def test_several_forwards_before_one_backward_and_accumulation():
    def scenario(context):
        model = network()
        with context():
            first, second = model(X), model(2 * X)
        with context():
            third = model(X + 1)
        (first.square().sum() + third.sum()).backward()
        second.square().sum().backward()
        return gradients(model) | dict(model.named_buffers())

    check(scenario)


def test_backward_and_optimizer_inside_the_context():
    def scenario(context):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        with context():
            for i in range(3):
                optimizer.zero_grad()
                model(X + i).square().mean().backward()
                optimizer.step()
        return {n: t.detach() for n, t in model.state_dict().items() if t.is_floating_point()}

    check(scenario)


def test_adversarial_steps():
    """The discriminator steps between the generator's forward and its backward."""

    def scenario(context):
        g, d = network(), randomised(nn.Sequential(block(4, 8), nn.Conv2d(8, 1, 1)).double())
        steps = [torch.optim.SGD(m.parameters(), 0.01) for m in (d, g)]
        for _ in range(2):
            with context():
                fake = g(X)
                loss = d(fake.detach()).mean() - d(X.mean(1, keepdim=True).expand(-1, 4, -1, -1)).mean()
            steps[0].zero_grad()
            loss.backward()
            steps[0].step()
            with context():
                loss = -d(fake).square().mean()
            steps[1].zero_grad()
            loss.backward()
            steps[1].step()
        return {n: p.detach() for m in (g, d) for n, p in m.named_parameters(str(m is g))}

    check(scenario)


def test_batched_gradients():
    """Several gradients at once: right, or an error that says so."""

    def scenario(context):
        model, x = network(), leaf()
        with context():
            out = model(x)
        return named(*torch.autograd.grad(out, x, image(3, *out.shape), is_grads_batched=True))

    try:
        check(scenario)
    except RuntimeError as error:
        assert "is_grads_batched" in str(error)  # noqa: PT017


# Second derivatives ------------------------------------------------------------------------------

LOSSES = {
    "sum": torch.sum,
    "mean": torch.mean,
    "square": lambda out: out.square().sum(),
    "one": lambda out: out[0, 0, 0, 0],
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("wanted", ["input", "parameters", "unused allowed"])
@pytest.mark.parametrize("loss", LOSSES)
def test_differentiated_again_is_an_error(loss, wanted, cost):
    """A sentence, whatever the loss: never other numbers."""
    model, x = network(), leaf()
    with under(cost):
        out = model(x)
    (g,) = torch.autograd.grad(LOSSES[loss](out), x, create_graph=True)
    penalty = (g.flatten(1).norm(dim=1) - 1).square().mean()
    with pytest.raises(RuntimeError, match=".{20}"):
        if wanted == "parameters":
            penalty.backward()
        else:
            torch.autograd.grad(penalty, x, allow_unused=wanted != "input")


@pytest.mark.parametrize("name", ["vhp", "hvp", "jvp", "hessian"])
def test_functions_that_differentiate_twice(name):
    """Right, or an error."""
    model, x = network(), X[:2, :, :4, :4]

    def function(x, cost=None):
        with under(cost):
            return model(x).square().sum()

    v = () if name == "hessian" else (torch.ones_like(x),)
    run = getattr(torch.autograd.functional, name)
    wanted = run(function, x, *v)
    for cost in COSTS:
        try:
            found = run(functools.partial(function, cost=cost), x, *v)
        except RuntimeError as error:
            assert len(str(error)) > 20
            continue
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_first_derivatives_of_create_graph():
    """They are right, and usable as numbers."""

    def scenario(context):
        model, x = network(), leaf()
        with context():
            out = model(x)
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (g.detach().square().mean() * out.square().sum()).backward()
        return named(g.detach()) | gradients(model)

    check(scenario)


# Release -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", COSTS)
def test_second_backward(cost):
    """As always: with ``retain_graph`` it gives the same again, without it is PyTorch's error."""
    model, x = network(), leaf()
    with under(cost):
        out = model(x).square().sum()
    first = torch.autograd.grad(out, x, retain_graph=True)
    second = torch.autograd.grad(out, x, retain_graph=True)
    assert_close(named(*second), named(*first))
    out.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


def test_second_backward_of_a_linear_layer_whose_bias_alone_is_trained():
    """PyTorch's node saves nothing for it, so that it may run again."""
    layer, x = nn.Linear(3, 4).requires_grad_(False), torch.randn(5, 3)
    layer.bias.requires_grad_()
    with remat():
        out = layer(x)
    for times in (1, 2):
        out.backward(torch.ones_like(out))
        assert_close(named(layer.bias.grad), named(torch.full((4,), 5.0 * times)))


@pytest.mark.parametrize("where", ["one convolution", "one norm", "one activation", "one pooling"])
def test_second_backward_of_one_operation(where):
    layer = {"convolution": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(3), "activation": nn.SiLU(),
             "pooling": nn.MaxPool2d(2)}[where.split()[1]].double()  # fmt: skip
    x = leaf()
    with remat():
        out = layer(x * 1)
    h = out.sum()
    h.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        out.sum().backward()


@pytest.mark.parametrize("cost", COSTS)
def test_memory_falls_in_backward(cost):
    """When backward comes to a block, everything behind it is gone but two tensors, as with PyTorch."""
    depth, x = 8, image(4, 8, 32, 32, dtype=torch.float32)
    model, dz = chain(depth), image(4, 8, 32, 32, dtype=torch.float32)

    def trace(cost):
        held, at_block = Held(), []
        held.ignore(x, dz, *model.parameters(), *model.buffers())
        model.zero_grad()
        with held:
            with under(cost):
                h = x
                for part in model:
                    h = part(h)
                    h.register_hook(lambda g: at_block.append(held.held))
            forward = held.held
            h.backward(dz)
        return forward, at_block

    (forward, found), (_, plain) = trace(cost), trace(None)
    assert all(f <= p + BLOCK for f, p in zip(found, plain, strict=True))
    if cost == 0:  # one convolution's output goes with each block
        small = sum(p.nbytes for p in model.parameters())
        assert all(f <= forward + (1.1 - max(i - 1, 0)) * BLOCK + small for i, f in enumerate(found))
    assert found[-1] <= 4 * BLOCK + sum(p.nbytes for p in model.parameters())


@pytest.fixture
def no_collector():
    """What goes goes by itself, not by the garbage collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("backward", ["none", "done", "kept", "partial", "failed"])
def test_nothing_is_kept_when_the_outputs_are_gone(cost, backward, no_collector):
    model, x, alive = network(), leaf(), []
    for layer in [*model[0], *model[1]]:
        layer.register_forward_hook(lambda m, args, out: alive.append(weakref.ref(out.untyped_storage())))
    with under(cost) as record:
        h = model[0](x)
        out = model[2](model[1](h))
    alive.append(weakref.ref(out.untyped_storage()))
    if backward == "partial":
        torch.autograd.grad(out.sum(), h, retain_graph=True)
    elif backward == "failed":
        handle = h.register_hook(lambda g: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            out.sum().backward(retain_graph=True)
        handle.remove()
        del handle
    elif backward != "none":
        out.sum().backward(retain_graph=backward == "kept")
    del h, out
    assert [ref() for ref in alive] == [None] * len(alive)
    assert record.rows


@pytest.mark.parametrize("backward", ["done", "kept", "partial"])
def test_nothing_made_again_outlives_its_backward(backward):
    model, x, held = network(), leaf(), Held()
    held.ignore(x, *model.parameters(), *model.buffers())
    with held:
        with remat(max_cost=1e9):
            h = model[0](x)
            out = model[2](model[1](h)).sum()
        before = held.held
        grads = torch.autograd.grad(out, h if backward == "partial" else x, retain_graph=backward != "done")
    assert held.held <= before + grads[0].nbytes


POOLED = {"average": F.avg_pool2d, "largest": F.max_pool2d, "both": lambda a, k: F.avg_pool2d(a, k) * 2}


@pytest.mark.parametrize("name", POOLED)
def test_pooling_keeps_nothing_by_cycles(name, no_collector):
    model, x, held = network(), leaf(), Held()
    held.ignore(x, *model.parameters(), *model.buffers())
    with held:
        for _ in range(2):
            with remat():
                out = model[1](F.relu(POOLED[name](model[0](x), 2)))
            out.sum().backward()
            del out
            model.zero_grad()
            x.grad = None
    assert held.held == 0


@pytest.mark.parametrize("images", [1, 2])
def test_a_layer_norm_with_parameters_like_an_image_holds_no_more_than_pytorch(images):
    conv, x = nn.Conv2d(3, 8, 1).double(), image(images, 3, 32, 32)
    norms, found = [nn.LayerNorm([8, 32, 32]).double() for _ in range(2)], []
    for cost in (None, *COSTS):
        held = Held()
        held.ignore(x, *conv.parameters(), *(p for norm in norms for p in norm.parameters()))
        with held, under(cost):
            out = norms[1](torch.sin(norms[0](conv(x))))
        found.append(held.held)
        assert out.requires_grad
    assert max(found) == found[0]


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_the_parts_of_a_concatenation_go(steps):
    """However many cheap steps lie between it and the value that a backward needs."""
    model, held = network(), Held()
    held.ignore(X, *model.parameters(), *model.buffers())
    with held, remat():
        z = torch.cat([model[0][1](model[0][0](X)), model[0][1](model[0][0](X))], 1)
        for _ in range(steps):
            z = z * 0.5
        out = F.conv2d(F.relu(z), torch.cat([model[2].weight] * 2, 1))
        del z
    kept = 2 * X.numel() // 3 * 8 * 8  # both convolutions' outputs
    assert kept <= held.held - out.nbytes <= 1.2 * kept


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("keep", ["nothing", "detached results", "numbers"])
def test_a_long_context_without_backward(cost, keep, no_collector):
    """Evaluations in one context: what a forward made goes with its outputs, whatever of them is kept."""
    model, held, kept = network(), Held(), []
    held.ignore(X, *model.parameters(), *model.buffers())
    with held, under(cost):
        sizes = []
        for _ in range(4):
            out = F.relu(model[1](model[0](X)))
            if keep != "nothing":
                kept.append(out.detach() if keep == "detached results" else out.sum().item())
            del out
            sizes.append(held.held)
    one = X.numel() // 3 * 8 * 8 if keep == "detached results" else 0
    assert sizes[-1] - sizes[0] <= 3 * one


def test_a_long_context_with_backward():
    """A training loop in one context: backward plans for its own step, not for those that are over."""
    model = network()
    with remat() as record:
        for step in range(3):
            out = model(X).sum()
            table = out.grad_fn.next_functions[0][0].operation.table
            out.backward()
            planned = len(table.operations) - table.alive
            assert planned == len(table.operations) // (step + 1)
    assert record.rows


def test_models_and_outputs_are_as_they_were():
    model = network()
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    with remat():
        out = model(leaf())
        inner = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    for m in (model, *inner):
        assert {name: set(vars(part)) for name, part in m.named_modules()} == before
    assert not vars(out) and not any(vars(t) for t in model.state_dict().values())
    assert torch.equal(pickle.loads(pickle.dumps(out.detach())), out)


# Changes in place --------------------------------------------------------------------------------


@torch.library.custom_op("remat_tests::treble", mutates_args={"x"})
def treble(y: float, x: torch.Tensor) -> None:
    x.mul_(y)


WRITES = {
    "mul_": lambda t: t.mul_(0.5),
    "with alpha": lambda t: t.add_(t.detach().clone(), alpha=2),
    "by a numpy number": lambda t: t.mul_(np.float64(0.5)),
    "by an integer tensor": lambda t: t.mul_(torch.tensor(2)),
    "rounded": lambda t: t.div_(0.1, rounding_mode="floor"),
    "clamp_": lambda t: t.clamp_(-1, 1),
    "copy_": lambda t: t.copy_(t.detach().flip(0)),
    "index": lambda t: t.__setitem__((slice(None), 0), 0.0),
    "masked": lambda t: t.__setitem__(t.detach() > 0, 0.0),
    "view": lambda t: t[:, :3].relu_(),
    "view of a view": lambda t: t[1:][:, ::2].mul_(3.0),
    "foreach": lambda t: torch._foreach_mul_([t.detach()], 0.5),
    "no_grad": lambda t: torch.no_grad()(lambda: t.mul_(0.5))(),
    "detached": lambda t: t.detach().sub_(1),
    "relu_": lambda t: F.relu(t, inplace=True),
    "selu_": lambda t: F.selu(t, inplace=True),
    "celu_": lambda t: F.celu(t, inplace=True),
    "threshold_": lambda t: F.threshold(t, 0.1, 0.0, True),
    "dropout_": lambda t: F.dropout(t, 0.5, inplace=True),
    "out": lambda t: torch.add(t.detach(), 1, out=t.detach()),
    "out of a convolution's kin": lambda t: torch.clamp(t.detach(), 0, out=t.detach()),
    "an initialisation": lambda t: nn.init.constant_(t, 0.5),
    "an embedding's limit": lambda t: F.embedding(torch.tensor([0, 1]), t.detach().flatten(1), max_norm=0.1),
    "an operator of the user's": lambda t: treble(3.0, t.detach()),
    "an operator by its short name": lambda t: torch.ops.remat_tests.treble(3.0, t.detach()),
    "by keyword": lambda t: torch.ops.aten.relu_.default(self=t.detach()),
    "data": lambda t: t.data.mul_(0.5),
    "data of a view": lambda t: t[0].data.mul_(0.5),
    "numpy": lambda t: np.multiply(t.detach().numpy(), 0.5, out=t.detach().numpy()),
    "asarray": lambda t: np.add(np.asarray(t.detach()), 1, out=np.asarray(t.detach())),
    "dlpack": lambda t: torch.from_dlpack(t.detach()).mul_(0.5),
    "storage": lambda t: t.untyped_storage().copy_((t.detach() + 1).untyped_storage()),
    "memory": lambda t: np.frombuffer(t.detach().numpy(), np.float64).__imul__(0.5),
}  # fmt: skip


IN_PLACE = {
    "sum": lambda y: y.add_(1),
    "operator": lambda y: y.__iadd__(y.detach().clone()),
    "activation": F.relu_,
    "index": lambda y: y.__setitem__(0, 0.0),
    "embedding": lambda y: F.embedding(torch.tensor([0, 1]), y, max_norm=0.1),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_write_to_what_remat_alone_keeps(name):
    """PyTorch keeps the concatenation, remat the tensor that it is made from."""

    def scenario(context):
        x, w = leaf(image(3, 4)), leaf(image(5, 4, seed=1))
        with context():
            y = F.linear(x, w)
            z = F.silu(torch.cat([y, y], 1))
            IN_PLACE[name](y)
        grads = torch.autograd.grad(z.square().sum() + y.square().sum(), [x, w])
        return dict(zip("xw", grads, strict=True))

    check(scenario)


def test_a_product_in_place():
    def scenario(context):
        x, w = leaf(), leaf(image(4, 3, 3, 3))
        with context():
            y = F.conv2d(x, w)
            a = F.softsign(y)
            a *= F.sigmoid(y)
        return dict(zip("xw", torch.autograd.grad(a.square().sum(), [x, w]), strict=True))

    check(scenario)


def written(model, which, write):
    """A network of values of every kind, of which one is written to when all are made."""
    h = model[0][0](X)
    z = model[0][1](h)
    a = F.relu(z)
    p, q = torch.cumsum(a, 2), torch.cumsum(a, 3)
    k = F.conv2d(torch.cat([p, q], 1), torch.cat([model[1][0].weight] * 2, 1), padding=1)
    s = p + q
    m = F.conv2d(s, model[2].weight)
    values = {"convolution": h, "norm": z, "activation": a, "part of a concatenation": p, "sum": s}
    write(values[which])
    return k.sum((1, 2, 3)) + m.square().sum((1, 2, 3)) + values[which].mean((1, 2, 3))


@pytest.mark.parametrize("which", ["convolution", "norm", "activation", "part of a concatenation", "sum"])
@pytest.mark.parametrize("write", WRITES)
def test_writes_inside_the_context(write, which):
    """PyTorch's numbers wherever it has some, or an error; where it has an error, no matter."""

    def run(cost):
        torch.manual_seed(0)
        model = network()
        with under(cost):
            out = written(model, which, WRITES[write])
        out.backward(image(4))
        return gradients(model)

    try:
        wanted = run(None)
    except RuntimeError:
        wanted = None
    for cost in COSTS:
        if wanted is not None:
            assert_close(run(cost), wanted, f"max_cost {cost},")
        else:
            with contextlib.suppress(RuntimeError):
                run(cost)


def next_to_its_conjugate(x, y):
    z = torch.complex(x, y)
    return F.silu(z.imag) + 2 * F.silu(z.conj().imag)


def across_images(x, p):
    r = F.leaky_relu(x.transpose(0, 1))
    return r.transpose(0, 1).flatten(0, 1)[1 : 1 + len(r)] * p


def norm_of_one_image_expanded(x, gamma, w):
    x = x.contiguous(memory_format=torch.channels_last).expand(3, -1, -1, -1)
    return F.conv2d(F.relu(F.batch_norm(x, None, None, gamma, training=True)), w)


def several_times_in_one_place(x, w):
    u = F.leaky_relu(x).unfold(1, 2, 1)
    u.add_(1.5)
    return F.linear(u, w)


def a_view_added_to_its_base(x, w):
    z = F.leaky_relu(x)
    z.add_(z[:, :1])
    return F.conv1d(z, w)


def a_small_view_subtracted(x, w, a, b):
    v = torch.cumsum(F.conv2d(x, w), 1)[:, ::2]
    k = F.conv2d(torch.cat([v, torch.cumsum(v, 1)], 1), a)
    v -= v[:, :, :1, :1].detach()
    return k + F.conv2d(v, b)


VIEWS = {  # a function, and the shapes of its arguments
    "conjugate": (next_to_its_conjugate, [(4, 4), (4, 4)]),
    "across images": (across_images, [(2, 3, 5), (3, 5)]),
    "windows that overlap": (lambda x: F.silu(F.leaky_relu(x).unfold(1, 5, 2)[..., ::2]), [(6, 9)]),
    "norm of an expanded image": (norm_of_one_image_expanded, [(1, 2, 4, 4), (2,), (1, 2, 1, 1)]),
    "several times in one place": (several_times_in_one_place, [(3, 4), (2, 2)]),
    "a view added to its base": (a_view_added_to_its_base, [(3, 32, 2), (1, 32, 1)]),
    "a small view": (a_small_view_subtracted, [(4, 3, 8, 8), (12, 3, 1, 1), (6, 12, 3, 3), (6, 6, 3, 3)]),
    "linear in place": (lambda x, w, b: F.linear(x, w, b).relu_(), [(2, 3, 4), (5, 4), (5,)]),
    "a bias for each row": (F.linear, [(4, 5), (3, 5), (4, 3)]),
    "groups of one": (lambda x, w, v: F.conv2d(F.group_norm(x, 2, w), v), [(3, 2, 1, 1), (2,), (1, 2, 1, 1)]),
    "the smaller factor first": (
        lambda x, g: F.silu(g * x.contiguous(memory_format=torch.channels_last)),
        [(4, 4, 4, 5), (4, 4, 4, 1)],
    ),
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", VIEWS)
def test_views_and_what_shares_memory(monkeypatch, name, cost):
    """Where parts of one memory are several values, or a value is not image after image."""
    monkeypatch.setattr(task, "SLAB_BYTES", 1)
    function, shapes = VIEWS[name]

    def run(context):
        leaves = [image(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
        with context:
            out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, image(*out.shape, seed=9))
        return out, dict(enumerate(grads))

    (wanted_out, wanted), (out, found) = run(contextlib.nullcontext()), run(remat(cost))
    assert torch.equal(out, wanted_out) and out.stride() == wanted_out.stride()
    assert_close(found, wanted)


def through_an_alias(x, a, b):
    alias = x.data  # its version is its own
    y = F.conv2d(x, a)
    alias.mul_(2)
    return y.detach().mean() + F.conv2d(x, b)


def into_anothers_data(x, a, b):
    y = x.detach() + 1
    kept = F.conv2d(y, a)
    x.data = y
    y.mul_(2)
    return kept.detach().mean() + F.conv2d(x, b)


def before_the_first_need(x, a, b):
    h = F.conv2d(x, a, padding=1)
    p = torch.cumsum(h, 2)
    z = torch.cat([p, torch.cumsum(h, 3)], 1)
    p.data.mul_(2)
    return F.conv2d(z, torch.cat([b, b], 1))


def running_statistics(x, a, b):
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    y = F.conv2d(x, a, padding=1)
    s = F.silu(y - mean.view(1, -1, 1, 1))
    F.batch_norm(F.batch_norm(y, mean, var, training=True), mean, var, training=True)
    return F.conv2d(s, b)


def alias_of_an_input(x, a, b):
    y = F.conv2d(x, a, padding=1)
    alias = y.detach().numpy()
    z = F.silu(F.batch_norm(y, None, None, training=True))
    alias *= 2
    return F.conv2d(z, b)


def source_of_a_linear_layers_copy(x, a, b):
    h = F.conv2d(x, a, padding=1)
    out = F.linear(h.permute(0, 2, 3, 1), a.flatten(1)[:, : h.shape[1]])
    h.data.mul_(1.5)
    return F.conv2d(out.permute(0, 3, 1, 2), b)


def alias_of_a_norms_result(x, a, b):
    z = F.batch_norm(F.conv2d(x, a, padding=1), None, None, training=True)
    alias = z.detach().numpy()
    s = F.relu(z, inplace=True)
    out = F.conv2d(s, b)
    alias *= 2
    return out


def alias_of_a_part(x, a, b):
    p = torch.cumsum(F.conv2d(x, a, padding=1), 2)
    alias = p.data
    z = torch.cat([p[:, :2], p[:, :1]], 1)
    alias.mul_(2)
    return F.conv2d(z, b)


def alias_of_a_small_operand(x, a, b):
    gate = x.mean((2, 3), keepdim=True)
    alias = gate.numpy()
    s = F.conv2d(x, a, padding=1) + gate
    alias += 1
    return F.conv2d(F.silu(s), b)


def result_of_relu6(x, a, b):
    y = F.relu6(F.conv2d(x, a, padding=1))
    y.data.mul_(-7)
    return F.conv2d(y, b)


def result_of_hardtanh_in_place(x, a, b):
    z = F.batch_norm(F.conv2d(x, a, padding=1), None, None, training=True)
    y = F.hardtanh(z, -0.5, 0.7, inplace=True)
    out = torch.cumsum(y, 2) * 1.0
    y.data.mul_(-7)
    return F.conv2d(out, b)


def weight_of_a_linear_layer(x, a, b):
    h = F.silu(F.conv2d(x, a))
    y = F.linear(h.mean((2, 3)), a[:, :, 0, 0]) + F.linear(h.mean((2, 3)), a.detach()[:, :, 1, 1])
    a.data = a.detach() * 2
    return F.conv2d(x, b).mean((2, 3)) * y.mean()


def a_fused_optimizers_step(x, a, b):
    optimizer = torch.optim.AdamW([a], 0.5, fused=True)
    a.grad = torch.ones_like(a)
    z = F.batch_norm(F.conv2d(x, a), None, None, training=True)
    out = F.conv2d(F.silu(z), b)
    optimizer.step()
    return out


def alias_of_a_weight(x, a, b):
    alias = a.data
    s = F.silu(F.conv2d(x, a))
    alias.mul_(2)
    return F.conv2d(s, b)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    "function",
    [
        through_an_alias,
        into_anothers_data,
        before_the_first_need,
        running_statistics,
        alias_of_an_input,
        source_of_a_linear_layers_copy,
        alias_of_a_norms_result,
        alias_of_a_part,
        alias_of_a_small_operand,
        alias_of_a_weight,
        a_fused_optimizers_step,
        result_of_relu6,
        result_of_hardtanh_in_place,
        weight_of_a_linear_layer,
    ],
)
def test_writes_without_a_new_version(function, cost):
    def run(context):
        x, a, b = image(4, 3, 8, 8), image(3, 3, 3, 3, seed=1), image(5, 3, 3, 3, seed=2).requires_grad_()
        with context:
            out = function(x, a.requires_grad_(), b)
        return out, dict(enumerate(torch.autograd.grad(out.square().sum(), [a, b], allow_unused=True)))

    (wanted_out, wanted), (out, found) = run(contextlib.nullcontext()), run(remat(cost))
    assert torch.equal(out, wanted_out)
    assert_close(found, wanted)


BY_IMAGE = {  # and whether PyTorch saves γ and β
    "group": (lambda y, *affine: F.group_norm(y, 2, *affine), (True, False)),
    "layer": (lambda y, *affine: F.layer_norm(y.mT, (8,), *affine), (True, True)),
    "instance": (lambda y, *affine: F.instance_norm(y, None, None, *affine), (False, False)),
}


@pytest.mark.parametrize("which", [0, 1], ids=["gamma", "beta"])
@pytest.mark.parametrize("name", BY_IMAGE)
def test_a_parameter_of_a_norm_that_changes_before_backward(name, which):
    """An error where PyTorch's node saves it, and without effect where not."""
    norm, saved = BY_IMAGE[name]

    def scenario(context):
        y, affine = image(3, 8, 8).requires_grad_(), [image(8, seed=i).requires_grad_() for i in (1, 2)]
        with context():
            out = norm(y, *affine)
        with torch.no_grad():
            affine[which].mul_(3)
        if saved[which]:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.backward(image(*out.shape, seed=3))
            return {}
        out.backward(image(*out.shape, seed=3))
        return named(y.grad, *(t.grad for t in affine))

    check(scenario)


OTHER_NORMS = {  # which remat leaves to PyTorch
    "without a graph": lambda y, *stats: F.batch_norm(y.detach(), *stats, training=True),
    "no_grad": torch.no_grad()(lambda y, *stats: F.batch_norm(y, *stats, training=True)),
    "an int's momentum": lambda y, *stats: F.batch_norm(y, *stats, training=True, momentum=1),
    "torch's": lambda y, *stats: torch.batch_norm(y, None, None, *stats, True, 0.1, 1e-5, False),
    "native": lambda y, *stats: torch.native_batch_norm(y, None, None, *stats, True, 0.1, 1e-5)[0],
    "aten's": lambda y, *stats: torch.ops.aten.native_batch_norm(y, None, None, *stats, True, 0.1, 1e-5)[0],
    "instance norm": lambda y, *stats: F.instance_norm(y, *stats, use_input_stats=True),
    "instance norm by name": lambda y, m, v: F.instance_norm(y, running_mean=m, running_var=v),
}


@pytest.mark.parametrize("name", OTHER_NORMS)
def test_running_statistics_that_another_norm_changes(name):
    """What a recipe reads is as it was."""

    def scenario(context):
        model, mean, var = network(), image(8, seed=1), image(8, seed=2).square()
        with context():
            y = model[0][0](X)
            s = F.silu((y - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1))
            OTHER_NORMS[name](y, mean, var)
            out = model[2](model[1](s))
        out.square().sum().backward()
        return gradients(model) | named(mean, var)

    check(scenario)


@pytest.mark.parametrize("expose", [torch.Tensor.data_ptr, lambda t: t.data, torch.Tensor.numpy])
def test_a_change_is_seen_although_the_tensor_is_exposed_later(expose):
    """What is copied then must not be what somebody has changed before."""

    def weight(x, a, b):
        out = F.conv2d(F.silu(F.conv2d(x, a)), b)
        with torch.no_grad():
            a.mul_(2)
            expose(a.detach())
        return out

    def operand(x, a, b):
        p = torch.cumsum(F.conv2d(x, a[:1]), 2)
        out = F.conv2d(torch.cat([p, p, p], 1), b)
        with torch._C.DisableTorchFunction():
            p.detach().mul_(2)
        expose(p.detach())
        return out

    for function, words in ((weight, "modified by an inplace operation"), (operand, "changed")):
        x, a, b = image(4, 3, 8, 8), image(3, 3, 3, 3, seed=1), image(5, 3, 3, 3, seed=2)
        with remat(1e9):
            out = function(x, a.requires_grad_(), b.requires_grad_())
        with pytest.raises(RuntimeError, match=words):
            out.square().sum().backward()


@pytest.mark.parametrize(
    "copy", [torch.cumsum, lambda t, dim: torch.roll(t, 1, dim)], ids=["unknown", "roll"]
)
def test_a_view_with_gaps_is_no_base_of_others(copy):
    """A kept one may be copied, and then lies in memory without the gaps."""

    def scenario(context, write):
        model = network()
        weight = model[1][0].weight
        with context():
            h = copy(model[0](X[:2]), 2)
            part = h[:, :7]
            out = F.conv2d(part, weight[:, :7]) + F.conv2d(part[:, :2], weight[:, :2])
            write(h)
        out.square().sum().backward()
        return gradients(model)

    check(functools.partial(scenario, write=lambda h: None))
    check(functools.partial(scenario, write=lambda h: h.data.mul_(2)))

    def in_place(context):
        model = network()
        with context():
            h = copy(model[0](X), 2)
            part = h[:, ::2]
            part += 1
            out = F.conv2d(h[:, :7], model[1][0].weight[:, :7])
        out.square().sum().backward()
        return gradients(model)

    check(in_place)


def test_a_buffer_that_a_sum_has_read_changes_after_the_context():
    """Running statistics change without a version, for example in the next forward."""

    def scenario(context):
        model, mean = network(), torch.zeros(8, dtype=torch.float64)
        with context():
            out = model[2](F.silu(model[0](X) + mean.view(1, 8, 1, 1)))
        F.batch_norm(torch.ones(2, 8, dtype=torch.float64), mean, torch.ones_like(mean), training=True)
        out.square().sum().backward()
        return gradients(model)

    check(scenario)


def test_a_parameter_that_a_sum_has_read_is_trained_before_backward():
    """PyTorch saves the sum."""

    def scenario(context):
        model, shift = network(), nn.Parameter(torch.ones(8, 1, 1, dtype=torch.float64))
        with context():
            out = model[2](F.silu(model[0](X) + shift))
        shift.grad = torch.ones_like(shift)
        torch.optim.SGD([shift], 0.1).step()
        out.square().sum().backward()
        return {**gradients(model), "shift": shift.grad}

    check(scenario)


def test_a_weight_written_without_a_version_inside_the_context():
    """Weights are clipped between two forwards: what was made before was made with the old ones."""

    def scenario(context):
        model = network()
        with context():
            h = model[1](model[0](X))
            model[1][0].weight.data.clamp_(-0.01, 0.01)
            out = model[2](h)
        out.square().sum().backward()
        return gradients(model)

    check(scenario)


@pytest.mark.parametrize("what", ["input", "convolution", "activation"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_kept_tensor_changed_after_forward_is_an_error(what, grad):
    """It says what changed; or, if backward does not need it any more, the numbers are PyTorch's."""

    def run(cost):
        model, x = network(), X.clone()
        with under(cost):
            h = model[0][0](x)
            a = F.silu(model[0][1](h))
            out = model[2](a)
        with torch.set_grad_enabled(grad):
            {"input": x, "convolution": h, "activation": a}[what].mul_(2.0)
        out.square().sum().backward()
        return gradients(model)

    def unchanged():
        """What the gradients are of the values that forward had."""
        model = network()
        a = F.silu(model[0][1](model[0][0](X)))
        model[2](a).square().sum().backward()
        return gradients(model)

    with pytest.raises(RuntimeError, match="modified by an inplace"):
        run(None)
    for cost in COSTS:
        if what == "input" or (what, cost) == ("convolution", 0):
            with pytest.raises(RuntimeError, match="inplace operation.*(of shape|Tensor)"):
                run(cost)
        else:
            with contextlib.suppress(RuntimeError):  # or made again from what did not change
                assert_close(run(cost), unchanged(), f"max_cost {cost},")


@pytest.mark.parametrize("cost", COSTS)
def test_a_parameter_changed_after_forward_is_an_error(cost):
    """An optimizer's step between forward and backward, as with PyTorch."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).sum().backward()
    with under(cost):
        out = model(X)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation|changed after forward"):
        out.sum().backward()


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_parameter_that_got_other_memory_is_an_error(what):
    """A convolution that is recomputed would take the new values."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).double()
    with remat(max_cost=1e9):
        out = model(X)
    parameter = getattr(model[0], what)
    parameter.data = 2 * parameter.data
    with pytest.raises(RuntimeError, match=f"its {what} of shape .* was changed after forward"):
        out.sum().backward()


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", ["0.1.weight", "1.0.weight", "1.1.weight", "2.weight"])
def test_one_parameter_changed_after_forward_is_an_error(name, cost):
    model = network()
    with under(cost):
        out = model(X)
    with torch.no_grad():
        model.get_parameter(name).mul_(2)
    with pytest.raises(
        RuntimeError, match="inplace operation.*Tensor|its weight of shape .* changed after forward"
    ):
        out.sum().backward()


@pytest.mark.parametrize(("inside", "costs"), [(True, COSTS), (False, [0])])
def test_what_pytorch_does_not_save_may_change(inside, costs):
    """Every bias, and the weight of a linear layer whose input needs no gradient.

    After the context, what a convolution needs that runs again may not.
    """

    def scenario(context):
        torch.manual_seed(0)
        layers = nn.Linear(9, 9), nn.Conv2d(3, 8, 1), nn.SiLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        model = randomised(nn.Sequential(*layers).double())

        @torch.no_grad()
        def change():
            for t in (layers[0].weight, *(layer.bias for layer in layers if layer.state_dict())):
                t.add_(1)

        with context():
            out = model(X)
            if inside:
                change()
        if not inside:
            change()
        out.square().sum().backward()
        return gradients(model)

    check(scenario, costs)


def test_a_norms_bias_and_the_last_convolutions_may_change_after_the_context():
    def scenario(context):
        model = network()
        with context():
            out = model(X)
        with torch.no_grad():
            for name, t in model.state_dict().items():
                if name.endswith("bias"):
                    t.add_(1)
        out.square().sum().backward()
        return gradients(model)

    check(scenario)


# What is left alone ------------------------------------------------------------------------------


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

    check(scenario)


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

    check(scenario, costs=[0])


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

    check(scenario)


def test_a_gradient_that_is_none():
    """From a function that has none for its input; the layers before it get none either."""

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dz):
            return None

    def scenario(context):
        model, x = network(), leaf()
        with context():
            h = model[0](x)
            out = model[2](model[1](NoGradient.apply(h))) + NoGradient.apply(F.relu(x.sum() * h.mean(1)))[0]
        out.square().sum().backward()
        none = [name for name, p in model.named_parameters() if p.grad is None]
        assert none == [name for name, _ in model.named_parameters() if name.startswith("0.")]
        return named(x.grad) | gradients(model)

    check(scenario)


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

    check(scenario)


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

    check(scenario)


def test_other_threads_run_as_always():
    model, found = network(), {}

    def run():
        out = model[2](model[1](model[0](X)))
        found["node"] = type(out.grad_fn).__name__
        found["gradients"] = torch.autograd.grad(out.sum(), model[0][0].weight)

    with remat():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert found["node"] == "ConvolutionBackward0"
    wanted = torch.autograd.grad(model(X).sum(), model[0][0].weight)
    torch.testing.assert_close(found["gradients"], wanted)


@pytest.mark.parametrize("cost", COSTS)
def test_backward_in_several_threads(cost):
    """Two outputs with a common trunk, backward of each in threads of their own, on the kept graph."""
    model, x, found = network(), leaf(), {}
    with under(cost):
        h = model[0](x)
        outputs = [model[2](model[1](h)).sum(), model[2](model[1](h + 1)).square().sum()]
    wanted = [torch.autograd.grad(o, x, retain_graph=True)[0] for o in outputs]

    def run(i):
        found[i] = [torch.autograd.grad(outputs[i % 2], x, retain_graph=True)[0] for _ in range(8)]

    threads = [threading.Thread(target=run, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        for g in found[i]:
            torch.testing.assert_close(g, wanted[i % 2], rtol=1e-9, atol=1e-9)


def test_a_backward_inside_a_backward():
    def scenario(context):
        model, x = network(), leaf()
        with context():
            h = model[0](x)
            out, other = model[2](model[1](h)).square().sum(), model[2](model[1](h * 2)).sum()
        inner = []

        def again(g):
            inner.extend(torch.autograd.grad(other, model[1][0].weight, retain_graph=True))

        hook = h.register_hook(again)
        out.backward(retain_graph=True)
        hook.remove()
        other.backward()
        return named(x.grad, *inner) | gradients(model)

    check(scenario)


# Contexts ----------------------------------------------------------------------------------------


def mode_stack():
    return torch.overrides._get_current_function_mode_stack()


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


@pytest.mark.parametrize("cost", COSTS)
def test_an_exception_inside(cost, no_collector):
    """It goes through, and neither a mode nor a tensor stays."""
    model, alive = network(), []

    def fails():
        with under(cost):
            h = model[0](leaf())
            alive.append(weakref.ref(h.untyped_storage()))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fails()
    assert not mode_stack()
    gc.collect()  # the traceback's frames
    assert alive[0]() is None


def test_errors_of_pytorch_are_its_own():
    model = network()
    calls = {
        "channels": lambda: model(X[:, :2]),
        "dtype": lambda: model(X.float()),
        "argument": lambda: F.conv2d(X, model[0][0].weight, strides=2),
        "one value": lambda: nn.BatchNorm2d(3)(torch.ones(1, 3, 1, 1, requires_grad=True)),
        "in place on a leaf": lambda: F.relu(leaf(), inplace=True),
        "sizes": lambda: torch.cat([X, X[:, :, 1:].requires_grad_()], 1),
        "groups": lambda: F.group_norm(leaf(), 2),
    }
    for name, call in calls.items():
        with pytest.raises(Exception) as wanted:  # noqa: B017, PT011
            call()
        with remat(), pytest.raises(wanted.type) as found:
            call()
        assert str(found.value) == str(wanted.value), name


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
        pass

    def scenario(context):
        model, empty, conv = network(), network().eval(), nn.Conv2d(3, 2, 3).to(torch.complex128)
        with context():
            out = model(X.as_subclass(Mine))
            assert isinstance(out, Mine)
            none = empty(X[:0])
            numbers = conv(X.to(torch.complex128))
            swish = Swish.apply(model[0](X))
        out.as_subclass(torch.Tensor).square().sum().backward()
        (none.sum() + numbers.abs().sum() + swish.sum()).backward()
        found = {n: g.as_subclass(torch.Tensor) for n, g in gradients(model).items()}
        return found | named(torch.view_as_real(conv.weight.grad), empty[0][0].weight.grad)

    check(scenario)


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

    check(scenario)


def test_backward_in_inference_mode():
    """It makes no graph, but the norms that backward calls again need one."""

    def scenario(context):
        model = nn.Sequential(network(), nn.GroupNorm(2, 4), nn.PReLU()).double()
        with context():
            loss = model(X).square().sum()
        with torch.inference_mode():
            loss.backward()
        return gradients(model)

    check(scenario)


def test_aliases_and_detached_tensors():
    def scenario(context):
        model = network()
        with context():
            h = model[0](X)
            d = h.detach().requires_grad_()
            out = model[1](d) * model[1](h.view_as(h)) + torch.ops.aten.alias(h)
        out.square().sum().backward()
        return named(d.grad) | gradients(model)

    check(scenario)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode():
    def scenario(context):
        model = network()
        with torch.autograd.detect_anomaly(), context():
            out = model(X)
            out.square().sum().backward()
        return gradients(model)

    check(scenario)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limits", [(-0.7, 0.7), (-0.1, 0.3), (0.0, 6.0)])
def test_limits_that_half_precision_rounds(dtype, limits):
    """A clipped value passes no gradient, whatever its limit is rounded to."""

    def scenario(context):
        x = torch.tensor([[-5.0, 0.05, 5.0]], dtype=dtype, requires_grad=True)
        with context():
            out = F.hardtanh(x, *limits)
        out.sum().backward()
        return named(out.detach(), x.grad)

    check(scenario)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, pair: F.pad(x, pair),
        lambda x, pair: F.layer_norm(x, pair),
        lambda x, pair: F.interpolate(x, pair),
        lambda x, pair: F.conv2d(x, torch.ones(2, 2, 1, 1).double(), padding=pair),
    ],
    ids="pad layer_norm interpolate conv2d".split(),
)
def test_an_argument_that_the_caller_changes_later(call):
    def scenario(context):
        x, pair = image(2, 2, 3, 3, seed=1).requires_grad_(), [3, 3]
        with context():
            out = F.silu(call(F.relu(x * 2), pair))
        pair[:] = [0, 1]
        out.backward(torch.linspace(1, 2, out.numel()).double().view_as(out))
        return named(out.detach(), x.grad)

    check(scenario)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.leaky_relu(x, np.float32(0.3)),
        lambda x: F.elu(x, torch.tensor(0.3)),
        lambda x: F.hardtanh(x, np.int64(-1), np.int64(2)),
        lambda x: F.elu_(x - 1, 0.5, 2.0),  # a third number, where F.elu has `inplace`
    ],
    ids="leaky_relu elu hardtanh elu_".split(),
)
def test_numbers_of_other_types(call):
    def scenario(context):
        x = image(2, 3, 4).requires_grad_()
        with context():
            out = call(x * 3)
        out.square().sum().backward()
        return named(out.detach(), x.grad)

    check(scenario)


def test_a_flag_that_is_a_tensor():
    """It may be another one at the next call."""
    flag = torch.tensor(True)

    def scenario(context):
        x, flag[...] = image(2, 3, 4).requires_grad_(), True
        with context():
            out = F.relu(x * 3, inplace=flag)
            flag[...] = False
            y = x * 2
            out = out + F.relu(y, inplace=flag) + y
        out.square().sum().backward()
        return named(out.detach(), x.grad)

    check(scenario)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.celu(x, 0),
        lambda x: F.conv_transpose2d(x, torch.ones(3, 2, 1, 1), stride=0),
        lambda x: F.conv2d(x, torch.ones(0, 3, 1, 1)),
        lambda x: F.max_pool2d(x, 1, 0),
        lambda x: x * torch.ones(2, 5, 1, 1, requires_grad=True),
        lambda x: F.max_pool2d(x, 2, ceil_mode=1),
        lambda x: F.max_pool2d(x, 2, ceil_mode=torch.ones(2)),
        lambda x: F.avg_pool2d(x, 2, ceil_mode=1),
        lambda x: F.dropout(x, 0.5, 1),
        lambda x: F.pad(x, (1, 1, 1, 1), "reflect", 0.5),
        lambda x: F.glu(x, np.array([1, 2])),
    ],
    ids="celu stride weight pool shapes ceil ceils ceil_mean training value dims".split(),
)
def test_wrong_arguments_get_pytorchs_error(call):
    x = torch.ones(2, 3, 4, 4, requires_grad=True)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as wanted:
        call(x)
    with remat(), pytest.raises(wanted.type) as found:
        call(x)
    assert str(found.value) == str(wanted.value)


def test_a_negative_epsilon():
    """An error, but in the oldest PyTorch."""

    def scenario(context):
        x = leaf(image(2, 3, 4, 4))
        with context(), contextlib.suppress(ValueError, RuntimeError):
            out = F.batch_norm(x, x[0, :, 0, 0].detach(), torch.ones(3).double(), eps=-0.1)
            out.square().sum().backward()
        return named(x.grad)

    check(scenario)


# Two processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "last", [nn.Identity(), F.relu, nn.BatchNorm2d(4).double(), nn.MaxPool2d(2), nn.ReflectionPad2d(1)]
)
def test_a_missing_second_derivative_is_an_error(last):
    """Of a linear loss, whose gradient has no graph."""
    x, w = leaf(), leaf(image(4, 3, 3, 3))
    with remat():
        out = last(F.conv2d(x, w))
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (dx.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("function", [F.conv2d, lambda x, w: F.linear(x.flatten(1), w.flatten(1))])
def test_autocast_leaves_float64(function):
    found = []
    for cost in (None, 0):
        with torch.autocast("cpu", torch.bfloat16), under(cost):
            found.append(function(leaf(image(2, 3, 3, 3)), leaf(image(4, 3, 3, 3))))
    assert found[0].dtype == found[1].dtype and torch.equal(*found)


def steps(model, x, dz, cost):
    """Two steps of SGD; the gradients of the second, and the parameters after it."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        with under(cost):
            out = model(x)
        out.backward(dz)
        optimizer.step()
    found = {}
    for name, p in model.named_parameters():
        for what, t in (("", p.detach()), (".grad", p.grad)):
            t = t if t is None else t.full_tensor() if hasattr(t, "full_tensor") else t
            found[name.removeprefix("module.") + what] = t
    return found


def distributed(rank, folder):
    """DDP in three variants and FSDP2 block by block: as plain, at the prices that matter."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    x, dz = image(4, 3, 10, 9, seed=rank), image(4, 4, 10, 9, seed=10 + rank)
    ways = {
        "DDP": DistributedDataParallel,
        "unused": functools.partial(DistributedDataParallel, find_unused_parameters=True),
        "static": functools.partial(DistributedDataParallel, static_graph=True),
    }

    def sharded(model):
        for part in model:
            fully_shard(part, reshard_after_forward=True)
        return fully_shard(model)

    ways["FSDP2"] = sharded
    for name, way in ways.items():
        wanted = steps(way(network()), x, dz, None)
        for cost in (0, 1e9):
            assert_close(steps(way(network()), x, dz, cost), wanted, f"{name}, max_cost {cost},")


class Reduced(torch.autograd.Function):
    """As in tensor parallel layers: the sum over all processes takes the input's memory."""

    @staticmethod
    def forward(ctx, x):
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, dx):
        return dx


def collectives(rank, folder):
    """Sums over the processes that autograd does not see, in the memory of values of each kind."""

    def reduced(t):
        torch.distributed.all_reduce(t.detach())
        return t

    def waited_for(t):
        torch.distributed.all_reduce(t.detach(), async_op=True).wait()
        return t

    def scenario(context, at, change):
        model, x = network(), image(4, 3, 10, 9, seed=rank)
        with context():
            h = x
            for i, layer in enumerate([*model[0][:2], nn.ReLU(change is reduced), *model[1], model[2]]):
                h = layer(h)
                if i == at:
                    h = change(h)
        out = F.linear(h.flatten(1), torch.ones(5, h[0].numel(), dtype=h.dtype)).square()
        out.sum().backward()
        return gradients(model)

    for at in range(5):
        for change in (reduced, waited_for, Reduced.apply):
            check(functools.partial(scenario, at=at, change=change))


def add_cpu_kernels(library):
    """What nn.SyncBatchNorm calls, and PyTorch has for GPUs alone."""

    def cpu(kernel):
        library.impl(kernel.__name__, kernel, "CPU")

    @cpu
    def batch_norm_stats(y, eps):
        return y.mean((0, 2, 3)), (y.var((0, 2, 3), correction=0) + eps).rsqrt()

    @cpu
    def batch_norm_gather_stats_with_counts(
        y, means, invstds, running_mean, running_var, momentum, eps, counts
    ):
        m, counts = counts.sum(), counts[:, None]
        mean = (means * counts).sum(0) / m
        var = ((invstds**-2 - eps + (means - mean).square()) * counts).sum(0) / m
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * m / (m - 1), momentum)
        return mean, (var + eps).rsqrt()

    @cpu
    def batch_norm_elemt(y, gamma, beta, mean, invstd, eps):
        mean, invstd, gamma, beta = (t[:, None, None] for t in (mean, invstd, gamma, beta))
        return (y - mean) * invstd * gamma + beta

    @cpu
    def batch_norm_backward_reduce(dz, y, mean, invstd, gamma, *needs):
        sum_dz, sum_dz_y = (t.sum((0, 2, 3)) for t in (dz, dz * (y - mean[:, None, None])))
        return sum_dz, sum_dz_y, sum_dz_y * invstd, sum_dz

    @cpu
    def batch_norm_backward_elemt(dz, y, mean, invstd, gamma, sum_dz, sum_dz_y, counts):
        m = counts.sum()
        mean, invstd, gamma, *means = (
            t[:, None, None] for t in (mean, invstd, gamma, sum_dz / m, sum_dz_y * invstd.square() / m)
        )
        return (dz - means[0] - (y - mean) * means[1]) * invstd * gamma


class Synchronised(nn.SyncBatchNorm):
    """On a CPU."""

    def forward(self, y):
        group, statistics = torch.distributed.group.WORLD, (self.running_mean, self.running_var)
        numbers = self.eps, self.momentum, group, group.size()
        return sync_batch_norm.apply(y, self.weight, self.bias, *statistics, *numbers)


def synchronised(rank, folder):
    """nn.SyncBatchNorm keeps y, and its output is recomputed; also where y is the network's input."""

    def scenario(context):
        torch.manual_seed(0)
        acts = nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(), nn.Hardswish()
        layers = [m for act in acts for m in (nn.Conv2d(8, 8, 1), Synchronised(8), act)]
        model = randomised(nn.Sequential(Synchronised(8), *layers, nn.Conv2d(8, 4, 1)).double())
        x = image(4 + rank, 8, 6, 5, seed=rank).requires_grad_()
        with Held() as held, context():
            out = model(x)
        found.append(held.held)
        out.backward(image(*out.shape, seed=9))
        return gradients(model) | dict(model.named_buffers()) | {"out": out.detach(), "x": x.grad}

    found = []
    with torch.library._scoped_library("aten", "IMPL") as library:
        add_cpu_kernels(library)
        check(scenario)
        norm, x = Synchronised(8).double(), image(4, 8, 6, 5).requires_grad_()
        with torch.inference_mode(), remat():
            assert norm(x).shape == x.shape
    plain, *ours = found
    assert all(held < 0.65 * plain for held in ours), found


def in_two_processes(rank, folder):
    distributed(rank, folder)
    collectives(rank, folder)
    synchronised(rank, folder)


@pytest.mark.distributed
@needs_gloo
def test_two_processes(tmp_path):
    assert two_processes(tmp_path, in_two_processes) == [0, 0]


@pytest.mark.parametrize("act", [F.silu, F.tanh, F.relu6, F.gelu, F.elu, F.mish, F.hardswish, F.relu])
def test_the_gradient_of_an_activation_may_have_another_layout(act):
    """The norm before it is not misled, as PyTorch's own may be."""
    x, y = image(1, 4, 4, 2).requires_grad_(), image(1, 4, 4, 2, seed=1)

    def forward(x):
        with remat():
            return act(y.contiguous(memory_format=torch.channels_last) + F.instance_norm(x))

    assert torch.autograd.gradcheck(forward, x)


BATCH_STATISTICS = {"running_mean": None, "running_var": None, "training": True}


@pytest.mark.parametrize("act", [torch.square, F.softplus, F.silu, F.normalize])
@pytest.mark.parametrize("norm", [F.instance_norm, functools.partial(F.batch_norm, **BATCH_STATISTICS)])
def test_a_norm_outside_of_the_context(norm, act):
    """It gets a gradient with the strides of plain PyTorch's."""
    x = image(1, 4, 4, 2).requires_grad_()

    def forward(x):
        y = norm(x).contiguous(memory_format=torch.channels_last)
        with remat():
            return act(y)

    assert torch.autograd.gradcheck(forward, x)


@pytest.mark.parametrize("layouts", [(0, 1), (1, 0)], ids=["nchw", "nhwc"])
def test_a_frozen_norms_gradient_has_its_inputs_layout(layouts):
    of_input, of_gradient = ((torch.contiguous_format, torch.channels_last)[i] for i in layouts)

    def scenario(context):
        x, one = image(2, 4, 4, 3).requires_grad_(), torch.ones(4).double()
        with context():
            h = F.instance_norm(x).contiguous(memory_format=of_input)
            out = F.batch_norm(h, one, one)
        h.register_hook(lambda dh: found.append(dh.stride()))
        out.backward(image(2, 4, 4, 3, seed=1).contiguous(memory_format=of_gradient))
        assert found.pop() == h.stride()
        return named(x.grad)

    found = []
    check(scenario)


@pytest.mark.parametrize("layouts", [(0, 1), (1, 0)], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("groups, kernel", [(1, 1), (1, 3), (2, 3)])
def test_the_gradient_of_an_input_has_its_layout(groups, kernel, layouts):
    """Also where the output's gradient has another: a norm before may take it for the wrong values."""
    of_input, of_gradient = ((torch.contiguous_format, torch.channels_last)[i] for i in layouts)
    conv, x = nn.Conv2d(4, 4, kernel, groups=groups).double(), image(2, 4, 9, 8).requires_grad_()
    with remat():
        h = F.silu(x.contiguous(memory_format=of_input))
        out = conv(h)
    h.register_hook(lambda dh: found.append(dh.is_contiguous(memory_format=of_input)))
    found = []
    out.backward(image(*out.shape, seed=1).contiguous(memory_format=of_gradient))
    assert found == [True]


@pytest.mark.parametrize("cost", [0, 1e9])
def test_a_convolution_of_a_view_with_gaps(cost):
    """What is made again has forward's strides, or its views would be read with others."""
    torch.manual_seed(0)
    first, conv, last = nn.Linear(4, 12), nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Linear(2, 3)
    model, x = nn.ModuleList([first, conv, last]).double(), torch.randn(2, 5, 5, 4).double()

    def forward():
        y = conv(first(x)[..., :2].permute(0, 3, 1, 2))
        return last(y.permute(0, 2, 3, 1))

    plain = forward()
    grad = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, list(model.parameters()), grad)
    with remat(cost):
        out = forward()
    assert torch.equal(out, plain)
    torch.testing.assert_close(torch.autograd.grad(out, list(model.parameters()), grad), wanted)
