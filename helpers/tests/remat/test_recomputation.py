"""What backward makes again is what forward made, to the bit, and made once."""

import inspect
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import remat
from helpers.predict import Held
from helpers.remat import convolutions, layouts, operations, task, values
from helpers.tests.remat.examples import CHAINS, EVERY_ACTIVATION, LAYOUTS, NORMS, PRECISIONS, example
from helpers.tests.remat.support import COSTS, Net, Recorder, X, block, check, image, randomised, step, under

CUT = {
    "padding": (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 9, 8)),
    "groups": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, dilation=(1, 2)), (4, 4, 9, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (7, 4, 5, 4)),
    "row": (lambda: nn.Conv1d(4, 6, 3, padding="same"), (6, 4, 9)),
    "skips pixels": (lambda: nn.Conv2d(4, 6, 1, stride=(2, 3)), (6, 4, 9, 8)),
    "volume": (lambda: nn.Conv3d(4, 6, 3, padding=1, bias=False), (4, 4, 5, 4, 3)),
}


@pytest.fixture
def cut(monkeypatch):
    """In how many parts each convolution cuts its batch, where a library's copies would raise the peak."""
    found, parts = [], convolutions.Convolution.parts
    monkeypatch.setattr(convolutions, "worth_a_cut", lambda copies, w: True)
    monkeypatch.setattr(task.Task, "room", lambda self, value=None: 0)
    monkeypatch.setattr(
        convolutions.Convolution, "parts", lambda *given: found.append(parts(*given)) or found[-1]
    )
    return found


@pytest.mark.parametrize("name", CUT)
def test_a_batch_cut_into_parts(name, cut):
    make, shape = CUT[name]
    check(lambda: nn.Sequential(make(), nn.ReLU()), image(*shape))
    assert set(cut) == {4}


def test_no_cut_where_the_sum_of_parts_would_lose_digits(cut):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        conv, x = nn.Conv2d(4, 6, 3).to(dtype), image(5, 4, 9, 8).to(dtype)
        with remat():
            out = conv(x)
        out.backward(image(*out.shape).to(dtype))
    assert cut == [1, 1, 4]


@pytest.mark.parametrize("room, parts", [(0, 4), (1 << 40, 1)])
def test_no_cut_where_there_is_room_for_the_copies(room, parts, cut, monkeypatch):
    monkeypatch.setattr(task.Task, "room", lambda self, value=None: room)
    with remat():
        out = nn.Conv2d(4, 6, 3).double()(image(5, 4, 9, 8))
    out.backward(image(*out.shape))
    assert cut == [parts]


def test_a_weight_that_may_be_gone_is_not_read_again():
    """As in sharded training: a view of a leaf, a part of a larger memory, DeepSpeed's."""
    flat, marked = torch.randn(4, 216), nn.Parameter(torch.randn(8, 3, 3, 3))
    marked.ds_id = 1
    weights = {
        "a leaf": nn.Parameter(torch.randn(8, 3, 3, 3)),
        "computed": torch.randn(8, 3, 3, 3).requires_grad_() * 2,
        "a view of a computed one": (torch.randn(216).requires_grad_() * 2).view(8, 3, 3, 3),
        "a view": torch.randn(216).requires_grad_().view(8, 3, 3, 3),
        "a part": nn.Parameter(flat[1].view(8, 3, 3, 3)),
        "marked": marked,
    }
    again, x = [], X.float()
    for name, weight in weights.items():
        with remat(1e9) as record:
            F.silu(F.conv2d(x, weight))
        again += [name for row in record.rows if row.recipe == "conv2d" and not row.kept]
    assert again == ["a leaf", "computed", "a view of a computed one"]


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


KNOWN = ("relu", "relu6", "hardtanh", "leaky_relu", "leaky_relu_", "elu", "elu_", "silu_", "mish",
         "hardswish", "hardsigmoid", "gelu", "gelu tanh", "sigmoid", "tanh", "prelu by channel")  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", KNOWN)
