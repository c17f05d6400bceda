"""The peak of a step, counted in tensors of a block."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from helpers import remat
from helpers.predict import Held, predict_memory
from helpers.remat import operations, task
from helpers.tests.remat.examples import CHAINS, Residual, chain
from helpers.tests.remat.support import BLOCK, Net, block, image, under

WEIGHT, VECTORS = 8 * 8 * 9 * 4, 16 * 8 * 4  # bytes of dw, and of what a norm has for each channel


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
    "hardswish": nn.Hardswish,
    "square": lambda: Net(lambda self, x: x**2),
    "clamp": lambda: Net(lambda self, x: x.clamp(0, 1)),
}


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("name", ALONE)
def test_peak_of_an_operation_alone(name, part):
    """If backward calls it again, the second result goes before the gradient comes: the peak is PyTorch's.

    Also of a part of what is held: backward reads it where it is.
    """
    peaks = []
    for cost in (None, 0):
        model, held = ALONE[name](), Held()
        if part:
            model = nn.Sequential(nn.Conv2d(8, 16, 1), Net(lambda self, x: x[:, 4:12]), model)
        x, dz = (image(4, 8, 32, 32, seed=seed, dtype=torch.float32) for seed in (0, 1))
        x.requires_grad_()
        held.ignore(x, dz, *model.parameters())
        with held:
            with under(cost):
                out = model(x)
            out.backward(dz)
        peaks.append(held.peak)
    # Of a part PyTorch may copy what these read (in 2.9 both), next to what remat keeps.
    copied = BLOCK if part and name in ("instance norm", "group norm") else 0
    assert BLOCK < peaks[1] <= peaks[0] + VECTORS + copied


def test_an_instance_norm_of_channels_last_reads_a_copy():
    """What is recomputed for it goes before its gradient comes."""
    x, held = image(4, 8, 32, 32, dtype=torch.bfloat16).to(memory_format=torch.channels_last), Held()
    dz = torch.randn_like(x)
    with held, remat():
        z = F.instance_norm((x.requires_grad_() * 1).float() * 1).to(x.dtype)
    before, held.peak = held.held, 0
    with held:
        z.backward(dz)
    assert held.peak <= before + 4 * BLOCK + VECTORS  # the copy; dz, and as the norm reads it; dx


def test_peak_of_a_product():
    """The gate's gradient, a sum, is made first: not while the other factor's waits."""

    def forward(self, x):
        y = F.silu(self.norm(self.first(x)))
        return self.last(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())

    model = Net(forward, first=nn.Conv2d(3, 8, 1), norm=nn.BatchNorm2d(8), gate=nn.Conv2d(8, 8, 1))
    model.last = nn.Conv2d(8, 1, 1)
    peak = predict_memory(model, (4, 3, 32, 32), max_cost=0).peak
    assert peak <= 3.3 * BLOCK


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


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0"])
def test_a_higher_price_does_not_raise_the_peak(name):
    """Of any network it could: recomputed convolutions' outputs are held until backward comes to them."""
    model = getattr(torchvision.models, name)(weights=None)
    peaks = [predict_memory(model, (4, 3, 96, 96), max_cost=cost).peak for cost in (0, 150, 600)]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < peaks[0]


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
