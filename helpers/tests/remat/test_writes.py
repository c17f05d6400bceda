"""Changes in place between forward and backward: right, or an error that names what changed."""

import contextlib
import functools
import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import remat
from helpers.remat import task
from helpers.tests.remat.support import (
    COSTS,
    X,
    assert_close,
    check_scenario,
    gradients,
    image,
    leaf,
    named,
    network,
    randomised,
    under,
)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("split", ["unsafe_chunk", "unsafe_split"])
@pytest.mark.parametrize("owner", [torch, torch.Tensor])
def test_an_alias_with_a_version_of_its_own(owner, split, dim):
    conv, last, grads = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), []
    x = image(2, 3, 8, 8, dtype=torch.float32).requires_grad_()
    for cost in (None, 0):
        with under(cost):
            y = conv(x)
            out = last(F.interpolate(y, scale_factor=2).relu())
            other = getattr(owner, split)(y.detach(), 2, dim)[0]
        other.add_(1)
        grads.append(torch.autograd.grad(out.sum(), x)[0])
    torch.testing.assert_close(*grads)


@torch.library.custom_op("remat_tests::treble", mutates_args={"x"})
def treble(y: float, x: torch.Tensor) -> None:
    x.mul_(y)


LIBRARY = torch.library.Library("remat_tests", "FRAGMENT")  # as long as the operators are to exist
LIBRARY.define("raised(Tensor x) -> Tensor")
LIBRARY.define("raised.by(Tensor(a!) x, float y) -> ()")
LIBRARY.impl("raised.by", lambda x, y: [x.add_(y)] and None, "CompositeExplicitAutograd")


class Named(torch.Tensor):
    """A user's subclass, as torchvision's images."""


WRITES = {
    "mul_": lambda t: t.mul_(0.5),
    "with alpha": lambda t: t.add_(t.detach().clone(), alpha=2),
    "by a numpy number": lambda t: t.mul_(np.float64(0.5)),
    "by an integer tensor": lambda t: t.mul_(torch.tensor(2)),
    "rounded": lambda t: t.div_(0.1, rounding_mode="floor"),
    "clamp_": lambda t: t.clamp_(-1, 1),
    "copy_": lambda t: t.copy_(t.detach().flip(0)),
    "index": lambda t: t.__setitem__((slice(None), 0), 0.0),
    "masked": lambda t: t.__setitem__(t.detach() > 0, 0.0),
    "view": lambda t: t[:, :3].relu_(),
    "view of a view": lambda t: t[1:][:, ::2].mul_(3.0),
    "foreach": lambda t: torch._foreach_mul_([t.detach()], 0.5),
    "no_grad": lambda t: torch.no_grad()(lambda: t.mul_(0.5))(),
    "inference_mode": lambda t: torch.inference_mode()(lambda: t.detach().mul_(0.5))(),
    "detached": lambda t: t.detach().sub_(1),
    "by another class": lambda t: t.detach().as_subclass(Named).sub_(1),
    "by another class's memory": lambda t: t.detach().as_subclass(Named).numpy().__imul__(0.5),
    "relu_": lambda t: F.relu(t, inplace=True),
    "selu_": lambda t: F.selu(t, inplace=True),
    "celu_": lambda t: F.celu(t, inplace=True),
    "threshold_": lambda t: F.threshold(t, 0.1, 0.0, True),
    "dropout_": lambda t: F.dropout(t, 0.5, inplace=True),
    "out": lambda t: torch.add(t.detach(), 1, out=t.detach()),
    "out of a convolution's kin": lambda t: torch.clamp(t.detach(), 0, out=t.detach()),
    "an initialisation": lambda t: nn.init.constant_(t, 0.5),
    "an embedding's limit": lambda t: F.embedding(torch.tensor([0, 1]), t.detach().flatten(1), max_norm=0.1),
    "an operator of the user's": lambda t: treble(3.0, t.detach()),
    "an operator by its short name": lambda t: torch.ops.remat_tests.treble(3.0, t.detach()),
    "by keyword": lambda t: torch.ops.aten.relu_.default(self=t.detach()),
    "data": lambda t: t.data.mul_(0.5),
    "data of a view": lambda t: t[0].data.mul_(0.5),
    "numpy": lambda t: np.multiply(t.detach().numpy(), 0.5, out=t.detach().numpy()),
    "asarray": lambda t: np.add(np.asarray(t.detach()), 1, out=np.asarray(t.detach())),
    "dlpack": lambda t: torch.from_dlpack(t.detach()).mul_(0.5),
    "storage": lambda t: t.untyped_storage().copy_((t.detach() + 1).untyped_storage()),
    "typed storage": lambda t: t.detach().storage().fill_(0.5),
    "memory": lambda t: np.frombuffer(t.detach().numpy(), np.float64).__imul__(0.5),
}  # fmt: skip


