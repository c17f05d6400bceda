"""FusedConvBN2d is nn.Conv2d then nn.BatchNorm2d, in every mode, and saves the conv's input alone."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from helpers import FusedConvBN2d, FusedConvBN2dFunction, fused_conv_bn2d
from helpers.memory import MemoryTrace, saved_tensors
from helpers.tests.rounding import apart, rounding

SLABS = [None, 1, 2, "batch"]


def randn(*shape, **kwargs):
    return torch.randn(*shape, dtype=torch.float64, **kwargs)


def make_pair(*conv_args, dtype=torch.float64, norm=None, **conv_kwargs):
    """A conv and a batch norm with nothing left at its default value."""
    conv = nn.Conv2d(*conv_args, **conv_kwargs)
    bn = nn.BatchNorm2d(conv.out_channels, **(norm or {}))
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            if tensor is not None:
                tensor.normal_()
        if bn.running_var is not None:
            bn.running_var.uniform_(0.5, 2)
    return nn.Sequential(conv, bn).to(dtype)


def close(found, wanted, name, tolerance):
    """Element by element; with a tolerance, by the norm of the difference (float32 and less)."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, name
    if tolerance is None:
        torch.testing.assert_close(found, wanted, msg=lambda m: f"{name}: {m}")
    else:
        assert apart(found, wanted) <= tolerance, f"{name}: {apart(found, wanted)}"


def check_equal(pair, x, slab_size=None, training=True, steps=1, tolerance=None):
    """Run pair and fused layer on the same numbers; compare outputs, gradients and buffers."""
    fused = FusedConvBN2d.from_pair(*copy.deepcopy(pair), slab_size=slab_size)
    pair.train(training), fused.train(training)
    for _ in range(steps):
        inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in "ab"]
        z, z_fused = pair(inputs[0]), fused(inputs[1])
        close(z_fused, z, "z", tolerance)
        dz = torch.randn_like(z)
        z.backward(dz), z_fused.backward(dz)
        close(inputs[1].grad, inputs[0].grad, "dx", tolerance)
    for (name, p), q in zip(fused.named_parameters(), pair.parameters(), strict=True):
        if name == "conv.bias" and training:  # truly zero; the pair returns rounding errors
            assert p.grad.count_nonzero() == 0
        else:
            close(p.grad, q.grad, name, tolerance)
    for (name, p), q in zip(fused.named_buffers(), pair.buffers(), strict=True):
        close(p, q, name, tolerance if p.is_floating_point() else None)
    return fused


GRID = [
    {"kernel_size": k, "stride": s, "padding": p, "dilation": d, "groups": g, "bias": b}
    for k, (s, p), d, (g, b) in itertools.product(
        (1, (3, 2)),
        ((1, 0), (2, (2, 1)), (1, "same"), (1, "valid")),
        (1, (1, 2)),
        ((1, True), (2, False), (4, True)),
    )
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("slab_size", SLABS)
def test_equals_the_pair_over_a_grid(slab_size, training):
    torch.manual_seed(0)
    for arguments in GRID:
        check_equal(make_pair(4, 8, **arguments), torch.randn(5, 4, 7, 9).double(), slab_size, training)


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(2, 1), "same"])
def test_padding_modes(padding_mode, padding):
    pair = make_pair(3, 4, 3, padding=padding, padding_mode=padding_mode)
    check_equal(pair, torch.randn(3, 3, 6, 5).double(), slab_size=2)


