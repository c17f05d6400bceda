"""`remat` computes what PyTorch computes: forward to the bit, gradients to rounding, in less memory."""

import contextlib
import copy
import functools
import itertools
import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from helpers import remat
from helpers.predict import Held, predict_memory
from helpers.remat import convolutions, operations, passes, task, values
from helpers.tests.kernels.rounding import apart, rounding

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

# Options of single operations --------------------------------------------------------------------

ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": lambda inplace: nn.Hardtanh(-0.5, 0.7, inplace=inplace),
    "leaky_relu": lambda inplace: nn.LeakyReLU(0.1, inplace),
    "elu": lambda inplace: nn.ELU(0.8, inplace),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "celu": lambda inplace: nn.CELU(0.5, inplace),
    "selu": nn.SELU,
    "threshold": lambda inplace: nn.Threshold(0.1, 0.2, inplace),
    "dropout": lambda inplace: nn.Dropout(0.3, inplace),
}
OUT_OF_PLACE = {
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "prelu": nn.PReLU,
    "prelu by channel": lambda: nn.PReLU(8),
}
EVERY_ACTIVATION = {
    **{f"{name}{'_' * inplace}": lambda f=f, i=inplace: f(inplace=i)
       for name, f in ACTIVATIONS.items() for inplace in (False, True)},
    **OUT_OF_PLACE,
}  # fmt: skip


@settings(max_examples=30)
@given(st.data())
def test_convolutions(data):
    """In one to three dimensions, transposed or not, with a norm and an activation behind."""
    draw = data.draw
    n, transposed, groups = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(n))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if transposed:
        options["padding"] = draw(st.integers(0, 1))
        options["output_padding"] = draw(st.integers(0, max(stride, dilation) - 1))
    else:
        paddings = [0, 1, 2, "valid", *(["same"] if stride == 1 else [])]
        options["padding"] = draw(st.sampled_from(paddings))
        options["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "replicate"]))
    c_in, c_out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    activation = draw(st.sampled_from(["relu", "relu_", "silu", "leaky_relu_", "gelu", "sigmoid"]))
    training = draw(st.booleans())
    family = nn.modules.conv
    kind = getattr(family, f"ConvTranspose{n}d" if transposed else f"Conv{n}d")
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[n]

    def make():
        convolve = kind(c_in, c_out, kernel, **options)
        last = getattr(family, f"Conv{n}d")(c_out, 2, 1)
        return nn.Sequential(convolve, norm(c_out), EVERY_ACTIVATION[activation](), last).train(training)

    check(make, image(draw(st.integers(1, 3)), c_in, *(draw(st.integers(8, 9)) for _ in range(n))))


def frozen(module):
    return module.requires_grad_(False)


@pytest.fixture(params=[1, 2])
def threads(request):
    """With one thread, and few images, PyTorch computes 1x1 convolutions in another way."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


POINTWISE = {
    "conv1d": (lambda: nn.Conv1d(3, 5, 1), (2, 3, 70)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 1, bias=False), (2, 3, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(3, 5, 1), (2, 3, 4, 5, 4)),
    "one channel": (lambda: nn.Conv2d(3, 1, 1, bias=False), (2, 3, 9, 8)),
    "one image": (lambda: nn.Conv2d(3, 5, 1), (1, 3, 9, 8)),
    "frozen": (lambda: frozen(nn.Conv2d(3, 5, 1)), (2, 3, 9, 8)),
    "groups": (lambda: nn.Conv2d(4, 6, 1, groups=2), (2, 4, 9, 8)),
    "volume, groups": (lambda: nn.Conv3d(4, 6, 1, groups=2), (2, 4, 4, 5, 4)),
    "padding": (lambda: nn.Conv2d(3, 5, 1, padding=1), (2, 3, 9, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 1), (2, 3, 9, 8)),
    "volume, transposed": (lambda: nn.ConvTranspose3d(3, 5, 1), (2, 3, 4, 5, 4)),
    # These skip pixels, but for the last two.
    "row, stride": (lambda: nn.Conv1d(3, 5, 1, stride=3), (2, 3, 70)),
    "stride": (lambda: nn.Conv2d(3, 5, 1, stride=2), (2, 3, 19, 18)),
    "volume, stride": (lambda: nn.Conv3d(3, 5, 1, stride=(1, 2, 3)), (2, 3, 4, 5, 4)),
    "frozen, stride": (lambda: frozen(nn.Conv2d(3, 5, 1, stride=(3, 1))), (2, 3, 9, 8)),
    "groups, stride": (lambda: nn.Conv2d(4, 6, 1, groups=2, stride=(2, 3)), (1, 4, 9, 8)),
    "padding, stride": (lambda: nn.Conv2d(3, 5, 1, padding=1, stride=2), (2, 3, 9, 8)),
    "transposed, stride": (lambda: nn.ConvTranspose2d(3, 5, 1, stride=2), (2, 3, 9, 8)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_convolutions(name, layout, dtype, threads):
    make, shape = POINTWISE[name]
    exact = step(make, [image(*shape)], None)
    if layout is torch.channels_last and len(shape) != 4:
        layout = torch.contiguous_format
    found, wanted = (step(make, [image(*shape)], cost, dtype, layout) for cost in (0, None))
    assert_same_forward(found, wanted)
    for key, gradient in exact.gradients.items():
        assert (found.gradients[key] is None) == (gradient is None)
        if gradient is not None:
            assert found.gradients[key].stride() == wanted.gradients[key].stride()
            assert apart(found.gradients[key], gradient) <= rounding(dtype, terms=2 * math.prod(shape[2:]))


def test_skipped_pixels_of_an_input_with_gaps():
    """PyTorch chooses the gradient's layout by the weight."""
    like, weight = torch.randn(2, 4, 8, 8), torch.randn(5, 3, 1, 1)
    like, weight = (t.to(memory_format=torch.channels_last) for t in (like, weight))
    strides = []
    for cost in (None, 0):
        x = like[:, :3].detach().requires_grad_()
        with under(cost):
            y = F.conv2d(x, weight, stride=2)
        strides.append(torch.autograd.grad(y, x, torch.randn(y.shape))[0].stride())
    assert strides[0] == strides[1]


CUT = {
    "padding": (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 9, 8)),
    "groups": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, dilation=(1, 2)), (4, 4, 9, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (7, 4, 5, 4)),
    "row": (lambda: nn.Conv1d(4, 6, 3, padding="same"), (6, 4, 9)),
    "skips pixels": (lambda: nn.Conv2d(4, 6, 1, stride=(2, 3)), (6, 4, 9, 8)),
    "volume": (lambda: nn.Conv3d(4, 6, 3, padding=1, bias=False), (4, 4, 5, 4, 3)),
}


@pytest.mark.parametrize("name", CUT)
def test_a_batch_cut_into_parts(name, monkeypatch):
    """As where a library's copies of a large one would raise the peak."""
    cut, parts = [], convolutions.Convolution.parts
    monkeypatch.setattr(convolutions, "worth_a_cut", lambda copies, w: True)
    monkeypatch.setattr(task.Task, "room", lambda self, value=None: 0)
    monkeypatch.setattr(
        convolutions.Convolution, "parts", lambda *given: cut.append(parts(*given)) or cut[-1]
    )
    make, shape = CUT[name]
    check(lambda: nn.Sequential(make(), nn.ReLU()), image(*shape))
    assert set(cut) == {4}


@pytest.mark.parametrize(
    "activation",
    [F.softplus, nn.Softplus(2, 10), lambda z: F.glu(torch.cat([z, z], 1), 1), lambda z: F.glu(z.mT)],
)
def test_activations_that_backward_calls_again(activation):
    def make():
        parts = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        return Net(
            lambda self, x: self.last(activation(self.norm(self.first(x)))),
            **dict(zip(("first", "norm", "last"), parts, strict=True)),
        )

    check(make, X)
    model = make().double()
    y = model.first(X)
    assert held_plainly_and_under_remat(model, X)[1] < 1.1 * y.nbytes


@pytest.mark.parametrize("name", EVERY_ACTIVATION)
def test_activations(name):
    make = EVERY_ACTIVATION[name]
    check(lambda: nn.Sequential(block(activation=make), block(8, 8, make), nn.Conv2d(8, 2, 1)), X)


NORMS = {
    "training": lambda: nn.BatchNorm2d(8),
    "eval": lambda: nn.BatchNorm2d(8).eval(),
    "no affine": lambda: nn.BatchNorm2d(8, affine=False),
    "no affine, eval": lambda: nn.BatchNorm2d(8, affine=False).eval(),
    "no running statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "momentum None": lambda: nn.BatchNorm2d(8, momentum=None),
    "momentum 1, large eps": lambda: nn.BatchNorm2d(8, momentum=1, eps=0.5),
    "frozen": lambda: nn.BatchNorm2d(8).eval().requires_grad_(False),
    "frozen scale": lambda: only(nn.BatchNorm2d(8), "bias"),
    "frozen shift": lambda: only(nn.BatchNorm2d(8), "weight"),
    "one group": lambda: nn.GroupNorm(1, 8),
    "two groups": lambda: nn.GroupNorm(2, 8),
    "groups without affine": lambda: nn.GroupNorm(4, 8, affine=False),
    "layer": lambda: nn.LayerNorm([8, 10, 9]),
    "layer over pixels": lambda: nn.LayerNorm([10, 9], elementwise_affine=False),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True),
    "instance without affine": lambda: nn.InstanceNorm2d(8),
    "instance with running statistics": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
}


def only(module, name):
    """``module`` of which one parameter is trained."""
    for n, p in module.named_parameters():
        p.requires_grad_(n == name)
    return module


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.LeakyReLU(inplace=True)])
def test_norms(name, activation):
    """Behind a convolution and before one, whose input's gradient and weight's gradient need it."""
    check(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), NORMS[name](), activation, nn.Conv2d(8, 2, 3)), X
    )


def test_batch_norm_of_vectors():
    check(lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), image(6, 5))


POOLS = {
    "max": lambda: nn.MaxPool2d(2),
    "max 3 stride 2 padding 1": lambda: nn.MaxPool2d(3, 2, 1),
    "max ceil_mode": lambda: nn.MaxPool2d((2, 3), 2, ceil_mode=True),
    "max stride None": lambda: Net(lambda self, x: F.max_pool2d(x, 3, None, 1)),
    "max overlapping": lambda: nn.MaxPool2d((5, 9), 1, (2, 4)),
    "max dilated": lambda: nn.MaxPool2d(2, 1, dilation=2),
    "max of one value": lambda: Net(lambda self, x: F.max_pool2d(x.clamp(max=0), 2)),
    "max with indices": lambda: Net(
        lambda self, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2, output_size=x.shape)),
    "mean": lambda: nn.AvgPool2d(2),
    "mean 3 stride 1 padding 1": lambda: nn.AvgPool2d(3, 1, 1),
    "mean ceil_mode": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "mean divisor": lambda: nn.AvgPool2d((2, 3), divisor_override=5),
    "adaptive": lambda: nn.AdaptiveAvgPool2d(3),
}  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", POOLS)
def test_poolings(name, layout):
    def make():
        return nn.Sequential(block(), POOLS[name](), nn.Conv2d(8, 4, 1), nn.ReLU())

    check(make, X, layout=layout)


