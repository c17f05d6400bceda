"""Predicted memory against measured memory, and what the prediction must not do."""

import contextlib
import copy
import functools
import math
import random
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from helpers import FusedConvBN2d, largest_batch, max_cost_for, predict, predict_memory, remat
from helpers.memory import MemoryTrace
from helpers.predict import Held


def measure(model, x, max_cost=None, autocast=None):
    """(end of forward, peak of all tensors) of a step."""

    def forward():
        with contextlib.ExitStack() as stack:
            if autocast is not None:
                stack.enter_context(torch.autocast("cpu", autocast))
            if max_cost is not None:
                stack.enter_context(remat(max_cost))
            return model(x)

    grad = torch.randn_like(forward().detach())
    with MemoryTrace("cpu") as trace:
        out = forward()
        trace.mark("end of forward")
        out.backward(grad)
    return trace.marks["end of forward"], trace.tensor_peak


def network(name):
    torch.manual_seed(0)
    return getattr(torchvision.models, name)(weights=None)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0"])
def test_to_the_byte(name):
    model, shape = network(name), (4, 3, 64, 64)
    assert predict_memory(model, shape) == measure(model, torch.randn(shape))


class Network(nn.Module):
    """A stem with a max-pool, expansions, a depthwise convolution, a gate, a concatenation and a sum."""

    def __init__(self, width=16):
        super().__init__()
        norm = nn.BatchNorm2d
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), norm(width), nn.ReLU(), nn.MaxPool2d(2))
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1), norm(2 * width), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width), norm(2 * width), nn.SiLU()
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2 * width, 2 * width, 1), nn.Sigmoid())
        self.last = nn.Sequential(nn.Conv2d(3 * width, width, 1), norm(width))

    def forward(self, x):
        x = self.stem(x)
        h = self.depthwise(self.expand(x))
        return (self.last(torch.cat([x, h * self.gate(h)], 1)) + x).relu()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("max_cost", [None, 0, 9, 50, math.inf])
def test_to_the_byte_under_remat_and_autocast(max_cost, autocast):
    model, shape, how = Network(), (4, 3, 32, 32), {"max_cost": max_cost, "autocast": autocast}
    assert predict_memory(model, shape, **how) == measure(model, torch.randn(shape), **how)


@pytest.mark.parametrize(
    ("name", "max_cost", "autocast"),
    [("resnet18", 150, torch.bfloat16), ("mobilenet_v2", 0, None), ("squeezenet1_1", 600, torch.bfloat16)],
)
def test_to_the_byte_on_networks_as_they_are(name, max_cost, autocast):
    model, shape, how = network(name), (2, 3, 64, 64), {"max_cost": max_cost, "autocast": autocast}
    assert predict_memory(model, shape, **how) == measure(model, torch.randn(shape), **how)


@pytest.mark.parametrize("max_cost", [0, 50])
def test_one_slab_stands_for_all_under_remat(max_cost):
    """Passes on images of 1 MiB and more take one at a time; on fake tensors the first, for all."""
    pool = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(4, 4, 1))
    for model, shape in (
        (Network(), (6, 3, 128, 128)),
        (pool, (4, 3, 400, 600)),
        (pool[::2], (4, 3, 400, 600)),
    ):
        assert predict_memory(model, shape, max_cost=max_cost) == measure(model, torch.randn(shape), max_cost)


@pytest.mark.parametrize("stride", [1, (1, 1, 2)])
def test_to_the_byte_on_pointwise_volumes(stride):
    model, shape = nn.Sequential(nn.Conv3d(3, 2, 1), nn.Conv3d(2, 4, 1, stride)), (8, 3, 20, 18, 20)
    assert predict_memory(model, shape, max_cost=0) == measure(model, torch.randn(shape), 0)


@pytest.mark.parametrize(
    ("dtype", "training"), [(torch.float32, False), (torch.bfloat16, False), (torch.float64, True)]
)
def test_to_the_byte_under_remat_in_eval_mode_and_other_dtypes(dtype, training):
    model, x = Network().to(dtype).train(training), torch.randn(4, 3, 32, 32, dtype=dtype)
    assert predict_memory(model, x, max_cost=9) == measure(model, x, 9)


