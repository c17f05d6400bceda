"""What FusedConvBN2d promises: nn.Conv2d then nn.BatchNorm2d, in every mode, which saves the input alone."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from helpers import FusedConvBN2d, FusedConvBN2dFunction
from helpers.batch_norm import piece_bytes
from helpers.fused import Settings
from helpers.memory import MemoryTrace, saved_tensors
from helpers.tests.kernels.rounding import apart, rounding

NAMES = ("x", "w", "b", "gamma", "beta")


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


def fuse(pair, slab_size=None):
    """The layer with a copy of the pair's modules."""
    return FusedConvBN2d.from_pair(*copy.deepcopy(pair), slab_size=slab_size)


def grads_of(model, x, dz, **how):
    """Gradients of x and of the parameters, by name."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    named = dict(zip(NAMES, (x, *model.parameters()), strict=False))
    return dict(zip(named, torch.autograd.grad(model(x), tuple(named.values()), dz, **how), strict=True))


def close(found, wanted, name, tolerance=None):
    """Element by element; with a tolerance, by the norm of the difference (float32 and less)."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, name
    if tolerance is None:
        torch.testing.assert_close(found, wanted, msg=lambda m: f"{name}: {m}")
    else:
        assert apart(found, wanted) <= tolerance, f"{name}: {apart(found, wanted)}"


def check_equal(pair, x, slab_size=None, training=True, steps=1, tolerance=None):
    """Run pair and fused layer on the same numbers; compare outputs, gradients and buffers."""
    fused = fuse(pair, slab_size).train(training)
    pair.train(training)
    for _ in range(steps):
        inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in "ab"]
        z, z_fused = pair(inputs[0]), fused(inputs[1])
        close(z_fused, z, "z", tolerance)
        dz = torch.randn_like(z)
        z.backward(dz), z_fused.backward(dz)
        close(inputs[1].grad, inputs[0].grad, "dx", tolerance)
    for (name, p), q in zip(fused.named_parameters(), pair.parameters(), strict=True):
        # In training db is truly zero; the pair returns rounding errors.
        close(p.grad, q.grad * 0 if name == "conv.bias" and training else q.grad, name, tolerance)
    for (name, p), q in zip(fused.named_buffers(), pair.buffers(), strict=True):
        close(p, q, name, tolerance if p.is_floating_point() else None)


# -- the same function -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(data=st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_equals_the_pair_whatever_the_arguments(data):
    def draw(*values):
        return data.draw(st.sampled_from(values))

    torch.manual_seed(draw(*range(99)))
    groups, same = draw(1, 2, 3), draw(False, False, True)
    kernel, dilation = [draw(1, 2, 3) for _ in "hw"], [draw(1, 2) for _ in "hw"]
    padding = "same" if same else draw("valid", 1, (0, 2), (2, 1))
    conv = {"stride": 1 if same else (draw(1, 2, 3), draw(1, 2)), "padding": padding, "groups": groups}
    conv |= {
        "dilation": dilation,
        "bias": draw(True, False),
        "padding_mode": draw("zeros", "zeros", "reflect"),
    }
    norm = {"affine": draw(True, True, False), "track_running_stats": draw(True, True, False)}
    norm |= {"eps": draw(1e-5, 0.5), "momentum": draw(0.1, 0.7, 0.0, None)}
    pair = make_pair(groups * draw(1, 2, 3), groups * draw(1, 2, 3), kernel, norm=norm, **conv)
    size = [d * (k - 1) + draw(1, 3, 4) for k, d in zip(kernel, dilation, strict=True)]
    x = randn(draw(2, 3, 5), pair[0].in_channels, *(max(3, s) for s in size))  # reflected, 2 need 3 pixels
    check_equal(pair, x, draw(None, 1, 2, 3, 100, "batch"), draw(True, False), steps=draw(1, 3))


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (1, 2, 5, 5), (2, 2, 3, 4), (0, 2, 5, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_one_pixel_one_image_or_none(shape, training):
    check_equal(make_pair(2, 3, 3), randn(shape), slab_size=1, training=training)


@pytest.mark.parametrize("slab_size", [None, 1, "batch"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 2, 4, 3), (2, 2, 5, 4)])
def test_gradcheck_in_slow_mode(training, slab_size, shape):
    fused = fuse(make_pair(2, 3, (3, 2), stride=(1, 2), padding=(0, 1)), slab_size).train(training)
    names, parameters = zip(*fused.named_parameters(), strict=True)

    def layer(x, *parameters):
        state = dict(zip(names, parameters, strict=True)) | {n: b.clone() for n, b in fused.named_buffers()}
        return torch.func.functional_call(fused, state, (x,))

    assert gradcheck(layer, (randn(shape, requires_grad=True), *parameters), fast_mode=False)


