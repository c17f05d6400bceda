"""helpers.conv and helpers.batch_norm against PyTorch's own operators and against finite differences."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.autograd.function import once_differentiable

from helpers import (
    batch_norm_backward,
    batch_norm_forward,
    batch_stats,
    conv2d_backward,
    update_running_stats,
)
from helpers.batch_norm import batch_norm_sums, piece_bytes
from helpers.tests.kernels.rounding import apart, rounding

GEOMETRIES = [
    {"stride": s, "padding": p, "dilation": d, "groups": g}
    for s, p, d, g in itertools.product((1, 2, (2, 1)), (0, (1, 2)), (1, (1, 2)), (1, 2))
]


def randn(*shape, **kwargs):
    return torch.randn(*shape, dtype=torch.float64, **kwargs)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv2d_backward_equals_autograd(geometry):
    x, b = randn(2, 4, 7, 9, requires_grad=True), randn(6, requires_grad=True)
    w = randn(6, 4 // geometry["groups"], 3, 2, requires_grad=True)
    y = F.conv2d(x, w, b, **geometry)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, w, b), dy)
    found = conv2d_backward(dy, x.detach(), w.detach(), **geometry, needs=(True, True, True))
    torch.testing.assert_close(found, expected)


class Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.conv2d(x, w, stride=2, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return conv2d_backward(dy, *ctx.saved_tensors, stride=2, padding=1)[:2]


def test_conv2d_backward_gradcheck():
    assert gradcheck(
        Conv2d.apply,
        (randn(2, 3, 5, 4, requires_grad=True), randn(2, 3, 3, 2, requires_grad=True)),
        fast_mode=False,
    )


@pytest.mark.parametrize("needs", [*itertools.product((False, True), repeat=3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conv2d_backward_gives_only_what_is_needed(dtype, needs):
    x, w, dy = (torch.randn(shape, dtype=dtype) for shape in ((3, 4, 8, 8), (4, 4, 3, 3), (3, 4, 6, 6)))
    found = conv2d_backward(dy, x, w, needs=needs)
    assert [grad is not None for grad in found] == [*needs]


def test_depthwise_gradients_of_an_empty_batch():
    x, w = torch.randn(0, 4, 9, 9), torch.randn(4, 1, 5, 5)
    dx, dw, _ = conv2d_backward(torch.randn(0, 4, 5, 5), x, w, groups=4)
    assert dx.shape == x.shape and torch.equal(dw, torch.zeros_like(w))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 0}, "non-positive stride is not supported"),
        ({"padding": "same"}, "padding must be an int or a pair of ints, got 'same'"),
        ({"padding": (1, 2, 3)}, r"expected padding .* 2 values .* got padding=\[1, 2, 3\]"),
        ({"groups": 2}, "Given groups=2, expected weight to be divisible by 2 at dimension 0"),
        ({"weight": randn(3, 1, 3, 3)}, "to have 1 channels, but got 2 channels"),
        ({"dilation": 4}, r"Calculated padded input size per channel: \(5 x 5\). Kernel size: \(9 x 9\)"),
        ({"grad_out": randn(1, 3, 4, 3)}, r"grad_out must have the output's shape \(1, 3, 3, 3\)"),
        ({"input": randn(2, 5, 5)}, r"input must be \(N, C, H, W\), floating point, got shape \(2, 5, 5\)"),
        (
            {"weight": randn(3, 2, 3, 3).float()},
            "weight must be a tensor, torch.float64 on cpu like input, got torch.float32",
        ),
        ({"grad_out": None}, "grad_out must be a tensor, .* got <class 'NoneType'>"),
        ({"needs": (True, False)}, r"needs must be three bools, .* got \(True, False\)"),
        ({"needs": True}, "needs must be three bools, .* got True"),
    ],
)
def test_conv2d_backward_names_the_bad_argument(change, message):
    arguments = {"grad_out": randn(1, 3, 3, 3), "input": randn(1, 2, 5, 5), "weight": randn(3, 2, 3, 3)}
    with pytest.raises((ValueError, RuntimeError), match=message):
        conv2d_backward(**{**arguments, **change})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_equals_pytorch(training, affine):
    y = (3 * randn(4, 5, 3, 7) + 2).requires_grad_()
    gamma, beta = (randn(5, requires_grad=True), randn(5, requires_grad=True)) if affine else (None, None)
    running = [randn(5), torch.rand(5, dtype=torch.float64) + 0.5]
    ours = [r.clone() for r in running]
    mean, var = batch_stats(y.detach()) if training else ours
    z = F.batch_norm(y, *running, gamma, beta, training, momentum=0.3, eps=1e-3)
    dz = torch.randn_like(z)
    found = batch_norm_forward(y, gamma, beta, mean, var, 1e-3)
    torch.testing.assert_close(found, z)
    found = batch_norm_backward(
        dz, y.detach(), None if gamma is None else gamma.detach(), mean, var, 1e-3, training
    )
    inputs = (y, gamma, beta) if affine else (y,)
    torch.testing.assert_close(found[: len(inputs)], torch.autograd.grad(z, inputs, dz))
    if training:
        update_running_stats(*ours, mean, var, y.numel() // 5, momentum=0.3)
        torch.testing.assert_close(ours, running)


class BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, gamma, beta):
        stats = batch_stats(y)
        ctx.save_for_backward(y, gamma, *stats)
        return batch_norm_forward(y, gamma, beta, *stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        return batch_norm_backward(dz, *ctx.saved_tensors)


def test_batch_norm_gradcheck():
    inputs = [
        randn(s, requires_grad=True) if isinstance(s, int) else randn(*s, requires_grad=True)
        for s in ((3, 2, 3, 1), 2, 2)
    ]
    assert gradcheck(BatchNorm.apply, inputs, fast_mode=False)


def test_batch_norm_backward_never_writes_to_its_arguments():
    dz, y = randn(1, 3, 1, 1).expand(2, 3, 4, 4), randn(2, 3, 4, 4)
    before = y.clone(), dz.clone()
    batch_norm_backward(dz, y, None, *batch_stats(y))
    assert torch.equal(y, before[0]) and torch.equal(dz, before[1])


def check_stats(y):
    """Mean and variance lose no more than the rounding of the values' deviations, and of the mean itself."""
    exact, terms = y.double(), y.numel() // y.shape[1]
    mean, var = batch_stats(y)
    exact_var, exact_mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    allowed = rounding(torch.float32, terms)
    assert ((var - exact_var).abs() <= allowed * exact_var).all()
    eps = torch.finfo(torch.float32).eps
    assert ((mean - exact_mean).abs() <= allowed * exact_var.sqrt() + eps * exact_mean.abs()).all()