def fused_network(slab_size=None):
    """Outputs larger and smaller than the inputs, in which they cannot or can wait."""
    layers = [FusedConvBN2d(c, d, 3, padding=1, slab_size=slab_size) for c, d in ((3, 8), (8, 24), (24, 8))]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))


@pytest.mark.parametrize("slab_size", [None, 1, 3, "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_the_byte_on_the_fused_layer(dtype, slab_size):
    model, x = fused_network(slab_size).to(dtype), torch.randn(8, 3, 32, 32).to(dtype)
    assert predict_memory(model, x) == measure(model, x)


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("make", [lambda: network("resnet18"), fused_network], ids=["plain", "fused"])
def test_to_the_byte_with_another_library_and_more_threads(make):
    """Without oneDNN PyTorch computes convolutions in another way, as on another processor."""
    model, shape, threads = make(), (2, 3, 32, 32), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.backends.mkldnn.flags(enabled=False):
            assert predict_memory(model, shape) == measure(model, torch.randn(shape))
    finally:
        torch.set_num_threads(threads)


def test_slabs_are_seen():
    """What backward makes for a moment: much with the whole batch at once, little with an image."""
    peaks = {}
    for slab_size in (1, 4, "batch"):
        block = FusedConvBN2d(64, 64, 3, padding=1, bias=False, slab_size=slab_size)
        peaks[slab_size] = predict_memory(nn.Sequential(nn.Conv2d(3, 64, 1), block), (16, 3, 32, 32)).peak
    image = 64 * 32 * 32 * 4
    assert peaks[4] - peaks[1] >= 3 * image
    assert peaks["batch"] - peaks[4] >= 3 * image


class Elementwise(nn.Module):
    """``function`` of the scaled input."""

    def __init__(self, function):
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.ones(1)), function

    def forward(self, x):
        return self.function(x * self.scale)


class Permute(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class Columns(nn.Module):
    def forward(self, x):
        return (x * 2).transpose(1, 2)


class Rows(nn.Module):
    """Of memory in the order of dimensions."""

    def forward(self, x):
        return x.view(len(x), -1)


class SumInBackward(torch.autograd.Function):
    """Its gradient is a sum in a third tensor's memory."""

    @staticmethod
    def forward(ctx, h):
        return h.sum()

    @staticmethod
    def backward(ctx, dz):
        return dz.repeat(1000) + dz.repeat(1000)


CONSTANT = torch.ones(2, 250)


def with_context(y):
    return y + y @ y[:, :1].softmax(-1).mT


EXACT = {
    "saved and in place": lambda h: (h.sigmoid() + h.tanh()).relu_()[::2].exp(),
    "gradients added in place": lambda h: h.neg().sum() + h.neg().sum(),
    "gradients added, one still needed": lambda h: (h.tanh() + h) * h,
    "gradients added, the first a view": lambda h: h.neg().sum() + h.unflatten(0, (2, 500)).exp().sum(),
    "ends with a sum": lambda h: h.exp() + h.cos(),
    "ends with a view": lambda h: h.exp().unflatten(0, (2, 500)),
    "a sum of its own in backward": SumInBackward.apply,
    "a number is a tensor meanwhile": lambda h: h.neg() + 2,
    "gradients added, the first given": lambda h: with_context(h.exp().view(2, 5, 100)),
    "a maximum": lambda h: h.unflatten(0, (20, 50)).max(1)[0],
    "sorted": lambda h: h.sort()[0],
    "the largest": lambda h: h.topk(100)[0],
    "gathered": lambda h: h.gather(0, torch.arange(0, 1000, 3)),
    "by an index": lambda h: h[torch.arange(0, 1000, 3)],
    "selected": lambda h: h.index_select(0, torch.arange(0, 1000, 3)),
    "the larger of two": lambda h: torch.maximum(h.sin(), h.cos()),
    "taken": lambda h: h.take(torch.arange(0, 1000, 3)),
    "with a part of a constant": lambda h: h.view(4, 250) + CONSTANT[0],
    "numbers from tensors": lambda h: functools.reduce(
        lambda h, _: h.sin() + torch.tensor(2).item(), range(30), h
    ),
    "dropout": lambda h: F.dropout(F.dropout2d(h.view(10, 10, 5, 2), 0.3)),
    "patches": lambda h: F.unfold(h.view(1, 10, 10, 10), 3),
}


class Images(nn.Module):
    """A loss of convolutions and other norms, each with something of its own to allocate."""

    def __init__(self, norm, end=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), norm(), nn.ReLU(), nn.Conv2d(8, 8, 3), norm())
        self.end = end

    def forward(self, x):
        z = self.layers(x)
        return z if self.end is None else self.end(z.sigmoid(), torch.zeros_like(z))


GROUPS, MEAN = functools.partial(nn.GroupNorm, 2, 8), functools.partial(nn.BatchNorm2d, 8, momentum=None)
IMAGES = {
    "group norm": lambda: Images(GROUPS),
    "a norm that averages": lambda: Images(MEAN),
    "a norm of columns": lambda: nn.Sequential(Columns(), nn.BatchNorm2d(16), nn.BatchNorm2d(16), Rows()),
    "layer norm": lambda: nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)),
    "a loss of each value": lambda: Images(GROUPS, lambda z, t: F.mse_loss(z, t, reduction="none").sum(1)),
    **{
        name: lambda name=name: Images(GROUPS, getattr(F, name))
        for name in (
            "mse_loss",
            "smooth_l1_loss",
            "binary_cross_entropy",
            "binary_cross_entropy_with_logits",
            "soft_margin_loss",
        )
    },
}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", IMAGES)
def test_to_the_byte_on_other_norms_and_losses(name, autocast):
    if name == "binary_cross_entropy" and autocast:
        pytest.skip("PyTorch forbids it")
    model, x = IMAGES[name](), torch.randn(4, 3, 16, 16)
    assert predict_memory(model, x, autocast=autocast) == measure(model, x, autocast=autocast)


