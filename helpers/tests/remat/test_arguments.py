"""Arguments: numbers as tensors, wrong ones, ones that the caller changes later."""

import contextlib
import copy
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import remat
from helpers.tests.remat.support import Net, X, check, check_scenario, image, leaf, named, network, under


def test_a_number_that_is_a_tensor():
    """It may change after the call."""

    def forward(self, x):
        value = torch.tensor(2.0)
        out = F.silu(torch.addcmul(self.beta, self.gamma, F.silu(self.c(x)), value=value))
        value.fill_(50)
        return out

    vectors = {v: nn.Parameter(torch.rand(8, 1, 1)) for v in ("gamma", "beta")}
    check(lambda: Net(forward, c=nn.Conv2d(3, 8, 3), **copy.deepcopy(vectors)), X)


@pytest.mark.parametrize("move", [torch.roll, torch.flip])
def test_numbers_that_are_tensors_in_a_list(move):
    """They may change after the call."""

    def forward(self, x):
        one = torch.tensor(1)
        args = ([one], [2]) if move is torch.roll else ([one + 1],)
        out = F.silu(move(F.silu(self.c(x)), *args))
        args[0][0].add_(1)
        return out

    check(lambda: Net(forward, c=nn.Conv2d(3, 8, 3)), X)


@pytest.mark.parametrize("activation", [nn.LeakyReLU(-0.1, inplace=True), nn.ELU(-0.5, inplace=True)])
@pytest.mark.parametrize("cost", [None, 0])
def test_a_negative_slope_in_place_is_pytorchs_error(activation, cost):
    with under(cost):
        out = activation(nn.BatchNorm2d(3)(image(2, 3, 5, 5).float()))
    with pytest.raises(RuntimeError, match="In-place"):
        out.sum().backward()


@pytest.mark.parametrize("call", [
    lambda y: F.pad(y, (1, 1), "constant", torch.tensor(0.5)),
    lambda y: F.interpolate(y, scale_factor=torch.tensor(2.0), recompute_scale_factor=True),
])  # fmt: skip
def test_a_number_as_a_tensor(call):
    y = image(2, 3, 4, 4, dtype=torch.float32).requires_grad_()
    with remat():
        out = call(y * 1)
    assert torch.equal(out, call(y * 1)) and out.requires_grad


@pytest.mark.parametrize("setting", [{"eps": -1.0}, {"eps": 0.0}, {"training": 2}, {"training": "no"}])
def test_a_norm_that_pytorch_refuses_is_refused(setting):
    y, outcomes = image(2, 3, 5, 5, dtype=torch.float32).requires_grad_(), []
    for cost in (None, 0):
        running = torch.zeros(3), torch.ones(3)
        with under(cost):
            try:
                outcome = F.batch_norm(y, *running, **{"training": True, **setting}).isnan().any().item()
            except (TypeError, ValueError) as error:
                outcome = f"{type(error).__name__}: {error}"
        outcomes.append((outcome, running[0].tolist(), running[1].tolist()))
    assert outcomes[0] == outcomes[1]


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

    check_scenario(scenario)


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

    check_scenario(scenario)


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

    check_scenario(scenario)


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

    check_scenario(scenario)