VOLUMES = {
    "max": lambda: nn.MaxPool3d(2),
    "max overlapping": lambda: nn.MaxPool3d((3, 2, 5), (2, 1, 3), (1, 0, 2)),
    "max ceil_mode": lambda: nn.MaxPool3d(2, (1, 2, 2), ceil_mode=True),
    "max dilated": lambda: nn.MaxPool3d(2, 1, dilation=2),
    "max large": lambda: nn.MaxPool3d(8, 2, 4),
    "max of one value": lambda: Net(lambda self, x: F.max_pool3d(x.clamp(max=0), 2, None, 1)),
    "max without a batch": lambda: Net(lambda self, x: F.max_pool3d(x[0], 2)[None]),
    "mean": lambda: nn.AvgPool3d(2),
    "mean 3 stride 1 padding 1": lambda: nn.AvgPool3d(3, 1, 1),
    "mean ceil_mode": lambda: nn.AvgPool3d(2, (1, 2, 2), ceil_mode=True, count_include_pad=False),
    "mean without a batch": lambda: Net(lambda self, x: F.avg_pool3d(x[0], 2)[None]),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["ncdhw", "ndhwc"])
@pytest.mark.parametrize("name", VOLUMES)
def test_poolings_of_volumes(name, layout):
    def make():
        convs = nn.Conv3d(3, 8, 3, padding=1, bias=False), nn.Conv3d(8, 4, 1)
        model = nn.Sequential(convs[0], nn.BatchNorm3d(8), nn.ReLU(), VOLUMES[name](), convs[1])
        return Net(lambda self, x: self.model(x.contiguous(memory_format=layout)), model=model)

    check(make, image(2, 3, 5, 4, 6))


PADS = {  # by the image's own pixels, and the layout of the input
    f"{kind} {n}d {layout}": (kind, n, getattr(torch, layout))
    for kind in ("Reflection", "Replication")
    for n, layouts in ((1, []), (2, ["channels_last"]), (3, ["channels_last_3d"]))
    for layout in ("contiguous_format", *layouts)
}


@pytest.mark.parametrize("name", PADS)
@pytest.mark.parametrize("pads", [(1, 1, 1, 1, 1, 1), (2, 0, 1, 2, 0, 1), (-1, 2, 1, 0, 0, 1)])
def test_padding(name, pads):
    kind, n, layout = PADS[name]

    def make():
        conv, norm = getattr(nn, f"Conv{n}d"), getattr(nn, f"BatchNorm{n}d")
        pad = getattr(nn, f"{kind}Pad{n}d")(pads[: 2 * n])
        model = nn.Sequential(conv(3, 8, 3), norm(8), nn.ReLU(), pad, conv(8, 4, 3))
        return Net(lambda self, x: self.model(x.contiguous(memory_format=layout)), model=model)

    check(make, image(2, 3, *(7, 6, 8)[:n]))


@pytest.mark.parametrize("kind", ["reflect", "replicate", "circular"])
def test_padding_keeps_nothing(kind):
    held = []
    for mode in ("zeros", kind):
        convs = (nn.Conv2d(c, 8, 3, padding=1, padding_mode=mode).double() for c in (3, 8, 8))
        layers = [layer for conv in convs for layer in (conv, nn.BatchNorm2d(8).double(), nn.ReLU())]
        held.append(held_plainly_and_under_remat(nn.Sequential(*layers), image(4, 3, 32, 32))[1])
    assert held[1] <= 1.01 * held[0] + image(4, 3, 34, 34).nbytes  # of the first convolution's input


DROPOUTS = {f"{n}d{' by channel' * bool(c)}": (n, c) for n in (1, 2, 3) for c in ("", f"{n}d")}


def dropouts(name):
    """A builder of a network with dropout behind an activation and in a concatenation."""
    n, by_channel = DROPOUTS[name]
    conv, norm = getattr(nn, f"Conv{n}d"), getattr(nn, f"BatchNorm{n}d")
    drop = getattr(F, f"dropout{by_channel}")

    def forward(self, x):
        x = drop(F.relu(self.norm(self.a(x))), 0.3)
        return self.c(torch.cat([x, drop(self.b(x), 0.1), F.silu(drop(x * 2, 0.5, training=False))], 1))

    return lambda: Net(forward, a=conv(3, 8, 3), norm=norm(8), b=conv(8, 4, 1), c=conv(20, 4, 1))


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout(name):
    check(dropouts(name), image(2, 3, *(7, 6, 8)[: DROPOUTS[name][0]]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("drop", [F.dropout, F.dropout2d])
def test_dropout_to_the_bit(drop, dtype, layout):
    """With the gradient of a sum, too, which has no layout of its own, and the random numbers that follow."""
    x, found = image(4, 3, 9, 8).to(dtype).contiguous(memory_format=layout).requires_grad_(), []
    for cost in (None, 0):
        torch.manual_seed(1)
        with under(cost):
            y = x * 1
            out = drop(y, 0.3)
        for dz in (torch.randn(4, 3, 9, 8).to(dtype), torch.ones((), dtype=dtype).expand(out.shape)):
            (dy,) = torch.autograd.grad(out, [y], dz, retain_graph=True)
            found.append((out, dy, torch.rand(3)))
    for got, wanted in zip(found[2:], found[:2], strict=True):
        assert all(torch.equal(g, w) and g.stride() == w.stride() for g, w in zip(got, wanted, strict=True))


def test_dropout_of_one_channel_has_pytorchs_strides():
    """Its input's have no meaning there, but the convolution behind chooses its algorithm by them."""
    x, w, found = image(4, 3, 16, 16).to(memory_format=torch.channels_last), image(1, 3, 1, 1), []
    for cost in (None, 0):
        torch.manual_seed(1)
        with under(cost):
            z = F.dropout(F.conv2d(x, w.requires_grad_()))
            found.append((z, F.conv2d(z, image(8, 1, 3, 3))))
    assert all(torch.equal(g, w) and g.stride() == w.stride() for g, w in zip(*found, strict=True))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.2, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_dropout_is_recomputed_to_the_bit(device, dtype, p):
    x, operation = 100 * image(999).to(device, dtype), operations.Dropout(p)
    torch.manual_seed(1)
    wanted = F.dropout(x, p)
    torch.manual_seed(1)
    assert torch.equal(operation.forward(x), wanted)
    for out in (None, torch.empty_like(x)):
        assert torch.equal(operation.recipe.run(out, x, operation.mask), wanted)


@pytest.mark.parametrize("p", [0.0, 1.0, 0, 1, torch.tensor(0.5), 2.0])
def test_dropout_of_nothing_or_everything(p):
    outcomes, x = [], image(2, 3, 5, 5).requires_grad_()
    for drop in (F.dropout, F.dropout2d):
        for cost in (None, 0):
            torch.manual_seed(0)
            with under(cost):
                try:
                    outcomes.append(drop(x * 1, p).tolist())
                except (TypeError, ValueError) as error:
                    outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] and outcomes[2] == outcomes[3]


@pytest.mark.parametrize("drop", [nn.Dropout, nn.Dropout2d])
def test_dropout_keeps_a_byte_for_each_value_or_channel(drop, monkeypatch):
    """It is recomputed to the bit, a few images at a time."""
    monkeypatch.setattr(task, "SLAB_BYTES", 500)
    x = image(4, 3, 32, 32, dtype=torch.float32)
    with Seen(monkeypatch) as seen:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), drop(0.3), nn.Conv2d(8, 4, 3))
        with remat() as record:
            out = model(x)
        out.sum().backward()
    mask = 4 * 8 * (30 * 30 if drop is nn.Dropout else 4)
    assert record.kept_bytes == x.nbytes + 4 * 4 * 8 * 30 * 30 + mask
    assert len(seen.remade) == 2 and seen.strange() == []


SIGNALS = {
    "max": lambda: nn.MaxPool1d(2),
    "max 3 stride 2 padding 1": lambda: nn.MaxPool1d(3, 2, 1),
    "max ceil_mode": lambda: nn.MaxPool1d(5, 3, ceil_mode=True),
    "max dilated": lambda: nn.MaxPool1d(2, 1, dilation=2),
    "max, then in place": lambda: nn.Sequential(nn.MaxPool1d(2), nn.ReLU6(inplace=True)),
    "max without a batch": lambda: Net(lambda self, x: F.max_pool1d(x[0], 2)[None]),
    "mean": lambda: nn.AvgPool1d(2),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_poolings_of_signals(name):
    def make():
        convs = nn.Conv1d(3, 8, 3, padding=1, bias=False), nn.Conv1d(8, 4, 1)
        return nn.Sequential(convs[0], nn.BatchNorm1d(8), nn.ELU(), SIGNALS[name](), convs[1])

    check(make, image(4, 3, 17))


@pytest.mark.parametrize("pool", [nn.MaxPool1d(2), nn.MaxPool2d((1, 2))])
def test_a_pooling_of_signals_holds_a_byte_for_each_maximum(pool):
    x = image(4, 3, 18) if isinstance(pool, nn.MaxPool1d) else image(4, 3, 1, 18)
    with remat() as record:
        out = pool(F.silu(x.requires_grad_()))
    assert record.rows[-1].nbytes == out.numel() and record.kept_bytes == x.nbytes + out.numel()
    assert record.plain_bytes == 2 * x.nbytes + 8 * out.numel()


@pytest.mark.parametrize("pools, n", [(SIGNALS, 1), (POOLS, 2), (VOLUMES, 3)], ids=["1d", "2d", "3d"])
def test_poolings_under_autocast(pools, n):
    """A CPU's autocast leaves some in half precision and casts others to float32."""
    conv, norm = getattr(nn, f"Conv{n}d"), getattr(nn, f"BatchNorm{n}d")
    for name, pool in pools.items():

        def make(pool=pool):
            return nn.Sequential(conv(3, 8, 3, padding=1), nn.ReLU(), pool(), norm(8))

        how = {"dtype": torch.float32, "autocast": torch.bfloat16}
        x = image(2, 3, *(9, 8, 10)[:n], dtype=torch.float32)
        wanted = step(make, [x], None, **how)
        for cost in COSTS:
            found = step(make, [x], cost, **how)
            assert_same_forward(found, wanted)
            for key in ("3.weight", "3.bias"):  # a GPU's and a CPU's sums have float32's digits
                difference = apart(found.gradients[key], wanted.gradients[key])
                assert difference <= rounding(torch.float32, terms=1000), (name, cost, key)


@pytest.mark.parametrize(("width", "nbytes"), [(128, 2), (130, 4)])
def test_a_pooling_of_volumes_holds_its_positions_alone(width, nbytes):
    """In two bytes where an image has at most 2¹⁵ values."""
    x = image(2, 1, 8, 32, width).requires_grad_()
    with remat() as record:
        out = F.max_pool3d(F.silu(x), 2)
    assert record.rows[-1].nbytes == nbytes * out.numel()
    assert record.kept_bytes == x.nbytes + record.rows[-1].nbytes


def test_a_pooling_works_in_slabs_of_its_indices(monkeypatch):
    """Eight bytes each, also where values have two."""
    monkeypatch.setattr(task, "SLAB_BYTES", 1 << 15)
    held, x = Held(), torch.randn(16, 4, 32, 32, dtype=torch.bfloat16).requires_grad_()
    dy = torch.ones_like(x)
    held.ignore(x, dy)
    with held, remat():
        y = F.max_pool2d(x, 3, 1, 1)
    assert held.peak <= y.nbytes + y.numel() + 3 * task.SLAB_BYTES
    held.peak = held.held
    with held:
        y.backward(dy)
    assert held.peak <= 2 * y.nbytes + y.numel() + 3 * task.SLAB_BYTES


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["max 3 stride 2 padding 1", "mean", "mean 3 stride 1 padding 1"])
def test_a_pooling_keeps_the_layout(name, layout):
    """Its gradient is laid out as its input; copies into another layout would cost passes."""
    x, found = X.clone(memory_format=layout).requires_grad_(), []
    with remat():
        y = x * 1
        y.register_hook(lambda dy: found.append(dy.stride()))
        POOLS[name]()(y).square().sum().backward()
    assert found == [y.stride()]