class Pyramid(nn.Module):
    """One branch has a single pixel; a buffer says how far the other is made smaller."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(32, 64, 1)]
        )
        self.norm = nn.BatchNorm2d(16)
        self.register_buffer("factor", torch.tensor(2))

    def forward(self, x):
        y = F.avg_pool2d(self.convs[0](x), int(self.factor))
        z = self.norm(self.convs[1](F.adaptive_avg_pool2d(y, 1)))
        return self.convs[2](torch.cat([F.interpolate(z, size=y.shape[2:]), y], 1))


class Twice(nn.Module):
    """Two gradients of one tensor are one tensor."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (3, 8))

    def forward(self, x):
        y = self.convs[0](x)
        return self.convs[1](y + y)


class OfPixels(nn.Conv1d):
    """Its gradient's layout is not the input's."""

    def forward(self, x):
        return super().forward(x.flatten(2)).unflatten(2, x.shape[2:])


def hardswish():
    convs = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3)
    return nn.Sequential(*convs, nn.Hardswish(), OfPixels(16, 16, 1))


def log_sigmoid():
    convs = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3)
    return nn.Sequential(*convs, nn.LogSigmoid(), nn.Conv2d(16, 16, 1, groups=16), nn.InstanceNorm2d(16))


@pytest.mark.parametrize("max_cost", [None, 0, 64])
@pytest.mark.parametrize("make", [IMAGES["group norm"], Pyramid, Twice, hardswish, log_sigmoid])
def test_to_the_byte_with_channels_last(make, max_cost):
    model, x = make(), torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    assert predict_memory(model, x, max_cost=max_cost) == measure(model, x, max_cost)


