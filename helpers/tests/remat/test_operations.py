"""Each operation that `remat` knows, with its options: forward to the bit, gradients to rounding."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import remat
from helpers.remat import task
from helpers.tests.kernels.rounding import apart, rounding
from helpers.tests.remat.examples import EVERY_ACTIVATION, NORMS
from helpers.tests.remat.support import (
    COSTS,
    Net,
    Recorder,
    X,
    assert_same_forward,
    block,
    check,
    frozen,
    held_plainly_and_under_remat,
    image,
    leaf,
    step,
    under,
)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_padding_with_one_zero_more_on_one_side():
    """PyTorch's "same" with an even kernel."""

    def make():
        convs = (nn.Conv2d(c, 4, kernel, padding="same") for c, kernel in ((3, (2, 3)), (4, (3, 4))))
        return nn.Sequential(*[layer for conv in convs for layer in (conv, nn.BatchNorm2d(4), nn.ReLU())])

    check(make, X)


@pytest.mark.parametrize("kernel", [(16, 16), (20, 14)], ids=str)
def test_a_window_whose_positions_need_more_than_a_byte(kernel):
    """Wider than the image, or with more than 256 pixels."""
    padding = kernel[0] // 2, kernel[1] // 2
    growing = torch.arange(22 * 15).view(1, 1, 22, 15)  # the largest is a window's last pixel
    for x in (growing, image(2, 3, 22, 15)):
        check(lambda: nn.MaxPool2d(kernel, 1, padding), x)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_dropout_of_a_number_or_a_vector(shape):
    x, found = image(*shape).requires_grad_(), []
    for cost in (None, 0):
        torch.manual_seed(0)
        with under(cost):
            out = F.dropout(x * 1)
        found.append((out, *torch.autograd.grad(out.sum(), x)))
    assert all(map(torch.equal, *found))


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
    # These skip pixels, but for those with a padding and the transposed ones.
    "row, stride": (lambda: nn.Conv1d(3, 5, 1, stride=3), (2, 3, 70)),
    "stride": (lambda: nn.Conv2d(3, 5, 1, stride=2), (2, 3, 19, 18)),
    "volume, stride": (lambda: nn.Conv3d(3, 5, 1, stride=(1, 2, 3)), (2, 3, 4, 5, 4)),
    "frozen, stride": (lambda: frozen(nn.Conv2d(3, 5, 1, stride=(3, 1))), (2, 3, 9, 8)),
    "groups, stride": (lambda: nn.Conv2d(4, 6, 1, groups=2, stride=(2, 3)), (1, 4, 9, 8)),
    "padding, stride": (lambda: nn.Conv2d(3, 5, 1, padding=1, stride=2), (2, 3, 9, 8)),
    "transposed, stride": (lambda: nn.ConvTranspose2d(3, 5, 1, stride=2), (2, 3, 9, 8)),
    "volume, transposed, stride": (lambda: nn.ConvTranspose3d(3, 5, 1, stride=2), (2, 3, 4, 5, 4)),
    "transposed, output padding": (
        lambda: nn.ConvTranspose2d(3, 5, 1, dilation=2, output_padding=1), (2, 3, 9, 8)),
}  # fmt: skip


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


@pytest.mark.parametrize("transposed", ["", "Transpose"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_an_image_without_a_batch(n, transposed):
    """PyTorch takes one, so remat must leave it alone."""
    kind = getattr(nn, f"Conv{transposed}{n}d")
    check(lambda: nn.Sequential(kind(3, 8, 3), nn.SiLU(), kind(8, 2, 1)), image(3, *[4] * n))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_small_image(channels, layout):
    """Its gradient is from the kernel that PyTorch takes: another one unfolds it, nine times its size."""
    conv = nn.Conv2d(64, channels, 3, padding=1).to(memory_format=layout)
    x, gradients = image(1, 64, 24, 24, dtype=torch.float32).to(memory_format=layout), []
    for cost in (None, 0):
        a = leaf(x)
        with under(cost):
            y = conv(a)
        gradients.append(torch.autograd.grad(y, a, image(*y.shape, dtype=torch.float32))[0])
    assert torch.equal(*gradients) and gradients[0].stride() == gradients[1].stride()


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
    recorder = Recorder(monkeypatch)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), drop(0.3), nn.Conv2d(8, 4, 3))
    with remat() as record:
        out = model(x)
    out.sum().backward()
    mask = 4 * 8 * (30 * 30 if drop is nn.Dropout else 4)
    assert record.kept_bytes == x.nbytes + 4 * 4 * 8 * 30 * 30 + mask
    assert len(recorder.recomputed) == 2 and not recorder.different


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
