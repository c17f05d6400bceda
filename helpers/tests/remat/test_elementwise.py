"""Sums, products, quotients, copies, casts and masks: recomputed, and right."""

import contextlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import remat
from helpers.predict import Held
from helpers.remat import task
from helpers.tests.remat.examples import LAYOUTS, PRECISIONS
from helpers.tests.remat.support import (
    Net,
    Recorder,
    X,
    assert_same_forward,
    block,
    check,
    check_scenario,
    image,
    leaf,
    named,
    step,
)


def factor_like(a):
    return torch.full((1, 1, 1), 2.0, dtype=a.dtype, requires_grad=True)


COPIES = {
    "shuffled channels": lambda a: a.view(4, 2, 4, 10, 9).transpose(1, 2).reshape(4, 8, 10, 9),
    "flattened": lambda a: a.transpose(1, 2).flatten(2).view(4, 10, 8, 9).transpose(1, 2),
    "windows": lambda a: a.reshape(4, 8, 5, 2, 3, 3).permute(0, 2, 4, 1, 3, 5).reshape(-1, 8, 2, 3),
    "channels shuffled by PyTorch": lambda a: F.channel_shuffle(a, 4),
    "stacked": lambda a: torch.stack([a[:, :4], 1 - a[:, 4:]], 2).flatten(1, 2),
    "stacked rows": lambda a: torch.stack([a[..., :4], a[..., 4:8]], -1).flatten(3),
    "copied": lambda a: torch.clone(a).contiguous(memory_format=torch.channels_last),
    "another sign": lambda a: -a + (-(a - 0.5)).neg().abs() + torch.abs(0.5 - a),
    "waves": lambda a: torch.sin(a) + a.cos() ** 2,
    "joined": lambda a: torch.concatenate([a[:, :4], a.new_empty(4, 0, 10, 9), 1 - a[:, 4:]], 1),
    "pooled in place": lambda a: F.max_pool2d(a, 3, 1, 1) + torch.max_pool2d(a, (1, 3), [1, 1], (0, 1)),
    "pooled in place, a volume": lambda a: F.max_pool3d(a[:, None], 3, 1, 1)[:, 0],
    "padded by tensors": lambda a: F.pad(a, (torch.tensor(1), torch.tensor(-1)))[..., :9],
    "reflected by tensors": lambda a: F.pad(a, [torch.tensor(1), 0, 0, 0], "reflect")[..., :9],
    "reflected": lambda a: F.pad(a, (1, 1, 1, 1), "reflect", 0.0)[:, :, 1:-1, 1:-1],
    "rolled": lambda a: torch.roll(a, shifts=(1, -2), dims=(2, -1)),
    "flipped": lambda a: a.flip(-1).flip((1, 2)),
    "a number less it": lambda a: 0.3 - (1 - a),
    "squares": lambda a: (a - 0.5) ** 2 + a.pow(2.0) + torch.square(a) + torch.pow(a, 3),
    "clamped": lambda a: torch.clamp(a - 0.5, min=0.0, max=1) + a.clip(0.1) + a.clamp_min(0.2),
    "rms norm": lambda a: F.rms_norm(a.transpose(1, 3), (8,), eps=1e-5).transpose(1, 3),
    "pooled": lambda a: F.adaptive_avg_pool2d(a, (8, 7)),
    "pooled, a volume": lambda a: F.adaptive_avg_pool3d(a[:, None], (None, 8, 7))[:, 0],
    "pooled to a row": lambda a: F.adaptive_avg_pool2d(a, (1, 40)),
    "pooled rows": lambda a: F.adaptive_avg_pool1d(a.flatten(2), 45)[..., None],
    "unit vectors": lambda a: F.normalize(a - 0.5) + F.normalize(a, p=1, dim=-1),
    "scaled and shifted": lambda a: torch.addcmul(a[0, 0, 0].detach(), factor_like(a), a, value=3),
}