@pytest.mark.parametrize(
    "norm",
    [
        {"eps": 0.5, "momentum": 0.7},
        {"momentum": None},
        {"momentum": 0.0},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_norm_arguments_over_several_steps(norm, training):
    check_equal(make_pair(3, 4, 3, norm=norm), torch.randn(4, 3, 5, 6).double(), 3, training, steps=3)


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_pair_over_drawn_geometries(data):
    draw = data.draw
    groups = draw(st.sampled_from([1, 2, 3]), "groups")
    c_in, c_out = groups * draw(st.integers(1, 3), "in"), groups * draw(st.integers(1, 3), "out")
    kernel = [draw(st.integers(1, 4), "kernel") for _ in "hw"]
    geometry = {
        "stride": tuple(draw(st.integers(1, 3), "stride") for _ in "hw"),
        "padding": tuple(draw(st.integers(0, 2), "padding") for _ in "hw"),
        "dilation": tuple(draw(st.integers(1, 2), "dilation") for _ in "hw"),
    }
    size = [
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 9), "size")
        for k, d, p in zip(kernel, geometry["dilation"], geometry["padding"], strict=True)
    ]
    n = draw(st.integers(2, 5), "N")
    slab_size = draw(st.sampled_from([None, 1, 2, 3, 100, "batch"]), "slab_size")
    torch.manual_seed(draw(st.integers(0, 99), "seed"))
    pair = make_pair(c_in, c_out, kernel, groups=groups, bias=draw(st.booleans(), "bias"), **geometry)
    check_equal(pair, torch.randn(n, c_in, *size).double(), slab_size, draw(st.booleans(), "training"))


def opinfo_samples(name):
    from torch.testing._internal.common_methods_invocations import op_db

    (op,) = [op for op in op_db if op.name == name and op.variant_test_name == ""]
    return list(op.sample_inputs("cpu", torch.float64, requires_grad=False))


@pytest.mark.filterwarnings("ignore")
def test_pytorchs_own_conv2d_samples():
    used = 0
    for sample in opinfo_samples("nn.functional.conv2d"):
        x, (weight, *rest), kwargs = sample.input, sample.args, dict(sample.kwargs)
        bias = rest[0] if rest else kwargs.pop("bias", None)
        if x.dim() != 4:
            continue
        y = F.conv2d(x, weight, bias, **kwargs)
        if y.numel() == 0 or y.numel() == y.shape[1]:
            continue  # no value, or one value a channel: an error, tested below
        z = F.batch_norm(y, None, None, training=True)
        torch.testing.assert_close(fused_conv_bn2d(x, weight, bias, **kwargs, slab_size=1), z)
        used += 1
    assert used >= 10


@pytest.mark.filterwarnings("ignore")
def test_pytorchs_own_batch_norm_samples():
    used = 0
    for sample in opinfo_samples("nn.functional.batch_norm"):
        x, kwargs = sample.input, dict(sample.kwargs)
        names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        kwargs.update(zip(names, sample.args, strict=False))
        if x.dim() < 2 or x.numel() <= x.shape[1]:
            continue
        x = x.reshape(*x.shape[:2], -1, 1)  # the samples of other ranks, as images
        kwargs = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        ours = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        gamma, beta = ours.pop("weight", None), ours.pop("bias", None)
        identity = torch.eye(x.shape[1], dtype=x.dtype)[:, :, None, None]
        ours.setdefault("training", False)
        torch.testing.assert_close(
            fused_conv_bn2d(x, identity, None, gamma, beta, **ours), F.batch_norm(x, **kwargs)
        )
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(ours.get(name), kwargs.get(name))
        used += 1
    assert used >= 5


@pytest.mark.parametrize("slab_size", [None, 1, "batch"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 2, 4, 3), (2, 2, 5, 4)])
def test_gradcheck_in_slow_mode(training, slab_size, shape):
    pair = make_pair(2, 3, (3, 2), stride=(1, 2), padding=(0, 1))
    fused = FusedConvBN2d.from_pair(*pair, slab_size=slab_size).train(training)
    names = [n for n, _ in fused.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in fused.parameters()]
    buffers = {n: b.clone() for n, b in fused.named_buffers()}

    def layer(x, *parameters):
        state = {**dict(zip(names, parameters, strict=True)), **{n: b.clone() for n, b in buffers.items()}}
        return torch.func.functional_call(fused, state, (x,))

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, (x, *parameters), fast_mode=False)


