"""`compare` finds what is wrong, says what is gained, and leaves everything as it was."""

import dataclasses
import math
import random
import threading
from fractions import Fraction
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers import compare, predict_memory, remat
from helpers.remat import convolutions, operations


def network(*more):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    model = nn.Sequential(*layers, *more)
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """A network whose forward is ``function(network, …)``."""

    def __init__(self, function, *more):
        super().__init__()
        self.network, self.function = network(*more), function

    def forward(self, *args, **kwargs):
        return self.function(self.network, *args, **kwargs)


def test_a_default_device_without_values():
    model = network()
    with torch.device("meta"):
        found = compare(model, IMAGES, max_cost=0, rounds=1)
    assert found.equal and 0 < found.difference < 1e-4


def test_what_it_finds():
    found = compare(network(), IMAGES, max_cost=0, rounds=1)
    assert found.equal and found.reference == "float64"
    assert found.difference < 1e-4 and 0 < found.rounding < 1e-4
    held, peak = zip(*(predict_memory(network(), IMAGES, max_cost=c) for c in (None, 0)), strict=True)
    assert found.held == held and held[1] < held[0] and found.peak == peak and min(found.seconds) > 0
    dearer = compare(network(), IMAGES, max_cost=math.inf, rounds=1)
    assert dearer.equal and dearer.held[1] < held[1] and dearer.held[0] == held[0]


def test_gradients_that_are_all_zero():
    found = compare(Model(lambda network, x: 0 * network(x)), IMAGES, rounds=1)
    assert found.equal and found.difference == found.rounding == 0


def test_what_it_prints():
    found = compare(network(), IMAGES, max_cost=27, rounds=2)
    found = dataclasses.replace(found, held=(2**21, 2**20), peak=(2**22, 3 * 2**20), seconds=(0.5, 0.6))
    found = dataclasses.replace(found, difference=0.0, rounding=1.5e-7)
    assert str(found).splitlines() == [
        "remat(max_cost=27): forward equal to the bit",
        "gradients: remat differs from plain by 0.0e+00, plain from float64 by 1.5e-07",
        "              plain     remat  ratio",
        "held MiB        2.0       1.0   0.50",
        "peak MiB        4.0       3.0   0.75",
        "time ms       500.0     600.0   1.20",
    ]
    assert "forward NOT EQUAL to" in str(dataclasses.replace(found, equal=False))


def test_a_wrong_gradient_is_seen():
    """A remade activation that is a little off: only remat's gradients change."""
    make = operations.Normalise.run
    with patch.object(operations.Normalise, "run", lambda *args: make(*args).mul_(1.001)):
        found = compare(network(), IMAGES, rounds=1)
    assert found.equal and found.difference > 5e-4 and found.rounding < 1e-4


def test_a_gradient_that_is_missing_is_seen():
    backward = convolutions.Convolution.backward
    without_dw = lambda *args: [backward(*args)[0], None, None]  # noqa: E731
    with patch.object(convolutions.Convolution, "backward", without_dw):
        found = compare(network(), IMAGES, rounds=1)
    assert found.equal and 0.99 < found.difference < 1.01


def test_another_forward_is_seen():
    """It counts its calls: the second of a pair is another."""

    def counting(net, x):
        counting.calls += 1
        return net(x) + counting.calls

    counting.calls = 0
    assert not compare(Model(counting), IMAGES, rounds=1).equal


def test_running_statistics_belong_to_what_is_compared():
    def counting(net, x):
        counting.calls += 1
        net[1].running_mean.add_(counting.calls)
        return net(x)

    counting.calls = 0
    assert not compare(Model(counting), IMAGES, rounds=1).equal


