"""Dtypes, autocast and memory formats: values, strides and gradients as PyTorch has them."""

import contextlib
import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from helpers import remat
from helpers.predict import Held
from helpers.remat import operations, task
from helpers.tests.kernels.rounding import apart, rounding
from helpers.tests.remat.examples import LAYOUTS, NORMS, PRECISIONS, mixed
from helpers.tests.remat.support import (
    COSTS,
    Net,
    X,
    assert_same_forward,
    check,
    check_scenario,
    image,
    leaf,
    named,
    network,
    randomised,
    step,
    under,
)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 64, 32), (2, 300, 200)])
def test_a_product_with_transposed_rows_under_autocast(shape, dtype):
    """PyTorch chooses its kernel by whether the weight requires a gradient; so must the weight's copy."""
    x, w = image(*shape, dtype=torch.float32), leaf(image(32, shape[1], seed=1, dtype=torch.float32))
    for weight in (lambda: w, lambda: w * 1.5):
        found = []
        for cost in (None, *COSTS):
            with torch.autocast("cpu", dtype), under(cost):
                y = F.linear(x.mT, weight())
                found += [y.detach(), *torch.autograd.grad(F.silu(y).float().sum(), w)]
        assert all(torch.equal(found[i], found[0]) for i in range(2, len(found), 2))
        for dw in found[3::2]:
            torch.testing.assert_close(dw, found[1], rtol=0.01, atol=0.05)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_trained_leaf_that_several_read_under_autocast_is_copied_once(kind, cost):
    if kind == "linear":
        x, readers = image(64, 256, dtype=torch.float32), [nn.Linear(256, 64) for _ in range(4)]
    else:
        x, readers = image(4, 8, 32, 32, dtype=torch.float32), [nn.Conv2d(8, 8, 3) for _ in range(4)]
    found, x = [], leaf(x)
    for how in (None, cost):
        held = Held()
        held.ignore(x, *(p for reader in readers for p in reader.parameters()))
        with held, torch.autocast("cpu", torch.bfloat16), under(how) as record:
            loss = sum(reader(x).float().mean() for reader in readers)
        found.append((held.held, *torch.autograd.grad(loss, x)))
    assert found[1][0] <= found[0][0] and record.kept_bytes == x.nbytes / 2
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0.01, atol=1e-4)


LAYERS = F.conv2d, lambda x, w: F.linear(x.flatten(1), w.flatten(1))


@pytest.mark.parametrize("function", LAYERS)
def test_a_trained_leaf_in_two_precisions(function):
    found = []
    for cost in (None, 0):
        x, w = (leaf(image(4, 8, 3, 3, seed=seed, dtype=torch.float32)) for seed in (0, 1))
        with under(cost):
            outs = []
            for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
                with torch.autocast("cpu", dtype):
                    outs.append(function(x, w))
        found.append([*outs, *torch.autograd.grad(sum(out.float().square().sum() for out in outs), [x, w])])
    for f, wanted in zip(*found, strict=True):
        assert f.dtype == wanted.dtype
        torch.testing.assert_close(f, wanted)


@pytest.mark.parametrize("cost", COSTS)
def test_a_backward_inside_of_autocast(cost):
    """What is computed again there has forward's precision."""
    model, grads = network().float(), []
    for how in (None, cost):
        with under(how):
            out = model(X.float())
        with torch.autocast("cpu", torch.bfloat16):
            grads.append(torch.autograd.grad(out, [*model.parameters()], image(*out.shape).float()))
    for found, wanted in zip(*grads, strict=True):
        assert apart(found, wanted) <= rounding(torch.float32, terms=1000)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gradient_far_from_zero(dtype):
    """The norm subtracts its mean: dy and dγ are about as exact as PyTorch's; in dy no sum overflows."""
    torch.manual_seed(0)
    norm, errors = nn.BatchNorm2d(4).to(dtype), []
    y, dz = torch.randn(64, 4, 16, 16).to(dtype).requires_grad_(), (torch.randn(64, 4, 16, 16) + 30).to(dtype)
    inputs = [t.detach().double().requires_grad_() for t in (y, norm.weight, norm.bias)]
    exact = F.batch_norm(inputs[0], None, None, *inputs[1:], training=True)
    exact = torch.autograd.grad(exact, inputs, dz.double())
    for cost in (None, 0):
        with under(cost):
            z = norm(y * 1)
        grads = torch.autograd.grad(z, [y, *norm.parameters()], dz)
        errors.append([apart(*pair) for pair in zip(grads, exact, strict=True)])
    for plain, ours in [*zip(*errors, strict=True)][:2]:  # float16 does not hold dβ
        assert ours <= 1.5 * plain + torch.finfo(dtype).eps


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