# -- what autograd may ask for ---------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=5))[:-1], ids=str)
def test_gradients_only_for_what_needs_them(needs, training):
    pair = make_pair(2, 3, 3)
    fused = FusedConvBN2d.from_pair(*copy.deepcopy(pair), slab_size=2).train(training)
    pair.train(training)
    x = torch.randn(3, 2, 6, 6).double()
    dz = torch.randn(3, 3, 4, 4).double()
    found = []
    for model in (pair, fused):
        for p, need in zip(model.parameters(), needs[1:], strict=True):
            p.requires_grad_(need)
        x_ = x.clone().requires_grad_(needs[0])
        model(x_).backward(dz)
        found.append([x_.grad, *(p.grad for p in model.parameters())])
    for wanted, ours, need, name in zip(*found, needs, ("x", "w", "b", "gamma", "beta"), strict=True):
        assert (ours is not None) == need
        if need and not (name == "b" and training):
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("slab_size", [None, 2, "batch"])
@pytest.mark.parametrize(
    "make",
    [
        lambda dz: dz[:1, :, :1, :1].expand_as(dz),
        lambda dz: dz.contiguous(memory_format=torch.channels_last),
        lambda dz: torch.stack([dz, dz], -1)[..., 0],
        lambda dz: torch.zeros_like(dz),
        lambda dz: dz.transpose(2, 3).contiguous().transpose(2, 3),
    ],
    ids=["expanded", "channels_last", "sliced", "zero", "transposed"],
)
def test_any_grad_out_and_none_is_written(make, slab_size):
    pair = make_pair(2, 4, 3)
    fused = FusedConvBN2d.from_pair(*copy.deepcopy(pair), slab_size=slab_size)
    x = torch.randn(4, 2, 6, 6).double()
    dz = make(torch.randn(4, 4, 4, 4).double())
    before = dz.clone()
    grads = []
    for model in (pair, fused):
        x_ = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(model(x_), (x_, *list(model.parameters())), dz))
    assert torch.equal(dz, before)
    for ours, wanted, name in zip(grads[1], grads[0], ("x", "w", "b", "gamma", "beta"), strict=True):
        if name != "b":
            torch.testing.assert_close(ours, wanted)


def test_backward_twice_gives_the_same_gradients_and_moves_no_statistics():
    fused = FusedConvBN2d(2, 3, 3, slab_size=1).double()
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    z, dz = fused(x), torch.randn(3, 3, 3, 3).double()
    state = copy.deepcopy(fused.state_dict())
    first, second = (torch.autograd.grad(z, (x, fused.conv.weight), dz, retain_graph=True) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in fused.state_dict().items())
    assert fused.bn.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["x", "weight", "gamma"])