def test_remade_values_are_forwards_to_the_bit(monkeypatch, name, precision, layout):
    """Also a few images at a time, of odd sizes: no kernel may see where a batch is cut."""
    monkeypatch.setattr(task, "SLAB_BYTES", 500)
    recorder, activation = Recorder(monkeypatch), EVERY_ACTIVATION[name]

    def make():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation(), nn.Conv2d(8, 5, 3), nn.BatchNorm2d(5).eval(),
            nn.ReLU(), nn.Conv2d(5, 4, 3))  # fmt: skip

    for cost in (0, 1e9):
        step(make, [image(5, 3, 11, 9)], cost, layout=LAYOUTS[layout], **PRECISIONS[precision])
    assert len(recorder.recomputed) >= 4
    assert not recorder.different


@pytest.mark.parametrize("function", [F.softplus, torch.sin, F.normalize])
def test_other_functions_are_remade_to_the_bit(function):
    """dy is the recomputed value: on a CPU its last bits may depend on where a large batch is cut."""
    x = torch.randn(37, 13, 53, 59, requires_grad=True)
    y = torch.ones_like(x, requires_grad=True)
    with remat():
        a = function(x * 1)
        out = a * y
    (dy,) = torch.autograd.grad(out, y, torch.ones_like(out))
    assert torch.equal(dy, a)


@pytest.mark.parametrize(
    "name", ["residual", "residual in place", "dense", "squeeze and excite", "pyramid", "numbers"]
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_networks_are_remade_to_the_bit(monkeypatch, name, precision):
    recorder = Recorder(monkeypatch)
    step(example(name), [X], 1e9, **PRECISIONS[precision])
    assert recorder.recomputed and not recorder.different


@pytest.mark.parametrize("norm", ["two groups", "layer", "no affine", "no running statistics", "eval"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_norms_are_remade_to_the_bit(monkeypatch, norm, precision):
    def make():
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), NORMS[norm](), nn.SiLU(), nn.Conv2d(8, 2, 3))

    recorder = Recorder(monkeypatch)
    step(make, [X], 0, **PRECISIONS[precision])
    assert not recorder.different


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


def test_a_flattened_copy_larger_than_a_slab(monkeypatch):
    """It starts from all images, of which each slab takes its own."""
    monkeypatch.setattr(task, "SLAB_BYTES", 500)

    def make():
        activations = nn.ReLU(), nn.SiLU()
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), activations[0], nn.Flatten(), activations[1], nn.Linear(448, 5)
        )

    check(make, X, layout=torch.channels_last)


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


def test_a_long_way_of_small_convolutions_deep_in_the_callers_stack():
    """They are recomputed one after the other, not each within the one before."""
    convs = [nn.Conv2d(4, 4, 1, bias=False).requires_grad_(False) for _ in range(240)]
    first, last, x = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1), image(2, 4, 2, 2).float().requires_grad_()
    with remat(1e12):
        h = first(x)
        for conv in convs:
            h = conv(h)
        out = last(F.interpolate(h, scale_factor=64)).sum()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 300)
    try:
        out.backward()
    finally:
        sys.setrecursionlimit(limit)
    assert x.grad is not None


def test_rows_of_a_batch_one_by_one(monkeypatch):
    """Each view's base is looked for among a number of values, not among all earlier views."""
    looked = []
    monkeypatch.setattr(layouts.View, "dense", property(lambda view: looked.append(view) or True))
    with remat():
        y = F.linear(torch.randn(500, 4, 4), torch.randn(4, 4, requires_grad=True))
        rows = y.unbind(0)
    assert len(rows) == 500 <= len(looked) <= 500 * values.MOST_VALUES


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


