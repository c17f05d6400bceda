"""The general block, [norm → activation →] conv [→ norm], against the modules one after another."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from helpers import FusedBlock2d
from helpers.memory import MemoryTrace, saved_tensors
from helpers.tests.rounding import apart, rounding

ACTIVATIONS = [
    None,
    nn.ReLU(),
    nn.ReLU6(),
    nn.LeakyReLU(0.2),
    nn.SiLU(),
    nn.Hardswish(),
    nn.GELU(),
    nn.GELU("tanh"),
]


HALF = 8  # tensors that half precision rounds on the way to a gradient: u, a, y, z, and theirs


def make_modules(conv, before=True, activation=None, after=True, dtype=torch.float64):
    """norm, activation, conv, norm with nothing at its default; those that are not asked for are None."""
    norms = [
        nn.BatchNorm2d(c) if there else None
        for c, there in ((conv.in_channels, before), (conv.out_channels, after))
    ]
    with torch.no_grad():
        for bn in (n for n in norms if n is not None):
            for t in (bn.weight, bn.bias, bn.running_mean):
                t.normal_()
            bn.running_var.uniform_(0.5, 2)
    modules = {"conv": conv, "norm_before": norms[0], "activation": activation, "norm_after": norms[1]}
    return {k: None if m is None else copy.deepcopy(m).to(dtype) for k, m in modules.items()}


def run(modules, x, dz=None, fuse=None, order=("norm_before", "activation", "conv", "norm_after")):
    """Output, and every gradient and buffer after backward, of the modules or of the block made of them."""
    modules = copy.deepcopy(modules)
    if fuse is not None:
        model = FusedBlock2d(**modules, **fuse)
    else:
        model = nn.Sequential(*[modules[name] for name in order if modules[name] is not None])
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
    z = model(x)
    if dz is None:
        dz = torch.randn_like(z)
    z.backward(dz)
    found = {"z": z.detach(), "dx": x.grad}
    for name in order:
        if modules[name] is not None:
            found |= {f"d {name}.{n}": p.grad for n, p in modules[name].named_parameters()}
            found |= {f"{name}.{n}": b for n, b in modules[name].named_buffers()}
    return found, dz


def check(modules, x, tolerance=None, **fuse):
    wanted, dz = run(modules, x)
    found, _ = run(modules, x, dz, fuse)
    own = modules["norm_after"] is not None and modules["norm_after"].training
    for name, value in wanted.items():
        if name == "d conv.bias" and own:
            assert found[name].count_nonzero() == 0
        elif value is None or not value.is_floating_point():
            assert found[name] is value or torch.equal(found[name], value), name
        elif tolerance is None:
            torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert apart(found[name], value) <= tolerance, f"{name}: {apart(found[name], value)}"


def frozen(modules, which):
    for name in which:
        if modules[name] is not None:
            modules[name].eval()
    return modules


def randn(*shape, **kwargs):
    return torch.randn(*shape, dtype=torch.float64, **kwargs)


@pytest.mark.parametrize("slab_size", [None, 2, "batch"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("after", [True, False], ids=["norm after", "no norm after"])
@pytest.mark.parametrize("before", [True, False], ids=["norm before", "no norm before"])
def test_equals_the_modules(before, after, activation, slab_size):
    torch.manual_seed(0)
    for conv in (nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv2d(4, 2, 3, stride=2), nn.Conv2d(4, 8, 1)):
        modules = make_modules(conv, before, activation, after)
        check(modules, randn(5, 4, 6, 7, requires_grad=True), slab_size=slab_size, backward="recompute")


@pytest.mark.parametrize("slab_size", [None, 2, "batch"])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize(
    ("before", "activation"), [(False, None), (True, nn.ReLU()), (True, nn.SiLU()), (True, None)]
)
def test_algebra_equals_the_modules(before, activation, stride, slab_size):
    torch.manual_seed(0)
    for c_in, c_out in ((4, 9), (5, 3)):
        modules = make_modules(nn.Conv2d(c_in, c_out, 1, stride=stride), before, activation)
        check(modules, randn(5, c_in, 6, 7, requires_grad=True), slab_size=slab_size, backward="algebra")


@pytest.mark.parametrize("slab_size", [None, 2])
def test_algebra_of_a_first_layer_with_any_kernel(slab_size):
    for conv in (
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.Conv2d(2, 4, (3, 2), dilation=(1, 2), bias=False),
    ):
        modules = make_modules(conv, before=False)
        check(modules, randn(5, conv.in_channels, 8, 7), slab_size=slab_size, backward="algebra")


@pytest.mark.parametrize("which", [["norm_before"], ["norm_after"], ["norm_before", "norm_after"]], ids=str)
@pytest.mark.parametrize("slab_size", [None, 2, "batch"])
def test_frozen_statistics(which, slab_size):
    for conv in (nn.Conv2d(4, 6, 3), nn.Conv2d(4, 8, 1)):
        modules = frozen(make_modules(conv, activation=nn.ReLU()), which)
        check(modules, randn(4, 4, 6, 5, requires_grad=True), slab_size=slab_size)


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_equals_the_modules_over_drawn_blocks(data):
    draw = data.draw
    groups = draw(st.sampled_from([1, 2]), "groups")
    c_in, c_out = groups * draw(st.integers(1, 3), "in"), groups * draw(st.integers(1, 6), "out")
    kernel = [draw(st.integers(1, 3), "kernel") for _ in "hw"]
    stride, padding = draw(st.integers(1, 3), "stride"), draw(st.integers(0, 1), "padding")
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=draw(st.booleans(), "bias"))
    size = [draw(st.integers(max(1, k - 2 * padding), 8), "size") for k in kernel]
    torch.manual_seed(draw(st.integers(0, 99), "seed"))
    modules = make_modules(
        conv,
        draw(st.booleans(), "before"),
        draw(st.sampled_from(ACTIVATIONS), "act"),
        draw(st.booleans(), "after"),
    )
    frozen(modules, [n for n in ("norm_before", "norm_after") if draw(st.booleans(), n)])
    x = randn(draw(st.integers(2, 5), "N"), c_in, *size, requires_grad=draw(st.booleans(), "needs x"))
    check(modules, x, slab_size=draw(st.sampled_from([None, 1, 3, "batch"]), "slab_size"))


@pytest.mark.parametrize("backward", ["recompute", "algebra"])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU()], ids=repr)
@pytest.mark.parametrize("constant", [[], ["norm_before"], ["norm_after"]], ids=str)
def test_gradcheck_in_slow_mode(constant, activation, backward):
    if backward == "algebra" and "norm_after" in constant:
        backward = "auto"
    modules = frozen(make_modules(nn.Conv2d(2, 3, 1, stride=(1, 2)), activation=activation), constant)
    block = FusedBlock2d(**modules, slab_size=2, backward=backward)
    names = [n for n, _ in block.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in block.parameters()]

    def layer(x, *parameters):
        state = dict(zip(names, parameters, strict=True)) | {n: b.clone() for n, b in block.named_buffers()}
        return torch.func.functional_call(block, state, (x,))

    assert gradcheck(layer, (randn(3, 2, 3, 4, requires_grad=True), *parameters), fast_mode=False)


@pytest.mark.parametrize("backward", ["recompute", "algebra"])
def test_gradients_only_for_what_needs_them(backward):
    modules = make_modules(nn.Conv2d(2, 4, 1), activation=nn.ReLU())
    x, dz = randn(3, 2, 4, 5), randn(3, 4, 4, 5)
    reference = FusedBlock2d(**copy.deepcopy(modules), backward=backward)
    full = x.clone().requires_grad_()
    reference(full).backward(dz)
    for needs in itertools.islice(itertools.product([True, False], repeat=7), 127):
        block = FusedBlock2d(**copy.deepcopy(modules), backward=backward)
        for p, need in zip(block.parameters(), needs[1:], strict=True):
            p.requires_grad_(need)
        x_ = x.clone().requires_grad_(needs[0])
        block(x_).backward(dz)
        found = [x_.grad, *(p.grad for p in block.parameters())]
        for ours, wanted, need in zip(
            found, [full.grad, *(p.grad for p in reference.parameters())], needs, strict=True
        ):
            assert (ours is not None) == need
            if need:
                torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("backward", ["recompute", "algebra"])
@pytest.mark.parametrize("slab_size", [None, 2, "batch"])
@pytest.mark.parametrize(
    "make",
    [
        lambda dz: dz[:1, :, :1, :1].expand_as(dz),
        lambda dz: dz.contiguous(memory_format=torch.channels_last),
        lambda dz: torch.stack([dz, dz], -1)[..., 0],
        lambda dz: torch.zeros_like(dz),
    ],
    ids=["expanded", "channels_last", "sliced", "zero"],
)
def test_any_grad_out_and_none_is_written(make, slab_size, backward):
    modules = make_modules(nn.Conv2d(3, 5, 1), activation=nn.Hardswish())
    x, dz = randn(4, 3, 5, 6, requires_grad=True), make(randn(4, 5, 5, 6))
    before = dz.clone()
    wanted, _ = run(modules, x, dz)
    found, _ = run(modules, x, dz, {"slab_size": slab_size, "backward": backward})
    assert torch.equal(dz, before)
    for name in wanted:
        if name != "d conv.bias":
            torch.testing.assert_close(found[name], wanted[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backward", ["recompute", "algebra"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_is_kept(dtype, backward):
    torch.manual_seed(0)
    modules = make_modules(nn.Conv2d(4, 8, 1), activation=nn.ReLU(), dtype=torch.float32)
    modules["conv"].to(dtype)
    x = torch.randn(4, 4, 6, 6).to(dtype, memory_format=torch.channels_last).requires_grad_()
    # A gradient sums over 4 images of 6x6, and in each of these over 8 channels.
    terms = HALF if dtype == torch.bfloat16 else 4 * 36 * 8
    check(modules, x, tolerance=rounding(dtype, terms), slab_size=2, backward=backward)
    block = FusedBlock2d(**modules, backward=backward)
    z = block(x)
    z.backward(torch.randn_like(z))
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backward", ["recompute", "algebra"])
def test_autocast_equals_the_modules(backward):
    torch.manual_seed(0)
    modules = make_modules(nn.Conv2d(4, 8, 1), activation=nn.SiLU(), dtype=torch.float32)
    x = torch.randn(8, 4, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(modules, x, tolerance=rounding(torch.bfloat16, HALF), slab_size=2, backward=backward)


def errors(dependent, mean, backward, seed):
    """Error against float64 of the block and of PyTorch's modules: {name: (ours, PyTorch's)}.

    The gradient correlates with the output and does not sum to zero.
    """
    torch.manual_seed(seed)
    modules = make_modules(nn.Conv2d(8, 16, 1, bias=False), before=False, dtype=torch.float32)
    x = torch.randn(16, 8, 20, 20) + mean
    if dependent:
        x[:, 1:] = x[:, :1] + 0.01 * (x[:, 1:] - mean)
    x.requires_grad_()
    exact_modules = {k: None if m is None else copy.deepcopy(m).double() for k, m in modules.items()}
    x_exact = x.detach().double().requires_grad_()
    z, _ = run(exact_modules, x_exact)
    dz = (torch.randn_like(z["z"]) + z["z"] + 1).float()
    exact, _ = run(exact_modules, x_exact, dz.double())
    pytorchs, _ = run(modules, x, dz)
    ours, _ = run(modules, x, dz, {"backward": backward, "slab_size": 3})
    names = ("z", "dx", "d conv.weight", "d norm_after.weight", "d norm_after.bias", "norm_after.running_var")
    return {name: (apart(ours[name], exact[name]), apart(pytorchs[name], exact[name])) for name in names}


@pytest.mark.parametrize("backward", ["recompute", "algebra"])
@pytest.mark.parametrize("mean", [0, 100, 1000])
@pytest.mark.parametrize("dependent", [False, True], ids=["", "nearly dependent channels"])
def test_no_less_accurate_than_pytorch(dependent, mean, backward):
    runs = [errors(dependent, mean, backward, seed) for seed in range(5)]
    for name in runs[0]:
        ours, pytorchs = (sorted(r[name][i] for r in runs)[2] for i in (0, 1))
        # Any order of adding 16 images of 20x20 makes so much. Where channels are the same but for a 100th
        # of each, the algebra's two terms of dw and dx cancel to so small a part.
        floor = rounding(torch.float32, 16 * 400) * (100 if dependent and backward == "algebra" else 1)
        assert ours <= 3 * pytorchs + floor, name  # see test_fused.py


def test_algebra_keeps_more_digits_of_the_weight_gradient():
    ours, pytorchs = errors(dependent=False, mean=100, backward="algebra", seed=0)["d conv.weight"]
    assert ours < 0.1 * pytorchs


@pytest.mark.parametrize("backward", ["recompute", "algebra"])
@pytest.mark.parametrize("before", [True, False])
def test_constant_channels_stay_finite(before, backward):
    modules = make_modules(nn.Conv2d(2, 3, 1), before, nn.ReLU() if before else None, dtype=torch.float32)
    found, _ = run(modules, torch.full((4, 2, 3, 3), 7.0, requires_grad=True), None, {"backward": backward})
    assert all(t is None or t.isfinite().all() for t in found.values())


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", ["recompute", "algebra"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_saves_the_raw_input_and_no_other_image(activation, backward):
    block = FusedBlock2d(**make_modules(nn.Conv2d(4, 8, 1), activation=activation), backward=backward)
    x = randn(4, 4, 9, 9, requires_grad=True)
    _, saved = saved_tensors(block, x)
    assert [s.storage for s in saved if len(s.shape) == 4] == [x.untyped_storage().data_ptr()]


def transient(c_in, c_out, kernel, **fuse):
    """Bytes of tensors that backward makes at its worst moment, beyond dx."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    block = FusedBlock2d(**make_modules(conv, activation=nn.ReLU(), dtype=torch.float32), **fuse)
    x, dz = torch.randn(32, c_in, 24, 24, requires_grad=True), torch.randn(32, c_out, 24, 24)
    block(x).backward(dz)
    x.grad = None
    block.zero_grad()
    z = block(x)
    with MemoryTrace() as trace:
        z.backward(dz)
    return trace.tensor_peak - x.nbytes, dz.nbytes