def test_a_saved_tensor_that_changed_is_an_error(name):
    fused = FusedConvBN2d(2, 3, 3)
    x = torch.randn(2, 2, 5, 5).requires_grad_() * 1
    z = fused(x)
    with torch.no_grad():
        {"x": x, "weight": fused.conv.weight, "gamma": fused.bn.weight}[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward(torch.ones_like(z))


LOSSES = {
    "sum": torch.sum,
    "mean": torch.mean,
    "weighted sum": lambda z: (z * torch.arange(z.numel()).view_as(z)).sum(),
    "sum of cubes": lambda z: (z**3).sum(),
}


def grad_of_grad(f, x, inputs=None):
    (dx,) = torch.autograd.grad(f(x), x, create_graph=True)
    # What is "allowed" to be unused would come back as no gradient at all.
    return torch.autograd.grad(dx.pow(2).sum() + x.sum(), inputs or x, allow_unused=True)


SECOND = {
    "grad of grad": grad_of_grad,
    "vhp": lambda f, x: torch.autograd.functional.vhp(f, x, torch.ones_like(x)),
    "hvp": lambda f, x: torch.autograd.functional.hvp(f, x, torch.ones_like(x)),
    "hessian": torch.autograd.functional.hessian,
    "vectorized hessian": lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True),
    "gradgradcheck": lambda f, x: gradgradcheck(f, (x,)),
    "torch.func.grad": lambda f, x: torch.func.grad(lambda x: torch.func.grad(f)(x).pow(2).sum())(x),
    "torch.func.vjp": lambda f, x: torch.func.vjp(torch.func.grad(f), x)[1](x),
    "torch.func.jacrev": lambda f, x: torch.func.jacrev(torch.func.grad(f))(x),
    "func of autograd": lambda f, x: torch.func.grad(
        lambda x: torch.autograd.grad(f(x), x, create_graph=True)[0].pow(2).sum()
    )(x),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("way", SECOND)
def test_a_second_derivative_raises_whatever_the_loss(way, loss, training):
    """Also where dz has no graph of its own, as for a plain sum."""
    fused = FusedConvBN2d.from_pair(*make_pair(2, 3, 3, norm={"track_running_stats": False}))
    if not training:
        fused.bn = make_pair(2, 3, 3)[1].eval()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(
        RuntimeError, match="FusedConvBN2d.* first derivatives only.* call the modules unfused"
    ):
        SECOND[way](lambda x: LOSSES[loss](fused(x)), x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("of", [*"xwbg", "beta"])
@pytest.mark.parametrize("by", [*"xwbg", "beta", "dz"])
def test_mixed_second_derivatives_raise_where_there_are_any(of, by, training):
    """Of each gradient by each of what it is made of; where the pair's is 0, an error is right, too."""
    pair = make_pair(2, 3, 3).train(training)
    fused = FusedConvBN2d.from_pair(*pair)
    x, dz = randn(2, 2, 4, 4, requires_grad=True), randn(2, 3, 2, 2, requires_grad=True)
    leaves = dict(zip([*"xwbg", "beta", "dz"], [x, *fused.parameters(), dz], strict=True))
    found = []
    for model in (pair, fused):
        (grad,) = torch.autograd.grad(model(x), leaves[of], dz, create_graph=True)
        try:
            found += torch.autograd.grad(grad.pow(2).sum(), leaves[by], allow_unused=True)
        except RuntimeError as reason:
            assert "first derivatives only" in str(reason)
            return
    exact, ours = (0 if t is None else t for t in found)
    assert ours == 0 and torch.as_tensor(exact).abs().max() < 1e-9


def test_first_derivatives_with_a_graph_are_what_they_are_without():
    pair = make_pair(2, 3, 3)
    fused = FusedConvBN2d.from_pair(*copy.deepcopy(pair))
    x, found = randn(3, 2, 5, 5), []
    for model in (pair, fused):
        x_ = x.clone().requires_grad_()
        z = checkpoint(model, x_, use_reentrant=False)  # lets a saved tensor be read once
        grads = torch.autograd.grad((z**3).sum(), (x_, *model.parameters()), create_graph=True)
        assert all(g.requires_grad for g in grads)
        (x_.square().sum() + sum(g.detach().sum() for g in grads)).backward()  # none of them differentiated
        found.append([x_.grad, *grads])
    for ours, wanted, name in zip(found[1], found[0], ("x", "dx", "w", "b", "g", "beta"), strict=True):
        if name != "b":
            torch.testing.assert_close(ours, wanted)


def test_hooks_see_what_they_see_on_the_pair():
    pair = make_pair(2, 3, 3)
    fused = FusedConvBN2d.from_pair(*copy.deepcopy(pair))
    x, dz, seen = torch.randn(3, 2, 5, 5).double(), torch.randn(3, 3, 3, 3).double(), []
    for model in (pair, fused):
        model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model.register_forward_hook(lambda *a: seen.append(a[2].detach()))
        model.register_full_backward_hook(lambda _, grad_in, grad_out: seen.extend([*grad_in, *grad_out]))
        x_ = x.clone().requires_grad_()
        z = model(x_)
        z.register_hook(lambda g: seen.append(g))
        z.backward(dz)
    half = len(seen) // 2
    assert half == 5
    for ours, wanted in zip(seen[half:], seen[:half], strict=True):
        torch.testing.assert_close(ours, wanted)


def test_in_place_relu_after_the_layer():
    pair = make_pair(2, 3, 3)
    fused = FusedConvBN2d.from_pair(*copy.deepcopy(pair))
    x, dz = torch.randn(3, 2, 5, 5).double(), torch.randn(3, 3, 3, 3).double()
    for model in (pair, fused):
        F.relu_(model(x)).backward(dz)
    torch.testing.assert_close(fused.conv.weight.grad, pair[0].weight.grad)


# -- the state a module carries --------------------------------------------------------------------


def test_from_pair_shares_parameters_and_buffers():
    conv, bn = make_pair(2, 3, 3)
    fused = FusedConvBN2d.from_pair(conv, bn)
    assert fused.conv.weight is conv.weight and fused.bn.running_mean is bn.running_mean
    fused(torch.randn(2, 2, 5, 5).double())
    assert bn.num_batches_tracked == 1


def test_same_seed_same_start_as_the_pair():
    torch.manual_seed(3)
    conv, bn = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
    torch.manual_seed(3)
    fused = FusedConvBN2d(2, 3, 3)
    assert torch.equal(fused.conv.weight, conv.weight) and torch.equal(fused.conv.bias, conv.bias)
    assert torch.equal(fused.bn.weight, bn.weight)


def test_state_dict_copy_and_pickle():
    pair = nn.Sequential()
    pair.add_module("conv", nn.Conv2d(2, 3, 3))
    pair.add_module("bn", nn.BatchNorm2d(3))
    fused = FusedConvBN2d(2, 3, 3, slab_size=2)
    assert list(fused.state_dict()) == list(pair.state_dict())
    fused(torch.randn(2, 2, 5, 5))
    pair.load_state_dict(fused.state_dict())
    fused.load_state_dict(pair.state_dict())
    x = torch.randn(2, 2, 5, 5)
    saved = io.BytesIO()
    torch.save(fused, saved)
    saved.seek(0)
    copies = (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(saved, weights_only=False),
        pair,
    )
    for other in copies:
        torch.testing.assert_close(other.eval()(x), fused.eval()(x))
    assert copies[0].slab_size == 2 and "slab_size=2" in repr(fused)


def test_frozen_norm_inside_a_training_layer():
    fused = FusedConvBN2d(2, 3, 3)
    fused.bn.eval()
    before = fused.bn.running_mean.clone()
    fused(torch.randn(2, 2, 5, 5))
    assert torch.equal(fused.bn.running_mean, before) and fused.bn.num_batches_tracked == 0


# -- dtypes, layouts, numerics ---------------------------------------------------------------------


@pytest.mark.parametrize("slab_size", [None, 2, "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["input", "weight", "both"])
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_is_kept(which, dtype, slab_size, training):
    torch.manual_seed(0)
    pair = make_pair(4, 8, 3, padding=1, dtype=torch.float32).to(dtype)
    x = torch.randn(4, 4, 6, 6).to(dtype)
    if which != "weight":
        x = x.to(memory_format=torch.channels_last)
    if which != "input":
        pair = pair.to(memory_format=torch.channels_last)
    # A gradient sums over 4 images of 6x6, and in each of these over 4 channels of 3x3. In half precision
    # four tensors on the way are rounded: y, y again, dy and the gradient.
    terms = 4 if dtype == torch.bfloat16 else 4 * 36 * 36
    fused = check_equal(pair, x, slab_size, training, tolerance=rounding(dtype, terms))
    z = fused(x.requires_grad_())
    assert z.is_contiguous(memory_format=torch.channels_last)
    z.backward(torch.randn_like(z))
    if which != "weight":
        assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_equals_the_pair(dtype, training):
    torch.manual_seed(0)
    pair = make_pair(4, 8, 3, dtype=torch.float32).train(training)
    fused = FusedConvBN2d.from_pair(*copy.deepcopy(pair), slab_size=2).train(training)
    x, results = torch.randn(4, 4, 8, 8), []
    dz = torch.randn(4, 8, 6, 6)
    for model in (pair, fused):
        x_ = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            z = model(x_)
            _, saved = saved_tensors(model, x_)
            z.backward(dz.to(z.dtype))  # inside autocast on purpose: backward must not cast again
        results.append((z, x_.grad, *(p.grad for p in model.parameters()), *model.buffers()))
    assert results[1][0].dtype == results[0][0].dtype == dtype
    assert {s.dtype for s in saved if len(s.shape) == 4} == {dtype}
    names = ("z", "dx", "dw", "db", "dgamma", "dbeta", "running_mean", "running_var", "batches")
    for name, ours, wanted in zip(names, results[1], results[0], strict=True):
        if name != "db" or not training:  # rounding errors in the pair
            close(ours, wanted, name, None if name == "batches" else rounding(dtype, 4))  # y, again, dy, dx


def test_grad_scaler_steps_and_skips():
    fused = FusedConvBN2d(2, 3, 3)
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    start = fused.conv.weight.detach().clone()
    for loss_factor, moved in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            z = fused(torch.randn(3, 2, 6, 6))
            loss = (z.float() * torch.randn_like(z)).sum() * loss_factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(fused.conv.weight, start) != moved


@pytest.mark.parametrize("slab_size", [None, 2, "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0, 10, 1000])
def test_no_less_accurate_than_pytorch(mean, dtype, slab_size):
    """Against float64, with a gradient that correlates with the output and does not sum to zero."""
    torch.manual_seed(1)
    pair = make_pair(8, 8, 3, bias=False, dtype=torch.float32)
    with torch.no_grad():
        pair[0].weight[:, :, 1, 1] += 0.5
        pair[0].weight.copy_(pair[0].weight.to(dtype))
    x = (torch.randn(16, 8, 20, 20) + mean).to(dtype)
    exact = copy.deepcopy(pair).double()
    x_exact = x.double().requires_grad_()
    z_exact = exact(x_exact)
    dz = (torch.randn_like(z_exact) + z_exact + 1).detach().to(dtype)
    z_exact.backward(dz.double())
    wanted = [z_exact.detach(), x_exact.grad, *(p.grad for p in exact.parameters()), exact[1].running_var]
    errors = []
    for fuse in (False, True):
        conv, bn = copy.deepcopy(pair)
        conv = conv.to(dtype)
        model = FusedConvBN2d.from_pair(conv, bn, slab_size) if fuse else nn.Sequential(conv, bn)
        x_ = x.clone().requires_grad_()
        z = model(x_)
        z.backward(dz)
        found = [z, x_.grad, *(p.grad for p in model.parameters()), bn.running_var]
        errors.append([apart(f, w) for f, w in zip(found, wanted, strict=True)])
    for ours, pytorchs, name in zip(
        errors[1], errors[0], ("z", "dx", "dw", "dgamma", "dbeta", "var"), strict=True
    ):
        # Lost digits are powers of ten. PyTorch adds up the batch at once, in whatever order suits the
        # processor: that alone may make a factor, and what any order makes of 16 images of 18x18.
        assert ours <= 3 * pytorchs + rounding(torch.float32, 16 * 18 * 18), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_channels_stay_finite(dtype):
    fused = FusedConvBN2d(2, 3, 1, bias=False, slab_size=1).to(dtype)
    x = torch.full((4, 2, 3, 3), 7.0, dtype=dtype, requires_grad=True)
    z = fused(x)
    z.backward(torch.randn_like(z))
    assert all(
        t.isfinite().all() for t in (z, x.grad, *(p.grad for p in fused.parameters()), *fused.buffers())
    )


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (1, 2, 5, 5), (2, 2, 3, 4)])
def test_one_spatial_value_and_a_batch_of_one(shape):
    check_equal(make_pair(2, 3, 3), torch.randn(shape).double(), slab_size=1)


def test_an_empty_batch_is_what_the_pair_makes_of_it():
    pair = make_pair(2, 3, 3)
    for training in (True, False):
        check_equal(pair, torch.randn(0, 2, 5, 5).double(), training=training)


# -- torch.func and torch.compile ------------------------------------------------------------------


def test_func_grad_equals_the_pair():
    pair = make_pair(2, 3, 3)
    fused = FusedConvBN2d.from_pair(*copy.deepcopy(pair))
    x = torch.randn(2, 2, 5, 5).double()
    grads = []
    for model in (pair, fused):
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        parameters = {n: p.detach() for n, p in model.named_parameters()}

        def loss(parameters, buffers, model=model):
            return (torch.func.functional_call(model, (parameters, buffers), (x,)) ** 3).sum()

        grads.append(list(torch.func.grad(loss)(parameters, buffers).values()))
    for i in (0, 2, 3):
        torch.testing.assert_close(grads[1][i], grads[0][i])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_vmap_and_forward_mode_raise_clearly():
    fused = FusedConvBN2d(2, 3, 3, track_running_stats=False)
    x = torch.randn(2, 2, 5, 5)
    with pytest.raises(RuntimeError, match="FusedBlockFunction.*vmap"):
        torch.func.vmap(lambda x: fused(x[None]))(x)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(fused, (x,), (x,))


def two_layers(make):
    return nn.Sequential(make(3, 8, 3), nn.ReLU(), make(8, 8, 3), nn.ReLU())


def held_after_forward(model, x):
    model(x).sum().backward()  # compile, and allocate what stays
    with MemoryTrace() as trace:
        z = model(x)
        trace.mark("end of forward")
        del z
    return trace.marks["end of forward"]


# "aot_eager_decomp_partition" has the partitioner that merges a recomputed operator, and needs no compiler.
@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
def test_compile_is_right_and_keeps_the_saving(backend):
    if backend == "inductor":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as reason:
            pytest.skip(f"torch.compile's inductor finds no C++ compiler here: {reason}")
    torch._dynamo.reset()
    fused = two_layers(FusedConvBN2d)
    plain = two_layers(lambda *a: nn.Sequential(nn.Conv2d(*a), nn.BatchNorm2d(a[1])))
    eager = copy.deepcopy(fused)
    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    x = torch.randn(16, 3, 20, 20)
    tolerance = rounding(torch.float32, 16 * 18 * 18 * 8 * 9)  # images, pixels, channels, kernel
    for training in (True, False):
        compiled.train(training), eager.train(training)
        z, z_eager = compiled(x), eager(x)
        close(z, z_eager, "z", tolerance)
        dz = torch.randn_like(z)
        z.backward(dz), z_eager.backward(dz)
    for (name, p), q in zip(fused.named_parameters(), eager.parameters(), strict=True):
        close(p.grad, q.grad, name, tolerance)
    for (name, p), q in zip(fused.named_buffers(), eager.buffers(), strict=True):
        close(p, q, name, tolerance if p.is_floating_point() else None)
    fused.train()
    held = held_after_forward(compiled, x)
    assert held <= 1.15 * held_after_forward(eager.train(), x)  # the last ReLU keeps a mask of its own
    assert held < 0.75 * held_after_forward(torch.compile(plain, backend=backend), x)


# -- memory, counted exactly -----------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_saves_the_input_and_no_other_image(training):
    fused = FusedConvBN2d(4, 8, 3).train(training)
    x = torch.randn(4, 4, 9, 9, requires_grad=True)
    z, saved = saved_tensors(fused, x)
    assert [s.shape for s in saved if len(s.shape) == 4] == [tuple(x.shape)]
    assert {s.storage for s in saved if len(s.shape) == 4} == {x.untyped_storage().data_ptr()}
    with torch.no_grad():
        _, saved = saved_tensors(fused, x)
    assert saved == []


def transient(c_in, c_out, kernel, slab_size, needs_x=True):
    """Bytes of tensors that backward makes at its worst moment, beyond dx."""
    fused = FusedConvBN2d(c_in, c_out, kernel, padding=kernel // 2, bias=False, slab_size=slab_size)
    x = torch.randn(32, c_in, 24, 24, requires_grad=needs_x)
    dz = torch.randn(32, c_out, 24, 24)
    fused(x).backward(dz)
    x.grad = fused.conv.weight.grad = None
    z = fused(x)
    with MemoryTrace() as trace:
        z.backward(dz)
    return trace.tensor_peak - (x.nbytes if needs_x else 0), dz.nbytes


def test_backward_in_slabs_needs_no_second_buffer_where_the_output_fits_the_input():
    for c_in, c_out in ((16, 16), (32, 16)):
        extra, output = transient(c_in, c_out, 3, slab_size=1)
        assert extra < 8 / 32 * output  # a few slabs of y and of dx, 1/32 each, and the weight's gradient
    for needs_x in (True, False):  # here y waits in memory of its own
        extra, output = transient(16, 32, 3, slab_size=1, needs_x=needs_x)
        assert output <= extra < (1 + 8 / 32) * output


def test_the_slab_is_the_knob():
    sizes = [transient(16, 16, 1, slab_size)[0] for slab_size in (1, 4, 16, "batch")]
    assert sizes == sorted(sizes) and sizes[-1] > 4 * sizes[0]


def test_forward_normalises_in_place():
    fused = FusedConvBN2d(8, 8, 3, padding=1, slab_size=1)
    x = torch.randn(32, 8, 24, 24)
    with torch.no_grad(), MemoryTrace() as trace:
        fused(x)
    assert trace.tensor_peak < (1 + 3 / 32) * x.nbytes


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 5, 5), r"input must be \(N, C, H, W\), got shape \(2, 5, 5\).*input\[None\]"),
        (torch.zeros(2, 5), r"input must be \(N, C, H, W\), got shape \(2, 5\)"),
        (torch.zeros(2, 3, 5, 5), "input must have 2 channels .* got 3"),
        (torch.zeros(2, 2, 5, 5).double(), "weight must have input's dtype torch.float64, got torch.float32"),
        (torch.zeros(2, 2, 5, 5).long(), "input must be floating point, got torch.int64"),
        (torch.zeros(2, 2, 2, 5), r"kernel of \(3, 3\).*larger than the padded input of \(2, 5\)"),
        (torch.zeros(1, 2, 3, 3), "more than 1 value per channel"),
        (torch.zeros(2, 2, 5, 5, device="meta"), "weight must be on input's device meta, got cpu"),
    ],
)
def test_bad_input_is_named_and_nothing_changes(x, message):
    fused = FusedConvBN2d(2, 4, 3)
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(ValueError, match=message):
        fused(x)
    assert all(torch.equal(v, before[k]) for k, v in fused.state_dict().items())


@pytest.mark.parametrize("slab_size", [0, -1, 1.5, True, "all"])
def test_bad_slab_size(slab_size):
    with pytest.raises(ValueError, match="slab_size must be None"):
        FusedConvBN2d(2, 4, 3, slab_size=slab_size)
    with pytest.raises(ValueError, match="slab_size must be None"):
        FusedConvBN2d.from_pair(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), slab_size=slab_size)