@pytest.mark.parametrize("max_cost", [None, 0])
@pytest.mark.parametrize("last", [nn.Identity, nn.ReLU])
def test_to_the_byte_on_a_linear_layer_of_channels(last, max_cost):
    """Its bias is added in place; the input is not contiguous."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Permute(), nn.Linear(8, 64), last())
    assert predict_memory(model, (2, 3, 9, 9), max_cost=max_cost) == measure(
        model, torch.randn(2, 3, 9, 9), max_cost
    )


@pytest.mark.parametrize("max_cost", [None, 0, 600])
@pytest.mark.parametrize("trained", ["bias", "0.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_to_the_byte_where_little_is_trained(dtype, trained, max_cost):
    """With a bias's gradient a library may give the weight's, although nobody asks for it."""
    ordinary = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 64, 5)
    model = nn.Sequential(*ordinary, nn.ConvTranspose2d(64, 32, 5)).to(dtype)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(trained))
    x = torch.randn(2, 3, 12, 12, dtype=dtype)
    assert predict_memory(model, x, max_cost=max_cost) == measure(model, x, max_cost)


def test_where_gradients_are_checked():
    """Anomaly mode reads values, which fake tensors have not."""
    model = nn.Linear(3, 3)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        found = predict_memory(model, (2, 3))
        assert torch.is_anomaly_enabled()
    assert found == predict_memory(model, (2, 3))


def test_a_parameter_from_elsewhere():
    """It must not keep a fake gradient."""
    other = nn.Parameter(torch.ones(3))
    other.grad = grad = torch.ones(3)

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * other

    model = Scaled(3, 3)
    assert predict_memory(model, (2, 3)).forward > 0
    assert other.grad is grad and torch.equal(grad, torch.ones(3))
    raises = Scaled(3, 3)
    raises.register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict_memory(raises, torch.randn(2, 3, requires_grad=True))
    assert other.grad is grad
    other.grad = None
    assert predict_memory(model, (2, 3)).peak > 0 and other.grad is None


class OfTokens(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(2).transpose(1, 2).float())


@pytest.mark.parametrize("images", [1, 2])
def test_to_the_byte_on_a_cast_of_transposed_images(images):
    model, x = nn.Sequential(nn.Conv2d(16, 16, 3).bfloat16(), OfTokens(16, 16)), torch.randn(images, 16, 9, 9)
    assert predict_memory(model, x.bfloat16(), max_cost=0) == measure(model, x.bfloat16(), 0)


@pytest.mark.parametrize("function", EXACT)
def test_to_the_byte_whatever_lives_when(function):
    model, x = Elementwise(EXACT[function]), torch.randn(1000)
    assert predict_memory(model, x) == measure(model, x)


def test_cuda_needs_no_gpu():
    """Its slabs are larger than a CPU's, and its blocks are of 512 bytes."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), FusedConvBN2d(16, 16, 3))
    cpu, cuda = (predict_memory(model, (64, 3, 64, 64), device_type=d) for d in ("cpu", "cuda"))
    assert cuda.peak > 1.2 * cpu.peak
    assert cuda.peak % 512 == 0 and cuda.forward % 512 == 0
    assert cpu.forward % 512 != 0
    assert torch.ones(1, requires_grad=True).sum().backward() is None  # the engine is as it was


def test_cuda_under_remat():
    """No slabs there: what lies between is as large as the result."""
    model, shape = Network(), (64, 3, 32, 32)
    plain, kept = (predict_memory(model, shape, max_cost=c, device_type="cuda") for c in (None, 0))
    assert kept.forward < 0.7 * plain.forward and kept.peak < plain.peak
    assert kept.peak > predict_memory(model, shape, max_cost=0).peak
    assert kept.peak % 512 == 0 and kept.forward % 512 == 0


def test_computes_nothing_and_changes_nothing():
    model = network("resnet18")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    for max_cost in (None, 0):
        forward, _ = predict_memory(model, (2**18, 3, 224, 224), max_cost=max_cost, device_type="cuda")
        assert forward > 2**40  # a TiB, which is not here
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


class Cache(nn.Module):
    """Stores what it computes in itself."""

    def __init__(self):
        super().__init__()
        self.inner, self.places, self.calls = nn.Linear(4, 4), None, torch.zeros(1)

    def forward(self, x):
        self.places = torch.arange(4.0) if self.places is None else self.places
        self.calls.add_(1)
        return self.inner(x) + self.places