# What networks are made of -----------------------------------------------------------------------


class Swish(torch.autograd.Function):
    """A user's own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, dz):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return dz * (s + x * s * (1 - s))


class NormAct(nn.BatchNorm2d):
    """A norm that activates, by itself and in place, as timm's."""

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        z = F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)
        return F.silu(z, inplace=True)


def kept_then_scaled(self, x):
    outputs = []
    for part in (self.a, self.b):
        x = part(x)
        outputs.append(x)
        x = x.clone()
        x *= 0.5
    return outputs


def scaled_branch(self, x):
    """Stochastic depth: whole images are dropped by a factor without a gradient."""
    r = self.a(x) * torch.tensor([1.25, 0, 1.25, 1.25], dtype=x.dtype).view(4, 1, 1, 1)
    r += self.a(x)
    return self.b(r)


def residual(self, x):
    h = self.a(x)
    return self.b(F.relu(self.c(h) + h) + h)


def residual_in_place(self, x):
    h = self.a(x)
    out = self.c(h)
    out += h
    return self.b(F.relu(out, inplace=True))


def dense(self, x):
    h = [self.a(x)]
    for part in (self.b, self.c):
        h.append(part(torch.cat(h, 1)))
    return torch.cat(h, dim=-3)


def excite(self, x):
    h = self.a(x)
    scale = torch.sigmoid(self.c(F.silu(self.b(h.mean((2, 3), keepdim=True)))))
    return self.d(h * scale)