def test_the_function_returns_the_statistics():
    x, w, gamma, beta = (randn(s) for s in ((3, 2, 5, 5), (4, 2, 3, 3), (4,), (4,)))
    z, mean, var = FusedConvBN2dFunction.apply(x, w, None, gamma, beta, Settings(slab_size=2))
    y = F.conv2d(x, w)
    torch.testing.assert_close(mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(var, y.var((0, 2, 3), correction=0))
    torch.testing.assert_close(z, F.batch_norm(y, None, None, gamma, beta, True))
    outputs = FusedConvBN2dFunction.apply(x, w.requires_grad_(), None, gamma, beta, Settings())
    assert [t.requires_grad for t in outputs] == [True, False, False]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", [(2, 3), (3, 2), (2, 4)], ids=str)
def test_same_with_an_even_kernel_pads_one_side_more(kernel):
    check_equal(make_pair(2, 3, kernel, padding="same"), randn(3, 2, 6, 5), 2, training=True)


# -- what autograd may ask for ---------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_gradients_only_for_what_needs_them(training):
    pair, dz = make_pair(2, 3, 3).train(training), randn(3, 3, 4, 4)
    fused, x = fuse(pair, 2).train(training), randn(3, 2, 6, 6)
    wanted = grads_of(pair, x, dz)
    for needs in itertools.islice(itertools.product([True, False], repeat=5), 31):
        leaves = dict(zip(NAMES, [x.clone(), *fused.parameters()], strict=True))
        for leaf, need in zip(leaves.values(), needs, strict=True):
            leaf.requires_grad_(need).grad = None
        fused(leaves["x"]).backward(dz)
        for (name, leaf), need in zip(leaves.items(), needs, strict=True):
            assert (leaf.grad is not None) == need
            if need:
                close(leaf.grad, torch.zeros(3).double() if name == "b" and training else wanted[name], name)


GRAD_OUTS = {
    "expanded": lambda dz: dz[:1, :, :1, :1].expand_as(dz),
    "channels_last": lambda dz: dz.contiguous(memory_format=torch.channels_last),
    "sliced": lambda dz: torch.stack([dz, dz], -1)[..., 0],
    "zero": torch.zeros_like,
    "transposed": lambda dz: dz.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("slab_size", [None, 2, "batch"])
@pytest.mark.parametrize("kind", GRAD_OUTS)
def test_any_grad_out_and_none_is_written(kind, slab_size):
    pair = make_pair(2, 4, 3)
    x, dz = randn(4, 2, 6, 6), GRAD_OUTS[kind](randn(4, 4, 4, 4))
    before = dz.clone()
    ours, wanted = grads_of(fuse(pair, slab_size), x, dz), grads_of(pair, x, dz)
    assert torch.equal(dz, before)
    for name in ("x", "w", "gamma", "beta"):
        close(ours[name], wanted[name], name)


def test_backward_twice_gives_the_same_gradients_and_moves_no_statistics():
    fused = FusedConvBN2d(2, 3, 3, slab_size=1).double()
    x = randn(3, 2, 5, 5, requires_grad=True)
    z, dz = fused(x), randn(3, 3, 3, 3)
    state = copy.deepcopy(fused.state_dict())
    first, second = (torch.autograd.grad(z, (x, fused.conv.weight), dz, retain_graph=True) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in fused.state_dict().items())
    assert fused.bn.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["x", "weight", "gamma"])
def test_a_saved_tensor_that_changed_is_an_error(name):
    fused, x = FusedConvBN2d(2, 3, 3), torch.randn(2, 2, 5, 5).requires_grad_() * 1
    z = fused(x)
    with torch.no_grad():
        {"x": x, "weight": fused.conv.weight, "gamma": fused.bn.weight}[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward(torch.ones_like(z))


def grad_of_grad(f, x):
    (dx,) = torch.autograd.grad(f(x), x, create_graph=True)
    # What is "allowed" to be unused would come back as no gradient at all.
    return torch.autograd.grad(dx.pow(2).sum() + x.sum(), x, allow_unused=True)


SECOND = {
    "grad of grad": grad_of_grad,
    "vectorized hessian": lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True),
}


@pytest.mark.parametrize("loss", [torch.sum, lambda z: (z**3).sum()], ids=["sum", "sum of cubes"])
@pytest.mark.parametrize("way", SECOND)
def test_a_second_derivative_raises_whatever_the_loss(way, loss):
    """Also where dz has no graph of its own, as for a plain sum."""
    fused = fuse(make_pair(2, 3, 3, norm={"track_running_stats": False}))
    with pytest.raises(RuntimeError, match="FusedConvBN2d has first derivatives only.* call its two modules"):
        SECOND[way](lambda x: loss(fused(x)), randn(2, 2, 4, 4, requires_grad=True))


@pytest.mark.parametrize("of", NAMES)
@pytest.mark.parametrize("by", [*NAMES, "dz"])
@pytest.mark.parametrize("training", [True, False])
def test_a_second_derivative_raises_or_is_the_pairs(training, by, of):
    """Of each gradient by each of what it is made of. In eval mode PyTorch differentiates a fold."""
    pair, found = make_pair(2, 3, 3).train(training), []
    x, dz = randn(2, 2, 4, 4, requires_grad=True), randn(2, 3, 2, 2, requires_grad=True)
    for model in (fuse(pair).train(training), pair):
        leaves = dict(zip([*NAMES, "dz"], [x, *model.parameters(), dz], strict=True))
        (grad,) = torch.autograd.grad(model(x), leaves[of], dz, create_graph=True)
        weights = torch.arange(grad.numel()).view_as(grad)
        try:
            loss = (grad.pow(2) * weights).sum() + 0 * leaves[by].sum()
            found += torch.autograd.grad(loss, leaves[by])
        except RuntimeError as reason:
            assert training and "first derivatives only" in str(reason)
            return
    torch.testing.assert_close(*found)


def test_first_derivatives_with_a_graph_are_what_they_are_without():
    """Under a checkpoint, too, which lets a saved tensor be read once."""
    pair, x, dz = make_pair(2, 3, 3), randn(3, 2, 5, 5), randn(3, 3, 3, 3)
    fused, wanted = fuse(pair), grads_of(pair, x, dz)
    run = fused.forward
    fused.forward = lambda x: checkpoint(run, x, use_reentrant=False)
    for name, grad in grads_of(fused, x, dz, create_graph=True).items():
        assert grad.requires_grad
        close(grad.detach(), wanted[name], name)


def test_an_operation_in_place_behind_the_layer():
    pair, x, dz = make_pair(2, 3, 3), randn(3, 2, 5, 5), randn(3, 3, 3, 3)
    ours, wanted = (grads_of(nn.Sequential(m, nn.ReLU(inplace=True)), x, dz) for m in (fuse(pair), pair))
    close(ours["w"], wanted["w"], "w")


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.jacrev])
def test_transforms_raise(transform):
    fused = FusedConvBN2d(2, 3, 3, track_running_stats=False)
    with pytest.raises(RuntimeError, match="autograd.Function with functorch transforms"):
        transform(lambda x: fused(x.view(-1, 2, 5, 5)).sum())(torch.randn(2, 2, 5, 5))