def two_names():
    layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    return nn.Sequential(layer, nn.ReLU(), layer)


def older_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(nn.Linear(4, 4))
    layer(torch.ones(2, 4))  # now its weight is the result of a computation
    return layer


class Once(nn.Module):
    """Joins its two inputs, unless they are one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, a, b):
        return self.layer(a if a is b else torch.cat([a, b]))


class Tied(nn.Module):
    """Its weights become one in forward; it takes another way where a parameter is none."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, a, b):
        self.last.weight = self.first.weight
        return self.last(self.first(a)) if isinstance(self.last.weight, nn.Parameter) else b * a


def test_a_tensor_stays_one_and_a_parameter_one():
    once, x, y = Once(), torch.randn(3, 8), torch.randn(3, 8)
    assert predict_memory(once, x, x) == measure(functools.partial(once, x), x)
    assert predict_memory(once, x, y) == measure(functools.partial(once, x), y) > predict_memory(once, x, x)
    assert predict_memory(Tied(), x, y) == measure(functools.partial(Tied(), x), y)
    memory = predict_memory(once, x, x).peak + x.nbytes + 2 * (8 * 8 + 8) * 4
    assert max_cost_for(once, x, x, memory=memory, device_type="cpu") == 0


def test_a_constant_on_another_device():
    class Scaled(nn.Module):
        def __init__(self, device):
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 4, device=device), torch.ones(4, device=device)

        def forward(self, x):
            return self.layer(x) * self.scale

    assert predict_memory(Scaled("meta"), (2, 4)) == predict_memory(Scaled("cpu"), (2, 4))
    assert predict_memory(Scaled("meta"), (2, 4), device_type="cuda").peak


def test_a_compiled_model_is_named():
    compiled = nn.Sequential(nn.Linear(2, 2))
    compiled.compile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(2, 2))
    for model in (torch.compile(nn.Linear(2, 2)), compiled, scripted, nn.Sequential(scripted)):
        with pytest.raises(ValueError, match="^model must be one that PyTorch runs operation by operation"):
            predict_memory(model, (3, 2))


def test_a_function_that_saves_its_result():
    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = torch.tanh(x)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, dy):
            (y,) = ctx.saved_tensors
            return dy * (1 - y * y)

    class Between(nn.Conv2d):
        def forward(self, x):
            return F.silu(F.silu(Tanh.apply(super().forward(x))))

    model, x = Between(4, 4, 1), torch.randn(2, 4, 16, 16)
    for max_cost in (None, 0, 150):
        assert predict_memory(model, x, max_cost=max_cost) == measure(model, x, max_cost)


def test_a_lazy_model_is_named():
    with pytest.raises(ValueError, match="^model must have run once, got one with lazy parameters"):
        predict_memory(nn.Sequential(nn.LazyLinear(2)), (3, 2))


def test_other_generators_stay_as_they_are():
    class Drawing(nn.Linear):
        def forward(self, x):
            torch.manual_seed(0)
            return super().forward(x) * random.random()

    model, before, numbers = Drawing(2, 2), random.getstate(), torch.get_rng_state()
    predict_memory(model, (3, 2))
    assert random.getstate() == before and torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.parametrize("make", [Cache, two_names, older_weight_norm])
def test_the_model_stays_as_it_was(make):
    model, x = make(), torch.randn(2, 4)
    tensors = [*model.parameters(), *model.buffers()]
    before = copy.deepcopy(model.state_dict())
    assert predict_memory(model, x) == predict_memory(model, x)
    assert all(t is s for t, s in zip(tensors, (*model.parameters(), *model.buffers()), strict=True))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert make is not Cache or (model.places is None and model.calls == 0)
    model(x).sum().backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("max_cost", [None, 0, 100])