def test_random_numbers_are_the_same():
    found = compare(network(nn.Dropout(), nn.ReLU()), IMAGES, rounds=1)
    assert found.equal and found.reference == "a second run"
    assert found.rounding == 0 and found.difference < 1e-5


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_numbers_of_other_generators_are_the_same(draw):
    """As of a stochastic depth by Python's generator."""
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), str(np.random.get_state())
    model = Model(lambda net, x: net(x * draw()) if draw() < 0.5 else net(x + draw()))
    found = compare(model, IMAGES, rounds=1)
    assert found.equal and found.reference == "float64" and 0 < found.difference < 4 * found.rounding
    assert before == (random.getstate(), str(np.random.get_state()))


def test_a_model_that_knows_no_float64():
    found = compare(Model(lambda net, x: net(x) @ torch.ones(12, 2)), IMAGES, rounds=1)
    assert found.equal and found.reference == "a second run"


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_an_older_weight_norm():
    """Its weights are computed, and could not be copied."""
    model = nn.Sequential(*(nn.utils.weight_norm(nn.Conv2d(3, 3, 3)) for _ in range(2)))
    found = compare(model, IMAGES, rounds=1)
    assert found.equal and found.reference == "float64" and max(found.difference, found.rounding) < 1e-4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_backward_starts_from_the_outputs_layout(layout):
    """As in `predict_memory`, where a loss would give it."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ELU(), nn.Conv2d(8, 8, 3), nn.ELU())
    images = IMAGES.contiguous(memory_format=layout)
    found = compare(model, images, rounds=1)
    assert found.peak == tuple(predict_memory(model, images, max_cost=c).peak for c in (None, 0))


def test_a_bias_before_a_norm_does_not_hide_the_others():
    """Its gradient is rounding alone, so that its own relative difference would be about 1."""
    assert compare(network(), IMAGES, rounds=1).rounding < 1e-4


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    others: dict


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: {"a": [y, y.detach()], "b": None},
        lambda y: Result(y, {"mean": (y.mean(), 3)}),
        lambda y: (y, Result(y + 1, {})),
    ],
    ids=["dict", "dataclass", "tuple"],
)
def test_outputs_of_any_form(wrap):
    model = Model(lambda net, x, *, scale, more: wrap(net(x) * scale + more["y"][0]))
    found = compare(model, IMAGES, rounds=1, scale=2.0, more={"y": (torch.ones(1, requires_grad=True), "z")})
    assert found.equal and found.difference < 1e-5 and found.reference == "float64"


def test_within_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        found = compare(network(), IMAGES, rounds=1)
    assert found.equal and found.reference == "float64" and found.rounding > 1e-4
    predicted = predict_memory(network(), IMAGES, autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):  # whose copies of weights would stay until its end
        assert predict_memory(network(), IMAGES, autocast=torch.bfloat16) == predicted
    assert (found.held[0], found.peak[0]) == predicted


def changing(net, x):
    """Changes a parameter and a buffer, replaces another buffer, sets eval mode, draws numbers."""
    changing.calls += 1
    with torch.no_grad():
        net[0].weight.add_(torch.rand(()))
    net[1].running_mean.mul_(0.5)
    net[1].running_var = net[1].running_var + 1
    if changing.calls == changing.fails:
        raise LookupError("no more")
    y = net(x)
    net.eval()
    return y


@pytest.mark.parametrize("fails", [0, 1, 2, 3, 6])
def test_everything_is_as_it_was(fails):
    model = Model(changing, nn.Dropout())
    changing.calls, changing.fails = 0, fails
    first, second, *_ = model.parameters()
    first.grad = grad = torch.randn_like(first)
    model.network[4].eval()
    x, values = IMAGES.clone().requires_grad_(), grad.clone()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    buffers, training = list(model.buffers()), [m.training for m in model.modules()]
    numbers = torch.get_rng_state()
    if fails:
        with pytest.raises(LookupError):
            compare(model, x, rounds=1)
    else:
        assert compare(model, x, rounds=1).equal
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(b is c for b, c in zip(model.buffers(), buffers, strict=True))
    assert [m.training for m in model.modules()] == training
    assert first.grad is grad and torch.equal(grad, values) and second.grad is None
    assert x.grad is None and torch.equal(x, IMAGES)
    assert torch.equal(torch.get_rng_state(), numbers)


def test_a_tensor_that_is_passed_twice_and_changed_in_place():
    class Shift(nn.Conv2d):
        def forward(self, x, other):
            x += 1
            return super().forward(other)

    x = torch.randn(2, 3, 5, 5)
    found = compare(Shift(3, 4, 3), x, x, rounds=1)
    assert found.equal and found.reference == "float64" and found.rounding < 1e-5


def test_inputs_changed_in_place_and_no_grad_around():
    model = Model(lambda net, x: net(x.mul_(2)))
    x = IMAGES.clone()
    with torch.no_grad():
        assert compare(model, x, rounds=1).equal
    assert torch.equal(x, IMAGES)


@dataclasses.dataclass
class Batch:
    images: torch.Tensor


def test_arguments_that_are_no_trees():
    """A dataclass whose tensor forward changes, a generator that it draws from, a module that it trains."""
    batch, generator, other = Batch(IMAGES.clone()), torch.Generator().manual_seed(1), nn.Conv2d(8, 2, 1)
    state = generator.get_state()

    def forward(net, batch, generator, other):
        return other(net(batch.images.mul_(2))) * torch.rand(1, generator=generator)

    assert compare(Model(forward), batch, generator, other, rounds=1).equal
    assert torch.equal(batch.images, IMAGES) and torch.equal(generator.get_state(), state)
    assert other.weight.grad is None


def test_a_parameter_that_the_model_does_not_own():
    other = nn.Parameter(torch.ones(8, 1, 1))
    other.grad = grad = torch.ones(8, 1, 1)
    model = Model(lambda net, x: net(x) * other)
    found = compare(model, IMAGES, rounds=1)
    assert found.equal and other.grad is grad and torch.equal(grad, torch.ones(8, 1, 1))
    other.grad = None
    assert compare(model, IMAGES, rounds=1).peak == found.peak and other.grad is None


def test_complex_numbers_and_nan():
    model = nn.Linear(3, 2, dtype=torch.complex64)
    found = compare(model, torch.randn(4, 3, dtype=torch.complex64), rounds=1)
    assert found.equal and found.difference == 0
    assert compare(network(), torch.full_like(IMAGES, math.nan), rounds=1).equal


def test_gradients_whose_squares_are_infinite():
    found = compare(Model(lambda net, x: net(x) * 1e25), IMAGES, rounds=1)
    assert found.difference < 1e-4 and found.rounding < 1e-4


@pytest.mark.parametrize("other", [lambda y: -y, lambda y: y.double(), lambda y: (y, y.detach())])
def test_a_model_that_returns_something_else_under_remat(other):
    def forward(net, x):
        y = net(x)
        return other(y) if torch.overrides._get_current_function_mode_stack() else y

    model = Model(forward)
    model.network = nn.Conv2d(3, 2, 3)  # without buffers, which come after what is returned
    assert not compare(model, IMAGES, rounds=1).equal


def test_plain_must_be_plain():
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    for context in (remat(), hooks):
        with context, pytest.raises(RuntimeError, match="^compare must be called outside of remat and of"):
            compare(network(), IMAGES, rounds=1)


@pytest.mark.parametrize("tool", [compare, predict_memory])
def test_a_model_that_enters_remat_itself(tool):
    """There plain PyTorch would not be plain, and the inner context's price would be taken."""
    model = Model(remat(max_cost=0)(lambda network, x: network(x)))
    with pytest.raises(
        RuntimeError, match=f"^{tool.__name__} enters remat itself: pass it a model that does"
    ):
        tool(model, IMAGES)
    with remat():  # it works as before
        assert model(IMAGES).requires_grad