@pytest.mark.parametrize("function", LAYERS)
def test_autocast_leaves_float64(function):
    found = []
    for cost in (None, 0):
        with torch.autocast("cpu", torch.bfloat16), under(cost):
            found.append(function(leaf(image(2, 3, 3, 3)), leaf(image(4, 3, 3, 3))))
    assert found[0].dtype == found[1].dtype and torch.equal(*found)


@pytest.mark.parametrize("act", [F.silu, F.tanh, F.relu6, F.gelu, F.elu, F.mish, F.hardswish, F.relu])
def test_the_gradient_of_an_activation_may_have_another_layout(act):
    """The norm before it is not misled, as PyTorch's own may be."""
    x, y = image(1, 4, 4, 2).requires_grad_(), image(1, 4, 4, 2, seed=1)

    def forward(x):
        with remat():
            return act(y.contiguous(memory_format=torch.channels_last) + F.instance_norm(x))

    assert torch.autograd.gradcheck(forward, x)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("act", [F.silu, F.sigmoid, F.gelu, F.elu, F.relu6, F.hardswish, F.relu])
def test_the_gradient_of_an_activation_of_one_row(act, images):
    """A norm before it, too small for remat, may read another layout from other strides than PyTorch's."""

    def scenario(context):
        x = image(images, 2, 1, 4).requires_grad_()
        with context():
            h = F.batch_norm(x, None, None, training=True).permute(0, 3, 2, 1)
            out = act(h)
        h.register_hook(lambda dh: found.append(dh.stride()))
        out.backward(image(*out.shape, seed=1))
        return named(x.grad)

    found = []
    check_scenario(scenario, costs=[0])
    assert found[0] == found[1]


@pytest.mark.parametrize("shape", [(1, 8, 12), (2, 8, 12), (1, 8, 3, 4)])
def test_the_gradient_of_tokens_has_pytorchs_strides(shape):
    """Those of one image lie in columns, in PyTorch's too."""

    def scenario(context):
        x, w = leaf(image(*shape)), leaf(image(5, 8, seed=1))
        with context():
            tokens = x.movedim(1, -1)
            out = F.linear(tokens, w)
        tokens.register_hook(lambda dt: found.append(dt.stride()))
        out.backward(image(*out.shape, seed=2))
        return named(x.grad, w.grad)

    found = []
    check_scenario(scenario, costs=[0, 1e9])
    assert found[0] == found[1] == found[2]


PARTS = {
    "some channels": lambda y: y[:, 1:3],
    "each second column": lambda y: y[..., ::2],
    "one channel for all": lambda y: y[:, :1].expand(-1, 3, -1, -1),
    "one row for all": lambda y: y[:, :, :1].expand(-1, -1, 5, -1),
    "turned": lambda y: y.transpose(2, 3)[:, :, 1:],
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("act", [F.silu, F.sigmoid, F.relu6, F.leaky_relu, F.hardswish, F.relu])
def test_the_gradient_of_an_activation_of_a_part(act, name):
    """It has no gaps, and its values lie in places of their own."""

    def scenario(context):
        x = image(2, 4, 6, 6).requires_grad_()
        with context():
            part = PARTS[name](F.conv2d(x, w))
            out = act(part)
        part.register_hook(lambda dh: found.append((dh.stride(), dh.untyped_storage().nbytes())))
        out.backward(image(*out.shape, seed=1))
        return named(x.grad)

    w, found = image(4, 4, 1, 1, seed=2), []
    check_scenario(scenario, costs=[0, 1e9])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "act",
    [F.silu, F.sigmoid, F.relu6, F.relu, lambda h: h * h.sigmoid(), lambda h: F.dropout(h, 0.5, True)],
    ids=["silu", "sigmoid", "relu6", "relu", "product", "dropout"],
)
def test_a_gradient_of_half_of_an_image(act):
    """Half of the channels, and of the gradient's: the batch's stride is twice that of PyTorch's result."""

    def scenario(context):
        torch.manual_seed(0)
        x = image(1, 4, 6, 6).requires_grad_()
        with context():
            half = F.conv2d(x, w)[:, :2]
            out = torch.cat([act(half), x[:, :2]], 1)
        half.register_hook(lambda dh: found.append(dh.stride()))
        out.backward(image(*out.shape, seed=1))
        return named(x.grad)

    w, found = image(4, 4, 1, 1, seed=2), []
    check_scenario(scenario, costs=[0, 1e9])
    assert found[0] == found[1] == found[2]