def test_backward_in_slabs_needs_no_second_buffer():
    extra, output = transient(16, 16, 3, slab_size=1, backward="recompute")
    assert extra < 8 / 32 * output
    extra, output = transient(16, 64, 1, slab_size=1, backward="algebra")  # y is four times x, and nowhere
    assert extra < 6 / 32 * output


def test_forward_makes_the_output_and_slabs():
    block = FusedBlock2d(
        **make_modules(nn.Conv2d(8, 8, 1), activation=nn.SiLU(), dtype=torch.float32), slab_size=1
    )
    x = torch.randn(32, 8, 24, 24)
    block(x)
    with torch.no_grad(), MemoryTrace() as trace:
        block(x)
    assert trace.tensor_peak < (1 + 8 / 32) * x.nbytes


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition"])
def test_compile_is_right_and_keeps_the_saving(backend):
    torch._dynamo.reset()

    def network():
        torch.manual_seed(0)
        modules = [
            make_modules(nn.Conv2d(8, 8, 3, padding=1), True, nn.SiLU(), after, torch.float32)
            for after in (0, 1)
        ]
        return nn.Sequential(*[FusedBlock2d(**m) for m in modules])

    eager, fused = network(), network()
    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    x = torch.randn(16, 8, 20, 20)
    held = []
    for model in (eager, compiled):
        model(x).backward(torch.ones(16, 8, 20, 20) * torch.arange(20))
        with MemoryTrace() as trace:
            z = model(x)
            trace.mark("end of forward")
        held.append(trace.marks["end of forward"])
        del z
    for p, q in zip(eager.parameters(), fused.parameters(), strict=True):
        assert apart(q.grad, p.grad) <= rounding(torch.float32, 16 * 400 * 8 * 9)  # images, channels, kernel
    assert held[1] <= 1.1 * held[0]