def test_batch_stats_of_a_channel_far_from_zero():
    check_stats(torch.randn(8, 3, 16, 16) + 1000)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("first", [slice(0, 1), slice(0, 300)])
def test_batch_stats_where_the_first_images_are_unlike_the_others(first, layout):
    """Blank ones, far from the mean."""
    y = (torch.randn(4096, 128, 2, 2) + 100).contiguous(memory_format=layout)
    y[first] = 0
    assert y.nbytes > piece_bytes(y)
    check_stats(y)
    check_stats(y[:400])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0, 1, 100, 1000])
def test_batch_stats_of_a_batch_of_many_bytes(offset, layout):
    """In pieces, the last of them smaller; near 0 or far from it, and constant."""
    y = torch.randn(37, 16, 48, 48).contiguous(memory_format=layout)
    y[:, 3] = 0.01 * y[:, 3] + 0.01 * offset
    y[:, 5] = 0
    assert y.nbytes > piece_bytes(y)
    check_stats(y)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_statistics_and_gradients_can_be_differentiated(layout):
    """Where a graph is wanted, the library's sums, which have none, are not taken."""
    y, dz = (torch.randn(3, 2, 4, 5, dtype=torch.float64) for _ in range(2))
    gamma = torch.rand(2, dtype=torch.float64) + 0.5

    def function(y, dz):
        y = y.contiguous(memory_format=layout)
        mean, var = batch_stats(y)
        z = batch_norm_forward(y, gamma, None, mean, var)
        return z, *batch_norm_backward(dz, y, gamma, mean, var)

    assert torch.autograd.gradcheck(function, (y.requires_grad_(), dz.requires_grad_()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_many_values_keep_their_digits(dtype, layout):
    torch.manual_seed(0)
    dz, y = ((torch.randn(32, 4, 56, 56) + 2).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    mean = y.float().mean((0, 2, 3))
    found, exact = batch_norm_sums(dz, y, mean), batch_norm_sums(dz.double(), y.double(), mean.double())
    for f, e in zip(found, exact, strict=True):
        assert (f - e).norm() <= 2e-6 * e.norm() + 2e-6 * dz.double().norm()


@pytest.mark.parametrize("mean", [0, 3, 30, 1000])
def test_a_gradient_far_from_zero(mean):
    """The norm subtracts most of dz: dy's errors are in dz's last digits, and their mean is close to 0."""
    torch.manual_seed(0)
    y, dz, gamma = torch.randn(33, 32, 17, 19), torch.randn(33, 32, 17, 19) + mean, torch.rand(32) + 0.5
    dy, _, _ = batch_norm_backward(dz, y, gamma, *batch_stats(y))
    exact, _, _ = batch_norm_backward(*(t.double() for t in (dz, y, gamma)), *batch_stats(y.double()))
    eps = torch.finfo(torch.float32).eps
    assert (dy.double() - exact).norm() <= 0.5 * eps * (dz.norm() + (dz - mean).norm())
    means = dy.double().mean((0, 2, 3))
    assert means.abs().max() <= 0.4 * eps * (mean + 1)
    assert means.square().mean().sqrt() <= 0.11 * eps * (mean + 1)


def test_a_gradient_of_a_tiny_norm():
    """γ/σ alone is close to the smallest number; γ/(σ m) would be below it."""
    y, dz, gamma = torch.randn(8, 2, 32, 32), torch.randn(8, 2, 32, 32) + 3, torch.full((2,), 1e-36)
    dy, _, _ = batch_norm_backward(dz, y, gamma, *batch_stats(y))
    y, dz = y.double(), dz.double()
    exact, _, _ = batch_norm_backward(dz, y, gamma.double(), *batch_stats(y))
    assert apart(dy * 2.0**100, exact * 2.0**100) < 1e-6


def test_a_mean_close_to_zero():
    torch.manual_seed(0)
    y = torch.randn(200, 4, 38, 38)
    y -= y.mean((0, 2, 3), keepdim=True)
    mean, _ = batch_stats(y)
    assert (mean - y.double().mean((0, 2, 3))).abs().max() < 2e-9


def test_infinite_running_statistics_stay_infinite():
    running = [torch.full((3,), math.inf), torch.full((3,), math.inf)]
    update_running_stats(*running, THREE, THREE, 8, 0.1)
    assert running[0].isinf().all() and running[1].isinf().all()


def test_statistics_and_gradients_under_vmap():
    y, dz = torch.randn(2, 5, 4, 3, 6, 6)

    def function(y, dz):
        mean, var = batch_stats(y)
        return mean, var, *batch_norm_backward(dz, y, None, mean, var)

    wanted = zip(*(function(*pair) for pair in zip(y, dz, strict=True)), strict=True)
    for found, want in zip(torch.func.vmap(function)(y, dz), wanted, strict=True):
        torch.testing.assert_close(found, torch.stack(want))


def test_batch_stats_of_half_precision_are_float32():
    mean, var = batch_stats(torch.randn(4, 3, 5, 5).bfloat16())
    assert mean.dtype == var.dtype == torch.float32


def test_batch_norm_of_no_images():
    y, dz = torch.randn(2, 0, 3, 4, 4)
    dy, dgamma, dbeta = batch_norm_backward(dz, y, None, torch.zeros(3), torch.ones(3))
    assert dy.shape == y.shape and not dgamma.any() and not dbeta.any()
    none = torch.zeros(0)
    assert batch_norm_backward(dz[:, :0], y[:, :0], none, none, none)[1].shape == (0,)


Y, THREE, FOUR = torch.zeros(2, 3, 4, 4), torch.ones(3), torch.ones(4)
with torch.inference_mode():
    INFERENCE = torch.ones(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": FOUR}, r"mean must have shape \(3,\), floating point, got \(4,\)"),
        ({"var": FOUR}, r"var must have shape \(3,\), floating point, got \(4,\)"),
        ({"weight": FOUR}, r"weight must have shape \(3,\), floating point, got \(4,\)"),
        ({"var": None}, r"var must have shape \(3,\), floating point, got <class 'NoneType'>"),
        ({"mean": THREE.long()}, r"mean must have shape \(3,\), floating point, got torch.int64"),
        ({"mean": torch.ones(())}, r"mean must have shape \(3,\), floating point, got \(\)"),
        ({"var": THREE.to("meta")}, "var must be on cpu, like the others, got one on meta"),
        ({"mean": THREE.half()}, "mean must be at least as wide as input, torch.float32, got torch.float16"),
        ({"var": THREE.bfloat16()}, "var must be at least as wide as input, torch.float32, got torch.bfl"),
        ({"input": Y[0]}, r"input must be \(N, C, H, W\), floating point, got shape \(3, 4, 4\)"),
        ({"input": Y.long()}, r"input must be .* floating point, got .* torch.int64"),
        ({"eps": -1e-5}, "eps must be a number, at least 0, got -1e-05"),
        ({"eps": math.nan}, "eps must be a number, at least 0, got nan"),
    ],
)
def test_batch_norm_names_the_bad_argument(change, message):
    arguments = {"input": Y, "weight": None, "mean": THREE, "var": THREE, **change}
    with pytest.raises(ValueError, match=f"^{message}"):
        batch_norm_forward(bias=None, **arguments)
    with pytest.raises(ValueError, match=f"^{message}"):
        batch_norm_backward(grad_out=Y, **arguments)


@pytest.mark.parametrize(
    ("dz", "got"), [(Y[:1], r"\(1, 3, 4, 4\) on cpu"), (Y.to("meta"), r"\(2, 3, 4, 4\) on meta")]
)
def test_batch_norm_backward_names_a_bad_gradient(dz, got):
    message = rf"^grad_out must have input's shape, \(2, 3, 4, 4\) on cpu, got {got}"
    with pytest.raises(ValueError, match=message):
        batch_norm_backward(dz, Y, None, THREE, THREE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"var": THREE[:1]}, r"var must have shape \(3,\), floating point, got \(1,\)"),
        ({"running_var": FOUR}, r"running_var must have shape \(3,\), floating point, got \(4,\)"),
        ({"running_var": THREE.long()}, "running_var must have .* floating point, got torch.int64"),
        ({"running_var": THREE.to("meta")}, "running_var must be on cpu, like the others, got one on meta"),
        ({"running_var": THREE[:1].expand(3)}, "running_var must have memory .* got an expanded tensor"),
        ({"running_var": INFERENCE}, "running_var must not be an inference tensor"),
        ({"mean": None}, "mean must be a tensor .* got <class 'NoneType'>"),
        ({"momentum": True}, "momentum must be a number from 0 to 1 .*, got True"),
        ({"m": True}, "m must be a whole number of values, at least 1, got True"),
        ({"m": math.inf}, "m must be a whole number of values, at least 1, got inf"),
        ({"momentum": THREE}, "momentum must be a number from 0 to 1 .*, got tensor"),
        ({"m": 0}, "m must be a whole number of values, at least 1, got 0"),
        ({"momentum": 2.0}, "momentum must be a number from 0 to 1 .*, got 2.0"),
        ({"momentum": "a"}, "momentum must be a number from 0 to 1 .*, got 'a'"),
    ],
)
def test_update_running_stats_names_the_bad_argument_and_changes_nothing(change, message):
    arguments = {"running_mean": THREE.clone(), "running_var": THREE, "mean": 2 * THREE, "var": THREE}
    arguments |= {"m": 8, "momentum": 0.1, **change}
    with pytest.raises(ValueError, match=f"^{message}"):
        update_running_stats(**arguments)
    assert torch.equal(arguments["running_mean"], THREE)