ACROSS = {  # each alone: what one of them keeps would hide the others
    "rolled": [lambda a: torch.roll(a, 1, 0), lambda a: a.roll(1), lambda a: a.roll((1, 2), (0, 1))],
    "flipped": [lambda a: a.flip(0), lambda a: a.flip(dims=[0, 1]), lambda a: torch.flip(a, (0,))],
    "shifted": [lambda a: F.pad(a, (0, 0, 0, 0, 0, 0, 1, -1))],
    "a factor for each image": [lambda a: torch.addcmul(a[0, 0, 0], a.mean((1, 2, 3), keepdim=True), a)],
    "stacked": [
        lambda a: torch.stack([a, a.sigmoid()]).square().mean(0),
        lambda a: torch.stack((a, a), -5).sum(0),
    ],
    "quotients": [
        lambda a: a / (a.sigmoid() + 1),
        lambda a: a[:, :1] / (a + 9),
        lambda a: a[:1] / 3 / a.exp(),
        lambda a: 1 / (a + 9),
    ],
    "reshaped": [
        lambda a: a.transpose(0, 1).reshape(4, 8, 10, 9),
        lambda a: a + a.reshape(-1)[1:2],
    ],
    "a tensor less it": [lambda a: torch.rsub(a, a.sigmoid()), lambda a: torch.rsub(a, 2, alpha=3)],
    "powers": [
        lambda a: 2**a,
        lambda a: (a + 3) ** 0.5,
        lambda a: a.sigmoid().pow(a),
        lambda a: a.exp().pow(-1),
    ],
    "to one pixel": [
        lambda a: a * F.adaptive_avg_pool2d(a, 1),
        lambda a: a * F.adaptive_avg_pool2d(a, [1, 1]),
    ],
    "lengths": [
        lambda a: a * a.norm(),
        lambda a: a * a.norm(dim=0),
        lambda a: a * torch.linalg.vector_norm(a, 1, (0, 1), True),
        lambda a: a * torch.linalg.vector_norm(a, 0, 1, True),
        lambda a: a * torch.linalg.vector_norm(a, ord=0, dim=1, keepdim=True),
        lambda a: a * torch.norm(a, "nuc", (2, 3), True),
    ],
    "unit vectors": [lambda a: F.normalize(a, dim=0)],
    "products": [
        lambda a: torch.addcmul(a, a.sigmoid(), a, value=2),
        lambda a: torch.addcmul(a[:, :1], a[:, 1:2], a),
    ],
    "clamped by tensors": [lambda a: a.clamp(torch.tensor(0.1), a.mean((2, 3), keepdim=True))],
}