@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(8), GROUPS, lambda: nn.LayerNorm(16)], ids="bgl")
def test_a_gradient_in_another_layout_than_its_norm(make, max_cost, layout):
    class Transposed(nn.Module):
        def forward(self, z):
            return z.transpose(1, 3).flatten(1)

    convs = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    model = nn.Sequential(convs[0], make(), nn.ReLU(), convs[1], make(), Transposed())
    model, x = model.to(memory_format=layout), torch.randn(8, 8, 16, 16).to(memory_format=layout)
    assert predict_memory(model, x, max_cost=max_cost) == measure(model, x, max_cost)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm([6, 5])], ids=str)
def test_real_tensors_are_counted_and_left_alone(norm):
    x, results = torch.randn(2, 4, 6, 5, requires_grad=True), []
    for mode in (contextlib.nullcontext(), Held()):
        with mode:
            z = norm(x)
            results.append((z, *torch.autograd.grad(z, [x, *norm.parameters()], x.detach())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_mode_does_not_matter(mode):
    model, shape = Network(), (4, 3, 32, 32)
    wanted = predict_memory(model, shape)
    with mode():
        assert predict_memory(model, shape) == wanted


def test_plain_would_not_be_plain():
    with remat(), pytest.raises(RuntimeError, match="^predict_memory must be called outside of remat"):
        predict_memory(nn.Linear(3, 3), (2, 3))


def test_a_model_that_cannot_be_copied():
    model = nn.Linear(3, 3)
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="^model must allow copy.deepcopy, got TypeError"):
        predict_memory(model, (2, 3))


def test_a_backward_inside_the_model():
    """What the engine does there counts as in backward."""

    class Inner(nn.Linear):
        def forward(self, x):
            x = x.detach().requires_grad_()
            y = torch.maximum(x, x.detach() * 2).sum() + x.abs().sum() + x.abs().sum()
            return super().forward(torch.autograd.grad(y, x)[0][:8])

    model, x = Inner(64, 8), torch.randn(128, 64)
    assert predict_memory(model, x) == measure(model, x)


def test_a_loss_inside_the_model_is_part_of_forward():
    class Two(nn.Module):
        def __init__(self, loss):
            super().__init__()
            self.scale, self.loss = nn.Parameter(torch.ones(1)), loss

        def forward(self, x, y):
            return self.loss(x * self.scale, y * self.scale)

    shape = (1000,)
    both = predict_memory(Two(lambda x, y: x.sum() + y.exp().sum()), shape, shape)
    assert both.forward == 4000 + 4  # exp's result, and the loss
    with pytest.raises(ValueError, match="^model must return a tensor that requires a gradient, got a "):
        predict_memory(Two(lambda *both: str(both)), shape, shape)


@pytest.mark.parametrize("max_cost", [None, 0, 50])
def test_a_model_may_return_several_tensors(max_cost):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = Network(), nn.Linear(16, 3)

        def forward(self, x):
            y = self.layers(x)
            return {"images": [y, y.detach() * 2], "classes": self.head(y.mean((2, 3)))}

    model, x, grads = Several(), torch.randn(4, 3, 32, 32), (torch.randn(4, 16, 16, 16), torch.randn(4, 3))
    with MemoryTrace("cpu") as trace:
        with contextlib.nullcontext() if max_cost is None else remat(max_cost):
            out = model(x)
        trace.mark("end of forward")
        torch.autograd.backward([out["images"][0], out["classes"]], grads)
    wanted = trace.marks["end of forward"], trace.tensor_peak
    assert predict_memory(model, x, max_cost=max_cost) == wanted


@pytest.mark.parametrize("optimizer_copies", [0, 2])
def test_largest_batch_is_the_largest(optimizer_copies):
    model = network("resnet18")
    budget = 300 * 2**20

    def needed(n):
        state = sum(t.nbytes for t in model.state_dict().values())
        state += optimizer_copies * sum(p.nbytes for p in model.parameters())
        return state + n * 3 * 64 * 64 * 4 + predict_memory(model, (n, 3, 64, 64), device_type="cuda").peak

    n = largest_batch(model, (3, 64, 64), budget, optimizer_copies)
    assert n > 2 and needed(n) <= budget < needed(n + 1)


def test_an_optimizer_keeps_nothing_for_what_is_frozen():
    model, memory = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 3).requires_grad_(False)), 1 << 20
    batches = [largest_batch(model, (3, 8, 8), memory, copies) for copies in (0, 100)]
    frozen, trained = (sum(p.nbytes for p in part.parameters()) for part in (model[1], model[0]))
    one = predict_memory(model, (9, 3, 8, 8)).peak - predict_memory(model, (8, 3, 8, 8)).peak + 3 * 8 * 8 * 4
    assert abs(batches[0] - batches[1] - 100 * trained / one) < 2 and frozen > 10 * trained