# Views with gaps of a recomputed tensor or of an input.
GAPS = {
    "channels": lambda a, x: a[:, 2:6],
    "columns": lambda a, x: a[:, :4, :, 1:],
    "of an input": lambda a, x: x[:, :4, 1:],
    "expanded": lambda a, x: x[:, :4, :1].expand(4, 4, 16, 15),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("before", [nn.Identity, nn.SiLU])
@pytest.mark.parametrize("exposed", [False, True])
@pytest.mark.parametrize("view", GAPS)
def test_what_reads_a_view_with_gaps_gets_forwards_strides(view, exposed, before, training):
    """Also where backward holds the view for others, or remat has a copy of it, without the gaps."""
    torch.manual_seed(0)
    conv, norm, results = nn.Conv2d(8, 8, 3, padding=1), randomised(nn.BatchNorm2d(4)).train(training), []
    large = nn.Sequential(nn.Conv2d(8, 32, 3), nn.SiLU(), nn.Conv2d(32, 32, 1), nn.SiLU())
    x = image(4, 8, 16, 15, dtype=torch.float32)
    for cost in (None, 0, 150):
        data = x.clone().requires_grad_()
        with under(cost):
            peak = large(data).sum()  # so high that until then backward has room to hold values
            v = GAPS[view](F.silu(conv(data)), data)
            z = norm(before()(v))
            out = F.silu(z)
            second = F.linear(v, torch.ones(3, v.shape[-1], requires_grad=True)).sum() + v.square().sum()
            del v
            if exposed:
                assert data.data is not data  # remat copies what may change now
        results.append(torch.autograd.grad(peak + out.sum() + second, [z, data])[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_norm_whose_buffers_alone_are_float32_is_recomputed_to_the_bit():
    """With gaps in its input; without buffers PyTorch would take a kernel that rounds differently."""
    norm, x, grads = nn.BatchNorm1d(4, affine=False), image(8, 12, 4, dtype=torch.bfloat16), []
    for cost in (None, 0):
        norm.reset_running_stats()
        with under(cost):
            z = norm((x.clone().requires_grad_() * 2).transpose(1, 2))
            out = F.silu(z)
        grads += [*torch.autograd.grad(out.sum(), z), norm.running_mean.clone(), norm.running_var.clone()]
    assert all(map(torch.equal, grads[:3], grads[3:]))


def test_a_frozen_norm_of_a_view_is_recomputed_to_the_bit_in_slabs(monkeypatch):
    """One image of the view has no gaps, and PyTorch takes another kernel."""
    monkeypatch.setattr(task, "SLAB_BYTES", 4 * 16 * 16 * 4)  # of one image
    conv, norm, grads = nn.Conv2d(3, 8, 1), randomised(nn.BatchNorm2d(4)).eval(), []
    for cost in (None, 0):
        with under(cost):
            z = norm(conv(image(4, 3, 16, 16, dtype=torch.float32))[:, :4])
            out = F.silu(z)
        grads += torch.autograd.grad(out.sum(), z)
    assert torch.equal(*grads)


@pytest.mark.parametrize("offset", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_recomputed_to_the_bit_wherever_its_input_begins(dtype, offset):
    """The library's order depends on the address, and backward's memory is aligned."""
    torch.manual_seed(0)
    linears, x, grads = [nn.Linear(d, 8, dtype=dtype) for d in (5, 6, 13, 64)], image(7, 99, dtype=dtype), []
    for cost in (None, 150):
        for linear in linears:
            with under(cost):
                y = linear((x.clone().requires_grad_() * 2)[:, offset : offset + linear.in_features])
                out = F.silu(y)
            grads += torch.autograd.grad(out.sum(), y)
    assert all(map(torch.equal, grads[:4], grads[4:]))


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


class Convolutions(TorchDispatchMode):
    """How often each convolution is computed, by the memory of its weight; gradients are not counted."""

    def __init__(self):
        super().__init__()
        self.times = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default and not args[6]:
            self.times[args[1].untyped_storage()._cdata] += 1
        return func(*args, **(kwargs or {}))


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