def copied(copy):
    return lambda: Net(lambda self, x: self.c(copy(self.b(x))), b=block(), c=nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_made_again(monkeypatch, name):
    monkeypatch.setattr(task, "SLAB_BYTES", 500)
    check(copied(COPIES[name]), X)
    for precision, layout in itertools.product(PRECISIONS.values(), LAYOUTS.values()):
        with monkeypatch.context() as patch:
            recorder = Recorder(patch)
            step(copied(COPIES[name]), [X], 0, layout=layout, **precision)
        assert recorder.recomputed and not recorder.different
    with remat() as record:
        copied(COPIES[name])()(X.float())
    kept = [row.recipe for row in record.rows if row.kept and row.recipe != "offsets"]
    assert kept == ["given", "conv2d"]


@pytest.mark.parametrize("copy", [torch.clone, torch.Tensor.double, lambda x: x.clone().view_as(x)])
def test_a_copy_of_what_is_kept(copy):
    """The copy that backward makes again may be written over, and what it is made from not."""

    def scenario(context):
        x, w = leaf(image(4, 3)), leaf(image(5, 3, seed=1))
        with context():
            outs = F.linear(x, w), F.silu(copy(x))
        return named(*torch.autograd.grad(outs, [x, w], [image(*out.shape, seed=2) for out in outs]))

    check_scenario(scenario)


def together(copies):
    return lambda a: sum(copy(a) for copy in copies)


@pytest.mark.parametrize(
    "copy",
    [pytest.param(copy, id=name) for name, copies in ACROSS.items() for copy in (*copies, together(copies))],
)
def test_copies_across_images(monkeypatch, copy):
    monkeypatch.setattr(task, "SLAB_BYTES", 500)
    check(copied(copy), X)


def halves(a):
    """In two dtypes, as where a layer casts by itself."""
    half, one = a.to(torch.bfloat16), a.float()
    mixed = torch.cat([half, one[:, :4]], 1)[:, 4:] + half * 2 - one.type_as(half) * one
    return ((half + 1).add_(one) + mixed).to(one) / 3


def test_values_in_several_dtypes():
    """Autocast's casts, and the model's own, are made again."""
    x, make = X.float(), copied(halves)
    for autocast in (None, torch.bfloat16):
        how = {"dtype": torch.float32, "autocast": autocast}
        wanted, found = (step(make, [x], cost, **how) for cost in (None, 0))
        assert_same_forward(found, wanted)
        torch.testing.assert_close(found.gradients, wanted.gradients, rtol=1e-2, atol=1e-2)
        with torch.autocast("cpu", autocast, enabled=autocast is not None), remat() as record:
            make()(x)
        kept = [row.recipe for row in record.rows if row.kept]
        assert kept == [("given" if autocast is None else "cast"), "conv2d"]


MASKS = {
    "a mask": lambda a, mask: a * mask,
    "a mask first": lambda a, mask: mask * a,
    "in place": lambda a, mask: (a + 1).mul_(mask),
    "divided": lambda a, mask: a / (mask + 1),
    "for all channels": lambda a, mask: a * mask[:, :1].clone().expand(a.shape),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_kept_as_in_pytorch(name):
    mask = (image(4, 8, 10, 9) > 0).double()
    make = copied(lambda a: MASKS[name](a, mask))
    check(make, X)
    model = make().double()
    with remat() as record:
        loss = model(X).sum()
    rows = [row for row in record.rows if row.kept]
    assert [row.recipe for row in rows] == ["given", "conv2d", "given"]
    assert rows[-1].nbytes == (mask.nbytes / 8 if "channels" in name else mask.nbytes)
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_a_mask_of_another_dtype(dtype):
    mask = torch.ones(4, 8, 10, 9, dtype=dtype)
    make = copied(lambda a: mask * a / (mask + 1))
    check(make, X)
    with remat() as record:
        make().double()(X)
    kept = [(row.recipe, row.nbytes) for row in record.rows if row.kept]
    assert kept == [
        ("given", X.nbytes),
        ("conv2d", 4 * 8 * 90 * 8),
        ("given", mask.nbytes),
        ("given", 4 * 720 * 8),
    ]


def test_a_negative_mask():
    """Other values in the same memory."""
    x, z, found = image(4, 8, 6, 6).requires_grad_(), torch.view_as_complex(image(4, 8, 6, 6, 2)), []
    for context in (contextlib.nullcontext(), remat()):
        with context:
            a = x.sin()
            y = (a * z.imag).relu().sin() + 3 * (a * z.conj().imag).relu().sin()
        found += torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("write", [torch.Tensor.zero_, lambda t: t.data], ids=["in place", "exposed"])
def test_masks_that_nothing_needs_are_not_copied(write):
    held, x = Held(), torch.ones(4, 8, 6, 6).requires_grad_()
    held.ignore(x)
    with held, remat():
        masks = torch.rand(8, 4, 8, 6, 6)
        for mask in masks:
            x * mask
        write(masks)
    assert held.peak <= 9 * x.nbytes + 8


def test_a_mask_that_is_added_may_change():
    """PyTorch keeps nothing of it."""
    found = []
    for context in (contextlib.nullcontext(), remat()):
        mask, x = image(4, 8, 6, 6) > 0, image(4, 8, 6, 6, seed=1).requires_grad_()
        with context:
            y = torch.sin(torch.relu(x.sin()) + mask)
        mask.logical_not_()
        found += torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(*found)


def test_a_mask_counts_once():
    mask, y = torch.ones(4, 8, 10, 9), image(4, 8, 10, 9, dtype=torch.float32).requires_grad_()
    with remat() as record:
        sum((y * mask).sum() for _ in range(3)).backward()
    assert record.plain_bytes == record.kept_bytes == mask.nbytes


def test_a_factor_in_place_is_copied_once():
    """As in PyTorch, whose node saves it."""
    peaks, q = [], torch.rand(8, 32, 32, 32).requires_grad_()
    for context in (contextlib.nullcontext(), remat()):
        held = Held()
        held.ignore(q)
        with held, context:
            torch.ones(8, 32, 32, 32).mul_(q)
        peaks.append(held.peak)
    assert peaks == [2 * q.nbytes] * 2


def test_a_mask_that_is_changed_is_an_error():
    mask, model = torch.ones(4, 8, 10, 9), copied(lambda a: a * mask)()
    with remat():
        loss = model(X.float()).sum()
    mask.zero_()
    with pytest.raises(RuntimeError, match="changed by an inplace operation|modified by an inplace"):
        loss.backward()


def test_a_norm_that_is_written_out():
    """Of each tensor of the image's size that it makes, nothing is kept but the centred image."""

    def forward(self, x):
        x = self.c(x)
        x = x - x.mean(1, keepdim=True)
        x = x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        return self.last(F.gelu(self.gamma * x + self.beta))

    def make():
        vectors = {v: nn.Parameter(torch.rand(32, 1, 1)) for v in ("gamma", "beta")}
        return Net(forward, c=nn.Conv2d(3, 32, 1), last=nn.Conv2d(32, 2, 1), **vectors)

    check(make, X)
    with remat() as record:
        make()(X.float())
    large = [row.recipe for row in record.rows if row.kept and row.shape == (4, 32, 10, 9)]
    assert large == ["sub"]


LENGTHS = {
    "torch.norm": lambda a: torch.norm(a, p=2, dim=(2, 3), keepdim=True),
    "method": lambda a: a.norm(2, (2, 3), True),
    "vector norm": lambda a: torch.linalg.vector_norm(a, dim=[2, 3], keepdim=True),
}


@pytest.mark.parametrize("length", [torch.linalg.vector_norm, torch.norm])
def test_lengths_with_fewer_dimensions_than_what_is_kept(length, monkeypatch):
    monkeypatch.setattr(task, "SLAB_BYTES", 100)

    def forward(self, x):
        return self.last(length(self.c(x), dim=1).square()[:, None])

    check(lambda: Net(forward, c=nn.Conv2d(3, 3, 1), last=nn.Conv2d(1, 2, 1)), X)


@pytest.mark.parametrize("name", LENGTHS)
def test_global_response_norm(name):
    """As in ConvNeXt V2."""

    def forward(self, x):
        a = F.gelu(self.n(self.c(x)))
        length = LENGTHS[name](a)
        scaled = a * (length / (length.mean(1, keepdim=True) + 1e-6))
        return self.last(a + torch.addcmul(self.beta, self.gamma, scaled))

    def make():
        vectors = {v: nn.Parameter(torch.rand(1, 8, 1, 1)) for v in ("gamma", "beta")}
        return Net(forward, c=nn.Conv2d(3, 8, 1), n=nn.BatchNorm2d(8), last=nn.Conv2d(8, 2, 1), **vectors)

    check(make, X)
    with remat() as record:
        make()(X.float())
    large = [row.recipe for row in record.rows if row.kept and math.prod(row.shape) > 4 * 8]
    assert large == ["given", "conv2d"]


def test_a_product_in_place():
    def scenario(context):
        x, w = leaf(), leaf(image(4, 3, 3, 3))
        with context():
            y = F.conv2d(x, w)
            a = F.softsign(y)
            a *= F.sigmoid(y)
        return dict(zip("xw", torch.autograd.grad(a.square().sum(), [x, w]), strict=True))

    check_scenario(scenario)