WRAPPERS = {
    "autocast": torch.autocast("cpu", torch.bfloat16),
    "compile": torch.compile,
    "lambda": lambda forward: lambda x: forward(x),
    "checkpoint": lambda forward: lambda x: checkpoint(forward, x, use_reentrant=False),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("tool", [compare, predict_memory])
def test_a_wrapped_forward_leads_to_the_original(tool, wrap):
    """A copy of the model would run the original, and train it."""
    model = network()
    model.forward = wrap(model.forward)
    with pytest.raises(ValueError, match="^model must allow copy.deepcopy, got one whose copy still"):
        tool(model, IMAGES)
    assert model[1].num_batches_tracked == 0 and not model[1].running_mean.any()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("tool", [compare, predict_memory])
def test_a_hook_that_changes_the_original_in_backward(tool):
    model = network()

    def shrink(*_):
        with torch.no_grad():
            weight.mul_(0.5)

    weight, before = model[3].weight, model[3].weight.detach().clone()
    model.register_full_backward_hook(shrink)
    with pytest.raises(ValueError, match="^model must allow copy.deepcopy, got one whose copy still"):
        tool(model, IMAGES)
    assert torch.equal(weight, before)


@pytest.mark.skipif(torch.__version__ < "2.10", reason="PyTorch 2.9 compiles it with the first try's mode")
def test_a_higher_order_operator():
    model = Model(lambda net, x: torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (net(x),)))
    assert compare(model, IMAGES, rounds=1).equal