IN_PLACE = WRITES | {
    **{
        f"__i{name}__": lambda y, name=name: getattr(operator, f"i{name}")(y.detach(), 2.0)
        for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod")
    },
    "sum": lambda y: y.add_(1),
    "operator": lambda y: y.__iadd__(y.detach().clone()),
    "activation": F.relu_,
    "first index": lambda y: y.__setitem__(0, 0.0),
    "embedding": lambda y: F.embedding(torch.tensor([0, 1]), y, max_norm=0.1),
    "embedding by keyword": lambda y: F.embedding(torch.tensor([0, 1]), weight=y, max_norm=0.1),
    "in place by keyword": lambda y: F.leaky_relu(input=y, negative_slope=0.1, inplace=True),
    "in place by position": lambda y: F.leaky_relu(y, 0.1, True),
    "an operator by keyword": lambda y: torch.ops.remat_tests.treble(y=3.0, x=y.detach()),
    "an operator's second overload": lambda y: torch.ops.remat_tests.raised(y.detach(), 3.0),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_write_to_what_remat_alone_keeps(name):
    """PyTorch keeps the concatenation, remat the tensor that it is made from."""

    def scenario(context):
        x, w = leaf(image(3, 4)), leaf(image(5, 4, seed=1))
        with context():
            y = F.linear(x, w)
            z = F.silu(torch.cat([y, y], 1))
            IN_PLACE[name](y)
        grads = torch.autograd.grad(z.square().sum() + y.square().sum(), [x, w])
        return dict(zip("xw", grads, strict=True))

    check_scenario(scenario)


@pytest.mark.parametrize("name", ["iand", "ior", "ixor", "ilshift", "irshift"])
def test_a_write_to_a_mask(name):
    """PyTorch keeps the product for the weight's gradient, remat the mask."""

    def scenario(context):
        x, w = leaf(image(3, 4)), leaf(image(5, 4, seed=1))
        mask = (x > 0) if "shift" not in name else (x > 0).int()
        with context():
            out = F.linear(F.silu(x) * mask, w)
            getattr(operator, name)(mask, mask.flip(0))
        return named(torch.autograd.grad(out.sum(), w)[0])

    check_scenario(scenario)


def written(model, which, write):
    """A network of values of every kind, of which one is written to when all are made."""
    h = model[0][0](X)
    z = model[0][1](h)
    a = F.relu(z)
    p, q = torch.cumsum(a, 2), torch.cumsum(a, 3)
    k = F.conv2d(torch.cat([p, q], 1), torch.cat([model[1][0].weight] * 2, 1), padding=1)
    s = p + q
    m = F.conv2d(s, model[2].weight)
    values = {"convolution": h, "norm": z, "activation": a, "part of a concatenation": p, "sum": s}
    write(values[which])
    return k.sum((1, 2, 3)) + m.square().sum((1, 2, 3)) + values[which].mean((1, 2, 3))


@pytest.mark.parametrize("which", ["convolution", "norm", "activation", "part of a concatenation", "sum"])
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("write", WRITES)
def test_writes_inside_the_context(write, which):
    """PyTorch's numbers wherever it has some, or an error; where it has an error, no matter."""

    def run(cost):
        torch.manual_seed(0)
        model = network()
        with under(cost):
            out = written(model, which, WRITES[write])
        out.backward(image(4))
        return gradients(model)

    try:
        wanted = run(None)
    except RuntimeError:
        wanted = None
    for cost in COSTS:
        if wanted is not None:
            assert_close(run(cost), wanted, f"max_cost {cost},")
        else:
            with contextlib.suppress(RuntimeError):
                run(cost)


def next_to_its_conjugate(x, y):
    z = torch.complex(x, y)
    return F.silu(z.imag) + 2 * F.silu(z.conj().imag)


def across_images(x, p):
    r = F.leaky_relu(x.transpose(0, 1))
    return r.transpose(0, 1).flatten(0, 1)[1 : 1 + len(r)] * p


def norm_of_one_image_expanded(x, gamma, w):
    x = x.contiguous(memory_format=torch.channels_last).expand(3, -1, -1, -1)
    return F.conv2d(F.relu(F.batch_norm(x, None, None, gamma, training=True)), w)


def several_times_in_one_place(x, w):
    u = F.leaky_relu(x).unfold(1, 2, 1)
    u.add_(1.5)
    return F.linear(u, w)


def a_view_added_to_its_base(x, w):
    z = F.leaky_relu(x)
    z.add_(z[:, :1])
    return F.conv1d(z, w)


def a_small_view_subtracted(x, w, a, b):
    v = torch.cumsum(F.conv2d(x, w), 1)[:, ::2]
    k = F.conv2d(torch.cat([v, torch.cumsum(v, 1)], 1), a)
    v -= v[:, :, :1, :1].detach()
    return k + F.conv2d(v, b)


VIEWS = {  # a function, and the shapes of its arguments
    "conjugate": (next_to_its_conjugate, [(4, 4), (4, 4)]),
    "across images": (across_images, [(2, 3, 5), (3, 5)]),
    "windows that overlap": (lambda x: F.silu(F.leaky_relu(x).unfold(1, 5, 2)[..., ::2]), [(6, 9)]),
    "norm of an expanded image": (norm_of_one_image_expanded, [(1, 2, 4, 4), (2,), (1, 2, 1, 1)]),
    "several times in one place": (several_times_in_one_place, [(3, 4), (2, 2)]),
    "a view added to its base": (a_view_added_to_its_base, [(3, 32, 2), (1, 32, 1)]),
    "a small view": (a_small_view_subtracted, [(4, 3, 8, 8), (12, 3, 1, 1), (6, 12, 3, 3), (6, 6, 3, 3)]),
    "linear in place": (lambda x, w, b: F.linear(x, w, b).relu_(), [(2, 3, 4), (5, 4), (5,)]),
    "a bias for each row": (F.linear, [(4, 5), (3, 5), (4, 3)]),
    "groups of one": (lambda x, w, v: F.conv2d(F.group_norm(x, 2, w), v), [(3, 2, 1, 1), (2,), (1, 2, 1, 1)]),
    "a single value": (lambda x: F.silu(x := F.leaky_relu(x)) * x[1][2], [(4, 4)]),
    "a number as a vector": (lambda x: F.silu(x * (s := x.mean())) * s.view(1), [(4, 4)]),
    "the smaller factor first": (
        lambda x, g: F.silu(g * x.contiguous(memory_format=torch.channels_last)),
        [(4, 4, 4, 5), (4, 4, 4, 1)],
    ),
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", VIEWS)
def test_views_and_what_shares_memory(monkeypatch, name, cost):
    """Where parts of one memory are several values, or a value is not image after image."""
    monkeypatch.setattr(task, "SLAB_BYTES", 1)
    function, shapes = VIEWS[name]

    def run(context):
        leaves = [image(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
        with context:
            out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, image(*out.shape, seed=9))
        return out, dict(enumerate(grads))

    (wanted_out, wanted), (out, found) = run(contextlib.nullcontext()), run(remat(cost))
    assert torch.equal(out, wanted_out) and out.stride() == wanted_out.stride()
    assert_close(found, wanted)


def through_an_alias(x, a, b):
    alias = x.data  # its version is its own
    y = F.conv2d(x, a)
    alias.mul_(2)
    return y.detach().mean() + F.conv2d(x, b)


def into_anothers_data(x, a, b):
    y = x.detach() + 1
    kept = F.conv2d(y, a)
    x.data = y
    y.mul_(2)
    return kept.detach().mean() + F.conv2d(x, b)


def before_the_first_need(x, a, b):
    h = F.conv2d(x, a, padding=1)
    p = torch.cumsum(h, 2)
    z = torch.cat([p, torch.cumsum(h, 3)], 1)
    p.data.mul_(2)
    return F.conv2d(z, torch.cat([b, b], 1))


def twice_before_the_first_need(x, a, b):
    p = torch.cumsum(F.conv2d(x, a, padding=1), 2)
    z = torch.cat([p, p], 1)
    p.data.mul_(2)
    return F.conv2d(z, torch.cat([b, b], 1))


def statistics_before_the_first_need(x, a, b):
    y, mean, var = F.conv2d(x, a).mean((2, 3)), x.mean((0, 2, 3)), x.var((0, 2, 3))
    z = F.pad(y - mean, (0, 9))
    F.batch_norm(3 * x + 1, mean, var, training=True)
    return F.silu(z)


def running_statistics(x, a, b):
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    y = F.conv2d(x, a, padding=1)
    s = F.silu(y - mean.view(1, -1, 1, 1))
    F.batch_norm(F.batch_norm(y, mean, var, training=True), mean, var, training=True)
    return F.conv2d(s, b)


def alias_of_an_input(x, a, b):
    y = F.conv2d(x, a, padding=1)
    alias = y.detach().numpy()
    z = F.silu(F.batch_norm(y, None, None, training=True))
    alias *= 2
    return F.conv2d(z, b)


def source_of_a_linear_layers_copy(x, a, b):
    h = F.conv2d(x, a, padding=1)
    out = F.linear(h.permute(0, 2, 3, 1), a.flatten(1)[:, : h.shape[1]])
    h.data.mul_(1.5)
    return F.conv2d(out.permute(0, 3, 1, 2), b)


def alias_of_a_norms_result(x, a, b):
    z = F.batch_norm(F.conv2d(x, a, padding=1), None, None, training=True)
    alias = z.detach().numpy()
    s = F.relu(z, inplace=True)
    out = F.conv2d(s, b)
    alias *= 2
    return out


def alias_of_a_part(x, a, b):
    p = torch.cumsum(F.conv2d(x, a, padding=1), 2)
    alias = p.data
    z = torch.cat([p[:, :2], p[:, :1]], 1)
    alias.mul_(2)
    return F.conv2d(z, b)


def alias_of_what_is_joined(x, a, b):
    p = torch.cumsum(F.conv2d(x, a, padding=1), 2)
    alias = p.detach().numpy()
    out = F.conv2d(torch.cat([p, p], 1), torch.cat([b, b], 1))
    alias *= 2
    return out


def alias_of_a_convolutions_input(x, a, b):
    p = torch.cumsum(F.conv2d(x, a, padding=1), 2)
    alias = p.data
    z = F.batch_norm(F.conv2d(p, a, padding=1), None, None, training=True)
    alias.mul_(2)
    return F.conv2d(F.relu(z), b)


def alias_of_a_small_operand(x, a, b):
    gate = x.mean((2, 3), keepdim=True)
    alias = gate.numpy()
    s = F.conv2d(x, a, padding=1) + gate
    alias += 1
    return F.conv2d(F.silu(s), b)


def result_of_relu6(x, a, b):
    y = F.relu6(F.conv2d(x, a, padding=1))
    y.data.mul_(-7)
    return F.conv2d(y, b)


def result_of_hardtanh_in_place(x, a, b):
    z = F.batch_norm(F.conv2d(x, a, padding=1), None, None, training=True)
    y = F.hardtanh(z, -0.5, 0.7, inplace=True)
    out = torch.cumsum(y, 2) * 1.0
    y.data.mul_(-7)
    return F.conv2d(out, b)


def weight_of_a_linear_layer(x, a, b):
    h = F.silu(F.conv2d(x, a))
    y = F.linear(h.mean((2, 3)), a[:, :, 0, 0]) + F.linear(h.mean((2, 3)), a.detach()[:, :, 1, 1])
    a.data = a.detach() * 2
    return F.conv2d(x, b).mean((2, 3)) * y.mean()


def a_fused_optimizers_step(x, a, b):
    optimizer = torch.optim.AdamW([a], 0.5, fused=True)
    a.grad = torch.ones_like(a)
    z = F.batch_norm(F.conv2d(x, a), None, None, training=True)
    out = F.conv2d(F.silu(z), b)
    optimizer.step()
    return out


def alias_of_a_weight(x, a, b):
    alias = a.data
    s = F.silu(F.conv2d(x, a))
    alias.mul_(2)
    return F.conv2d(s, b)


READERS = {
    "norm": lambda p: F.batch_norm(p, None, None, training=True),
    "group norm": lambda p: F.group_norm(p, 1),
    "activation": F.silu,
    "number": lambda p: p * 3,
    "dropout": lambda p: F.dropout(p, 0.5, True),
    "cast": lambda p: p.float().double(),
    "resize": lambda p: F.interpolate(p, scale_factor=2.0),
    "max pool": lambda p: F.max_pool2d(p, 3, 1, 1),
    "pool": lambda p: F.avg_pool2d(p, 3, 1, 1),
    "padding": lambda p: F.pad(p, (1, 1, 1, 1), "reflect"),
}


def enlarged(name):
    """The source, which may change unseen, is smaller than what backward needs."""

    def run(x, a, b):
        torch.manual_seed(0)
        p = torch.cumsum(F.conv2d(x, a, padding=1), 2)
        alias = p.detach().numpy()
        out = F.conv2d(F.interpolate(READERS[name](p), scale_factor=2.0), b)
        alias *= 2
        return out

    return run


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    "function",
    [
        through_an_alias,
        into_anothers_data,
        before_the_first_need,
        twice_before_the_first_need,
        statistics_before_the_first_need,
        running_statistics,
        alias_of_an_input,
        source_of_a_linear_layers_copy,
        alias_of_a_norms_result,
        alias_of_a_part,
        alias_of_what_is_joined,
        alias_of_a_convolutions_input,
        alias_of_a_small_operand,
        alias_of_a_weight,
        a_fused_optimizers_step,
        result_of_relu6,
        result_of_hardtanh_in_place,
        weight_of_a_linear_layer,
        *(pytest.param(enlarged(name), id=name) for name in READERS),
    ],
)
def test_writes_without_a_new_version(function, cost):
    def run(context):
        x, a, b = image(4, 3, 8, 8), image(3, 3, 3, 3, seed=1), image(5, 3, 3, 3, seed=2).requires_grad_()
        with context:
            out = function(x, a.requires_grad_(), b)
        return out, dict(enumerate(torch.autograd.grad(out.square().sum(), [a, b], allow_unused=True)))

    (wanted_out, wanted), (out, found) = run(contextlib.nullcontext()), run(remat(cost))
    assert torch.equal(out, wanted_out)
    assert_close(found, wanted)


IMAGE_NORMS = {  # and whether PyTorch saves γ and β
    "group": (lambda y, *affine: F.group_norm(y, 2, *affine), (True, False)),
    "layer": (lambda y, *affine: F.layer_norm(y.mT, (8,), *affine), (True, True)),
    "instance": (lambda y, *affine: F.instance_norm(y, None, None, *affine), (False, False)),
}


@pytest.mark.parametrize("which", [0, 1], ids=["gamma", "beta"])
@pytest.mark.parametrize("name", IMAGE_NORMS)
def test_a_parameter_of_a_norm_that_changes_before_backward(name, which):
    """An error where PyTorch's node saves it, and without effect where not."""
    norm, saved = IMAGE_NORMS[name]

    def scenario(context):
        y, affine = image(3, 8, 8).requires_grad_(), [image(8, seed=i).requires_grad_() for i in (1, 2)]
        with context():
            out = norm(y, *affine)
        with torch.no_grad():
            affine[which].mul_(3)
        if saved[which]:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.backward(image(*out.shape, seed=3))
            return {}
        out.backward(image(*out.shape, seed=3))
        return named(y.grad, *(t.grad for t in affine))

    check_scenario(scenario)


RECOMPUTED = {
    "group norm": lambda y: F.group_norm(y, 2),
    "group norm of a part": lambda y: F.group_norm(y[:, 2:6], 2),
    "layer norm": lambda y: F.layer_norm(y, (6,)),
    "rms norm": lambda y: F.rms_norm(y, (6,)),
    "instance norm": F.instance_norm,
    "unit vectors": F.normalize,
    "lengths": lambda y: torch.linalg.vector_norm(y, dim=1, keepdim=True),
    "softplus": F.softplus,
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", RECOMPUTED)
def test_an_unseen_write_to_what_a_node_computes_from_again(name, cost):
    """Gradients are those of the values that forward had; PyTorch's mix old statistics with new values."""

    def gradient(context, write):
        x, w = image(2, 3, 6, 6), leaf(image(8, 3, 1, 1, seed=1))
        with context:
            y = F.conv2d(x, w)
            z = RECOMPUTED[name](y)
            if write:
                y.data.mul_(3)
        return torch.autograd.grad(z, w, image(*z.shape, seed=2))[0]

    torch.testing.assert_close(gradient(remat(cost), True), gradient(contextlib.nullcontext(), False))


def test_an_unseen_write_is_seen_by_other_nodes_all_the_same():
    """PyTorch's convolution computes its weight's gradient from what is there, and so does remat's."""

    def scenario(context):
        x, w = leaf(image(2, 3, 6, 6)), leaf(image(8, 3, 1, 1, seed=1))
        with context():
            y = x * 2
            z = F.layer_norm(y, (6,)).mean()
            out = F.conv2d(y, w)
            y.data.mul_(3)
        return named(*torch.autograd.grad(out.sum() + z, w))

    check_scenario(scenario)


OTHER_NORMS = {  # the first alone is remat's
    "batch norm": lambda y, *stats: F.batch_norm(y, *stats, training=True),
    "without a graph": lambda y, *stats: F.batch_norm(y.detach(), *stats, training=True),
    "no_grad": torch.no_grad()(lambda y, *stats: F.batch_norm(y, *stats, training=True)),
    "an int's momentum": lambda y, *stats: F.batch_norm(y, *stats, training=True, momentum=1),
    "torch's": lambda y, *stats: torch.batch_norm(y, None, None, *stats, True, 0.1, 1e-5, False),
    "native": lambda y, *stats: torch.native_batch_norm(y, None, None, *stats, True, 0.1, 1e-5)[0],
    "aten's": lambda y, *stats: torch.ops.aten.native_batch_norm(y, None, None, *stats, True, 0.1, 1e-5)[0],
    "instance norm": lambda y, *stats: F.instance_norm(y, *stats, use_input_stats=True),
    "instance norm by name": lambda y, m, v: F.instance_norm(y, running_mean=m, running_var=v),
}


@pytest.mark.parametrize("name", OTHER_NORMS)
@pytest.mark.parametrize("size", [(2, 1), (9, 8)], ids=["few values", "many"])
def test_running_statistics_that_another_norm_changes(size, name):
    """What a recipe reads is as it was; of many values it has copies of what is small."""

    def scenario(context):
        x, a, b = leaf(image(4, 3, *size)), leaf(image(8, 3, 1, 1, seed=1)), leaf(image(5, 24, 1, 1, seed=2))
        stats = image(8, seed=3), image(8, seed=4).square()
        mean, var = (t.view(-1, 1, 1) for t in stats)
        with context():
            y = F.conv2d(x, a)
            z = F.batch_norm(y, None, None, training=True)  # keeps y
            s = F.silu(torch.cat([y - mean, y + var, (y - mean) / (var + 1)], 1))
            OTHER_NORMS[name](y, *stats)
            out = F.conv2d(s, b)
        (out.square().sum() + z.sum()).backward()
        return named(x.grad, a.grad, b.grad, *stats)

    check_scenario(scenario)


def test_an_observers_averages_that_change():
    """Quantisation's, of the least and the largest value of each channel."""

    def scenario(context):
        x, w = leaf(image(4, 8, 2, 1)), leaf(image(5, 8, 1, 1, seed=2))
        on, least, most = torch.tensor([1]), torch.zeros(8), torch.ones(8)
        scale, zero = torch.ones(8), torch.zeros(8, dtype=torch.int)
        observed = x.detach().float().transpose(0, 1)
        with context():
            y = F.conv2d(x, w)  # keeps x
            s = F.silu(x * most.view(-1, 1, 1))
            torch.fused_moving_avg_obs_fake_quant(
                observed, on, on, least, most, scale, zero, 0.5, 0, 255, 0, True
            )
            out = y * F.conv2d(s, w)
        out.sum().backward()
        return named(x.grad, w.grad, least, most)

    check_scenario(scenario)


@pytest.mark.parametrize("unseen", [True, False])
def test_a_source_that_changed_is_not_kept_in_its_results_place(unseen):
    """The two convolutions' outputs are smaller than the concatenation, and would do."""

    def scenario(context):
        x, a, b = image(4, 3, 8, 8), leaf(image(3, 3, 3, 3, seed=1)), leaf(image(5, 9, 3, 3, seed=2))
        with context():
            p, q = F.conv2d(x, a), F.conv2d(x, a.flip(0))
            joined = torch.cat([p, p, q], 1)
            with torch._C.DisableTorchFunction() if unseen else contextlib.nullcontext():
                p.detach().mul_(2)
            out = F.conv2d(joined, b)
        out.square().sum().backward()
        return named(a.grad, b.grad)

    check_scenario(scenario)


@pytest.mark.parametrize(
    "expose",
    [torch.Tensor.data_ptr, lambda t: t.data, torch.Tensor.numpy, lambda t: t.mul_(1)],
    ids=["data_ptr", "data", "numpy", "mul_"],
)
def test_a_change_is_seen_although_the_tensor_is_exposed_later(expose):
    """What is copied then must not be what somebody has changed before."""

    def weight(x, a, b):
        out = F.conv2d(F.silu(F.conv2d(x, a)), b)
        with torch.no_grad():
            a.mul_(2)
            expose(a.detach())
        return out

    def operand(x, a, b):
        p = torch.cumsum(F.conv2d(x, a[:1]), 2)
        out = F.conv2d(torch.cat([p, p, p], 1), b)
        with torch._C.DisableTorchFunction():
            p.detach().mul_(2)
        expose(p.detach())
        return out

    def bias(x, a, b):
        c = image(3, seed=4).requires_grad_()
        out = F.conv2d(F.silu(F.conv2d(x, a, c)), b)
        with torch._C.DisableTorchFunction():
            c.detach().mul_(2)
        expose(c.detach())
        return out

    inplace, freed = "modified by an inplace operation", "its bias of shape .* was changed after forward"
    for function, words in ((weight, inplace), (operand, "changed"), (bias, freed)):
        x, a, b = image(4, 3, 8, 8), image(3, 3, 3, 3, seed=1), image(5, 3, 3, 3, seed=2)
        with remat(1e9):
            out = function(x, a.requires_grad_(), b.requires_grad_())
        with pytest.raises(RuntimeError, match=words):
            out.square().sum().backward()


@pytest.mark.parametrize(
    "copy", [torch.cumsum, lambda t, dim: torch.roll(t, 1, dim)], ids=["unknown", "roll"]
)
def test_a_view_with_gaps_is_no_base_of_others(copy):
    """A kept one may be copied, and then lies in memory without the gaps."""

    def scenario(context, write):
        model = network()
        weight = model[1][0].weight
        with context():
            h = copy(model[0](X[:2]), 2)
            part = h[:, :7]
            out = F.conv2d(part, weight[:, :7]) + F.conv2d(part[:, :2], weight[:, :2])
            write(h)
        out.square().sum().backward()
        return gradients(model)

    check_scenario(functools.partial(scenario, write=lambda h: None))
    check_scenario(functools.partial(scenario, write=lambda h: h.data.mul_(2)))

    def in_place(context):
        model = network()
        with context():
            h = copy(model[0](X), 2)
            part = h[:, ::2]
            part += 1
            out = F.conv2d(h[:, :7], model[1][0].weight[:, :7])
        out.square().sum().backward()
        return gradients(model)

    check_scenario(in_place)


def test_a_buffer_that_a_sum_has_read_changes_after_the_context():
    """Running statistics change without a version, for example in the next forward."""

    def scenario(context):
        model, mean = network(), torch.zeros(8, dtype=torch.float64)
        with context():
            out = model[2](F.silu(model[0](X) + mean.view(1, 8, 1, 1)))
        F.batch_norm(torch.ones(2, 8, dtype=torch.float64), mean, torch.ones_like(mean), training=True)
        out.square().sum().backward()
        return gradients(model)

    check_scenario(scenario)


def test_a_parameter_that_a_sum_has_read_is_trained_before_backward():
    """PyTorch saves the sum."""

    def scenario(context):
        model, shift = network(), nn.Parameter(torch.ones(8, 1, 1, dtype=torch.float64))
        with context():
            out = model[2](F.silu(model[0](X) + shift))
        shift.grad = torch.ones_like(shift)
        torch.optim.SGD([shift], 0.1).step()
        out.square().sum().backward()
        return {**gradients(model), "shift": shift.grad}

    check_scenario(scenario)


@pytest.mark.parametrize("cost", COSTS)
def test_a_weight_trained_in_inference_mode_inside_the_context(cost):
    """While another forward's graph is alive, whose recipes copy it."""
    model, trained = network(), network()
    with remat(cost):
        loss = model(X).mean()
        with torch.inference_mode():
            for p in model.parameters():
                p.mul_(0.5)
    with torch.no_grad():
        for p in trained.parameters():
            p.mul_(0.5)
    torch.testing.assert_close(dict(model.named_parameters()), dict(trained.named_parameters()))
    assert loss.requires_grad


def test_a_weight_written_without_a_version_inside_the_context():
    """Weights are clipped between two forwards: what was made before was made with the old ones."""

    def scenario(context):
        model = network()
        with context():
            h = model[1](model[0](X))
            model[1][0].weight.data.clamp_(-0.01, 0.01)
            out = model[2](h)
        out.square().sum().backward()
        return gradients(model)

    check_scenario(scenario)


@pytest.mark.parametrize("what", ["input", "convolution", "activation"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_kept_tensor_changed_after_forward_is_an_error(what, grad):
    """It says what changed; or, if backward does not need it any more, the numbers are PyTorch's."""

    def run(cost):
        model, x = network(), X.clone()
        with under(cost):
            h = model[0][0](x)
            a = F.silu(model[0][1](h))
            out = model[2](a)
        with torch.set_grad_enabled(grad):
            {"input": x, "convolution": h, "activation": a}[what].mul_(2.0)
        out.square().sum().backward()
        return gradients(model)

    def unchanged():
        """What the gradients are of the values that forward had."""
        model = network()
        a = F.silu(model[0][1](model[0][0](X)))
        model[2](a).square().sum().backward()
        return gradients(model)

    with pytest.raises(RuntimeError, match="modified by an inplace"):
        run(None)
    for cost in COSTS:
        if what == "input" or (what, cost) == ("convolution", 0):
            with pytest.raises(RuntimeError, match="inplace operation.*(of shape|Tensor)"):
                run(cost)
        else:
            with contextlib.suppress(RuntimeError):  # or made again from what did not change
                assert_close(run(cost), unchanged(), f"max_cost {cost},")


@pytest.mark.parametrize("cost", COSTS)
def test_a_parameter_changed_after_forward_is_an_error(cost):
    """An optimizer's step between forward and backward, as with PyTorch."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).sum().backward()
    with under(cost):
        out = model(X)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation|changed after forward"):
        out.sum().backward()


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_parameter_that_got_other_memory_is_an_error(what):
    """A convolution that is recomputed would take the new values."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).double()
    with remat(max_cost=1e9):
        out = model(X)
    parameter = getattr(model[0], what)
    parameter.data = 2 * parameter.data
    with pytest.raises(RuntimeError, match=f"its {what} of shape .* was changed after forward"):
        out.sum().backward()


CHANGES = {
    "changed": torch.no_grad()(lambda t: t.mul_(2)),
    "freed": lambda t: t.untyped_storage().resize_(0),  # as sharded training does
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_changed_before_its_convolution_runs_again(name, what):
    """Also where the node of the convolution, which would notice, does not run."""
    conv, norm = nn.Conv2d(3, 4, 3).double(), nn.BatchNorm2d(4).double()
    with remat(max_cost=1e9):
        out = norm(conv(X))
    CHANGES[what](getattr(conv, name))
    with pytest.raises(RuntimeError, match=f"its {name} of shape .* was {what} after forward"):
        torch.autograd.grad(out.sum(), norm.weight)


def test_running_statistics_of_eval_mode_that_change():
    """PyTorch keeps the norm's result for the weight's gradient, remat its recipe."""

    def scenario(context):
        x, w = leaf(image(4, 3, 5, 5)), leaf(image(2, 3, 1, 1, seed=1))
        norm = nn.BatchNorm2d(3).double().eval()
        with context():
            out = F.conv2d(norm(x), w)
        norm.train()(3 * x)
        return named(torch.autograd.grad(out.square().sum(), w)[0])

    check_scenario(scenario)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("name", ["0.1.weight", "1.0.weight", "1.1.weight", "2.weight"])
def test_one_parameter_changed_after_forward_is_an_error(name, cost):
    model = network()
    with under(cost):
        out = model(X)
    with torch.no_grad():
        model.get_parameter(name).mul_(2)
    with pytest.raises(
        RuntimeError, match="inplace operation.*Tensor|its weight of shape .* changed after forward"
    ):
        out.sum().backward()


@pytest.mark.parametrize(("inside", "costs"), [(True, COSTS), (False, [0])])
def test_what_pytorch_does_not_save_may_change(inside, costs):
    """Every bias, and the weight of a linear layer whose input needs no gradient.

    After the context, what a convolution needs that runs again may not.
    """

    def scenario(context):
        torch.manual_seed(0)
        layers = nn.Linear(9, 9), nn.Conv2d(3, 8, 1), nn.SiLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        model = randomised(nn.Sequential(*layers).double())

        @torch.no_grad()
        def change():
            for t in (layers[0].weight, *(layer.bias for layer in layers if layer.state_dict())):
                t.add_(1)

        with context():
            out = model(X)
            if inside:
                change()
        if not inside:
            change()
        out.square().sum().backward()
        return gradients(model)

    check_scenario(scenario, costs)


def test_a_norms_bias_and_the_last_convolutions_may_change_after_the_context():
    def scenario(context):
        model = network()
        with context():
            out = model(X)
        with torch.no_grad():
            for name, t in model.state_dict().items():
                if name.endswith("bias"):
                    t.add_(1)
        out.square().sum().backward()
        return gradients(model)

    check_scenario(scenario)