# -- the state a module carries --------------------------------------------------------------------


def test_the_pairs_parameters_and_state_and_copies():
    torch.manual_seed(3)
    conv, bn = pair = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    torch.manual_seed(3)
    fused, shared, x = (
        FusedConvBN2d(2, 3, 3, slab_size=2),
        FusedConvBN2d.from_pair(conv, bn),
        torch.randn(2, 2, 5, 5),
    )
    assert shared.conv.weight is conv.weight and shared.bn.running_mean is bn.running_mean
    assert list(fused.state_dict()) == list(shared.state_dict()) and "slab_size=2" in repr(fused)
    assert all(torch.equal(*t) for t in zip(fused.parameters(), pair.parameters(), strict=True))
    fused(x), shared(x)
    assert bn.num_batches_tracked == 1
    saved = io.BytesIO()
    torch.save(fused, saved)
    saved.seek(0)
    for other in (copy.deepcopy(fused), torch.load(saved, weights_only=False)):
        assert other.slab_size == 2 and torch.equal(other.eval()(x), fused.eval()(x))


def test_a_parametrized_weight_is_computed_once():
    """Spectral norm takes a step each time."""
    pair = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)), nn.BatchNorm2d(3))
    fused, x = fuse(pair), torch.randn(2, 2, 5, 5)
    for images in (x, x[:0]):
        pair(images), fused(images)
    close(fused.conv.parametrizations.weight[0]._u, pair[0].parametrizations.weight[0]._u, "u")


class Counted(nn.Module):
    """A parametrization that changes nothing."""

    calls = 0

    def forward(self, t):
        self.calls += 1
        return t


@pytest.mark.parametrize("training", [True, False])
def test_a_parametrized_tensor_is_computed_once(training):
    fused, x = fuse(make_pair(2, 3, 3)).train(training), randn(2, 2, 5, 5)
    for module, name in ((fused.conv, "weight"), (fused.conv, "bias"), (fused.bn, "bias")):
        nn.utils.parametrize.register_parametrization(module, name, counted := Counted())
        for images in (x, x[:0]):
            before = counted.calls
            fused(images)
            assert counted.calls == before + 1, name