BATCH_STATISTICS = {"running_mean": None, "running_var": None, "training": True}


@pytest.mark.parametrize("act", [torch.square, F.softplus, F.silu, F.normalize])
@pytest.mark.parametrize("norm", [F.instance_norm, functools.partial(F.batch_norm, **BATCH_STATISTICS)])
def test_a_norm_outside_of_the_context(norm, act):
    """It gets a gradient with the strides of plain PyTorch's."""
    x = image(1, 4, 4, 2).requires_grad_()

    def forward(x):
        y = norm(x).contiguous(memory_format=torch.channels_last)
        with remat():
            return act(y)

    assert torch.autograd.gradcheck(forward, x)


@pytest.mark.parametrize("norm", [F.instance_norm, functools.partial(F.batch_norm, **BATCH_STATISTICS)])
def test_a_norm_reads_its_gradient_in_any_layout(norm):
    """Of one row of one image PyTorch takes it for other values."""
    x, dz, found = image(1, 3, 1, 2).requires_grad_(), image(1, 3, 1, 2, seed=1), []
    with remat():
        z = norm(x * 1.5)
    for layout in (torch.contiguous_format, torch.channels_last):
        found += torch.autograd.grad(z, x, dz.contiguous(memory_format=layout), retain_graph=True)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("norm", [F.instance_norm, functools.partial(F.batch_norm, **BATCH_STATISTICS)])
def test_a_norm_reads_its_gradient_in_any_order(norm):
    """With the images innermost, as after ``flatten(2).permute(2, 0, 1)``, PyTorch's does not."""
    x, dz, found = image(2, 3, 4, 2).requires_grad_(), image(2, 3, 4, 2, seed=1), []
    with remat():
        z = norm(x * 1.5)
    for order in itertools.permutations(range(4)):
        other = torch.empty_permuted(dz.shape, order, dtype=dz.dtype).copy_(dz)
        found += torch.autograd.grad(z, x, other, retain_graph=True)
    for dx in found[1:]:
        torch.testing.assert_close(dx, found[0])


@pytest.mark.parametrize("layouts", [(0, 1), (1, 0)], ids=["nchw", "nhwc"])
def test_a_frozen_norms_gradient_has_its_inputs_layout(layouts):
    of_input, of_gradient = ((torch.contiguous_format, torch.channels_last)[i] for i in layouts)

    def scenario(context):
        x, one = image(2, 4, 4, 3).requires_grad_(), torch.ones(4).double()
        with context():
            h = F.instance_norm(x).contiguous(memory_format=of_input)
            out = F.batch_norm(h, one, one)
        h.register_hook(lambda dh: found.append(dh.stride()))
        out.backward(image(2, 4, 4, 3, seed=1).contiguous(memory_format=of_gradient))
        assert found.pop() == h.stride()
        return named(x.grad)

    found = []
    check_scenario(scenario)


