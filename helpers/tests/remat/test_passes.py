"""An accelerator's passes: by PyTorch's kernels, by interpreted Triton, and on a card; and their number.

Each test of the boundary runs on what there is. `test_under_the_interpreter` runs them all once more, in a
process whose Triton interprets.
"""

import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from helpers.remat import passes, remat
from helpers.remat.operations import ACTIVATIONS, Kind
from helpers.tests.remat import support

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = find_spec("triton") is not None
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and not INTERPRETED else [])]
KINDS = {
    "relu": (Kind("relu"), F.relu),
    "relu6": (Kind("hardtanh", (0.0, 6.0)), F.relu6),
    "hardtanh": (Kind("hardtanh", (-1.0, 0.5)), lambda u: F.hardtanh(u, -1.0, 0.5)),
    "leaky_relu": (Kind("leaky_relu", (0.1,)), lambda u: F.leaky_relu(u, 0.1)),
    "elu": (Kind("elu", (1.3, 1.0, 1.0)), lambda u: F.elu(u, 1.3)),
    "celu": (Kind("elu", (0.7, 1.0, 1 / 0.7)), lambda u: F.celu(u, 0.7)),
    "selu": (Kind("elu", (1.6732632423543772, 1.0507009873554805, 1.0)), F.selu),
    "silu": (Kind("silu"), F.silu),
    "hardswish": (Kind("hardswish"), F.hardswish),
    "hardsigmoid": (Kind("hardsigmoid"), F.hardsigmoid),
    "mish": (Kind("mish"), F.mish),
    "gelu": (Kind("gelu"), F.gelu),
    "gelu tanh": (Kind("gelu_tanh"), lambda u: F.gelu(u, approximate="tanh")),
    "sigmoid": (Kind("sigmoid"), torch.sigmoid),
    "tanh": (Kind("tanh"), torch.tanh),
}
CORNERS = (-3.0, -1.0, 0.0, 0.5, 3.0, 6.0)
SHAPES = [(3, 5, 7, 5), (2, 16, 4, 4), (33, 7), (2, 3, 1100), (2, 4, 3, 5, 2), (4, 1, 3, 3), (5, 9, 1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layout(t, last):
    """``t`` with its channels last in memory, or first."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t.contiguous()


def example(shape, dtype, device, last=False, seed=0):
    """y, its norm, something to add, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    y, added, da = (layout((3 * random(*shape) + 1).to(dtype), last).to(device) for _ in range(3))
    c = shape[1]
    norm = passes.Norm(random(c), random(c).abs() + 0.2, random(c), random(c))
    return y, passes.Norm(*[t.to(device) for t in norm]), added, da


def truth(y, norm, act, added, da):
    """z, a and dz in float64."""
    one = [-1] + [1] * (y.dim() - 2)
    mean, invstd, gamma, beta = (t.double().view(one) for t in norm)
    z = gamma * (y.double() - mean) * invstd + beta
    if added is not None:
        z = z + added.double()
    z.requires_grad_()
    a = act(z)
    (dz,) = torch.autograd.grad(a, z, da.double())
    return z.detach(), a.detach(), dz


def close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def check(got, want, z, dtype, scale):
    """Within a few roundings of z, which also decides the slope: not near an activation's corners."""
    # The interpreter cuts digits off where a device rounds to bfloat16.
    near = 16 * torch.finfo(dtype).eps * (1 + z.abs() + scale)
    corner = torch.stack([(z - corner).abs() < near for corner in CORNERS]).any(0)
    apart = (got.double() - want).abs()
    assert not (corner.all() or torch.isnan(got).any())
    assert (apart <= near * (1 + want.abs())).logical_or(corner).all(), apart[~corner].max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", KINDS)
def test_activations(name, dtype, device):
    kind, act = KINDS[name]
    assert {kind.name for kind, _ in KINDS.values()} == {*ACTIVATIONS}
    for last in (False, True):
        for plus in (False, True):
            y, norm, added, da = example((3, 5, 7, 5), dtype, device, last)
            added = added if plus else None
            z, a, dz = truth(y, norm, act, added, da)
            scale = 4 * (1 + y.abs().max().item() if dtype != torch.float32 else 1)
            got = passes.norm_act(y, norm, kind, added), passes.act_backward(da, y, norm, kind, added)
            assert all(t.dtype == dtype and t.stride() == y.stride() for t in got)
            check(got[0], a, z, dtype, scale)
            check(got[1], dz, z, dtype, scale)
            assert passes.one_pass(y, added) == (device == "cuda" or INTERPRETED)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, last, device):
    kind, act = KINDS["silu"]
    y, norm, added, da = example(shape, torch.float32, device, last)
    z, a, dz = truth(y, norm, act, added, da)
    close(passes.norm_act(y, norm, kind, added), a)
    close(passes.act_backward(da, y, norm, kind, added), dz)
    close(passes.normalise(y, norm) + added, z)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_without_gamma_and_beta_and_into_given_memory(dtype, device):
    kind, act = KINDS["relu"]
    y, norm, added, _ = example((2, 5, 3, 3), dtype, device)
    for gamma, beta in ((None, norm.beta), (norm.gamma, None), (None, None)):
        some = norm._replace(gamma=gamma, beta=beta)
        ones = torch.ones_like(norm.mean)
        full = some._replace(gamma=ones if gamma is None else gamma, beta=0 * ones if beta is None else beta)
        assert torch.equal(passes.norm_act(y, some, kind), passes.norm_act(y, full, kind))
    want = passes.norm_act(y, norm, kind, added)
    for place in (torch.empty_like(y), added.clone()):
        plus = place if place is not None and torch.equal(place, added) else added
        assert passes.norm_act(y, norm, kind, plus, out=place) is place and torch.equal(place, want)


@pytest.mark.parametrize("device", DEVICES)
def test_what_no_kernel_takes(device):
    """Float64, gaps, and other layouts: all by PyTorch's kernels, or copied first."""
    kind, act = KINDS["silu"]
    y, norm, added, da = example((2, 5, 4, 4), torch.float32, device)
    z, a, dz = truth(y, norm, act, added, da)
    gaps = torch.stack([y, y], -1)[..., 0]
    last = layout(added, True)
    assert not passes.one_pass(gaps) and not passes.one_pass(y, last) and not passes.one_pass(y.double())
    assert not passes.one_pass(y[:0]) and not passes.one_pass(y[0, 0, 0])
    for y_, added_, da_ in ((gaps, added, da), (y, last, da), (y, added, layout(da, True))):
        close(passes.norm_act(y_, norm, kind, added_), a)
        close(passes.act_backward(da_, y_, norm, kind, added_), dz)
    da = da[:, :1].expand_as(y)
    close(passes.act_backward(da, y, norm, kind, added), truth(y, norm, act, added, da)[2])


@pytest.mark.parametrize("device", DEVICES)
def test_not_a_number_stays_one(device):
    y, norm, _, da = example((1, 2, 2, 2), torch.float32, device)
    y[0, 0, 0, 0] = float("nan")
    for name in ("relu", "relu6", "leaky_relu", "silu", "hardswish", "elu"):
        assert torch.isnan(passes.norm_act(y, norm, KINDS[name][0])[0, 0, 0, 0]), name


def test_a_default_device_without_values():
    """Whether half precision rounds a limit is asked on a CPU."""
    passes.takes_result.cache_clear()
    with torch.device("meta"):
        assert not passes.takes_result(KINDS["hardtanh"][0]._replace(numbers=(-0.1, 6.0)), torch.bfloat16)
        assert passes.takes_result(KINDS["relu6"][0], torch.bfloat16)


def block(dtype, last, act, *, plus=False):
    """A function norm -> activation -> conv of a meta tensor y, which it returns, too."""
    with torch.device("meta"):
        conv, norm = nn.Conv2d(16, 16, 3, padding=1, bias=False).to(dtype), nn.BatchNorm2d(16)
        y = layout(torch.empty(8, 16, 14, 14, dtype=dtype), last).requires_grad_()

    def forward():
        a = act(norm(y) + y if plus else norm(y))
        a.register_hook(as_laid_out)
        return conv(a)

    def as_laid_out(grad):  # a meta convolution's gradients have no layout
        with _disable_current_modes():
            return layout(grad, last)

    return forward, y


# Where tensors have no memory, an operator stands in for a kernel, so that `Passes` sees it.
library = torch.library.Library("remat", "DEF")
library.define("norm_act(Tensor?[] read, Tensor(a!) out) -> Tensor(a!)")
library.impl("norm_act", lambda read, out: out, "Meta")


@pytest.fixture
def kernels_are_seen(monkeypatch):
    launch = passes.launch

    def launched(da, y, added, norm, kind, out):
        return torch.ops.remat.norm_act([da, y, added, *norm], launch(da, y, added, norm, kind, out))

    monkeypatch.setattr(passes, "launch", launched)


class Passes(TorchDispatchMode):
    """Counts how often tensors of ``size`` values or more are read or written, by operator."""

    # A norm reads its input for the sums and once more, and so does its backward, with dz.
    AGAIN = {"native_batch_norm": 1, "native_batch_norm_backward": 2}

    def __init__(self, size):
        super().__init__()
        self.size, self.counts, self.calls = size, Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        schema, name = func._schema.arguments, func._schema.name.split("::")[1]
        given = [(s, t) for s, v in zip(schema, args, strict=False) for t in tree_leaves(v)]
        given += [(s, t) for s in schema if s.name in kwargs for t in tree_leaves(kwargs[s.name])]
        given = [(s, t) for s, t in given if isinstance(t, torch.Tensor)]
        written = [t for s, t in given if s.is_write]
        overwritten = [t for s, t in given if s.is_write and (s.is_out or s.name == "out" or name == "copy_")]
        read = [t for _, t in given if not any(t is o for o in overwritten)]
        new = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage()._cdata for _, t in given}
        view = not written and any(t.untyped_storage()._cdata in storages for t in new)
        if not view and not name.startswith(("empty", "new_empty")):
            count = sum(t.numel() >= self.size for t in [*read, *(written or new)])
            if count:
                self.counts[name] += count + self.AGAIN.get(name, 0)
                self.calls[name] += 1
        return out

    def between(self):
        """All but those of convolutions."""
        return sum(n for name, n in self.counts.items() if not name.startswith("convolution"))