def test_frozen_norm_inside_a_training_layer():
    fused = FusedConvBN2d(2, 3, 3)
    fused.bn.eval()
    before = copy.deepcopy(fused.state_dict())
    fused(torch.randn(2, 2, 5, 5))
    assert all(torch.equal(v, before[k]) for k, v in fused.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eval_mode_is_the_same_with_gradients_without_and_under_transforms(dtype):
    torch.manual_seed(0)
    layer, x = fuse(make_pair(2, 3, 3, dtype=torch.float32)).eval(), torch.randn(2, 2, 5, 5)
    layer.conv.to(dtype)
    z, x = layer(x.to(dtype)), x.to(dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), z)
    assert torch.equal(torch.func.vmap(layer)(x[:, None])[:, 0], z)
    dz = torch.randn(z.shape).to(dtype)
    (wanted,) = torch.autograd.grad(z, layer.bn.bias, dz)
    bias = {"bn.bias": layer.bn.bias.detach()}
    found = torch.func.grad(lambda bias: (torch.func.functional_call(layer, bias, x) * dz).sum())(bias)
    torch.testing.assert_close(found["bn.bias"], wanted)


def test_a_frozen_norms_gradients_do_not_overflow_in_half_precision():
    torch.manual_seed(0)
    pair = make_pair(8, 8, 3, bias=False, dtype=torch.float32).eval()
    x, dz, found = torch.randn(32, 8, 32, 32), torch.randn(32, 8, 30, 30) + 16, []
    for layer, bn in ((pair, pair[1]), (fused := fuse(pair).eval(), fused.bn)):
        with torch.autocast("cpu", torch.float16):
            z = layer(x)
        found.append(torch.autograd.grad(z, [bn.weight, bn.bias], dz.half()))
    assert found[0][1].abs().max() > torch.finfo(torch.float16).max
    for theirs, ours in zip(*found, strict=True):
        close(ours, theirs, "dgamma or dbeta", rounding(torch.float16))


# -- dtypes, layouts, digits -----------------------------------------------------------------------


@pytest.mark.parametrize("slab_size", [2, "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["input", "weight", "both"])
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_is_kept(which, dtype, slab_size, training):
    torch.manual_seed(0)
    pair, x = make_pair(4, 8, 3, padding=1, dtype=torch.float32).to(dtype), torch.randn(4, 4, 6, 6).to(dtype)
    x = x.to(memory_format=torch.channels_last) if which != "weight" else x
    pair = pair.to(memory_format=torch.channels_last) if which != "input" else pair
    # A gradient sums over 4 images of 6x6, and in each of these over 4 channels of 3x3. In half precision
    # four tensors on the way are rounded: y, y again, dy and the gradient.
    terms = 4 if dtype == torch.bfloat16 else 4 * 36 * 36
    check_equal(pair, x, slab_size, training, tolerance=rounding(dtype, terms))
    z = fuse(pair, slab_size).train(training)(x.requires_grad_())
    z.backward(torch.randn_like(z))
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert which == "weight" or x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backward_in_autocast", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate"])
def test_autocast_equals_the_pair(padding_mode, backward_in_autocast, dtype, training):
    torch.manual_seed(0)
    how = {"padding": 1, "padding_mode": padding_mode, "dtype": torch.float32}
    pair, x, dz = make_pair(4, 8, 3, **how).train(training), torch.randn(4, 4, 8, 8), None
    results = []
    for model in (pair, fuse(pair, 2).train(training)):
        x_ = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            z, saved = saved_tensors(model, x_)
        dz = torch.randn_like(z) if dz is None else dz
        with torch.autocast("cpu", dtype=dtype, enabled=backward_in_autocast):
            z.backward(dz)
        results.append((z, x_.grad, *(p.grad for p in model.parameters()), *model.buffers()))
    assert results[1][0].dtype == results[0][0].dtype == dtype
    convolved = (4, 4, 8, 8) if padding_mode == "zeros" else (4, 4, 10, 10)
    assert {s.dtype for s in saved if s.shape == convolved} == {dtype}
    names = ("z", "dx", "dw", "db", "dgamma", "dbeta", "running_mean", "running_var", "batches")
    for name, ours, wanted in zip(names, results[1], results[0], strict=True):
        if name != "db" or not training:  # rounding errors in the pair
            close(ours, wanted, name, None if name == "batches" else rounding(dtype, 4))  # y, again, dy, dx


def test_the_function_alone_takes_no_part_in_autocast():
    """Its backward recomputes y outside of autocast, and must find forward's."""
    torch.manual_seed(0)
    x, w, gamma, dz = torch.randn(8, 4, 10, 10) + 3, torch.randn(6, 4, 3, 3), torch.ones(6), None
    results = []
    for enabled in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, w, gamma)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z, *statistics = FusedConvBN2dFunction.apply(*leaves[:2], None, leaves[2], None, Settings())
        dz = torch.randn_like(z) + 5 if dz is None else dz
        results.append([z, *statistics, *torch.autograd.grad(z, leaves, dz)])
    assert all(map(torch.equal, *results))