WRONG = {
    "alpha 0": lambda x: F.celu(x, 0),
    "stride 0": lambda x: F.conv_transpose2d(x, torch.ones(3, 2, 1, 1), stride=0),
    "empty weight": lambda x: F.conv2d(x, torch.ones(0, 3, 1, 1)),
    "a pool's stride 0": lambda x: F.max_pool2d(x, 1, 0),
    "a pool's stride 0, 1d": lambda x: F.max_pool1d(x.flatten(2), 2, 0),
    "a pool's padding, 1d": lambda x: F.max_pool1d(x.flatten(2), 2, 1, 2),
    "a set of sizes": lambda x: F.max_pool2d(x, {2}),
    "a range of sizes": lambda x: F.max_pool2d(x, 2, 2, range(2)),
    "sizes that are a tensor": lambda x: F.adaptive_avg_pool2d(x, torch.ones(3)),
    "shapes": lambda x: x * torch.ones(2, 5, 1, 1, requires_grad=True),
    "a pad in a set": lambda x: F.pad(x, {1, 2}, "reflect"),
    "a pad of bools": lambda x: F.pad(x, (True, 1.0, 1, 1), "reflect"),
    "no argument of a pool": lambda x: torch.max_pool2d(x, 2, circular=True),
    "ceil_mode 1": lambda x: F.max_pool2d(x, 2, ceil_mode=1),
    "ceil_mode of two": lambda x: F.max_pool2d(x, 2, ceil_mode=torch.ones(2)),
    "ceil_mode 1, mean": lambda x: F.avg_pool2d(x, 2, ceil_mode=1),
    "training 1": lambda x: F.dropout(x, 0.5, 1),
    "reflection with a value": lambda x: F.pad(x, (1, 1, 1, 1), "reflect", 0.5),
    "reflection with an empty value": lambda x: F.pad(x, (1, 1, 1, 1), "reflect", ()),
    "reflection with values": lambda x: F.pad(x, (1, 1, 1, 1), "reflect", torch.ones(3)),
    "dims in an array": lambda x: F.glu(x, np.array([1, 2])),
    "dims in a tensor": lambda x: F.glu(x, torch.ones(3)),
    "dims in a tensor, norm": lambda x: F.normalize(x, dim=torch.ones(3)),
    "three sizes in a list": lambda x: F.interpolate(x, [2, 2, 2]),
    "out": lambda x: F.softplus(x, out=torch.empty_like(x)),
    "statistics that need gradients": lambda x: F.batch_norm(
        x, torch.zeros(3, requires_grad=True), torch.ones(3), training=True
    ),
    "a mean that is a number": lambda x: F.batch_norm(x, 0, torch.ones(3), training=True),
    "a mean that is a tuple": lambda x: F.batch_norm(x, (), torch.ones(3)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_get_pytorchs_error(name):
    x = torch.ones(2, 3, 4, 4, requires_grad=True)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as wanted:
        WRONG[name](x)
    with remat(), pytest.raises(wanted.type) as found:
        WRONG[name](x)
    assert str(found.value) == str(wanted.value)


EVERY_POOL = {
    "max, 1d": lambda x: F.max_pool1d(x.flatten(2), 2),
    "max": lambda x: F.max_pool2d(x, 2),
    "max, 3d": lambda x: F.max_pool3d(x.unsqueeze(4), (2, 2, 1)),
    "mean": lambda x: F.avg_pool2d(x, 2),
    "mean, 3d": lambda x: F.avg_pool3d(x.unsqueeze(4), (2, 2, 1)),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 2),
}


@pytest.mark.parametrize("pool", EVERY_POOL.values(), ids=EVERY_POOL)
def test_pools_of_no_images(pool):
    def scenario(context):
        x = leaf(X[:0])
        with context():
            out = pool(F.silu(x))
        out.square().sum().backward()
        return named(out, x.grad)

    check_scenario(scenario)


def test_a_negative_epsilon():
    """An error, but in the oldest PyTorch."""

    def scenario(context):
        x = leaf(image(2, 3, 4, 4))
        with context(), contextlib.suppress(ValueError, RuntimeError):
            out = F.batch_norm(x, x[0, :, 0, 0].detach(), torch.ones(3).double(), eps=-0.1)
            out.square().sum().backward()
        return named(x.grad)

    check_scenario(scenario)


def test_the_weight_of_an_l1_loss():
    """PyTorch does not tell function modes about it."""
    if "weight" not in inspect.signature(F.l1_loss).parameters:
        pytest.skip("this PyTorch has no such argument")

    def scenario(context):
        x, weight = leaf(), image(*X.shape, seed=1).abs()
        with context():
            losses = [F.l1_loss(x, x.detach() * 2, weight=w) for w in (weight, None)]
        sum(losses).backward()
        return named(*losses, x.grad)

    check_scenario(scenario)


def test_the_result_of_a_chain_of_products():
    """PyTorch does not tell function modes about its ``out`` either."""
    matrices = image(2, 3), image(3, 4), image(4, 5)
    out = torch.zeros(2, 5, dtype=torch.float64)
    with remat():
        product = torch.chain_matmul(*matrices, out=out)
    assert product is out
    torch.testing.assert_close(out, torch.linalg.multi_dot(matrices))


def test_the_order_of_ambiguous_dimensions():
    """Nor about this argument, after which a size of 1 is an error."""
    with remat(), pytest.raises(RuntimeError, match="unique dim order"):
        torch.zeros(1, 1, 3, 4).dim_order(ambiguity_check=True)


def test_a_list_of_one_number_is_for_all_dimensions():
    x, w = leaf(), image(4, 3, 3, 3, seed=1).requires_grad_()
    with remat() as record:
        y = F.conv2d(x, w, None, [2], (1,), dilation=[1])
    assert len(record.rows) == 1 and torch.equal(y, F.conv2d(x, w, None, 2, 1))


def test_a_padding_by_tensors():
    model = network()
    with remat() as record:
        model[1](F.pad(model[0](X), (torch.tensor(1), 1)))
    assert [row.recipe for row in record.rows if row.kept] == ["given", "conv2d", "conv2d"]


def test_a_limit_that_is_no_number():
    """The result is NaN too, and does not tell where the gradient is 0."""

    def scenario(context):
        x = leaf(torch.tensor([[0.5, 2.0], [-1.0, 3.0]], dtype=torch.float64))
        with context():
            out = F.hardtanh(F.relu(x * 2), math.nan, 1.0)
        out.sum().backward()
        return named(x.grad)

    check_scenario(scenario)