def counted(forward, y, *, ours):
    """The passes of forward and of backward."""
    size, y.grad = y.numel(), None
    with Passes(size) as first, remat(max_cost=0) if ours else nullcontext():
        z = forward()
    with Passes(size) as second:
        z.backward(torch.empty_like(z))
    return first, second


IN_A_BLOCK = {
    "relu": F.relu,
    "relu in place": lambda z: F.relu(z, inplace=True),
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", IN_A_BLOCK)
def test_passes_of_a_block(name, dtype, last, kernels_are_seen):
    forward, y = block(dtype, last, IN_A_BLOCK[name])
    plain, ours = (counted(forward, y, ours=o) for o in (False, True))
    assert [p.between() for p in plain] == [5, 8]
    assert [p.between() for p in ours] == [5, 10], ours[1].counts
    assert ours[0].calls == plain[0].calls and ours[1].calls["norm_act"] == 2
    assert "_to_copy" not in ours[0].calls + ours[1].calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", IN_A_BLOCK)
def test_passes_of_a_residual_block(name, dtype, kernels_are_seen):
    """What is added takes part in the same pass."""
    forward, y = block(dtype, True, IN_A_BLOCK[name], plus=True)
    plain, ours = (counted(forward, y, ours=o) for o in (False, True))
    assert [p.between() for p in plain] == [8, 11]  # one for y's two gradients
    once = "relu" in name  # the result, made for the convolution, serves the activation's backward too
    assert [p.between() for p in ours] == [8, 13 if once else 15], ours[1].counts
    assert "_to_copy" not in ours[0].calls + ours[1].calls


MERGED = {  # what is made of a norm's result z and of its block's input x
    "sum": lambda z, x: F.silu(z + x),
    "sum, the other way round": lambda z, x: F.silu(x + z),
    "sum with a number": lambda z, x: F.silu(z + 1.5),
    "sum with one channel": lambda z, x: F.silu(z + x[:, :1]),
    "sum of another shape": lambda z, x: F.silu(F.batch_norm(z[:, :1] * 1.5, None, None, training=True) + x),
    "difference": lambda z, x: F.silu(x - z),
    "product": lambda z, x: F.silu(z * x),
    "sum of the result with itself": lambda z, x: F.silu(z + z),
    "the sum and the result, each needed": lambda z, x: F.silu(z + x) * z,
    "two activations": lambda z, x: F.silu(F.mish(z)),
    "a part": lambda z, x: F.silu(torch.cat([z[:, 1:], x], 1)),
}


@pytest.mark.parametrize("name", MERGED)
def test_merged_steps_are_the_same_function(name, monkeypatch):
    """A CPU plays an accelerator without a kernel, so that PyTorch's run in its place."""
    monkeypatch.setattr(passes, "has_kernel", lambda device: True)
    monkeypatch.setattr(passes, "one_pass", lambda *tensors: False)
    channels = MERGED[name](*torch.ones(2, 2, 3, 1, 1)).shape[1]

    def make():
        parts = {"a": nn.Conv2d(3, 3, 3, padding=1), "n": nn.BatchNorm2d(3), "b": nn.Conv2d(channels, 2, 1)}
        return support.Net(lambda self, x: self.b(MERGED[name](self.n(self.a(x)), x)), **parts)

    support.check(make, support.X)


def test_without_a_compiler_there_is_no_kernel(monkeypatch):
    """Triton is installed with PyTorch for CUDA, but needs more of a machine than PyTorch does."""
    runtime = pytest.importorskip("triton.runtime")

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(runtime, "driver", Driver())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.warns(UserWarning, match="^Triton does not run, so remat uses PyTorch's kernels: Failed to"):
        assert not passes.has_kernel.__wrapped__(torch.device("cuda"))


def test_passes_are_counted_as_they_are():
    x = torch.ones(4, 4)
    with Passes(16) as found:
        y = x + 1  # 2
        y.add_(x)  # 3
        torch.mul(x, x[0], out=y)  # 2: the row is small
        y.copy_(x)  # 2
        y.view(2, 8).t()  # 0
        x.to(torch.float64)  # 2
    assert found.counts == {"add": 2, "add_": 3, "mul": 2, "copy_": 2, "_to_copy": 2}


@pytest.mark.skipif(not passes.has_kernel(torch.device(DEVICES[-1])), reason="the interpreter runs it")
@pytest.mark.parametrize("device", DEVICES[-1:])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("name", ["relu", "silu", "relu6", "relu in place"])
def test_gradients_by_the_kernels(name, plus, device):
    """The engine with the kernels in it: gradients as far from float64's as PyTorch's."""
    torch.manual_seed(0)
    act = IN_A_BLOCK[name]
    net = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)])
    x = torch.randn(3, 4, 6, 6)

    def block(x):
        y = net[0](x)
        return act(net[1](y) + x if plus else net[1](y))

    grads = []
    for price in ("float64", None, 0, 1e9):
        dtype = torch.float64 if price == "float64" else torch.float32
        for p in net.to(device, dtype).parameters():
            p.grad = None
        with remat(price) if isinstance(price, (int, float)) else nullcontext():
            out = net[2](block(block(block(x.to(device, dtype)))))
        out.square().sum().backward()
        grads.append([p.grad.double() for p in net.parameters()])
    for true, plain, *ours in zip(*grads, strict=True):
        allowed = 4 * (plain - true).norm() + 1e-5 * true.norm() + 1e-4
        assert all((g - true).norm() <= allowed for g in ours)