# -- choice and errors -----------------------------------------------------------------------------


def test_auto_follows_the_rule():
    from helpers.fused import algebra_pays

    for c_in, c_out, shape, pays in (
        (8, 32, (4, 8, 9, 9), True),
        (8, 8, (4, 8, 9, 9), False),
        (8, 32, (1, 8, 2, 2), False),
    ):
        x, w = torch.zeros(shape), torch.zeros(c_out, c_in, 1, 1)
        assert algebra_pays(x, w, list(shape[2:])) == pays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_before": nn.BatchNorm2d(3)}, "norm_before must have 2 channels to fit conv, got 3"),
        ({"norm_after": nn.BatchNorm2d(3)}, "norm_after must have 4 channels to fit conv, got 3"),
        ({"norm_after": nn.GroupNorm(1, 4)}, "norm_after must be a plain nn.BatchNorm2d, got GroupNorm"),
        ({"activation": nn.Tanh()}, "activation must be None or one of ReLU.* got Tanh"),
        ({"conv": nn.Linear(2, 4)}, "conv must be a plain nn.Conv2d, got Linear"),
        ({"conv": nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")}, "padding_mode .*'reflect'"),
        ({"backward": "magic"}, "backward must be .* got 'magic'"),
        ({"slab_size": 0}, "slab_size must be None"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change, message):
    arguments = {"conv": nn.Conv2d(2, 4, 1), "norm_before": nn.BatchNorm2d(2), "activation": nn.ReLU()}
    with pytest.raises(ValueError, match=message):
        FusedBlock2d(**arguments | change)


@pytest.mark.parametrize(
    ("block", "x", "message"),
    [
        ({"backward": "algebra"}, torch.zeros(2, 2, 5, 5), "algebra.* needs norm_after"),
        ({}, torch.zeros(1, 2, 1, 1), "norm_before gets 1"),
        ({}, torch.zeros(2, 3, 5, 5), "input must have 2 channels"),
    ],
)
def test_bad_input_is_named_and_nothing_changes(block, x, message):
    block = FusedBlock2d(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(2), nn.ReLU(), **block)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match=message):
        block(x)
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


def test_a_norm_of_another_dtype_is_named():
    block = FusedBlock2d(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(2).double())
    with pytest.raises(
        ValueError, match="norm_before: gamma must have dtype torch.float32, got torch.float64"
    ):
        block(torch.zeros(2, 2, 5, 5))


def test_an_empty_batch_is_what_the_modules_make_of_it():
    check(make_modules(nn.Conv2d(2, 4, 1), activation=nn.ReLU()), randn(0, 2, 5, 5, requires_grad=True))


def test_in_eval_mode_without_gradients_the_norm_after_is_folded():
    modules = frozen(make_modules(nn.Conv2d(2, 4, 3), activation=nn.ReLU()), ["norm_before", "norm_after"])
    x = randn(3, 2, 6, 6)
    with torch.inference_mode():
        wanted = modules["norm_after"](modules["conv"](F.relu(modules["norm_before"](x))))
        torch.testing.assert_close(FusedBlock2d(**modules)(x), wanted)