def test_largest_batch_where_one_image_fits_or_none():
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64))
    one = largest_batch(model, (3, 64, 64), 5 * 2**20)
    assert one == 1
    with pytest.raises(ValueError, match="^memory must hold a step of batch size 1, .* got 1,000$"):
        largest_batch(model, (3, 64, 64), 1000)
    with pytest.raises(ValueError, match="^memory must hold a step of batch size 2, .* got 1,000$"):
        largest_batch(model, (3, 1, 1), 1000)


def test_largest_batch_where_memory_is_quadratic(monkeypatch):
    """As with the logits of a contrastive loss."""

    class Pairs(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return (y @ y.T).log_softmax(-1)

    tried, real = [], predict.bytes_needed

    def counted(model, inputs, *args, **how):
        tried.append(len(inputs[0]))
        return real(model, inputs, *args, **how)

    monkeypatch.setattr(predict, "bytes_needed", counted)
    model, budget = Pairs(8, 8), 10**9
    n = largest_batch(model, (8,), budget)
    assert len(tried) <= 3 * math.log2(n) + 10
    assert counted(model, [torch.empty(n, 8)], 1, device_type="cuda")[0] <= budget
    assert counted(model, [torch.empty(n + 1, 8)], 1, device_type="cuda")[0] > budget


def test_largest_batch_where_one_image_takes_most():
    class Falling(nn.Linear):
        def forward(self, x):
            return super().forward(x).repeat(20_000 if len(x) < 2 else 1, 1).exp()

    def needed(n):
        return predict_memory(model, (n, 4)).peak + n * 16 + 20 * 4

    model, budget = Falling(4, 4), 10**7
    n = largest_batch(model, (np.int64(4),), budget, 0, device_type="cpu")
    assert n > 2 and needed(n) <= budget < needed(n + 1)


def test_largest_batch_under_remat_and_autocast():
    model, budget = Network(), 2**24
    batches = {}
    for how in ({}, {"max_cost": 0}, {"max_cost": 0, "autocast": torch.bfloat16}):
        n = batches[len(how)] = largest_batch(model, (3, 32, 32), budget, 0, device_type="cpu", **how)
        fits, not_any_more = (
            predict_memory(model, (m, 3, 32, 32), **how).peak
            + sum(t.nbytes for t in model.state_dict().values())
            + m * 3 * 32 * 32 * 4
            for m in (n, n + 1)
        )
        assert fits <= budget < not_any_more
    assert batches[0] < batches[1] < batches[2]


def without_norms():
    """What is computed from a convolution of price 18 may be recomputed from 17 on."""
    convs = [nn.Conv2d(c, 2, 3, padding=1) for c in (3, 2, 2, 2, 2)]
    return nn.Sequential(*(m for conv in convs for m in (conv, nn.ReLU())))


@pytest.mark.parametrize("make", [functools.partial(Network, 4), without_norms])
def test_max_cost_for_is_the_smallest_price(make):
    """Against all whole prices, one after another."""
    model, x = make(), torch.randn(8, 3, 12, 12)
    peaks = [predict_memory(model, x, max_cost=cost).peak for cost in range(32)]
    fixed = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) + x.nbytes
    fixed += 2 * sum(p.nbytes for p in model.parameters())
    assert len(set(peaks)) > 1
    for peak in sorted(set(peaks)):
        cost = max_cost_for(model, x, memory=fixed + peak, optimizer_copies=2, device_type="cpu")
        assert cost == next(c for c, p in enumerate(peaks) if p <= peak)