def test_from_pair_names_what_does_not_fit():
    conv, bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
    with pytest.raises(ValueError, match="bn must have conv's 4 output channels, got 3"):
        FusedConvBN2d.from_pair(conv, nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="conv must be a plain nn.Conv2d, got Linear"):
        FusedConvBN2d.from_pair(nn.Linear(2, 4), bn)
    with pytest.raises(ValueError, match="bn must be a plain nn.BatchNorm2d, got GroupNorm"):
        FusedConvBN2d.from_pair(conv, nn.GroupNorm(2, 4))
    with pytest.raises(ValueError, match="bn must be on conv's device cpu, got meta"):
        FusedConvBN2d.from_pair(conv, nn.BatchNorm2d(4, device="meta"))
    conv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="conv has hooks"):
        FusedConvBN2d.from_pair(conv, bn)


@pytest.mark.parametrize("name", ["bias", "gamma", "beta", "running_mean"])
def test_vectors_are_checked(name):
    kwargs = {"running_mean": torch.zeros(4), "running_var": torch.ones(4), name: torch.zeros(5)}
    with pytest.raises(ValueError, match=rf"{name} must have shape \(4,\), got \(5,\)"):
        fused_conv_bn2d(torch.zeros(2, 2, 5, 5), torch.zeros(4, 2, 3, 3), **kwargs)


def test_the_function_is_the_layer():
    x, w, gamma, beta = (torch.randn(s).double() for s in ((3, 2, 5, 5), (4, 2, 3, 3), (4,), (4,)))
    z, mean, var = FusedConvBN2dFunction.apply(
        x, w, None, gamma, beta, None, None, 1e-5, [1, 1], [0, 0], [1, 1], 1, 2
    )
    y = F.conv2d(x, w)
    torch.testing.assert_close(mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(var, y.var((0, 2, 3), correction=0))
    torch.testing.assert_close(z, F.batch_norm(y, None, None, gamma, beta, True))