@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device")
def test_captured_in_a_graph_without_waiting():
    kind, _ = KINDS["silu"]
    y, norm, added, da = example((8, 16, 14, 14), torch.bfloat16, "cuda", True)

    def run():
        return passes.norm_act(y, norm, kind, added), passes.act_backward(da, y, norm, kind, added)

    want = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(not TRITON or INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton compiles on Linux")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("cols, last", [(12544, False), (3136, False), (64, True)])
def test_compiles_for_a_card_that_is_not_here(dtype, cols, last, tmp_path, monkeypatch):
    """For sm_90: every activation, in one of the kernel's uses after the other, and nothing is spilled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from helpers.remat import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    known = dict.fromkeys(("da", "y", "added", "out"), "*" + dtype) | dict.fromkeys("pqr", "fp32")
    known |= dict.fromkeys(("mean", "invstd", "gamma", "beta"), "*fp32")
    known |= dict.fromkeys(("ROWS", "COLS", "C"), "i32")
    br, bc, warps = passes.block_of(cols, last)
    for absent, name in zip(6 * ["da", "added"], ACTIVATIONS, strict=True):
        constants = {"ACT": name, "LAST": last, "BR": br, "BC": bc, absent: None}
        signature = {n: "constexpr" if n in constants else known[n] for n in kernels.one_pass.arg_names}
        whole = [n for n, kind in signature.items() if kind.startswith("*") or kind == "i32"]
        attributes = {(list(signature).index(n),): [["tt.divisibility", 16]] for n in whole}
        source = ASTSource(kernels.one_pass, signature, constexprs=constants, attrs=attributes)
        made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        assert made.asm["cubin"] and ".local" not in made.asm["ptx"], name  # nothing is spilled