def test_backward_alone_in_autocast_stays_in_forwards_precision():
    fused, x, dz = fuse(make_pair(4, 8, 3, dtype=torch.float32)), torch.randn(4, 4, 8, 8), torch.ones(1)
    grads = []
    for enabled in (False, True):
        z = fused(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            grads += torch.autograd.grad(z, fused.conv.weight, dz.expand_as(z) * z.detach())
    assert torch.equal(*grads)


@pytest.mark.parametrize("slab_size", [None, 2, "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0, 10, 1000])
def test_no_less_accurate_than_pytorch(mean, dtype, slab_size):
    """Against float64, with a gradient that correlates with the output and does not sum to zero."""
    torch.manual_seed(1)
    pair = make_pair(8, 8, 3, bias=False, dtype=torch.float32)
    with torch.no_grad():
        pair[0].weight[:, :, 1, 1] += 0.5
    pair[0].to(dtype)
    x, exact = (torch.randn(16, 8, 20, 20) + mean).to(dtype), copy.deepcopy(pair).double()
    with torch.no_grad():
        z = exact(x.double())
    dz, errors = (torch.randn_like(z) + z + 1).to(dtype), []
    wanted = {"z": z, "var": exact[1].running_var, **grads_of(copy.deepcopy(exact), x.double(), dz.double())}
    for model in (pair, fuse(pair, slab_size)):
        z = copy.deepcopy(model)(x)
        found = {"z": z, **grads_of(model, x, dz), "var": list(model.buffers())[1]}
        errors.append({name: apart(found[name], wanted[name]) for name in wanted})
    for name in wanted:
        # Lost digits are powers of ten. PyTorch adds up the batch at once, in whatever order suits the
        # processor: that alone may make a factor, and what any order makes of 16 images of 18x18.
        assert errors[1][name] <= 3 * errors[0][name] + rounding(torch.float32, 16 * 18 * 18), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weights_gradient_of_many_slabs_is_added_up_in_float32(dtype):
    torch.manual_seed(0)
    fused = FusedConvBN2d(3, 4, 3, bias=False, slab_size=1).to(dtype)
    x, dz = (torch.randn(256, c, n, n).to(dtype) for c, n in ((3, 6), (4, 4)))
    wanted = grads_of(copy.deepcopy(fused).double(), x.double(), dz.double())["w"]
    found = grads_of(fused, x, dz)["w"]
    assert apart(found, wanted) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_variance_of_zero_in_half_precision(dtype):
    """In eval mode ε is added in float32: half precision would round this one to 0."""
    fused, x = FusedConvBN2d(2, 4, 3, eps=1e-8).to(dtype).eval(), torch.randn(4, 2, 5, 5).to(dtype)
    fused.bn.running_var.copy_(torch.tensor([0.3, 0.1, 1e-3, 0.0]))
    wanted = copy.deepcopy(fused).double()(x.double())
    for c in range(4):
        assert apart(fused(x)[:, c], wanted[:, c]) <= rounding(dtype, terms=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_channels_stay_finite(dtype):
    fused, x = (
        FusedConvBN2d(2, 3, 1, bias=False, slab_size=1).to(dtype),
        torch.full((4, 2, 3, 3), 7.0).to(dtype),
    )
    found = [*grads_of(fused, x, torch.randn(4, 3, 3, 3).to(dtype)).values(), *fused.buffers(), fused(x)]
    assert all(t.isfinite().all() for t in found)


# -- memory, counted exactly -----------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_saves_the_input_and_no_other_image(training):
    fused = FusedConvBN2d(4, 8, 3).train(training)
    x = torch.randn(5, 4, 9, 9, requires_grad=True)
    z, saved = saved_tensors(fused, x)
    assert {s.storage for s in saved if s.shape[0] == 5} == {x.untyped_storage().data_ptr()}
    with torch.no_grad():
        _, saved = saved_tensors(fused, x)
    assert saved == []


def transient(c_in, c_out, kernel, slab_size, needs_x=True):
    """Bytes of tensors that backward makes at its worst moment, beyond dx."""
    fused = FusedConvBN2d(c_in, c_out, kernel, padding=kernel // 2, bias=False, slab_size=slab_size)
    x = torch.randn(32, c_in, 24, 24, requires_grad=needs_x)
    z, dz = fused(x), torch.randn(32, c_out, 24, 24)
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


def test_the_slab_is_the_knob_and_whole_batches_need_one_buffer_more():
    sizes = [transient(16, 16, 1, slab_size)[0] for slab_size in (1, 4, 8, "batch")]
    assert sizes == sorted(sizes) and sizes[-1] > 4 * sizes[0]
    extra, output = transient(16, 16, 1, "batch")
    assert extra < (1 + 1 / 32) * output  # y, which becomes dy


def test_forward_normalises_in_place():
    fused, x = FusedConvBN2d(8, 8, 3, padding=1, slab_size=1), torch.randn(128, 8, 48, 48)
    with torch.no_grad(), MemoryTrace() as trace:
        fused(x)
    assert trace.tensor_peak < x.nbytes + 2 * piece_bytes(x) + 3 * x[0].nbytes < 2 * x.nbytes


def held_after_forward(model, x):
    model(x).sum().backward()  # compile, and allocate what stays
    with MemoryTrace() as trace:
        z = model(x)
        trace.mark("end of forward")
        del z
    return trace.marks["end of forward"]


@pytest.mark.parametrize("slab", [2, 8])
def test_a_slab_goes_before_the_next_one(slab):
    """The peak is a whole batch's and one slab's, in units of y; of two slabs it would be higher."""
    layer = FusedConvBN2d(4, 4, 3, padding=1, slab_size=slab)
    x = torch.randn(32, 4, 24, 24, requires_grad=True)
    dz = torch.randn_like(x)
    with MemoryTrace() as forward:
        z = layer(x)
    with MemoryTrace() as backward:
        z.backward(dz)
    assert forward.tensor_peak < 2.03 * x.nbytes
    assert backward.tensor_peak < (1.03 + slab / 32) * x.nbytes


# "aot_eager_decomp_partition" has the partitioner that merges a recomputed operator, and needs no compiler.
@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
def test_compile_is_right_and_keeps_the_saving(backend, tmp_path, monkeypatch):
    # The compiler's cache on the disk may hold code for another instruction set, and take it.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if backend == "inductor":
        cpp_builder = pytest.importorskip("torch._inductor.cpp_builder")
        try:
            cpp_builder.get_cpp_compiler()
        except Exception as reason:
            pytest.skip(f"torch.compile's inductor finds no C++ compiler here: {reason}")
    torch._dynamo.reset()

    def two_layers(make):
        return nn.Sequential(make(3, 8, 3), nn.ReLU(), make(8, 8, 3), nn.ReLU())

    plain = two_layers(lambda *a: nn.Sequential(nn.Conv2d(*a), nn.BatchNorm2d(a[1])))
    eager, x = two_layers(FusedConvBN2d), torch.randn(16, 3, 20, 20)
    compiled = torch.compile(copy.deepcopy(eager), backend=backend)
    tolerance = rounding(torch.float32, 16 * 18 * 18 * 8 * 9)  # images, pixels, channels, kernel
    for training in (True, False):
        z, z_eager = compiled.train(training)(x), eager.train(training)(x)
        close(z, z_eager, "z", tolerance)
        dz = torch.randn_like(z)
        z.backward(dz), z_eager.backward(dz)
    for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
        close(p.grad, q.grad, "a gradient", tolerance)
    for p, q in zip(compiled.buffers(), eager.buffers(), strict=True):
        close(p, q, "a buffer", tolerance if p.is_floating_point() else None)
    held = held_after_forward(compiled.train(), x)
    assert held <= 1.15 * held_after_forward(eager.train(), x)  # the last ReLU keeps a mask of its own
    assert held < 0.75 * held_after_forward(torch.compile(plain, backend=backend), x)


# -- errors ----------------------------------------------------------------------------------------

BAD_INPUTS = [
    (torch.zeros(2, 5, 5), r"input must be \(N, C, H, W\), .* got shape \(2, 5, 5\).*input\[None\]"),
    ([1.0], r"input must be a tensor \(N, C, H, W\), floating point, got <class 'list'>"),
    (torch.zeros(2, 5), r"input must be \(N, C, H, W\), floating point, got shape \(2, 5\)"),
    (torch.zeros(2, 3, 5, 5), r"expected input\[0, 3, 5, 5\] to have 2 channels, but got 3 channels"),
    (torch.zeros(2, 2, 5, 5).double(), "conv.weight must be torch.float64 on cpu .* got torch.float32"),
    (torch.zeros(2, 2, 5, 5).long(), "input must be .* floating point, .* torch.int64"),
    (torch.zeros(2, 2, 2, 5), r"Calculated padded input size per channel: \(2 x 5\). Kernel size: \(3 x 3\)"),
    (torch.zeros(1, 2, 3, 3), "more than 1 value per channel"),
    (torch.zeros(2, 2, 5, 5, device="meta"), "conv.weight must be torch.float32 on meta .* on cpu"),
]


@pytest.mark.parametrize(("x", "message"), BAD_INPUTS)
def test_bad_input_is_named_and_nothing_changes(x, message):
    fused = FusedConvBN2d(2, 4, 3)
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=message):
        fused(x)
    assert all(torch.equal(v, before[k]) for k, v in fused.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_from_pair_is_in_the_norms_mode(training):
    assert FusedConvBN2d.from_pair(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).train(training)).training is training


def test_bad_input_does_not_change_a_parametrization():
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 3))
    fused = FusedConvBN2d.from_pair(conv, nn.BatchNorm2d(4))
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(ValueError, match="^input must be "):
        fused(torch.zeros(2, 5, 5))
    assert all(torch.equal(v, before[k]) for k, v in fused.state_dict().items())


@pytest.mark.parametrize("name", ["weight", "bias", "running_var"])
def test_a_norm_in_another_dtype_is_named_and_nothing_changes(name):
    fused = FusedConvBN2d(2, 4, 3)
    tensor = getattr(fused.bn, name)
    tensor.data = tensor.double()
    with pytest.raises(ValueError, match=f"^bn.{name} must be torch.float32 on cpu .* got torch.float64"):
        fused(torch.zeros(2, 2, 5, 5))
    assert fused.bn.num_batches_tracked == 0


@pytest.mark.parametrize("name", ["conv.bias", "bn.weight", "bn.running_var"])
def test_a_vector_of_another_length_is_named_and_nothing_changes(name):
    fused = FusedConvBN2d(2, 4, 3)
    module, _, leaf = name.partition(".")
    getattr(getattr(fused, module), leaf).data = torch.ones(1)
    with pytest.raises(ValueError, match=rf"^{name} must have shape \(4,\), floating point, got \(1,\)"):
        fused(torch.zeros(2, 2, 5, 5))
    assert fused.bn.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_half_of_the_statistics_is_an_error(name, training):
    fused = FusedConvBN2d(2, 4, 3).train(training)
    setattr(fused.bn, name, None)
    with pytest.raises(ValueError, match="^bn must have both running_mean and running_var, or neither"):
        fused(torch.zeros(2, 2, 5, 5))
    assert fused.bn.num_batches_tracked == 0


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_statistics_that_cannot_change_are_named_and_nothing_changes(name):
    fused = FusedConvBN2d(2, 4, 3)
    with torch.inference_mode():
        setattr(fused.bn, name, getattr(fused.bn, name).clone())
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(ValueError, match=f"^bn.{name} must not be an inference tensor"):
        fused(torch.randn(2, 2, 5, 5))
    assert all(torch.equal(v, before[k]) for k, v in fused.state_dict().items())
    assert fused.eval()(torch.randn(2, 2, 5, 5)).shape == (2, 4, 3, 3)


def test_expanded_statistics_are_named_and_nothing_changes():
    fused = FusedConvBN2d(2, 4, 3)
    fused.bn.running_mean = torch.zeros(1).expand(4)
    with pytest.raises(ValueError, match="^bn.running_mean must have memory for each value, got an expanded"):
        fused(torch.randn(2, 2, 5, 5))
    assert fused.bn.num_batches_tracked == 0


@pytest.mark.parametrize("name", ["conv", "bn"])
def test_hooks_that_come_later_are_named(name):
    fused = FusedConvBN2d(2, 4, 3)
    nn.utils.prune.random_unstructured(fused.get_submodule(name), "weight", 0.5)
    with pytest.raises(ValueError, match=f"^{name} has hooks, which the fused layer would not call"):
        fused(torch.zeros(2, 2, 5, 5))


def test_an_exported_layer_takes_batches_and_images_of_any_size():
    x, layer = torch.randn(4, 3, 7, 6), FusedConvBN2d(3, 5, 3).eval()
    sizes = {i: torch.export.Dim(name, min=4, max=64) for i, name in ((0, "n"), (2, "rows"), (3, "columns"))}
    exported = torch.export.export(layer, (x,), dynamic_shapes=(sizes,)).module()
    for images in (x, torch.randn(9, 3, 8, 11)):
        torch.testing.assert_close(exported(images), layer(images))


@pytest.mark.parametrize("counter", [None, torch.tensor([3])])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", ["yes", "no", "no more"])
@pytest.mark.parametrize("training", [True, False])
def test_a_norm_with_another_counter_or_none(training, tracked, momentum, counter):
    fused, x = FusedConvBN2d(2, 4, 3, momentum=momentum).train(training), torch.randn(2, 2, 5, 5)
    fused.bn.num_batches_tracked = None if counter is None else counter.clone()
    if tracked == "no":
        fused.bn.running_mean = fused.bn.running_var = None
    elif tracked == "no more":
        fused.bn.track_running_stats = False
    bn = copy.deepcopy(fused.bn)
    torch.testing.assert_close(fused(x), bn(fused.conv(x)))
    torch.testing.assert_close(list(fused.bn.buffers()), list(bn.buffers()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_that_averages_in_half_precision(dtype):
    fused, x = FusedConvBN2d(2, 4, 3, momentum=None).to(dtype), torch.randn(4, 2, 5, 5).to(dtype)
    bn = copy.deepcopy(fused.bn)
    for _ in range(3):
        close(fused(x), bn(fused.conv(x)), "z", rounding(dtype, 2))
    for name, buffer in bn.named_buffers():
        found = getattr(fused.bn, name)
        torch.testing.assert_close(found, buffer, rtol=4 * torch.finfo(dtype).eps, atol=0.01, msg=name)


BAD_SETTINGS = [{"momentum": 2}, {"momentum": "a"}, {"eps": -1.0}, {"eps": None}, {"eps": 0.0}]
BAD_SETTINGS += [{"momentum": torch.tensor(True)}, {"momentum": torch.tensor(0.1, device="meta")}]


@pytest.mark.parametrize("setting", BAD_SETTINGS, ids=str)
def test_a_bad_setting_of_the_norm_is_named_and_nothing_changes(setting):
    fused, (name,) = FusedConvBN2d(2, 4, 3, **setting), setting
    before = copy.deepcopy(fused.state_dict())
    allowed = r"a number, at least 0|a number from 0 to 1 \(or a tensor.*\)|above 0 for batch statistics"
    with pytest.raises(ValueError, match=f"^{name} must be ({allowed}), got "):
        fused(torch.randn(2, 2, 5, 5))
    assert all(torch.equal(v, before[k]) for k, v in fused.state_dict().items())


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_word_for_a_padding_is_named_in_forward(padding):
    """The layer makes numbers of it; the function would fail in backward."""
    x, w = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match=f"geometry must have numbers for its padding, got '{padding}'"):
        FusedConvBN2dFunction.apply(x, w, None, None, None, Settings(geometry=(1, padding, 1, 1)))


@pytest.mark.parametrize("slab_size", [0, -1, 1.5, True, "all"])
def test_bad_slab_sizes_are_named(slab_size):
    with pytest.raises(ValueError, match="slab_size must be None, .* got"):
        FusedConvBN2d(2, 4, 3, slab_size=slab_size)
    fused = FusedConvBN2d(2, 4, 3)
    fused.slab_size = slab_size
    with pytest.raises(ValueError, match="slab_size must be None, .* got"):
        fused(torch.randn(2, 2, 5, 5))
    assert fused.bn.num_batches_tracked == 0
    with pytest.raises(ValueError, match="slab_size must be None, .* got"):
        tensors = randn((2, 2, 5, 5)), randn((4, 2, 3, 3)), None, None, None
        FusedConvBN2dFunction.apply(*tensors, Settings(slab_size=slab_size))


def test_from_pair_names_what_does_not_fit():
    conv, bn, hooked = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(2, 4, 3)
    hooked.register_forward_hook(lambda *_: None)

    class Scaled(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, 2 * weight, bias)

    class Any(nn.BatchNorm2d):
        def _check_input_dim(self, input):
            pass

    changed = nn.Conv2d(2, 4, 3)
    changed.forward = torch.relu
    for pair, message in (
        ((conv, nn.BatchNorm2d(3)), "bn must have conv's 4 channels, got 3"),
        ((nn.Linear(2, 4), bn), "conv must be a plain nn.Conv2d, got Linear"),
        ((conv, nn.GroupNorm(2, 4)), "bn must be a plain nn.BatchNorm2d, got GroupNorm"),
        ((conv, nn.SyncBatchNorm(4)), "bn must be a plain nn.BatchNorm2d, got SyncBatchNorm; helpers.remat"),
        ((hooked, bn), "conv has hooks"),
        ((Scaled(2, 4, 3), bn), "conv must be a plain nn.Conv2d, got Scaled"),
        ((changed, bn), "conv must be a plain nn.Conv2d, got Conv2d"),
        ((conv, Any(4)), "bn must be a plain nn.BatchNorm2d, got Any"),
        ((conv, bn, "all"), "slab_size must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            FusedConvBN2d.from_pair(*pair)
    with pytest.raises(ValueError, match="bn.weight must be .* on cpu .* on meta"):
        FusedConvBN2d.from_pair(conv, nn.BatchNorm2d(4, device="meta"))(torch.randn(2, 2, 5, 5))

    with pytest.raises(ValueError, match="bn must be a plain nn.BatchNorm2d, got SyncBatchNorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(FusedConvBN2d(2, 4, 3))(torch.randn(2, 2, 5, 5))


class Doubled(nn.Conv2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


def patched():
    conv = nn.Conv2d(2, 4, 3)
    conv._conv_forward = lambda x, weight, bias: x
    return conv


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 4), nn.Identity, lambda: Doubled(2, 4, 3), patched])
def test_a_convolution_that_became_another_is_named(make, training):
    layer = FusedConvBN2d(2, 4, 3).train(training)
    layer.conv = make()
    with pytest.raises(ValueError, match=f"conv must be a plain nn.Conv2d, got {type(layer.conv).__name__};"):
        layer(torch.randn(2, 2, 5, 5))
