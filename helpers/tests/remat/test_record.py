"""The price and the record: what is said, what is counted, what is refused."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers import remat
from helpers.predict import Held
from helpers.tests.remat.examples import EVERY_ACTIVATION, NORMS, example
from helpers.tests.remat.support import Net, X, block, check, counted_forward, image


def test_the_record_says_what_recomputing_costs():
    model, first, second = nn.Sequential(block(), block(8, 8)).double(), 3 * 9, 8 * 9
    with remat(first + second) as record:
        model(X)
    costs = [row.cost for row in record.rows if not row.kept]
    assert costs == [first, first, first + second, first + second]


def test_the_record_counts_the_input_of_a_frozen_convolution_and_a_linear_layers_copy():
    """PyTorch saves both."""
    x, frozen = X.float(), nn.Conv2d(8, 8, 1).requires_grad_(False)
    conv, linear = nn.Conv2d(3, 8, 3), nn.Linear(7, 4)
    with remat() as record:
        y = frozen(conv(x))
    assert record.plain_bytes == x.nbytes + y.nbytes
    with remat() as record:
        linear(y[:, :2])
    assert record.plain_bytes == y[:, :2].numel() * y.itemsize


def test_the_record_counts_the_memory_behind_a_view():
    """A half that is kept holds the whole."""
    convs = nn.ModuleList(nn.Conv1d(16, 32, 7, padding=3) for _ in range(3))

    def forward(self, x):
        for conv in self.convs:
            a, b = conv(x).chunk(2, 1)
            x = a * torch.sigmoid(b)
        return x

    held, x = Held(), image(2, 16, 200, dtype=torch.float32)
    held.ignore(x, *convs.parameters())
    with held, remat() as record:
        out = Net(forward, convs=convs)(x)
    assert record.kept_bytes == held.held - out.nbytes + x.nbytes
    assert sum(row.recipe == "view" and row.kept for row in record.rows) == 0


def test_parameters_of_a_record_can_be_swapped():
    """As `nn.Module.to` may do; swap_tensors refuses a tensor that somebody has a weak reference to."""
    model = block()
    with remat(1000) as record:
        out = model(image(2, 3, 5, 5, dtype=torch.float32)).sum()
    out.backward()
    for p in model.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().double()))
    assert record.rows and model[0].weight.dtype == torch.float64


def test_record():
    """What is kept and what is made again, by the names of the parameters."""
    model = nn.Sequential(block(), block(8, 8), nn.Conv2d(8, 2, 1))
    with remat() as record:
        model(X.float())
    kept, again = ([row for row in record.rows if row.kept == kept] for kept in (True, False))
    assert record.kept_bytes == sum(row.nbytes for row in kept) < record.plain_bytes
    assert record.plain_bytes == X.numel() * 4 + 4 * (4 * 8 * 90) * 4
    assert len(again) == 2 and all(row.nbytes == math.prod(row.shape) * 4 for row in again)
    text = str(record.names(model))
    of = [(row.recipe, record.origin(row)) for row in record.rows]
    convolutions = [("conv2d", "0.0"), ("relu", "0.1"), ("conv2d", "1.0"), ("relu", "1.1")]
    assert of == [("given", ""), *convolutions]
    assert "1.0" in text and "conv2d" in text and "relu" in text and "recomputed" in text
    with pytest.raises(ValueError, match="^model must be a torch.nn.Module, got <class 'str'>"):
        record.names("model")
    with remat() as record, torch.no_grad():
        model(X.float())
    assert str(record).startswith("no operation here needs a gradient")


FROZEN = {
    "convolution": nn.Conv2d(8, 8, 3),
    "transposed convolution": nn.ConvTranspose2d(8, 8, 3),
    "layer": nn.Sequential(nn.Flatten(2), nn.Linear(36, 5)),
    "batch norm": nn.BatchNorm2d(8),
    "batch norm, eval": nn.BatchNorm2d(8).eval(),
    "group norm": nn.GroupNorm(2, 8),
    "instance norm": nn.InstanceNorm2d(8, affine=True),
    "silu": nn.SiLU(),
    "relu": nn.ReLU(inplace=True),
    "prelu": nn.PReLU(),
    "dropout": nn.Dropout(0.5),
    "dropout by channel": nn.Dropout2d(0.5),
    "max pool": nn.MaxPool2d(2),
    "pool": nn.AvgPool2d(2),
    "adaptive pool": nn.AdaptiveAvgPool2d(2),
    "padding": nn.ReflectionPad2d(1),
    "upsampling": nn.Upsample(scale_factor=2.0),
    "product": Net(lambda self, x: x * x[:, :1] / (x + 9)),
    "concatenation": Net(lambda self, x: torch.cat([x + 1, x * 2], 1)),
    "cast": Net(lambda self, x: x.float().flatten(1).square().clamp(0, 1)),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_needs_no_gradient_is_left_alone(name):
    """Nothing is recorded, and nothing held but the result."""
    model, x, held = FROZEN[name].double().requires_grad_(False), image(4, 8, 6, 6), Held()
    held.ignore(x, *model.parameters(), *model.buffers())
    with held, remat(9) as record:
        out = model(x)
        assert held.held <= out.nbytes
    assert not record.rows and record.plain_bytes == 0 and out.grad_fn is None


@pytest.mark.parametrize("norm", ["eval", "frozen", "no affine, eval", "no running statistics", "two groups"])
def test_the_record_counts_every_norms_input(norm):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), NORMS[norm](), nn.Conv2d(8, 2, 1)), X.float()
    with remat() as record:
        model(x)
    assert record.plain_bytes == x.nbytes + 2 * (4 * 8 * 8 * 7) * 4


@pytest.mark.parametrize("trained", [True, False])
def test_the_record_counts_autocasts_copies_of_weights(trained):
    """Of a frozen one, one for each call."""
    model, x = nn.Sequential(block(), block(8, 24), nn.Flatten(), nn.Linear(2160, 9)), X.float()
    model[1][0].weight.requires_grad_(trained)
    for more in (lambda x: x, lambda x: model[1][0](model[0](x))):  # one weight is cast twice
        with Held() as held:
            held.ignore(x, *model.parameters(), *model.buffers())
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x), more(x)
            plain = held.held - sum(t.nbytes for t in out if t is not x)
        with torch.autocast("cpu", torch.bfloat16), remat() as record:
            model(x), more(x)
        assert abs(plain - record.plain_bytes) < 2048


# The record is about operations that remat knows; of these two it knows nothing.
COUNTED = [name for name in EVERY_ACTIVATION if "threshold" not in name and name != "dropout_"]


@pytest.mark.parametrize("name", COUNTED)
def test_the_record_counts_what_plain_pytorch_holds(name):
    model = nn.Sequential(block(activation=EVERY_ACTIVATION[name]), nn.Conv2d(8, 2, 1)).float()
    x = X.float()
    out, plain = counted_forward(model, x, None)
    with remat() as record:
        model(x)
    vectors = 3 * 8 * 4  # a norm's statistics; PReLU's weight is a parameter
    assert 0 <= plain.held - out.nbytes - (record.plain_bytes - x.nbytes) <= vectors


@pytest.mark.parametrize("max_cost", [-1, float("nan"), True, "3", None, [0], 1j, -float("inf")])
def test_price_that_is_none(max_cost):
    message = "^max_cost must be a number of multiplications per value, at least 0, got "
    with pytest.raises(ValueError, match=message):
        remat(max_cost=max_cost)


def test_the_price_is_forgotten():
    with pytest.raises(ValueError, match=r"got <function .*\(write @remat\(\), or with remat\(\): model"):
        remat(test_record)


async def a_coroutine():
    pass


async def an_async_generator():
    yield


@pytest.mark.parametrize("function", [a_coroutine, an_async_generator, 5, None])
def test_what_it_cannot_decorate(function):
    with pytest.raises(TypeError, match="^remat decorates a function that is not async, got "):
        remat()(function)


@pytest.mark.parametrize("max_cost", [0, 0.5, 64, np.int64(64), 1e9, float("inf")])
def test_prices(max_cost):
    check(example("residual"), X, costs=[max_cost])


def test_the_price_of_a_transposed_convolution():
    """Its mean: with a stride of 2, a pixel takes a quarter of the kernel."""
    model = nn.Sequential(
        nn.ConvTranspose2d(8, 6, 4, 2, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 1, 1)
    )
    with remat(1e9) as record:
        model(image(2, 8, 5, 4, dtype=torch.float32))
    costs = {row.recipe: row.cost for row in record.rows if not row.kept}
    assert costs == {"conv_transpose2d": 8 / 2 * 4 * 4 / 4, "relu": 8 / 2 * 4 * 4 / 4}


def test_the_price_is_a_limit():
    """What follows a convolution may cost a little more, but not the convolution itself."""
    for channels, cost, kept in ((64, 64, 0), (66, 64, 1), (66, 66, 0)):
        model = nn.Sequential(nn.Conv2d(channels, 65, 1), nn.Conv2d(65, 3, 1))
        with remat(cost) as record:
            model(image(2, channels, 5, 5, dtype=torch.float32))
        assert sum(row.kept for row in record.rows if row.recipe == "conv2d") == kept


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pool", [nn.AvgPool2d(3, 2, 1), nn.ReflectionPad2d(1)])
def test_an_average_or_a_pad_by_pixels_needs_nothing(pool, layout):
    x = image(2, 3, 6, 6).to(memory_format=layout).requires_grad_()
    with remat() as record:
        pool(x * 2)
    assert record.rows == [] and record.plain_bytes == x.nbytes
