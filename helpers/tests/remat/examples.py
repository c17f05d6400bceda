"""Networks, layouts and options that several of these tests go through."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers import remat
from helpers.tests.remat.support import Net, block

ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": lambda inplace: nn.Hardtanh(-0.5, 0.7, inplace=inplace),
    "leaky_relu": lambda inplace: nn.LeakyReLU(0.1, inplace),
    "elu": lambda inplace: nn.ELU(0.8, inplace),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "celu": lambda inplace: nn.CELU(0.5, inplace),
    "selu": nn.SELU,
    "threshold": lambda inplace: nn.Threshold(0.1, 0.2, inplace),
    "dropout": lambda inplace: nn.Dropout(0.3, inplace),
}


OUT_OF_PLACE = {
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "prelu": nn.PReLU,
    "prelu by channel": lambda: nn.PReLU(8),
}


EVERY_ACTIVATION = {
    **{f"{name}{'_' * inplace}": lambda f=f, i=inplace: f(inplace=i)
       for name, f in ACTIVATIONS.items() for inplace in (False, True)},
    **OUT_OF_PLACE,
}  # fmt: skip


NORMS = {
    "training": lambda: nn.BatchNorm2d(8),
    "eval": lambda: nn.BatchNorm2d(8).eval(),
    "no affine": lambda: nn.BatchNorm2d(8, affine=False),
    "no affine, eval": lambda: nn.BatchNorm2d(8, affine=False).eval(),
    "no running statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "momentum None": lambda: nn.BatchNorm2d(8, momentum=None),
    "momentum 1, large eps": lambda: nn.BatchNorm2d(8, momentum=1, eps=0.5),
    "frozen": lambda: nn.BatchNorm2d(8).eval().requires_grad_(False),
    "frozen scale": lambda: only(nn.BatchNorm2d(8), "bias"),
    "frozen shift": lambda: only(nn.BatchNorm2d(8), "weight"),
    "one group": lambda: nn.GroupNorm(1, 8),
    "two groups": lambda: nn.GroupNorm(2, 8),
    "groups without affine": lambda: nn.GroupNorm(4, 8, affine=False),
    "layer": lambda: nn.LayerNorm([8, 10, 9]),
    "layer over pixels": lambda: nn.LayerNorm([10, 9], elementwise_affine=False),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True),
    "instance without affine": lambda: nn.InstanceNorm2d(8),
    "instance with running statistics": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
}


def only(module, name):
    """``module`` of which one parameter is trained."""
    for n, p in module.named_parameters():
        p.requires_grad_(n == name)
    return module


class Swish(torch.autograd.Function):
    """A user's own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, dz):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return dz * (s + x * s * (1 - s))


class NormAct(nn.BatchNorm2d):
    """A norm that activates, by itself and in place, as timm's."""

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        z = F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)
        return F.silu(z, inplace=True)


def kept_then_scaled(self, x):
    outputs = []
    for part in (self.a, self.b):
        x = part(x)
        outputs.append(x)
        x = x.clone()
        x *= 0.5
    return outputs


def scaled_branch(self, x):
    """Stochastic depth: whole images are dropped by a factor without a gradient."""
    r = self.a(x) * torch.tensor([1.25, 0, 1.25, 1.25], dtype=x.dtype).view(4, 1, 1, 1)
    r += self.a(x)
    return self.b(r)


def residual(self, x):
    h = self.a(x)
    return self.b(F.relu(self.c(h) + h) + h)


def residual_in_place(self, x):
    h = self.a(x)
    out = self.c(h)
    out += h
    return self.b(F.relu(out, inplace=True))


def dense(self, x):
    h = [self.a(x)]
    for part in (self.b, self.c):
        h.append(part(torch.cat(h, 1)))
    return torch.cat(h, dim=-3)


def excite(self, x):
    h = self.a(x)
    scale = torch.sigmoid(self.c(F.silu(self.b(h.mean((2, 3), keepdim=True)))))
    return self.d(h * scale)


