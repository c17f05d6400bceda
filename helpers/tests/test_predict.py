"""Predicted memory against measured memory, and what the prediction must not do."""

from unittest.mock import patch

import pytest
import torch
import torchvision
from torch import nn

from helpers import FusedBlock2d, FusedConvBN2d, fuse_conv_bn, largest_batch, predict, predict_memory
from helpers.memory import MemoryTrace


def measure(model, x):
    """(end of forward, peak of all tensors) of a step."""
    grad = torch.randn_like(model(x).detach())
    with MemoryTrace("cpu") as trace:
        out = model(x)
        trace.mark("end of forward")
        out.backward(grad)
    return trace.marks["end of forward"], trace.tensor_peak


def network(name, fusion):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    return model if fusion is None else fuse_conv_bn(model, **fusion)


FUSIONS = {
    "plain": None,
    "fused": {},
    "without recomputing": {"recompute_conv": False},
    "one image a slab": {"slab_size": 1},
}


NETWORKS = ("resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0")
CASES = [(name, fusion) for name in NETWORKS for fusion in list(FUSIONS)[:3]]


@pytest.mark.parametrize(("name", "fusion"), [*CASES, ("resnet18", "one image a slab")])
def test_to_the_byte(name, fusion):
    model, shape = network(name, FUSIONS[fusion]), (4, 3, 64, 64)
    assert predict_memory(model, shape) == measure(model, torch.randn(shape))


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("fusion", FUSIONS)
def test_to_the_byte_with_another_library_and_more_threads(fusion):
    """Without oneDNN PyTorch computes convolutions in another way, as on another processor."""
    model, shape, threads = network("resnet18", FUSIONS[fusion]), (2, 3, 32, 32), torch.get_num_threads()
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


class SumInBackward(torch.autograd.Function):
    """Its gradient is a sum in a third tensor's memory."""

    @staticmethod
    def forward(ctx, h):
        return h.sum()

    @staticmethod
    def backward(ctx, dz):
        return dz.repeat(1000) + dz.repeat(1000)


EXACT = {
    "saved and in place": lambda h: (h.sigmoid() + h.tanh()).relu_()[::2].exp(),
    "gradients added in place": lambda h: h.neg().sum() + h.neg().sum(),
    "gradients added, one still needed": lambda h: (h.tanh() + h) * h,
    "ends with a sum": lambda h: h.exp() + h.cos(),
    "ends with a view": lambda h: h.exp().unflatten(0, (2, 500)),
    "a sum of its own in backward": SumInBackward.apply,
}


@pytest.mark.parametrize("function", EXACT)
def test_to_the_byte_whatever_lives_when(function):
    model, x = Elementwise(EXACT[function]), torch.randn(1000)
    assert predict_memory(model, x) == measure(model, x)


BLOCKS = {
    "wider": (16, 64, False, "recompute"),
    "narrower": (64, 16, False, "recompute"),
    "norm first": (64, 16, True, "recompute"),
    "algebra": (16, 64, True, "algebra"),
}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("block", "first"),
    [*((block, "scaled") for block in BLOCKS), ("wider", "spike before"), ("norm first", "nothing before")],
)
def test_few_slabs_stand_for_all(block, first, device_type):
    """Also where the peak is before them, or in the statistics of the input, taken in pieces."""
    before = {
        "scaled": Elementwise(lambda h: h),
        "spike before": Elementwise(lambda h: h + h.repeat(20, 1, 1, 1).sum().detach()),
        "nothing before": nn.Identity(),
    }[first]
    c_in, c_out, norm_first, backward = BLOCKS[block]
    entry = (nn.BatchNorm2d(c_in), nn.ReLU()) if norm_first else (None, None)
    conv, last = nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
    layer = FusedBlock2d(conv, *entry, last, slab_size=8, backward=backward)
    model, shape = nn.Sequential(before, layer), (203, c_in, 16, 16)
    few = predict_memory(model, shape, device_type=device_type)
    with patch.object(predict, "FEW", 1000):
        every = predict_memory(model, shape, device_type=device_type)
    assert few.forward == every.forward
    assert few.peak == pytest.approx(every.peak, rel=2e-3)


def test_cuda_needs_no_gpu():
    """Its slabs are larger than a CPU's, and its blocks are of 512 bytes."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), FusedConvBN2d(16, 16, 3))
    cpu, cuda = (predict_memory(model, (64, 3, 64, 64), device_type=d) for d in ("cpu", "cuda"))
    assert cuda.peak > 1.2 * cpu.peak
    assert cuda.peak % 512 == 0 and cuda.forward % 512 == 0
    assert cpu.forward % 512 != 0
    assert torch.ones(1, requires_grad=True).sum().backward() is None  # the engine is as it was


def test_computes_nothing_and_changes_nothing():
    model = network("resnet18", {})
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    forward, _ = predict_memory(model, (2**18, 3, 224, 224), device_type="cuda")
    assert forward > 2**40  # a TiB, which is not here
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_fused_forward_that_is_traced_anew_meanwhile():
    """It is fused in the prediction, and afterwards."""
    model, shape = network("resnet18", {}), (2, 3, 64, 64)
    forward = predict_memory(model, shape).forward
    model.version = 2  # a forward could depend on it
    assert predict_memory(model, shape).forward == forward == measure(model, torch.randn(shape))[0]


def test_loss_is_part_of_forward():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x, y):
            return x * self.scale, y * self.scale

    model, shape = Two(), (1000,)
    both = predict_memory(model, shape, shape, loss=lambda out: out[0].sum() + out[1].exp().sum())
    assert both.forward == 3 * 4000 + 4  # x·scale, y·scale, its exp, and the loss
    with pytest.raises(ValueError, match="loss: what the model returns must be a tensor"):
        predict_memory(model, shape, shape)


@pytest.mark.parametrize("optimizer_copies", [0, 2])
def test_largest_batch_is_the_largest(optimizer_copies):
    model = network("resnet18", {})
    budget = 300 * 2**20

    def needed(n):
        state = sum(t.nbytes for t in model.state_dict().values())
        state += optimizer_copies * sum(p.nbytes for p in model.parameters())
        return state + n * 3 * 64 * 64 * 4 + predict_memory(model, (n, 3, 64, 64), device_type="cuda").peak

    n = largest_batch(model, (3, 64, 64), budget, optimizer_copies)
    assert n > 2 and needed(n) <= budget < needed(n + 1)


def test_largest_batch_where_one_image_fits_or_none():
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64))
    one = largest_batch(model, (3, 64, 64), 5 * 2**20)
    assert one == 1
    with pytest.raises(ValueError, match="^budget_bytes must hold a step of batch size 1, .* got 1,000$"):
        largest_batch(model, (3, 64, 64), 1000)
    with pytest.raises(ValueError, match="^budget_bytes must hold a step of batch size 2, .* got 1,000$"):
        largest_batch(model, (3, 1, 1), 1000)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: predict_memory(m), "inputs must have"),
        (lambda m: predict_memory(m, (2, 0)), "inputs must be a shape"),
        (lambda m: predict_memory(m, (2, 3), device_type="tpu"), "device_type must be one of cpu, cuda, got"),
        (lambda m: largest_batch(m, 3, 1e9), "image_shape must be a shape"),
        (lambda m: largest_batch(m, (3,), 1e9, -1), "optimizer_copies must be an int from 0 on, got -1"),
        (lambda m: largest_batch(m, (3,), float("inf")), "budget_bytes must be finite, got inf"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(nn.Linear(3, 3))