def shuffle(self, x):
    left, right = self.a(x).chunk(2, dim=1)
    h = torch.cat([left, self.b(right)], 1)
    n, c, height, width = h.shape
    h = h.view(n, 2, c // 2, height, width).transpose(1, 2).reshape(n, c, height, width)
    return self.c(h[:, 1:5]) + self.c(h[:, ::2])


def pyramid(self, x):
    h = self.a(x)
    low = F.max_pool2d(h, 2)
    up = F.interpolate(self.b(low), size=h.shape[2:], mode="bilinear", align_corners=False)
    return self.c(torch.cat([h, F.pad(up, (0, 0, 0, 0, 0, 0))], 1)), F.interpolate(low, scale_factor=2)


def arithmetic(self, x):
    h = (self.a(x) * 2 - 1) / 3 + 0.5
    h = 1 - h * torch.linspace(0.5, 1, h.shape[1], dtype=h.dtype).view(-1, 1, 1)
    h *= 1.5
    h -= x.mean()
    return self.b(h.sub_(1).div_(2))


def itself(self, x):
    h = self.a(x)
    return self.b(h * h + torch.cat([h, h], 1)[:, 4:12])


def norms_of_few_images(self, x):
    """Each norm's statistics are those of some images (ghost batch norm)."""
    y, norm = self.a[0](x), self.a[1]
    h = F.relu(torch.cat([norm(images) for images in y.split(3)]))
    return self.b(torch.cat([h, h]))


def groups_as_images(self, x):
    """A few channels at a time become an image, then all of them one (a filter for each image)."""
    h = self.a(x)
    n, c, height, width = h.shape
    groups = F.silu(self.b(h.reshape(2 * n, c // 2, height, width)))
    filters = self.c.weight.repeat(n, 1, 1, 1)
    one = F.conv2d(groups.view(1, n * c, height, width), filters, groups=n)
    return self.d(F.relu(one.view(n, -1, height, width)))


def keyword_arguments(self, x):
    y = F.conv2d(weight=self.a[0].weight, input=x, stride=(1,), padding="same")
    z = F.batch_norm(input=y, running_mean=None, running_var=None, training=True)
    return F.max_pool2d(input=F.leaky_relu(input=z, negative_slope=0.2), kernel_size=2)


def options(self, x, extra=None):
    """None in a dict, an optional argument, a device and a dtype asked of the parameters."""
    p = next(self.parameters())
    parts = {"x": x.to(p.device, p.dtype), "mask": None}
    h = self.a(parts["x"]) if parts["mask"] is None else parts["x"]
    return {"out": self.b(h if extra is None else h + extra), "rest": [None, (h,)]}


def shared(self, x):
    h = self.a(x)
    for _ in range(3):
        h = self.b(h)
    return h


def in_a_loop(self, x):
    h = self.a(x)
    for _ in range(40):
        h = h + 0.1 * torch.relu(h)
    return self.b(h)


def contexts(self, x):
    with remat(9):
        x = self.a(x)
        with remat(0):
            x = self.b(x)
    return self.c(x)


def wrong_by_design(self, x):
    """Half of the network without gradients, statistics and all."""
    with torch.no_grad():
        h = self.a(x)
    return self.b(h) + self.b(self.a(x).detach())


NETWORKS = {
    "output kept, then scaled in place": (kept_then_scaled, {"a": block(), "b": block(8, 8)}),
    "residual into a scaled branch": (scaled_branch, {"a": block(), "b": nn.Conv2d(8, 4, 1)}),
    "residual": (residual, {"a": block(), "b": block(8, 4), "c": block(8, 8, nn.Identity)}),
    "residual in place": (residual_in_place, {"a": block(), "b": block(8, 4), "c": block(8, 8, nn.Identity)}),
    "dense": (dense, {"a": block(), "b": block(8, 4), "c": block(12, 4)}),
    "squeeze and excite": (
        excite, {"a": block(), "b": nn.Conv2d(8, 2, 1), "c": nn.Conv2d(2, 8, 1), "d": block(8, 4)}),
    "chunks and shuffled channels": (shuffle, {"a": block(), "b": block(4, 4), "c": block(4, 4)}),
    "pyramid": (pyramid, {"a": block(), "b": block(8, 8), "c": block(16, 4)}),
    "numbers": (arithmetic, {"a": block(), "b": block(8, 4)}),
    "a value with itself": (itself, {"a": block(), "b": block(8, 4)}),
    "norms of few images": (norms_of_few_images, {"a": block(), "b": block(8, 4)}),
    "groups as images": (
        groups_as_images, {"a": block(), "b": nn.BatchNorm2d(4), "c": nn.Conv2d(8, 4, 1), "d": block(4, 4)}),
    "keyword arguments": (keyword_arguments, {"a": block()}),
    "dicts and optional arguments": (options, {"a": block(), "b": block(8, 4)}),
    "a module three times": (shared, {"a": block(), "b": block(8, 8)}),
    "a long loop": (in_a_loop, {"a": block(), "b": block(8, 4)}),
    "contexts inside": (contexts, {"a": block(activation=lambda: nn.SiLU(inplace=True)),
                                   "b": block(8, 8, lambda: nn.ReLU(inplace=True)), "c": block(8, 4)}),
    "partly without gradients": (wrong_by_design, {"a": block(), "b": block(8, 4)}),
    "a function of the user's": (
        lambda self, x: self.b(Swish.apply(self.a(x))), {"a": block(), "b": nn.Conv2d(8, 4, 1)}),
    "a norm with its activation": (
        lambda self, x: self.b(self.n(self.a(x))), {"a": block(), "n": NormAct(8), "b": block(8, 4)}),
    "a checkpoint inside": (
        lambda self, x: self.b(checkpoint(self.a, x, use_reentrant=False)), {"a": block(), "b": block(8, 4)}),
    "a reentrant checkpoint inside": (
        lambda self, x: self.b(checkpoint(self.a, x, use_reentrant=True)), {"a": block(), "b": block(8, 4)}),
    "pre-activation": (
        lambda self, x: x + self.c(F.relu(self.n(x))), {"n": nn.BatchNorm2d(3), "c": nn.Conv2d(3, 3, 1)}),
    "frozen weights": (
        lambda self, x: self.b(self.a(x)), {"a": block().requires_grad_(False), "b": block(8, 4)}),
    "an unbatched image": (lambda self, x: F.relu(self.c(x[0])), {"c": nn.Conv2d(3, 4, 3)}),
    "dropout": (lambda self, x: self.b(F.dropout2d(self.a(x), 0.3)), {"a": block(), "b": block(8, 4)}),
}  # fmt: skip


def network(name):
    """A builder: the same parts, new each time."""
    forward, parts = NETWORKS[name]
    return lambda: Net(forward, **copy.deepcopy(parts))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    check(network(name), X)


@pytest.fixture
def accelerator(monkeypatch):
    """The engine goes an accelerator's way, with PyTorch's kernels for the passes."""
    monkeypatch.setattr(passes, "has_kernel", lambda device: True)
    monkeypatch.setattr(passes, "one_pass", lambda *given: False)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_as_on_an_accelerator(accelerator, name):
    check(network(name), X, costs=(0, 1e9))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_place_on_an_accelerator(accelerator, name):
    check(lambda: block(activation=lambda: ACTIVATIONS[name](inplace=True)), X, costs=(0, 1e9))


@pytest.mark.parametrize("what", ["gamma", "y", "a"])
@pytest.mark.parametrize("act", [F.relu, F.silu])
def test_unseen_changes_after_an_activation_in_place(accelerator, act, what):
    """Each formula gets what PyTorch's node would find: the norm's the new γ and y, ReLU's the new a."""

    def run(self, x):
        y = self.conv(x)
        a = act(self.norm(y), inplace=True)
        {"gamma": self.norm.weight, "y": y, "a": a}[what].data.mul_(-3)
        return self.last(a)

    parts = {"conv": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "last": nn.Conv2d(8, 4, 1)}
    check(lambda: Net(run, **copy.deepcopy(parts)), X)


def test_optional_input():
    check(network("dicts and optional arguments"), X, image(4, 8, 10, 9))


def test_parts_of_a_model_called_alone():
    def run(self, x):
        return self.inner[1][0](self.inner[0](x))

    check(lambda: Net(run, inner=nn.Sequential(block(), block(8, 8))), X)


def test_functional_call():
    inner = block().double()
    state = {name: t.detach() for name, t in inner.state_dict().items()}

    def run(self, x):
        mine = {**state, "0.weight": self.w}
        return torch.func.functional_call(inner, mine, (x,)).mean((2, 3))

    check(lambda: Net(run, w=nn.Parameter(torch.randn(8, 3, 3, 3))), X)


def test_parametrized_weights():
    def make():
        model = nn.Sequential(block(), nn.Conv2d(8, 4, 1))
        nn.utils.parametrizations.weight_norm(model[0][0])
        nn.utils.parametrizations.spectral_norm(model[1])
        return model

    check(make, X)


TORCHVISION = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "efficientnet_b0",
    "shufflenet_v2_x0_5", "regnet_y_400mf", "squeezenet1_1", "mnasnet0_5",
)  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    narrow = {"width_per_group": 16} if name == "resnet50" else {}
    check(lambda: getattr(torchvision.models, name)(num_classes=7, **narrow), image(2, 3, 32, 32))


# Dtypes and layouts ------------------------------------------------------------------------------


def mixed():
    """Of everything a little, without a bias before a norm: its gradient is nothing but rounding."""
    return nn.Sequential(
        block(), block(8, 8, nn.SiLU),
        nn.MaxPool2d(2), Net(dense, a=block(8, 8), b=block(8, 4, nn.Hardswish), c=block(12, 4, nn.GELU)),
        nn.AvgPool2d(2), nn.Conv2d(16, 4, 1),
    )  # fmt: skip


LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
PRECISIONS = {
    "float64": {"dtype": torch.float64},
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "autocast": {"dtype": torch.float32, "autocast": torch.bfloat16},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_dtypes(precision, layout):
    """Forward is PyTorch's, and gradients are no farther from the exact ones than PyTorch's."""
    how = {**PRECISIONS[precision], "layout": LAYOUTS[layout]}
    eps = torch.bfloat16 if precision == "autocast" else how["dtype"]
    exact, wanted = step(mixed, [X], None).gradients, step(mixed, [X], None, **how)
    for cost in COSTS:
        found = step(mixed, [X], cost, **how)
        assert_same_forward(found, wanted)
        for name, w in wanted.gradients.items():
            # What is exact has float64's rounding itself.
            allowed = 1.5 * apart(w, exact[name]) + rounding(eps, 4) + rounding(torch.float64, 400)
            assert apart(found.gradients[name], exact[name]) <= allowed, (cost, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_into_a_norm_under_autocast(dtype):
    """Statistics of large values, in float32 as PyTorch's."""

    def make():
        norms = nn.BatchNorm2d(1), nn.BatchNorm2d(8)
        return nn.Sequential(norms[0], nn.Conv2d(1, 8, 3), norms[1], nn.ReLU(), nn.Conv2d(8, 4, 3))

    x = 1e4 * image(4, 1, 8, 8, dtype=torch.float32).abs() - 80
    wanted = step(make, [x], None, dtype=torch.float32, autocast=dtype)
    for cost in COSTS:
        found = step(make, [x], cost, dtype=torch.float32, autocast=dtype)
        assert_same_forward(found, wanted)
        for name in ("0.weight", "2.weight", "4.weight"):
            assert apart(found.gradients[name], wanted.gradients[name]) <= rounding(dtype, terms=200)


BY_IMAGE = {
    "group_norm": lambda: nn.GroupNorm(2, 8),
    "layer_norm": lambda: nn.LayerNorm(9),
    "instance_norm": lambda: nn.InstanceNorm2d(8, affine=True),
    "prelu": lambda: nn.PReLU(8),
}


@pytest.fixture(params=["in half precision", "in float32"])
def policy(request):
    """What autocast does with norms: a CPU's leaves them in half precision, a GPU's casts them to float32."""
    if request.param == "in half precision":
        return (yield torch.bfloat16)
    library = torch.library.Library("aten", "IMPL")
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def cast(operator, *args):
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operator(*(t.float() if isinstance(t, Tensor) else t for t in args))

    for name in BY_IMAGE:
        library.impl(name, functools.partial(cast, getattr(torch.ops.aten, name)), "AutocastCPU")
    yield torch.float32
    library._destroy()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BY_IMAGE)
def test_norms_by_image_under_autocast(name, policy):
    """Backward calls them as forward did, whether it runs in autocast itself or not."""

    def make():
        norms = BY_IMAGE[name](), BY_IMAGE[name]()
        convs = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 2, 1)
        return nn.Sequential(convs[0], norms[0], nn.SiLU(), convs[1], norms[1], nn.Tanh(), convs[2])

    x, found = X.float(), {}
    for cost in (None, 0, 1e9):
        for inside in (False, True):
            torch.manual_seed(0)
            model = randomised(make())
            with torch.autocast("cpu", torch.bfloat16), under(cost) as record:
                out = model(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                out.backward(image(*out.shape, seed=1).bfloat16())
            assert cost is None or all(row.recipe in ("cast", "conv2d") for row in record.rows if row.kept)
            found[cost, inside] = out.detach(), [p.grad for p in model.parameters()]
    assert model[:2](x).dtype == torch.float32  # outside of autocast
    with torch.autocast("cpu", torch.bfloat16):
        assert model[:2](x).dtype == policy
    out, grads = found.pop((None, False))
    for ours, theirs in found.values():
        assert torch.equal(ours, out)
        for f, w in zip(theirs, grads, strict=True):
            assert apart(f, w) <= rounding(torch.float32, terms=100)


@pytest.mark.parametrize("cost", COSTS)
def test_a_computed_weight_under_autocast(cost):
    """Of it PyTorch keeps the copy in half precision that autocast makes, and so does remat."""
    convs = [nn.utils.parametrizations.weight_norm(nn.Conv2d(64, 64, 3)) for _ in range(2)]
    model, x, held = nn.Sequential(convs[0], nn.ReLU(), convs[1]), image(1, 64, 6, 6).float(), []
    for context in (contextlib.nullcontext(), remat(cost)):
        counted = Held()
        counted.ignore(x, *model.parameters())
        with counted, torch.autocast("cpu", torch.bfloat16), context:
            out = model(x)
        held.append(counted.held)
        out.sum().backward()
    assert held[1] <= held[0]


KNOWN = ("relu", "relu6", "hardtanh", "leaky_relu", "leaky_relu_", "elu", "elu_", "silu_", "mish",
         "hardswish", "hardsigmoid", "gelu", "gelu tanh", "sigmoid", "tanh", "prelu by channel")  # fmt: skip


class Seen(TorchFunctionMode):
    """Every tensor that forward made, as it was, beside every one that backward makes again."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.remade, self.made, get = [], {}, task.Task.get

        def watched(task, value):
            kept = value.kept is not None
            t, mine = get(task, value)
            if not kept:
                self.remade.append(t.clone())
            return t, mine

        monkeypatch.setattr(task.Task, "get", watched)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in (*tensors(args), *tensors(out)):
            for u in (t.detach(), t.detach().bfloat16()):  # autocast's casts
                self.made.setdefault((u.shape, u.dtype), []).append(u.clone())
        return out

    def strange(self):
        """What is no tensor of forward."""
        return [
            (tuple(t.shape), t.dtype)
            for t in self.remade
            if not any(torch.equal(t, k) for k in self.made.get((t.shape, t.dtype), []))
        ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", KNOWN)
def test_remade_values_are_forwards_to_the_bit(monkeypatch, name, precision, layout):
    """Also a few images at a time, of odd sizes: no kernel may see where a batch is cut."""
    monkeypatch.setattr(task, "SLAB_BYTES", 500)
    seen, activation = Seen(monkeypatch), EVERY_ACTIVATION[name]

    def make():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation(), nn.Conv2d(8, 5, 3), nn.BatchNorm2d(5).eval(),
            nn.ReLU(), nn.Conv2d(5, 4, 3))  # fmt: skip

    for cost in (0, 1e9):
        with seen:
            step(make, [image(5, 3, 11, 9)], cost, layout=LAYOUTS[layout], **PRECISIONS[precision])
    assert len(seen.remade) >= 4
    assert seen.strange() == []


@pytest.mark.parametrize(
    "name", ["residual", "residual in place", "dense", "squeeze and excite", "pyramid", "numbers"]
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_networks_are_remade_to_the_bit(monkeypatch, name, precision):
    with Seen(monkeypatch) as seen:
        step(network(name), [X], 1e9, **PRECISIONS[precision])
    assert seen.remade and seen.strange() == []


@pytest.mark.parametrize("norm", ["two groups", "layer", "no affine", "no running statistics", "eval"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_norms_are_remade_to_the_bit(monkeypatch, norm, precision):
    def make():
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), NORMS[norm](), nn.SiLU(), nn.Conv2d(8, 2, 3))

    with Seen(monkeypatch) as seen:
        step(make, [X], 0, **PRECISIONS[precision])
    assert seen.strange() == []


def test_padding_that_moves_images(monkeypatch):
    """With pairs for all dimensions, F.pad shifts the batch: a part of the result needs other images."""
    monkeypatch.setattr(task, "SLAB_BYTES", 500)

    def forward(self, x):
        return self.h(F.relu(F.pad(self.b(x), (0, 0, 0, 0, 0, 0, 1, -1)) - 0.1))

    check(lambda: Net(forward, b=block(), h=nn.Conv2d(8, 4, 1)), image(5, 3, 10, 9))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 10, 9), (1, 8, 1, 1)])
def test_values_that_all_images_share(monkeypatch, shape):
    """What is computed from a parameter for all images is not cut where images are: also if N = C."""
    monkeypatch.setattr(task, "SLAB_BYTES", 500)

    def forward(self, x):
        x = self.b(x)
        return self.h(F.relu(x * F.leaky_relu(self.scale) + F.leaky_relu(self.shift)))

    def make():
        scale, shift = (nn.Parameter(image(*shape, seed=i)) for i in (1, 2))
        return Net(forward, b=block()[:2], h=nn.Conv2d(8, 4, 1), scale=scale, shift=shift)

    check(make, image(8, 3, 10, 9))


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_dead_channels(precision):
    """A norm's result that is 0 exactly is 0 when made again: else the ReLU's mask flips, and dβ is not 0."""
    how = PRECISIONS[precision]

    def gradient(cost):
        torch.manual_seed(0)
        model = randomised(
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        )
        with torch.no_grad():
            model[0].weight[:3], model[0].bias[:3], model[1].bias[:3] = 0, 0.5, 0  # y = μ = 0.5, exactly
        model.to(how["dtype"])
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in how), under(cost):
            out = model(X.to(how["dtype"]))
        out.backward(image(*out.shape).to(out))
        return model[1].bias.grad

    wanted = gradient(None)
    assert not wanted[:3].any() and wanted[3:].all()
    for cost in COSTS:
        found = gradient(cost)
        assert not found[:3].any()
        assert apart(found, wanted) <= rounding(torch.bfloat16, terms=4)


# Memory ------------------------------------------------------------------------------------------


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


def held_by(name, cost):
    """Bytes at the end of forward, by a model and a batch that need no memory."""
    with torch.device("meta"):
        model, x = getattr(torchvision.models, name)(weights=None), torch.empty(8, 3, 64, 64)
    out, held = counted_forward(model, x, cost)
    assert out.requires_grad
    return held.held


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0", "vgg11_bn"]
)
def test_a_higher_price_never_holds_more(name):
    held = [held_by(name, cost) for cost in (0, 9, 32, 64, 150, 300, 600, 1000)]
    assert held == sorted(held, reverse=True)
    assert held[-1] < held[0] < 0.6 * held_by(name, None)


def chain(depth, channels=8, activation=nn.ReLU):
    return nn.Sequential(*[block(channels, channels, activation) for _ in range(depth)])


BLOCK = 4 * 8 * 32 * 32 * 4  # bytes of a tensor of a block
WEIGHT, VECTORS = 8 * 8 * 9 * 4, 16 * 8 * 4  # bytes of dw, and of what a norm has for each channel


def test_the_record_says_what_recomputing_costs():
    model, first, second = nn.Sequential(block(), block(8, 8)).double(), 3 * 9, 8 * 9
    with remat(first + second) as record:
        model(X)
    costs = [row.cost for row in record.rows if not row.kept]
    assert costs == [first, first, first + second, first + second]


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recipe", [True, False])
def test_a_linear_layer_on_some_tokens_keeps_them_alone(recipe, bias):
    """PyTorch makes a matrix of them first. Without a recipe they are part of a product that nobody needs."""
    scale, layer, norm = torch.tensor(2.0), nn.Linear(64, 8, bias=bias).double(), nn.LayerNorm(64).double()
    results = []
    for cost in (None, 0):
        x, held = image(8, 256, 64).requires_grad_(recipe), Held()
        held.ignore(x, scale, *layer.parameters(), *norm.parameters())
        layer.zero_grad()
        with held, under(cost):
            tokens = norm(x) if recipe else x * scale
            out = layer(tokens[:, :16])
            del tokens
        results.append(held.held)
        if not recipe:  # the copy is safe from this
            with torch.no_grad():
                x.mul_(0)
        out.square().sum().backward()
        results.append(layer.weight.grad.clone())
    assert results[2] <= results[0] + 1024
    torch.testing.assert_close(results[3], results[1])


@pytest.mark.parametrize("order", [1, -1])
def test_other_views_of_what_a_linear_layer_copies(order):
    """A part of a larger tensor, which is transposed for the layer, and read as it is by others."""
    reads = [
        lambda h, v, w, u: F.linear(h.mT, v),
        lambda h, v, w, u: F.conv1d(h, w).square(),
        lambda h, v, w, u: F.linear(h, u).sin(),
        lambda h, v, w, u: F.silu(h.mT),
    ]
    found = []
    for cost in (None, 0, 100):
        x, *weights = (image(*shape).requires_grad_() for shape in ((8, 4, 6), (5, 4), (3, 4, 1), (3, 6)))
        with under(cost):
            h = x.exp()[2:4]
            out = sum(read(h, *weights).sum() for read in reads[::order])
        out.backward()
        found.append([t.grad for t in (x, *weights)])
    torch.testing.assert_close(found[1:], found[:1] * 2)


def test_an_empty_result_of_a_transposed_convolution():
    x, w = image(2, 4, 1, 1).float().requires_grad_(), image(4, 3, 1, 1).float().requires_grad_()
    with remat():
        y = F.conv_transpose2d(x, w, None, 2, [1, 0], 1)
    assert y.shape == (2, 3, 0, 2)
    y.sum().backward()
    assert not x.grad.any() and not w.grad.any()


ENLARGED = {
    "half of an enlarged image": lambda y: F.interpolate(y, scale_factor=2).chunk(2, 1)[0],
    "an enlarged half": lambda y: F.interpolate(y.chunk(2, 1)[0], scale_factor=2),
    "a padding without a batch": lambda y: F.pad(y.flatten(0, 1), (9, 9, 9, 9), "reflect"),
}


@pytest.mark.parametrize("name", ENLARGED)
def test_of_a_view_the_small_source_is_kept(name):
    conv, held, x = nn.Conv2d(3, 8, 3), Held(), image(2, 3, 16, 16, dtype=torch.float32)
    held.ignore(x, *conv.parameters())
    with held, remat() as record:
        y = conv(x)
        out = F.silu(ENLARGED[name](y)).mean((-1, -2))
        nbytes = y.nbytes
        del y
    assert record.kept_bytes == nbytes + x.nbytes
    assert held.held == nbytes + out.nbytes


def factor_like(a):
    return torch.full((1, 1, 1), 2.0, dtype=a.dtype, requires_grad=True)


COPIES = {
    "shuffled channels": lambda a: a.view(4, 2, 4, 10, 9).transpose(1, 2).reshape(4, 8, 10, 9),
    "flattened": lambda a: a.transpose(1, 2).flatten(2).view(4, 10, 8, 9).transpose(1, 2),
    "windows": lambda a: a.reshape(4, 8, 5, 2, 3, 3).permute(0, 2, 4, 1, 3, 5).reshape(-1, 8, 2, 3),
    "channels shuffled by PyTorch": lambda a: F.channel_shuffle(a, 4),
    "stacked": lambda a: torch.stack([a[:, :4], 1 - a[:, 4:]], 2).flatten(1, 2),
    "stacked rows": lambda a: torch.stack([a[..., :4], a[..., 4:8]], -1).flatten(3),
    "copied": lambda a: torch.clone(a).contiguous(memory_format=torch.channels_last),
    "another sign": lambda a: -a + (-(a - 0.5)).neg().abs() + torch.abs(0.5 - a),
    "waves": lambda a: torch.sin(a) + a.cos() ** 2,
    "joined": lambda a: torch.concatenate([a[:, :4], a.new_empty(4, 0, 10, 9), 1 - a[:, 4:]], 1),
    "pooled in place": lambda a: F.max_pool2d(a, 3, 1, 1) + torch.max_pool2d(a, (1, 3), [1, 1], (0, 1)),
    "pooled in place, a volume": lambda a: F.max_pool3d(a[:, None], 3, 1, 1)[:, 0],
    "padded by tensors": lambda a: F.pad(a, (torch.tensor(1), torch.tensor(-1)))[..., :9],
    "reflected by tensors": lambda a: F.pad(a, [torch.tensor(1), 0, 0, 0], "reflect")[..., :9],
    "reflected": lambda a: F.pad(a, (1, 1, 1, 1), "reflect", 0.0)[:, :, 1:-1, 1:-1],
    "rolled": lambda a: torch.roll(a, shifts=(1, -2), dims=(2, -1)),
    "flipped": lambda a: a.flip(-1).flip((1, 2)),
    "a number less it": lambda a: 0.3 - (1 - a),
    "squares": lambda a: (a - 0.5) ** 2 + a.pow(2.0) + torch.square(a) + torch.pow(a, 3),
    "clamped": lambda a: torch.clamp(a - 0.5, min=0.0, max=1) + a.clip(0.1) + a.clamp_min(0.2),
    "rms norm": lambda a: F.rms_norm(a.transpose(1, 3), (8,), eps=1e-5).transpose(1, 3),
    "pooled": lambda a: F.adaptive_avg_pool2d(a, (8, 7)),
    "pooled, a volume": lambda a: F.adaptive_avg_pool3d(a[:, None], (None, 8, 7))[:, 0],
    "pooled rows": lambda a: F.adaptive_avg_pool1d(a.flatten(2), 45)[..., None],
    "unit vectors": lambda a: F.normalize(a - 0.5) + F.normalize(a, p=1, dim=-1),
    "scaled and shifted": lambda a: torch.addcmul(a[0, 0, 0].detach(), factor_like(a), a, value=3),
}
ACROSS = {
    "rolled": lambda a: torch.roll(a, 1, 0) + a.roll(1) + a.roll((1, 2), (0, 1)),
    "flipped": lambda a: a.flip(0) + a.flip(dims=[0, 1]) + torch.flip(a, (0,)),
    "stacked": lambda a: torch.stack([a, a.sigmoid()]).square().mean(0) + torch.stack((a, a), -5).sum(0),
    "quotients": lambda a: a / (a.sigmoid() + 1) + a[:, :1] / (a + 9) + a[:1] / 3 / a.exp() + 1 / (a + 9),
    "reshaped": lambda a: a.transpose(0, 1).reshape(4, 8, 10, 9) + a.reshape(-1)[1:2],
    "a tensor less it": lambda a: torch.rsub(a, a.sigmoid()) + torch.rsub(a, 2, alpha=3),
    "powers": lambda a: 2**a + (a + 3) ** 0.5 + a.sigmoid().pow(a) + a.exp().pow(-1),
    "to one pixel": lambda a: a * F.adaptive_avg_pool2d(a, 1) * F.adaptive_avg_pool2d(a, [1, 1]),
    "lengths": lambda a: a * a.norm() + a.norm(dim=0) + torch.linalg.vector_norm(a, 1, (0, 1), True),
    "other lengths": lambda a: (
        a * torch.linalg.vector_norm(a, 0, 1, True) + torch.norm(a, "nuc", (2, 3), True)
    ),
    "unit vectors": lambda a: F.normalize(a, dim=0),
    "products": lambda a: torch.addcmul(a, a.sigmoid(), a, value=2) + torch.addcmul(a[:, :1], a[:, 1:2], a),
    "clamped by tensors": lambda a: a.clamp(torch.tensor(0.1), a.mean((2, 3), keepdim=True)),
}


def copied(copy):
    return lambda: Net(lambda self, x: self.c(copy(self.b(x))), b=block(), c=nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_made_again(monkeypatch, name):
    monkeypatch.setattr(task, "SLAB_BYTES", 500)
    check(copied(COPIES[name]), X)
    for precision, layout in itertools.product(PRECISIONS.values(), LAYOUTS.values()):
        with Seen(monkeypatch) as seen:
            step(copied(COPIES[name]), [X], 0, layout=layout, **precision)
        assert seen.remade and seen.strange() == []
    with remat() as record:
        copied(COPIES[name])()(X.float())
    kept = [row.recipe for row in record.rows if row.kept and row.recipe != "offsets"]
    assert kept == ["given", "conv2d"]


@pytest.mark.parametrize("name", ACROSS)
def test_copies_across_images(monkeypatch, name):
    monkeypatch.setattr(task, "SLAB_BYTES", 500)
    check(copied(ACROSS[name]), X)


def halves(a):
    """In two dtypes, as where a layer casts by itself."""
    half, one = a.to(torch.bfloat16), a.float()
    mixed = torch.cat([half, one[:, :4]], 1)[:, 4:] + half * 2 - one.type_as(half) * one
    return ((half + 1).add_(one) + mixed).to(one) / 3


def test_values_in_several_dtypes():
    """Autocast's casts, and the model's own, are made again."""
    x, make = X.float(), copied(halves)
    for autocast in (None, torch.bfloat16):
        how = {"dtype": torch.float32, "autocast": autocast}
        wanted, found = (step(make, [x], cost, **how) for cost in (None, 0))
        assert_same_forward(found, wanted)
        torch.testing.assert_close(found.gradients, wanted.gradients, rtol=1e-2, atol=1e-2)
        with torch.autocast("cpu", autocast, enabled=autocast is not None), remat() as record:
            make()(x)
        kept = [row.recipe for row in record.rows if row.kept]
        assert kept == [("given" if autocast is None else "cast"), "conv2d"]


MASKS = {
    "a mask": lambda a, mask: a * mask,
    "a mask first": lambda a, mask: mask * a,
    "in place": lambda a, mask: (a + 1).mul_(mask),
    "divided": lambda a, mask: a / (mask + 1),
    "for all channels": lambda a, mask: a * mask[:, :1].clone().expand(a.shape),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_kept_as_in_pytorch(name):
    mask = (image(4, 8, 10, 9) > 0).double()
    make = copied(lambda a: MASKS[name](a, mask))
    check(make, X)
    model = make().double()
    with remat() as record:
        loss = model(X).sum()
    rows = [row for row in record.rows if row.kept]
    assert [row.recipe for row in rows] == ["given", "conv2d", "given"]
    assert rows[-1].nbytes == (mask.nbytes / 8 if "channels" in name else mask.nbytes)
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_a_mask_of_another_dtype(dtype):
    mask = torch.ones(4, 8, 10, 9, dtype=dtype)
    make = copied(lambda a: mask * a / (mask + 1))
    check(make, X)
    with remat() as record:
        make().double()(X)
    kept = [(row.recipe, row.nbytes) for row in record.rows if row.kept]
    assert kept == [
        ("given", X.nbytes),
        ("conv2d", 4 * 8 * 90 * 8),
        ("given", mask.nbytes),
        ("given", 4 * 720 * 8),
    ]


def test_a_negative_mask():
    """Other values in the same memory."""
    x, z, found = image(4, 8, 6, 6).requires_grad_(), torch.view_as_complex(image(4, 8, 6, 6, 2)), []
    for context in (contextlib.nullcontext(), remat()):
        with context:
            a = x.sin()
            y = (a * z.imag).relu().sin() + 3 * (a * z.conj().imag).relu().sin()
        found += torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("write", [torch.Tensor.zero_, lambda t: t.data], ids=["in place", "exposed"])
def test_masks_that_nothing_needs_are_not_copied(write):
    held, x = Held(), torch.ones(4, 8, 6, 6).requires_grad_()
    held.ignore(x)
    with held, remat():
        masks = torch.rand(8, 4, 8, 6, 6)
        for mask in masks:
            x * mask
        write(masks)
    assert held.peak <= 9 * x.nbytes + 8


def test_a_mask_that_is_added_may_change():
    """PyTorch keeps nothing of it."""
    found = []
    for context in (contextlib.nullcontext(), remat()):
        mask, x = image(4, 8, 6, 6) > 0, image(4, 8, 6, 6, seed=1).requires_grad_()
        with context:
            y = torch.sin(torch.relu(x.sin()) + mask)
        mask.logical_not_()
        found += torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(*found)


def test_a_mask_counts_once():
    mask, y = torch.ones(4, 8, 10, 9), image(4, 8, 10, 9, dtype=torch.float32).requires_grad_()
    with remat() as record:
        sum((y * mask).sum() for _ in range(3)).backward()
    assert record.plain_bytes == record.kept_bytes == mask.nbytes


def test_a_factor_in_place_is_copied_once():
    """As in PyTorch, whose node saves it."""
    peaks, q = [], torch.rand(8, 32, 32, 32).requires_grad_()
    for context in (contextlib.nullcontext(), remat()):
        held = Held()
        held.ignore(q)
        with held, context:
            torch.ones(8, 32, 32, 32).mul_(q)
        peaks.append(held.peak)
    assert peaks == [2 * q.nbytes] * 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["quotient", "product", "convolution", "weight", "weight of one channel"])
def test_gradients_have_pytorchs_strides(name, layout):
    """A norm outside of remat may conclude a layout from them."""
    found = []
    for context in (contextlib.nullcontext(), remat(), remat(1e9)):
        x, w = image(4, 8, 6, 5), image(8, 8, 3, 3)
        x, other = (t.requires_grad_() for t in (x.contiguous(memory_format=layout), x + 3))
        with context:
            if name in ("quotient", "product"):
                y = x.tanh() / other if name == "quotient" else x.tanh() * other
            else:
                w = w[:1] if "one" in name else w
                w = w.contiguous(memory_format=torch.channels_last) if "weight" in name else w
                y = F.conv2d(x.tanh() if "weight" in name else other[:, :, :, 1:], w.requires_grad_())
        for dy in (y.detach(), y.detach().transpose(1, 3).contiguous().transpose(1, 3)):
            grads = torch.autograd.grad(y, (x, other), dy, retain_graph=True, allow_unused=True)
            found.append([g if g is None else g.stride() for g in grads])
    assert found[2:4] == found[:2] and found[4:] == found[:2]


def test_a_mask_that_is_changed_is_an_error():
    mask, model = torch.ones(4, 8, 10, 9), copied(lambda a: a * mask)()
    with remat():
        loss = model(X.float()).sum()
    mask.zero_()
    with pytest.raises(RuntimeError, match="changed by an inplace operation|modified by an inplace"):
        loss.backward()


def test_a_norm_that_is_written_out():
    """Of each tensor of the image's size that it makes, nothing is kept but the centred image."""

    def forward(self, x):
        x = self.c(x)
        x = x - x.mean(1, keepdim=True)
        x = x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        return self.last(F.gelu(self.gamma * x + self.beta))

    def make():
        vectors = {v: nn.Parameter(torch.rand(32, 1, 1)) for v in ("gamma", "beta")}
        return Net(forward, c=nn.Conv2d(3, 32, 1), last=nn.Conv2d(32, 2, 1), **vectors)

    check(make, X)
    with remat() as record:
        make()(X.float())
    large = [row.recipe for row in record.rows if row.kept and row.shape == (4, 32, 10, 9)]
    assert large == ["sub"]


LENGTHS = {
    "torch.norm": lambda a: torch.norm(a, p=2, dim=(2, 3), keepdim=True),
    "method": lambda a: a.norm(2, (2, 3), True),
    "vector norm": lambda a: torch.linalg.vector_norm(a, dim=[2, 3], keepdim=True),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_global_response_norm(name):
    """As in ConvNeXt V2."""

    def forward(self, x):
        a = F.gelu(self.n(self.c(x)))
        length = LENGTHS[name](a)
        scaled = a * (length / (length.mean(1, keepdim=True) + 1e-6))
        return self.last(a + torch.addcmul(self.beta, self.gamma, scaled))

    def make():
        vectors = {v: nn.Parameter(torch.rand(1, 8, 1, 1)) for v in ("gamma", "beta")}
        return Net(forward, c=nn.Conv2d(3, 8, 1), n=nn.BatchNorm2d(8), last=nn.Conv2d(8, 2, 1), **vectors)

    check(make, X)
    with remat() as record:
        make()(X.float())
    large = [row.recipe for row in record.rows if row.kept and math.prod(row.shape) > 4 * 8]
    assert large == ["given", "conv2d"]


LITTLE_SAVED = {  # by PyTorch
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(784, 512)),
    "product": lambda: Net(
        lambda self, x: F.linear(x, self.w * self.factor),
        w=nn.Parameter(torch.randn(512, 784)),
        factor=nn.Parameter(torch.ones(1)),
    ),
    "few values": lambda: nn.Sequential(nn.Linear(784, 512), nn.BatchNorm1d(512)),
    "few values, eval": lambda: nn.Sequential(nn.Linear(784, 512), nn.BatchNorm1d(512)).eval(),
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", LITTLE_SAVED)
def test_no_more_is_held_than_in_pytorch(name, cost):
    """Of a first layer's computed weight, and of a norm with few values in a channel."""
    model = Net(lambda self, x: F.relu(self.m(x)).mean(), m=LITTLE_SAVED[name]())
    held, x = [], image(4, 784, dtype=torch.float32)
    for price in (None, cost):
        out, counted = counted_forward(model, x, price)
        assert out.requires_grad
        held.append(counted.held)
    assert 0 < held[1] <= held[0]


def relu6_first(x, c, w):
    y = F.avg_pool2d(x, 1)
    return F.relu6(y).mean((2, 3)).sum() + F.conv2d(y, c).sum()


NOT_SAVED = {  # by PyTorch, or once
    "a frozen factor": lambda x, c, w: torch.addcmul(x.new_zeros(1), x.new_ones(8, 1, 1), x * 1).sum(),
    "pooled to one": lambda x, c, w: F.adaptive_avg_pool1d((x * 1).flatten(2), (1,)).sum(),
    "relu6": lambda x, c, w: F.relu6(x).mean((2, 3)).sum(),
    "relu6 first": relu6_first,
    "half of the channels": lambda x, c, w: F.linear((x * 1)[:, :4].permute(0, 2, 3, 1), w).sum(),
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", NOT_SAVED)
def test_what_pytorch_does_not_save(name, cost):
    leaves = [image(*s).requires_grad_() for s in ((2, 8, 12, 10), (8, 8, 1, 1), (8, 4))]
    counted = []
    for price in (None, cost):
        with Held() as held, under(price):
            held.ignore(*leaves)
            out = NOT_SAVED[name](*leaves)
        assert out.requires_grad
        counted.append(held.held)
    assert counted[1] <= counted[0] + 256


def test_a_number_that_is_a_tensor():
    """It may change after the call."""

    def forward(self, x):
        value = torch.tensor(2.0)
        out = F.silu(torch.addcmul(self.beta, self.gamma, F.silu(self.c(x)), value=value))
        value.fill_(50)
        return out

    vectors = {v: nn.Parameter(torch.rand(8, 1, 1)) for v in ("gamma", "beta")}
    check(lambda: Net(forward, c=nn.Conv2d(3, 8, 3), **copy.deepcopy(vectors)), X)


def test_a_flattened_copy_larger_than_a_slab(monkeypatch):
    """It starts from all images, of which each slab takes its own."""
    monkeypatch.setattr(task, "SLAB_BYTES", 500)

    def make():
        activations = nn.ReLU(), nn.SiLU()
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), activations[0], nn.Flatten(), activations[1], nn.Linear(448, 5)
        )

    check(make, X, layout=torch.channels_last)


def tokens_through_a_layer(self, x):
    return self.l(self.act(self.n(self.c(x))).flatten(2).transpose(1, 2))


def tokens_of_a_sum(self, x):
    if len(x) == 1:  # an image read as rows, columns, channels
        x = x[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)[None]
    return self.act(x + self.n(self.c(x))).flatten(2).transpose(1, 2)


def norm_of_a_part(self, x):
    y = F.silu(self.c(x.contiguous(memory_format=torch.channels_last)))
    y = torch.cat([y, y], 1)
    return self.act(self.n(y.view(y.shape).chunk(2, 1)[1]))


@pytest.mark.parametrize("shape", [(1, 8, 3, 2), (2, 8, 3, 1), (2, 8, 3, 2)], ids=str)
@pytest.mark.parametrize("norm", ["eval", "no running statistics", "instance"])
@pytest.mark.parametrize("forward", [tokens_through_a_layer, tokens_of_a_sum, norm_of_a_part])
def test_norms_and_layouts(shape, norm, forward):
    """Of one image or column, PyTorch may read a gradient in another layout wrongly."""

    def make(activation):
        return Net(forward, c=nn.Conv2d(8, 8, 1), n=NORMS[norm](), act=activation(), l=nn.Linear(8, 5))

    for activation in (nn.Identity, nn.SiLU):
        torch.manual_seed(0)
        x, model = image(*shape).requires_grad_(), randomised(make(activation)).double()
        for cost in COSTS:
            assert torch.autograd.gradcheck(remat(cost)(model), x)
        if 1 not in shape:
            check(functools.partial(make, activation), x.detach())


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


def test_a_computed_weight_may_be_a_view():
    """As where weights are standardised."""

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            w = conv.weight.flatten(1)
            w = F.layer_norm(w, w.shape[1:]).view_as(conv.weight)
            x = F.relu(norm(F.conv2d(x, w, padding=1)))
        return x

    def make():
        convs, norms = (nn.Conv2d(8, 8, 3) for _ in range(3)), (nn.BatchNorm2d(8) for _ in range(3))
        return Net(forward, convs=nn.ModuleList(convs), norms=nn.ModuleList(norms))

    check(make, image(4, 8, 10, 9))
    held = []
    for cost in (0, 1000):
        with remat(cost) as record:
            make()(image(4, 8, 32, 32, dtype=torch.float32))
        held.append(record.kept_bytes)
    assert held[1] < 0.6 * held[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_volumes_hold_no_more_than_their_values(dtype):
    """A CPU's kernel makes them in a padded tensor's memory."""
    conv, x = nn.Conv3d(4, 4, 2, padding=1).to(dtype), image(6, 4, 5, 5, 5, dtype=dtype).requires_grad_()
    with remat():
        y = conv(x)
    y.sum().backward()
    assert x.grad.untyped_storage().nbytes() == x.grad.nbytes


@pytest.mark.parametrize("depth", [1, 2, 5, 12])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.GELU])
def test_held_and_peak_of_a_chain(depth, activation):
    """Each convolution's output is held, and the result; backward needs two tensors of a block above that.

    dw is there beside dz and a. From block to block y goes, which is more than the gradients of the
    parameters that come, so the peak is in the last block.
    """
    model, held = chain(depth, activation=activation), Held()
    x, dz = (image(4, 8, 32, 32, seed=seed, dtype=torch.float32) for seed in (0, 1))
    held.ignore(x, dz, *model.parameters(), *model.buffers())
    with held:
        with remat():
            out = model(x)
        forward, held.peak = held.held, 0
        out.backward(dz)
    assert forward <= (depth + 1) * BLOCK + depth * VECTORS
    assert held.peak <= forward + 2 * BLOCK + WEIGHT + VECTORS


ALONE = {
    "group norm": lambda: nn.GroupNorm(4, 8),
    "layer norm": lambda: nn.LayerNorm(32),
    "instance norm": lambda: nn.InstanceNorm2d(8, affine=True),
    "prelu": lambda: nn.PReLU(8),
    "mish": nn.Mish,
    "silu": nn.SiLU,
    "square": lambda: Net(lambda self, x: x**2),
    "clamp": lambda: Net(lambda self, x: x.clamp(0, 1)),
}


@pytest.mark.parametrize("name", ALONE)
def test_peak_of_an_operation_alone(name):
    """If backward calls it again, the second result goes before the gradient comes: the peak is PyTorch's."""
    peaks = []
    for cost in (None, 0):
        model, held = ALONE[name](), Held()
        x, dz = (image(4, 8, 32, 32, seed=seed, dtype=torch.float32) for seed in (0, 1))
        x.requires_grad_()
        held.ignore(x, dz, *model.parameters())
        with held:
            with under(cost):
                out = model(x)
            out.backward(dz)
        peaks.append(held.peak)
    assert BLOCK < peaks[1] <= peaks[0] + VECTORS


@pytest.mark.parametrize("name", ["leaky_relu_", "elu_", "celu_", "selu_"])
def test_an_activation_in_place_holds_its_result_alone(name):
    activation = EVERY_ACTIVATION[name]()
    convs = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(convs[0], activation, convs[1], activation)
    x, found = image(4, 3, 32, 32, dtype=torch.float32), []
    for cost in (None, 0):
        out, held = counted_forward(model, x, cost)
        found.append((held.held, held.peak))
    assert found[1] == found[0] and out.grad_fn is not None


@pytest.mark.parametrize("activation", [nn.LeakyReLU(-0.1, inplace=True), nn.ELU(-0.5, inplace=True)])
@pytest.mark.parametrize("cost", [None, 0])
def test_a_negative_slope_in_place_is_pytorchs_error(activation, cost):
    with under(cost):
        out = activation(nn.BatchNorm2d(3)(image(2, 3, 5, 5).float()))
    with pytest.raises(RuntimeError, match="In-place"):
        out.sum().backward()


CUTS = {  # what a convolution reads of eight channels' images
    "crops": lambda ys: torch.cat([y[..., :4, :4] for y in ys], 1),
    "one channel each": lambda ys: torch.cat([y[:, :1] for y in ys], 1),
    "what is added to all images": lambda ys: sum([y[:1, :, :1, :1] for y in ys[1:]], F.silu(ys[0])),
    "halves": lambda ys: torch.cat([half for y in ys for half in y.chunk(2, 1)], 1),
    "one image each": lambda ys: torch.cat([y[:1] for y in ys]),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_small_part_does_not_hold_the_whole(cut):
    def run(self, x):
        return self.last(CUTS[cut]([conv(x) for conv in self.convs]))

    with torch.device("meta"):
        convs, x = nn.ModuleList(nn.Conv2d(3, 8, 3, padding=1) for _ in range(4)), torch.empty(4, 3, 32, 32)
        channels = CUTS[cut]([conv(x) for conv in convs]).shape[1]
        found = held_plainly_and_under_remat(Net(run, convs=convs, last=nn.Conv2d(channels, 2, 1)), x)
    assert 0 < found[1] <= found[0]


def test_images_put_together_are_recomputed():
    with torch.device("meta"):
        model, x = network("norms of few images")().to("meta"), torch.empty(6, 3, 32, 32)
    found = held_plainly_and_under_remat(model, x)
    # Of 8 channels plain has the 6 images of y, 6 behind ReLU and 12 put together; of 4 channels the 12 of y.
    image = x[:1, :1].nbytes
    assert found[0] // image >= 8 * (6 + 6 + 12) + 4 * 12 and found[1] // image == 8 * 6 + 4 * 12


def test_a_concatenation_that_pytorch_holds_anyway():
    """Its parts, which plain PyTorch drops, are not held beside it."""

    def run(self, x):
        z = torch.cat([conv(x) for conv in self.convs], 1)
        weights = self.last(z).flatten(2).softmax(2)
        return torch.bmm(z.flatten(2), weights.mT)

    with torch.device("meta"):
        convs, x = nn.ModuleList(nn.Conv2d(3, 8, 3) for _ in range(2)), torch.empty(4, 3, 32, 32)
        model = Net(run, convs=convs, last=nn.Conv2d(16, 1, 1))
    found = held_plainly_and_under_remat(model, x)
    assert 0 < found[1] <= found[0]


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("after", ["a layer", "a layer with the gradient of its input", "a sum", "a product"])
def test_the_graph_behind_a_detached_tensor_goes(after, cost):
    def run(self, x):
        h = self.body(x)  # alive as long as forward runs
        detached = h.detach()
        if after == "a sum":
            detached = detached + self.other(x)
        elif after == "a product":
            detached = detached * self.other(x)
        return self.last(detached.requires_grad_() if "gradient" in after else detached)

    with torch.device("meta"):
        body, other = nn.Sequential(block(), nn.AvgPool2d(2)), nn.Conv2d(3, 8, 2, stride=2)
        model, x = Net(run, body=body, other=other, last=nn.Conv2d(8, 4, 1)), torch.empty(4, 3, 32, 32)
    found = held_plainly_and_under_remat(model, x, cost)
    assert 0 < found[1] <= found[0]


def test_a_padding_that_pytorch_holds_anyway():
    """Its input, nearly as large, is not held beside it."""

    def run(self, x):
        for conv in self.convs:
            padded = F.pad(x, (1, 1, 1, 1))
            x = conv(padded) + padded.abs()[:, :, 1:-1, 1:-1]
        return x

    with torch.device("meta"):
        convs = nn.ModuleList(nn.Conv2d(8, 8, 3) for _ in range(4))
        model, x = Net(run, convs=convs), torch.empty(4, 8, 32, 32, requires_grad=True)
    found = held_plainly_and_under_remat(model, x)
    assert 0 < found[1] <= found[0]


def test_images_in_another_shape_are_recomputed():
    with torch.device("meta"):
        model, x = network("groups as images")().to("meta"), torch.empty(6, 3, 32, 32)
    found = [nbytes // x[:, :1].nbytes for nbytes in held_plainly_and_under_remat(model, x)]
    # Plain has both norms' inputs, SiLU's and its result, of 8 channels, and behind that ReLU's result and y.
    assert found[0] >= 4 * 8 + 2 * 4 and found[1] == 8 + 2 * 4


def test_the_parts_of_a_concatenation_go_with_the_context():
    """Also where no node will need it: before layers that are not trained."""
    with torch.device("meta"):
        first, frozen = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 8, 1).requires_grad_(False)
        x = torch.empty(4, 3, 32, 32)
    held = Held()
    held.ignore(x, *first.parameters(), *frozen.parameters())
    with held, remat(9):
        y = frozen(torch.cat([torch.cumsum(first(x), i) for i in (2, 3)], 1)).mean()
    assert y.requires_grad and held.held == y.nbytes


@pytest.mark.parametrize("cost", [0, 1000])
def test_a_long_chain_of_small_steps(cost):
    """They count as next to nothing, but each would be a level of recursion."""
    gate, x = (torch.randn(4, 8, n, n, dtype=torch.float64, requires_grad=True) for n in (1, 16))

    def run():
        t = F.silu(gate)
        for _ in range(1500):
            t = t * 0.999
        return torch.autograd.grad(F.silu(F.silu(x) + t).sum(), (gate, x))

    with remat(cost):
        got = run()
    torch.testing.assert_close(got, run())


def test_rows_of_a_batch_one_by_one(monkeypatch):
    """Each view's base is looked for among a number of values, not among all earlier views."""
    looked = []
    monkeypatch.setattr(values.View, "dense", property(lambda view: looked.append(view) or True))
    with remat():
        y = F.linear(torch.randn(500, 4, 4), torch.randn(4, 4, requires_grad=True))
        rows = y.unbind(0)
    assert len(rows) == 500 <= len(looked) <= 500 * values.MOST_VALUES


class Residual(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        y += x
        return F.relu(y, inplace=True)


@pytest.mark.parametrize(("device_type", "tensors"), [("cpu", 2.16), ("cuda", 3.1)])
@pytest.mark.parametrize("depth", [2, 4, 6, 8])
def test_peak_of_a_chain_of_sums(monkeypatch, depth, device_type, tensors):
    """A sum is made from the sum before it, in the memory of one tensor (a CPU: two slabs), not of each."""
    monkeypatch.setattr(task, "SLAB_BYTES", 8 * 32 * 32 * 4)  # of one image
    blocks = [Residual(*block(8, 8)[:2]) for _ in range(depth)]
    model = nn.Sequential(*block()[:2], *blocks)
    forward, peak = predict_memory(model, (16, 3, 32, 32), max_cost=0, device_type=device_type)
    tensor = 16 * 8 * 32 * 32 * 4
    assert forward >= (depth + 2) * tensor
    assert peak <= forward + tensors * tensor


@pytest.fixture
def norms(monkeypatch):
    """How often each norm is recomputed."""
    run, found = operations.Normalise.run, Counter()

    def counted(self, out, y):
        found[id(self)] += 1
        return run(self, out, y)

    monkeypatch.setattr(operations.Normalise, "run", counted)
    return found


def test_a_value_is_held_where_the_peak_is_still_to_come(norms):
    """The last layer's gradient is larger than all that backward makes again: each norm runs once.

    Without it there is no room, and a block's output is made from all those before it.
    """
    for columns, often in ((4096, False), (1, True)):
        norms.clear()
        blocks = [CHAINS["residual"]() for _ in range(6)]
        model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(8 * 64, columns))
        with remat():
            out = model(image(2, 8, 8, 8, dtype=torch.float32))
        out.sum().backward()
        assert len(norms) == 6
        assert (max(norms.values()) > 2) == often


@pytest.mark.parametrize("name", ["conv, norm, relu", "depthwise", "residual", "pre-activation", "dense"])
def test_inputs_of_recomputed_convolutions_are_held_where_there_is_room(norms, name):
    """A recomputed convolution's input is needed for its weight's gradient, too.

    The first layer's gradient is the largest, and the last to come.
    """
    model = nn.Sequential(nn.Conv2d(8, 8, 63, padding=31), *[CHAINS[name]() for _ in range(6)])
    with remat(100):
        out = model(image(2, 8, 8, 8, dtype=torch.float32))
    out.sum().backward()
    assert list(norms.values()) == [1] * 6


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_what_is_held_does_not_raise_the_peak(monkeypatch, name):
    """The peak is that of a backward that holds only what it must, up to a part of a block's tensors."""
    model, peaks = getattr(torchvision.models, name)(weights=None), {}
    for room in (task.Task.room, lambda self, value=None: -1):
        monkeypatch.setattr(task.Task, "room", room)
        for cost in (0, 150):
            peaks.setdefault(cost, []).append(predict_memory(model, (4, 3, 96, 96), max_cost=cost).peak)
    assert all(held <= 1.05 * least for held, least in peaks.values()), peaks


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True)

    def forward(self, x):
        h = self.conv(x)
        return (self.norm(h) * h.sigmoid()).flatten(1)


class PooledRow(nn.Module):
    """A row of pixels in a layout that is PyTorch's for channels first and last at once, but for the row."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        z = self.norm(x.unflatten(1, (4, -1)).flatten(2, 3)[:, :, :1] * 1).transpose(2, 3)
        return F.avg_pool2d(z.contiguous(memory_format=torch.channels_last).transpose(2, 3), 2, 2, 1)


@pytest.mark.parametrize(
    ("make", "shape", "layout"),
    [(Gated, (1, 3, 8, 8), torch.channels_last), (PooledRow, (2, 4, 1, 6), torch.contiguous_format)],
)
def test_gradients_have_pytorchs_layout(make, shape, layout):
    """PyTorch's own norms take a gradient in another layout for the wrong values."""
    model, grads = make().double(), []
    for cost in (None, 0):
        x = image(*shape).contiguous(memory_format=layout).requires_grad_()
        with under(cost):
            out = model(x)
        grads.append(torch.autograd.grad(out.square().sum(), [x, *model.norm.parameters()]))
    for p, q in zip(*grads, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_with_gaps_in_its_input_is_recomputed_to_the_bit(training):
    """Then PyTorch's kernel computes the norm in another order."""
    conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(4).train(training)
    for t in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(t)
    x, grads = image(4, 3, 16, 16, dtype=torch.float32), []
    for cost in (None, 0):
        with under(cost):
            z = norm(conv(x)[:, 2:6])
            out = F.silu(z)
        grads += torch.autograd.grad(out.sum(), z)
    assert torch.equal(*grads)


@pytest.mark.parametrize("alias", [lambda y: y.unsafe_chunk(2, 1)[0], lambda y: torch.unsafe_split(y, 2)[0]])
def test_an_alias_with_a_version_of_its_own(alias):
    conv, last, grads = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), []
    x = image(2, 3, 8, 8, dtype=torch.float32).requires_grad_()
    for cost in (None, 0):
        with under(cost):
            y = conv(x)
            out, other = last(F.interpolate(y, scale_factor=2).relu()), alias(y.detach())
        other.add_(1)
        grads.append(torch.autograd.grad(out.sum(), x)[0])
    torch.testing.assert_close(*grads)


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


def test_a_norms_gradient_is_written_over_its_recomputed_input(monkeypatch):
    """Where there is no room: no kept tensor is overwritten, so that the graph can be used again."""
    monkeypatch.setattr(task.Task, "room", lambda self, value=None: -1)
    monkeypatch.setattr(task, "SLAB_BYTES", 8 * 32 * 32 * 4)  # of one image
    branches, norm = [block(8, 4), block(8, 4)], nn.BatchNorm2d(8)
    x, dz = (image(16, 8, 32, 32, seed=seed, dtype=torch.float32) for seed in (0, 1))
    everything, held = nn.ModuleList([*branches, norm]), Held()
    held.ignore(x, dz, *everything.parameters(), *everything.buffers())
    with held:
        with remat():
            joined = torch.cat([branch(x) for branch in branches], 1)
            out = norm(joined)
        gradient = torch.autograd.graph.get_gradient_edge(joined)
        del joined
        forward, held.peak = held.held, 0
        (first,) = torch.autograd.grad(out, [gradient], dz, retain_graph=True)
        assert held.peak <= forward + 1.3 * first.nbytes
        (second,) = torch.autograd.grad(out, [gradient], dz)
    joined = torch.cat([branch(x) for branch in branches], 1)
    (wanted,) = torch.autograd.grad(norm(joined), [joined], dz)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, wanted)


def test_what_a_graph_keeps_is_no_room(monkeypatch):
    """Where the graph stays, so do the kept values: nothing else may be held in their place."""
    model = nn.Sequential(*[CHAINS["residual"]() for _ in range(6)])
    x, dz = (image(4, 8, 32, 32, seed=seed, dtype=torch.float32) for seed in (0, 1))

    def peak():
        held = Held()
        held.ignore(x, dz, *model.parameters(), *model.buffers())
        model.zero_grad()
        with held:
            with remat():
                out = model(x)
            out.backward(dz, retain_graph=True)
        return held.peak

    found = peak()
    monkeypatch.setattr(task.Task, "room", lambda self, value=None: -1)
    assert found <= peak() + BLOCK // 2


class Convolutions(TorchDispatchMode):
    """How often each convolution is computed, by the memory of its weight; gradients are not counted."""

    def __init__(self):
        super().__init__()
        self.times = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default and not args[6]:
            self.times[args[1].untyped_storage()._cdata] += 1
        return func(*args, **(kwargs or {}))


CHAINS = {
    "conv, norm, relu": lambda: block(8, 8),
    "depthwise": lambda: block(8, 8, groups=8),
    "residual": lambda: Net(lambda self, x: F.relu(self.b(x) + x), b=block(8, 8)),
    "pre-activation": lambda: Net(
        lambda self, x: x + self.c(F.relu(self.n(x))),
        n=nn.BatchNorm2d(8), c=nn.Conv2d(8, 8, 3, padding=1)),
    "dense": lambda: Net(lambda self, x: torch.cat([x[:, 4:], self.b(x)], 1), b=block(8, 4)),
}  # fmt: skip


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("depth", [3, 15])
@pytest.mark.parametrize("name", CHAINS)
def test_a_convolution_is_computed_again_at_most_once(name, depth, cost):
    model, convolutions = nn.Sequential(*[CHAINS[name]() for _ in range(depth)]), Convolutions()
    with convolutions:
        with under(cost):
            out = model(image(2, 8, 6, 6, dtype=torch.float32))
        assert set(convolutions.times.values()) == {1}
        out.sum().backward()
    assert len(convolutions.times) == depth
    most = max(convolutions.times.values())
    assert most == 1 if cost == 0 else most <= 2
    if cost == 1e9:
        assert most == 2  # the price was used


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
    assert "1.0" in text and "conv2d" in text and "relu" in text and "recomputed" in text
    with pytest.raises(ValueError, match="^model must be a torch.nn.Module, got <class 'str'>"):
        record.names("model")
    with remat() as record, torch.no_grad():
        model(X.float())
    assert str(record).startswith("no operation here needs a gradient")


@pytest.mark.parametrize("norm", ["eval", "frozen", "no affine, eval", "no running statistics", "two groups"])
def test_the_record_counts_every_norms_input(norm):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), NORMS[norm](), nn.Conv2d(8, 2, 1)), X.float()
    with remat() as record:
        model(x)
    assert record.plain_bytes == x.nbytes + 2 * (4 * 8 * 8 * 7) * 4


def test_parts_of_concatenations_do_not_pile_up():
    """Where nothing decides what is kept of them."""
    peaks = []
    for cost in (None, 0):
        conv, held, x = nn.Conv2d(3, 16, 3, padding=1), Held(), image(2, 3, 32, 32, dtype=torch.float32)
        held.ignore(x, *conv.parameters())
        with held, under(cost):
            y = conv(x)
            for _ in range(8):
                y = torch.sin(torch.cat([y.cumsum(2), y.cumsum(3)], 1))[:, :16]
        peaks.append(held.peak)
    assert peaks[1] <= peaks[0] + 2 * y.nbytes  # the last one's


def test_the_record_counts_autocasts_copies_of_weights():
    model, x = nn.Sequential(block(), block(8, 8), nn.Flatten(), nn.Linear(720, 9)), X.float()
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
    check(network("residual"), X, costs=[max_cost])
