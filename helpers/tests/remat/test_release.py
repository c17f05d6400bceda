"""What is kept goes in backward, or with the outputs; nothing is kept by cycles."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import remat
from helpers.predict import Held
from helpers.tests.remat.examples import chain
from helpers.tests.remat.support import (
    BLOCK,
    COSTS,
    X,
    assert_close,
    image,
    leaf,
    mode_stack,
    named,
    network,
    under,
)


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