def shuffle(self, x):
    left, right = self.a(x).chunk(2, dim=1)
    h = torch.cat([left, self.b(right)], 1)
    n, c, height, width = h.shape
    h = h.view(n, 2, c // 2, height, width).transpose(1, 2).reshape(n, c, height, width)
    return self.c(h[:, 1:5]) + self.c(h[:, ::2])


def pyramid(self, x):
    h = self.a(x)
    low = F.max_pool2d(h, 2)
    up = F.interpolate(self.b(low), size=h.shape[2:], mode="bilinear", align_corners=False)
    return self.c(torch.cat([h, F.pad(up, (0, 0, 0, 0, 0, 0))], 1)), F.interpolate(low, scale_factor=2)


def arithmetic(self, x):
    h = (self.a(x) * 2 - 1) / 3 + 0.5
    h = 1 - h * torch.linspace(0.5, 1, h.shape[1], dtype=h.dtype).view(-1, 1, 1)
    h *= 1.5
    h -= x.mean()
    return self.b(h.sub_(1).div_(2))


def itself(self, x):
    h = self.a(x)
    return self.b(h * h + torch.cat([h, h], 1)[:, 4:12])


def norms_of_few_images(self, x):
    """Each norm's statistics are those of some images (ghost batch norm)."""
    y, norm = self.a[0](x), self.a[1]
    h = F.relu(torch.cat([norm(images) for images in y.split(3)]))
    return self.b(torch.cat([h, h]))


def groups_as_images(self, x):
    """A few channels at a time become an image, then all of them one (a filter for each image)."""
    h = self.a(x)
    n, c, height, width = h.shape
    groups = F.silu(self.b(h.reshape(2 * n, c // 2, height, width)))
    filters = self.c.weight.repeat(n, 1, 1, 1)
    one = F.conv2d(groups.view(1, n * c, height, width), filters, groups=n)
    return self.d(F.relu(one.view(n, -1, height, width)))


def keyword_arguments(self, x):
    y = F.conv2d(weight=self.a[0].weight, input=x, stride=(1,), padding="same")
    z = F.batch_norm(input=y, running_mean=None, running_var=None, training=True)
    return F.max_pool2d(input=F.leaky_relu(input=z, negative_slope=0.2), kernel_size=2)


def options(self, x, extra=None):
    """None in a dict, an optional argument, a device and a dtype asked of the parameters."""
    p = next(self.parameters())
    parts = {"x": x.to(p.device, p.dtype), "mask": None}
    h = self.a(parts["x"]) if parts["mask"] is None else parts["x"]
    return {"out": self.b(h if extra is None else h + extra), "rest": [None, (h,)]}


def shared(self, x):
    h = self.a(x)
    for _ in range(3):
        h = self.b(h)
    return h


def in_a_loop(self, x):
    h = self.a(x)
    for _ in range(40):
        h = h + 0.1 * torch.relu(h)
    return self.b(h)


def contexts(self, x):
    with remat(9):
        x = self.a(x)
        with remat(0):
            x = self.b(x)
    return self.c(x)


def wrong_by_design(self, x):
    """Half of the network without gradients, statistics and all."""
    with torch.no_grad():
        h = self.a(x)
    return self.b(h) + self.b(self.a(x).detach())


NETWORKS = {
    "output kept, then scaled in place": (kept_then_scaled, {"a": block(), "b": block(8, 8)}),
    "residual into a scaled branch": (scaled_branch, {"a": block(), "b": nn.Conv2d(8, 4, 1)}),
    "residual": (residual, {"a": block(), "b": block(8, 4), "c": block(8, 8, nn.Identity)}),
    "residual in place": (residual_in_place, {"a": block(), "b": block(8, 4), "c": block(8, 8, nn.Identity)}),
    "dense": (dense, {"a": block(), "b": block(8, 4), "c": block(12, 4)}),
    "squeeze and excite": (
        excite, {"a": block(), "b": nn.Conv2d(8, 2, 1), "c": nn.Conv2d(2, 8, 1), "d": block(8, 4)}),
    "chunks and shuffled channels": (shuffle, {"a": block(), "b": block(4, 4), "c": block(4, 4)}),
    "pyramid": (pyramid, {"a": block(), "b": block(8, 8), "c": block(16, 4)}),
    "numbers": (arithmetic, {"a": block(), "b": block(8, 4)}),
    "a value with itself": (itself, {"a": block(), "b": block(8, 4)}),
    "norms of few images": (norms_of_few_images, {"a": block(), "b": block(8, 4)}),
    "groups as images": (
        groups_as_images, {"a": block(), "b": nn.BatchNorm2d(4), "c": nn.Conv2d(8, 4, 1), "d": block(4, 4)}),
    "keyword arguments": (keyword_arguments, {"a": block()}),
    "dicts and optional arguments": (options, {"a": block(), "b": block(8, 4)}),
    "a module three times": (shared, {"a": block(), "b": block(8, 8)}),
    "a long loop": (in_a_loop, {"a": block(), "b": block(8, 4)}),
    "contexts inside": (contexts, {"a": block(activation=lambda: nn.SiLU(inplace=True)),
                                   "b": block(8, 8, lambda: nn.ReLU(inplace=True)), "c": block(8, 4)}),
    "partly without gradients": (wrong_by_design, {"a": block(), "b": block(8, 4)}),
    "a function of the user's": (
        lambda self, x: self.b(Swish.apply(self.a(x))), {"a": block(), "b": nn.Conv2d(8, 4, 1)}),
    "a norm with its activation": (
        lambda self, x: self.b(self.n(self.a(x))), {"a": block(), "n": NormAct(8), "b": block(8, 4)}),
    "a checkpoint inside": (
        lambda self, x: self.b(checkpoint(self.a, x, use_reentrant=False)), {"a": block(), "b": block(8, 4)}),
    "a reentrant checkpoint inside": (
        lambda self, x: self.b(checkpoint(self.a, x, use_reentrant=True)), {"a": block(), "b": block(8, 4)}),
    "pre-activation": (
        lambda self, x: x + self.c(F.relu(self.n(x))), {"n": nn.BatchNorm2d(3), "c": nn.Conv2d(3, 3, 1)}),
    "frozen weights": (
        lambda self, x: self.b(self.a(x)), {"a": block().requires_grad_(False), "b": block(8, 4)}),
    "an unbatched image": (lambda self, x: F.relu(self.c(x[0])), {"c": nn.Conv2d(3, 4, 3)}),
    "dropout": (lambda self, x: self.b(F.dropout2d(self.a(x), 0.3)), {"a": block(), "b": block(8, 4)}),
}  # fmt: skip


def example(name):
    """A builder: the same parts, new each time."""
    forward, parts = NETWORKS[name]
    return lambda: Net(forward, **copy.deepcopy(parts))


def mixed():
    """Of everything a little, without a bias before a norm: its gradient is nothing but rounding."""
    return nn.Sequential(
        block(), block(8, 8, nn.SiLU),
        nn.MaxPool2d(2), Net(dense, a=block(8, 8), b=block(8, 4, nn.Hardswish), c=block(12, 4, nn.GELU)),
        nn.AvgPool2d(2), nn.Conv2d(16, 4, 1),
    )  # fmt: skip


LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


PRECISIONS = {
    "float64": {"dtype": torch.float64},
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "autocast": {"dtype": torch.float32, "autocast": torch.bfloat16},
}


def chain(depth, channels=8, activation=nn.ReLU):
    return nn.Sequential(*[block(channels, channels, activation) for _ in range(depth)])


class Residual(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        y += x
        return F.relu(y, inplace=True)


CHAINS = {
    "conv, norm, relu": lambda: block(8, 8),
    "depthwise": lambda: block(8, 8, groups=8),
    "residual": lambda: Net(lambda self, x: F.relu(self.b(x) + x), b=block(8, 8)),
    "pre-activation": lambda: Net(
        lambda self, x: x + self.c(F.relu(self.n(x))),
        n=nn.BatchNorm2d(8), c=nn.Conv2d(8, 8, 3, padding=1)),
    "dense": lambda: Net(lambda self, x: torch.cat([x[:, 4:], self.b(x)], 1), b=block(8, 4)),
}  # fmt: skip
