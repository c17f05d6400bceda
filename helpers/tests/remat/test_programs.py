"""Programs drawn at random: whatever forward computes, backward recomputes it to the bit."""

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers.remat import task
from helpers.remat.layouts import CHANNELS_LAST
from helpers.tests.remat.examples import PRECISIONS
from helpers.tests.remat.support import COSTS, Recorder, image, under

ACTIVATIONS = [
    F.relu, F.relu6, F.leaky_relu, F.elu, F.silu, F.gelu, F.mish, F.hardswish, F.hardsigmoid, F.sigmoid,
    F.tanh, F.softplus, torch.sin, torch.square, lambda h: h.clamp(-0.7, 1.1),
    lambda h: F.prelu(h, h.new_tensor([0.2])),
]  # fmt: skip
IN_PLACE = [F.relu, F.relu6, F.leaky_relu, F.elu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.celu]
VIEWS = [
    lambda h: h[:, : (h.shape[1] + 1) // 2], lambda h: h[:, h.shape[1] // 2 :], lambda h: h[:, ::2],
    lambda h: h[..., 1:], lambda h: h[..., ::2], lambda h: h[1:], lambda h: h.transpose(-1, -2),
    lambda h: h.flatten(2).unflatten(2, h.shape[2:]), lambda h: h.flatten(0, 1).unflatten(0, h.shape[:2]),
]  # fmt: skip
COPIES = [
    lambda h: h.clone(), lambda h: h.double().to(h.dtype), lambda h: h.bfloat16().to(h.dtype), lambda h: -h,
    lambda h: h.roll(1, -1), lambda h: h.flip(1), lambda h: F.pad(h, (1, 0)), lambda h: h.contiguous(),
    lambda h: torch.cat([h, h * 2], 1), lambda h: torch.cat([h, h]),
    lambda h: torch.stack([h, h + 1]).flatten(0, 1),
]  # fmt: skip


class Program:
    """One run of a program: of each step its name, how many tensors back it reads, and a seed."""

    def __init__(self, x, steps):
        self.dims, self.made, self.leaves = x.dim() - 2, [x], {"x": x}
        for name, back, seed in steps:
            self.pick = random.Random(seed).choice
            h = self.made[-1 - back % len(self.made)]
            self.made.append(getattr(self, name)(h))

    def parameter(self, like, *shape, dead=False):
        """For ``dead`` ones the first half is zeros: a norm's channels, all whose values are then equal."""
        n = len(self.leaves)
        t = image(*shape, seed=n).to(like.dtype) * 0.5
        if dead:
            t[: (len(t) + 1) // 2] = 0
        self.leaves[str(n)] = t.requires_grad_()
        return t

    def over(self, name):
        return getattr(F, f"{name}{self.dims}d")

    def convolution(self, h):
        side = self.pick([1, 1, 3])
        w = self.parameter(h, self.pick([2, 3, 4]), h.shape[1], *[side] * self.dims)
        return self.over("conv")(h, w, padding=side // 2, stride=self.pick([1, 1, 1, 1, 2]))

    def depthwise(self, h):
        w = self.parameter(h, h.shape[1], 1, *[3] * self.dims)
        return self.over("conv")(h, w, padding=1, groups=h.shape[1])

    def transposed(self, h):
        w = self.parameter(h, h.shape[1], 2, *[2] * self.dims)
        return self.over("conv_transpose")(h, w, stride=self.pick([1, 2]))

    def linear(self, h):
        return F.linear(h, self.parameter(h, self.pick([2, 5]), h.shape[-1]))

    def batch_norm(self, h):
        c = h.shape[1]
        dtype = self.pick([h.dtype, torch.float32])  # statistics stay float32 when a model is cast
        buffers = image(c, seed=1).to(dtype), (image(c, seed=2).square() + 0.1).to(dtype)
        affine, dead = self.pick([True, True, False]), self.pick([True, False])
        gamma, beta = (self.parameter(h, c, dead=dead) if affine else None for _ in range(2))
        return F.batch_norm(h, *buffers, gamma, beta, training=self.pick([True, True, False]))

    def other_norm(self, h):
        norms = [
            lambda: F.group_norm(h, 1, self.parameter(h, h.shape[1])),
            lambda: F.layer_norm(h, h.shape[-1:]),
            lambda: F.instance_norm(h),
        ]
        return self.pick(norms)()

    def activation(self, h):
        return self.pick(ACTIVATIONS)(h)

    def activation_in_place(self, h):
        return self.pick(IN_PLACE)(h * 1.5, inplace=True)

    def view(self, h):
        return self.pick(VIEWS)(h)

    def copy(self, h):
        return self.pick(COPIES)(h)

    def pool(self, h):
        return self.over(self.pick(["max_pool", "avg_pool"]))(h, 2, 1)

    def pair(self, h):
        q = self.pick([t for t in self.made if t.shape == h.shape])
        return self.pick([torch.add, torch.mul, torch.sub, lambda p, q: p / (q.square() + 1)])(h, q)

    def excite(self, h):
        return h * torch.sigmoid(h.mean([*range(2, h.dim())], keepdim=True))

    def dropout(self, h):
        return F.dropout(h, 0.3)


STEPS = [
    "convolution", "convolution", "depthwise", "transposed", "linear", "batch_norm", "batch_norm",
    "batch_norm", "other_norm", "activation", "activation", "activation_in_place", "view", "view", "copy",
    "pool", "pair", "excite", "dropout",
]  # fmt: skip


def run(x, steps, cost, autocast):
    """The tensors that forward makes, and the gradients of all leaves."""
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None), under(cost):
        program = Program(x, steps)
    made, leaves = [t.detach().clone() for t in program.made], program.leaves
    outputs = [t for t in program.made[-1:-4:-1] if t.requires_grad]
    del program
    torch.autograd.backward(outputs, [image(*t.shape, seed=99).to(t) for t in outputs])
    return made, {name: t.grad for name, t in leaves.items()}


@settings(max_examples=200)
@given(st.data())
def test_programs(data):
    draw = data.draw
    shape = [
        draw(st.integers(2, 5)),
        draw(st.integers(2, 5)),
        *[draw(st.integers(4, 9))] * draw(st.integers(1, 3)),
    ]
    one = st.tuples(st.sampled_from(STEPS), st.sampled_from([0, 0, 1, 2]), st.integers(0, 9999))
    steps = draw(st.lists(one, min_size=2, max_size=10))
    precision = draw(st.sampled_from([*PRECISIONS.values()]))
    dtype, autocast = precision["dtype"], precision.get("autocast")
    x = image(*shape).to(dtype)
    # In float32 PyTorch's convolutions of channels_last images of few channels may write beyond their memory.
    if dtype is not torch.float32 and draw(st.booleans()):
        x = x.to(memory_format=CHANNELS_LAST.get(x.dim(), torch.contiguous_format))
    try:
        made, wanted = run(x, steps, None, autocast)
    except (RuntimeError, ValueError):  # an image too small for the next step
        assume(False)
    for cost in COSTS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task, "SLAB_BYTES", draw(st.sampled_from([1 << 22, 500])))
            recorder = Recorder(patch)
            found, gradients = run(x, steps, cost, autocast)
        assert all(map(torch.equal, found, made)) and not recorder.different
        if dtype is torch.float64:  # beside 1, since all may be mere rounding errors
            scale = max(1.0, *(t.abs().max().item() for t in wanted.values() if t is not None))
            for name, t in wanted.items():
                torch.testing.assert_close(gradients[name], t, rtol=1e-8, atol=1e-8 * scale)