@pytest.mark.parametrize("layouts", [(0, 1), (1, 0)], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("groups, kernel", [(1, 1), (1, 3), (2, 3)])
def test_the_gradient_of_an_input_has_its_layout(groups, kernel, layouts):
    """Also where the output's gradient has another: a norm before may take it for the wrong values."""
    of_input, of_gradient = ((torch.contiguous_format, torch.channels_last)[i] for i in layouts)
    conv, x = nn.Conv2d(4, 4, kernel, groups=groups).double(), image(2, 4, 9, 8).requires_grad_()
    with remat():
        h = F.silu(x.contiguous(memory_format=of_input))
        out = conv(h)
    h.register_hook(lambda dh: found.append(dh.is_contiguous(memory_format=of_input)))
    found = []
    out.backward(image(*out.shape, seed=1).contiguous(memory_format=of_gradient))
    assert found == [True]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape, size", [((6, 3, 3, 1), (3, 1)), ((6, 3, 1, 3), (1, 3))], ids=str)
def test_a_grouped_weight_of_one_row_or_column(shape, size, last):
    """Where a size is 1, its stride may say nothing, but the CPU's library may read it."""
    weight = image(*shape, dtype=torch.float32).transpose(2, 3)
    weight = weight.contiguous(memory_format=torch.channels_last).transpose(2, 3).requires_grad_()
    x, dz = (image(*s, dtype=torch.float32) for s in ((2, 6, *size), (2, 6, 1, 1)))
    dz = dz.as_strided(dz.shape, (6, 1, 6, 6)) if last else dz  # of one pixel both are contiguous

    def gradient(dtype, price=None):
        a, w = x.to(dtype).requires_grad_(), weight.to(dtype)
        with under(price):
            y = F.conv2d(a, w if price is not None else w.contiguous(), groups=2)
        return torch.autograd.grad(y, a, dz.to(dtype))[0]

    exact = gradient(torch.float64)
    for price in (0, 1e9):
        torch.testing.assert_close(gradient(torch.float32, price), exact.float(), rtol=1e-4, atol=1e-5)


class LikeCudnn:
    """`torch.ops.aten` with a batch norm like cuDNN's: its backward must get what its forward got.

    PyTorch's forward copies a tensor with gaps, and chooses by the strides how the library computes. Its
    backward raises an error for gaps, takes γ as it is, and may write to the library's buffer.
    """

    def __init__(self, monkeypatch):
        self.kernel, self.formats, self.forward = None, [], torch._batch_norm_impl_index
        monkeypatch.setattr(torch, "_batch_norm_impl_index", self.norm)
        monkeypatch.setattr(operations, "aten", self)
        self._batch_norm_impl_index_backward = SimpleNamespace(default=self.norm_backward)

    def __getattr__(self, name):
        return getattr(torch.ops.aten, name)

    def norm(self, y, *how):
        self.formats.append(suggest_memory_format(y))
        z, mean, invstd, _, _ = self.forward(y.contiguous(memory_format=self.formats[-1]), *how)
        return z, mean, invstd, torch.zeros(4), 1

    def norm_backward(self, kernel, y, dz, gamma, *how):
        *_, training, _, _, buffer = how
        if training:
            assert y.is_contiguous(memory_format=suggest_memory_format(y)) and gamma.is_contiguous()
            assert suggest_memory_format(y) is self.formats[-1]
            assert suggest_memory_format(dz) is self.formats[-1]
            assert not buffer.any()
            buffer.fill_(1.0)
        self.kernel = kernel
        return torch.ops.aten._batch_norm_impl_index_backward.default(0, y, dz, gamma, *how)


NORM_INPUTS = {
    "transposed": lambda y: y.transpose(2, 3),
    "some channels": lambda y: y[:, 1:],
    "a crop": lambda y: y[:, :, 1:-1, 1:-1],
    "one pixel": lambda y: y[:, :, :1, :1],
    "one channel": lambda y: y[:, :1],
    "tokens": lambda y: y.flatten(2).transpose(1, 2),
    "as it is": lambda y: y,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NORM_INPUTS)
def test_a_gpu_librarys_norm_gets_in_backward_what_it_got_in_forward(name, layout, training, monkeypatch):
    part, cl = NORM_INPUTS[name], {"memory_format": LAYOUTS[layout]}
    conv, x = nn.Conv2d(3, 4, 3).double().to(**cl), image(8, 3, 7, 8).to(**cl).requires_grad_()
    c = part(conv(x)).shape[1]
    gamma, beta = (image(c, 2, seed=seed)[:, 0].requires_grad_() for seed in (2, 3))
    running = image(c, seed=4), image(c, seed=5).abs()

    def gradients(price):
        with under(price):
            g = gamma if price is not None else gamma.contiguous()  # a CPU's kernels misread another
            z = F.batch_norm(part(conv(x)), *(t.clone() for t in running), g, beta, training)
            out = F.silu(z)
        inputs, dz = (x, conv.weight, gamma, beta), image(*out.shape, seed=1)
        return [torch.autograd.grad(out, inputs, dz, retain_graph=True) for _ in range(2)]

    wanted = gradients(None)
    for price in (0, 1e9):
        torch.testing.assert_close(gradients(price), wanted)
    monkeypatch.setattr(task.Task, "room", lambda self, value=None: 1 << 30)  # a GPU needs none of the slabs
    library = LikeCudnn(monkeypatch)
    for price in (0, 1e9):
        torch.testing.assert_close(gradients(price), wanted)
        assert library.kernel == 1


@pytest.mark.parametrize("cost", [0, 1e9])
def test_a_convolution_of_a_view_with_gaps(cost):
    """What is made again has forward's strides, or its views would be read with others."""
    torch.manual_seed(0)
    first, conv, last = nn.Linear(4, 12), nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Linear(2, 3)
    model, x = nn.ModuleList([first, conv, last]).double(), torch.randn(2, 5, 5, 4).double()

    def forward():
        y = conv(first(x)[..., :2].permute(0, 3, 1, 2))
        return last(y.permute(0, 2, 3, 1))

    plain = forward()
    grad = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, list(model.parameters()), grad)
    with remat(cost):
        out = forward()
    assert torch.equal(out, plain)
    torch.testing.assert_close(torch.autograd.grad(out, list(model.parameters()), grad), wanted)