def test_max_cost_for_names_the_least():
    model, shape = Network(4), (8, 3, 16, 16)
    with pytest.raises(ValueError, match="^memory must be at least .*, got 1,000$") as error:
        max_cost_for(model, shape, memory=1000)
    words = str(error.value).replace(",", "").split()
    least, cost = int(words[5]), int(next(w for w in words if w.startswith("max_cost=")).split("=")[1])
    assert max_cost_for(model, shape, memory=least) == cost
    with pytest.raises(ValueError, match=f"{least:,}"):
        max_cost_for(model, shape, memory=least - 1)
    peak = predict_memory(model, shape, device_type="cuda").peak
    plain = peak + sum((2 * p.nbytes for p in model.parameters()), sum(b.nbytes for b in model.buffers()))
    assert f"{plain + 8 * 3 * 16 * 16 * 4:,} in plain" in str(error.value)


class Asks(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)

    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class AsksInBackward(nn.Linear):
    """For the positions that a mask overwrites."""

    def __init__(self):
        super().__init__(3, 3)
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x):
        y = super().forward(x).clone()
        y[self.mask] = self.bias
        return y


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: predict_memory(print, (2, 3)), r"model must be a torch.nn.Module, got <class 'builtin"),
        (lambda m: predict_memory(m), r".*missing 1 required positional argument: 'input'"),
        (lambda m: predict_memory(m, "23"), r"inputs \(other than tensors\) must be a shape .* got '23'"),
        (lambda m: predict_memory(m, (2, -3)), r"inputs .* must be a shape .* at least 0, got \(2, -3"),
        (lambda m: predict_memory(m, (True, 3)), r"inputs .* must be a shape .* got \(True, 3"),
        (lambda m: predict_memory(m, torch.eye(3).to_sparse()), "inputs must be strided .* torch.sparse_coo"),
        (lambda m: predict_memory(m, {"x": (2, 3)}), "inputs .* must be a shape .* got {'x'"),
        (lambda m: predict_memory(m, (2, 3), device_type="tpu"), "device_type must be one of cpu, cuda, got"),
        (lambda m: predict_memory(Asks(), (2, 3)), "model must not ask for its tensors' values, got aten"),
        (lambda m: predict_memory(AsksInBackward(), (2, 3)), "model must not ask for its tensors' values"),
        (lambda m: predict_memory(nn.ReLU(), (2, 3)), "model must return a tensor that requires a gradient"),
        (
            lambda m: largest_batch(m, 3, 1e9),
            "image_shape must be a shape of whole numbers, at least 0, got 3",
        ),
        (
            lambda m: predict_memory(object.__new__(nn.parallel.DistributedDataParallel), (2, 3)),
            "model must be the module inside of DistributedDataParallel",
        ),
        (
            lambda m: predict_memory(m, (2, 3), max_cost=-1),
            "max_cost must be a number of multiplications per value, at least 0, got -1",
        ),
        (
            lambda m: predict_memory(m, (2, 3), autocast=torch.float32),
            "autocast must be None, torch.bfloat16",
        ),
        (
            lambda m: predict_memory(m, (2, 3), autocast=torch.bfloat16, device_type="cuda"),
            "autocast needs device_type='cpu', whose prediction is close, got 'cuda'",
        ),
        (
            lambda m: max_cost_for(m, (2, 3), memory=-1),
            r"memory must be a number of bytes above 0 and below 2\*\*62, got -1",
        ),
        (lambda m: max_cost_for(m, (2, 3), memory="16 GiB"), "memory must be a number of bytes"),
        (lambda m: largest_batch(m, (3,), 1e9, -1), "optimizer_copies must be an int, at least 0, got -1"),
        (lambda m: largest_batch(m, (3,), 1e21), "memory must be a number of bytes above 0 and below"),
        (lambda m: largest_batch(m, (3,), math.inf), "memory must be a number of bytes above 0"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"^{message}"):
        call(nn.Linear(3, 3))
