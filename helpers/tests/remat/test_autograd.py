"""`remat` in autograd's company: hooks, parts of the gradients, second derivatives, threads."""

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import remat
from helpers.tests.remat.support import (
    COSTS,
    X,
    block,
    check_scenario,
    gradients,
    image,
    leaf,
    named,
    network,
    randomised,
    under,
)


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

    check_scenario(scenario)


def test_a_forward_hook_that_returns_another_tensor():
    def scenario(context):
        model = network()
        model[0][1].register_forward_hook(lambda m, args, out: out * 2)
        model[1][0].register_forward_pre_hook(lambda m, args: (args[0].tanh(),))
        with context():
            out = model(X)
        out.square().sum().backward()
        return gradients(model)

    check_scenario(scenario)


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

    check_scenario(scenario)


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

    check_scenario(scenario)


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

    check_scenario(scenario)


def test_two_outputs_of_which_one_is_used():
    def scenario(context):
        model, x = network(), leaf()
        with context():
            h = model[0](x)
            model[1](h), (out := model[2](h))
        out.square().sum().backward()
        return named(x.grad) | gradients(model)

    check_scenario(scenario)


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

    check_scenario(scenario)


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

    check_scenario(scenario)


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

    check_scenario(scenario)


def by_flag(out, x, dz):
    return torch.autograd.grad(out, x, dz, is_grads_batched=True)


def by_vmap(out, x, dz):
    return torch.vmap(lambda dz_i: torch.autograd.grad(out, x, dz_i))(dz)


@pytest.mark.parametrize("batched", [by_flag, by_vmap])
def test_batched_gradients(batched):
    """Several gradients at once: right, or an error that says so."""

    def scenario(context):
        model, x = network(), leaf()
        with context():
            out = model(x)
        return named(*batched(out, x, image(3, *out.shape)))

    try:
        check_scenario(scenario)
    except RuntimeError as error:
        assert "is_grads_batched" in str(error)  # noqa: PT017


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

    check_scenario(scenario)


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

    check_scenario(scenario)


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

    check_scenario(scenario)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode():
    def scenario(context):
        model = network()
        with torch.autograd.detect_anomaly(), context():
            out = model(X)
            out.square().sum().backward()
        return gradients(model)

    check_scenario(scenario)


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