@pytest.mark.parametrize("tool", [compare, predict_memory])
def test_a_bound_method_is_copied_with_its_module(tool):
    model = network()
    model[0].forward = model[0].forward  # as some libraries patch it
    assert tool(model, IMAGES)
    assert model[0].weight.grad is None and model[1].num_batches_tracked == 0


def test_a_tensor_that_is_passed_twice_stays_one():
    model = Model(lambda net, x, y: net(x) if x is y else net(x) + net(y))
    found = compare(model, IMAGES, IMAGES, rounds=1)
    assert found.held[0] == compare(network(), IMAGES, rounds=1).held[0]


def test_sparse_tensors():
    class Graph(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("neighbours", torch.eye(4).to_sparse())

        def forward(self, x):
            return torch.sparse.mm(self.neighbours, super().forward(x))

    assert compare(Graph(), torch.randn(4, 4), rounds=1).equal
    with pytest.raises(ValueError, match="^model must make strided tensors alone, got one with layout torch"):
        predict_memory(nn.Embedding(3, 4, sparse=True), torch.zeros(5, dtype=torch.int64))


def test_a_price_of_any_kind_of_number():
    found = compare(network(), IMAGES, max_cost=Fraction(1, 2), rounds=1)
    assert found.max_cost == 0.5 and "remat(max_cost=0.5): forward equal" in str(found)


def test_a_tool_in_a_model():
    def forward(network, x):
        predict_memory(nn.Conv2d(3, 2, 1), tuple(x.shape), max_cost=0)
        return network(x)

    assert predict_memory(Model(forward), tuple(IMAGES.shape)) == predict_memory(network(), IMAGES)


def test_inside_of_inference_mode():
    with torch.inference_mode():
        assert compare(network(), IMAGES.clone(), rounds=1).equal


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare(len, IMAGES), "model must be a torch.nn.Module, got <class 'builtin"),
        (lambda: compare(network(), IMAGES, rounds=0), "rounds must be an int, at least 1, got 0"),
        (
            lambda: compare(network(), IMAGES, max_cost=-1),
            "max_cost must be a number of multiplications per value, at least 0, got -1",
        ),
        (
            lambda: compare(nn.ReLU(), IMAGES),
            "model must return a tensor that requires a gradient, got one without a gradient",
        ),
        (
            lambda: compare(Model(lambda net, x, lock: net(x)), IMAGES, threading.Lock()),
            "model and its arguments must allow copy.deepcopy, got TypeError: cannot pickle",
        ),
        (lambda: compare(network(), IMAGES.to("meta")), "model and inputs must have values, got device meta"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