def test_the_variance_of_a_single_value_is_taken_as_it_is():
    running_mean, running_var = THREE.clone(), THREE.clone()
    update_running_stats(running_mean, running_var, 2 * THREE, 3 * THREE, 1, 0.5)
    assert torch.equal(running_mean, 1.5 * THREE) and torch.equal(running_var, 2 * THREE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_in_half_precision_are_rounded_once(dtype):
    torch.manual_seed(0)
    running, new = torch.rand(999).to(dtype), torch.rand(999)
    wanted = (0.7 * running.double() + 0.3 * new.double()).to(dtype)
    running_mean, running_var = running.clone(), running.clone()
    update_running_stats(running_mean, running_var, new, new * (7 / 8), 8, 0.3)
    for found in (running_mean, running_var):
        assert (found == wanted).float().mean() > 0.99


def test_a_momentum_of_any_kind_of_number():
    running = [torch.zeros(3), torch.zeros(3)]
    update_running_stats(*running, 2 * THREE, THREE, 8, Fraction(1, 2))
    assert torch.equal(running[0], THREE)


@pytest.mark.parametrize("y", [Y[0], Y[:0], Y.long(), [1.0]])
def test_batch_stats_names_the_bad_argument(y):
    with pytest.raises(ValueError, match="^y must "):
        batch_stats(y)
