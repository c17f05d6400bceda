"""`fuse_conv_bn` against the model as it was: the same training, fewer bytes, and nothing done on a guess."""

import collections
import copy
import io
import pickle
import random
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torchvision import models, ops

from helpers import fuse_conv_bn, unfuse
from helpers.fuse import Fused
from helpers.memory import MemoryTrace

# -- small models, each with what is to be found in it ---------------------------------------------


def conv_bn(c_in, c_out, kernel=3, act=None, **conv):
    layers = [nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False, **conv), nn.BatchNorm2d(c_out)]
    return nn.Sequential(*layers, *([act] if act is not None else []))


class Bottleneck(nn.Module):
    """ResNet's, with one relu module for all places."""

    def __init__(self, c_in=8, c_mid=4, c_out=16, stride=2):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_mid, 1, bias=False), nn.BatchNorm2d(c_mid)
        self.conv2, self.bn2 = nn.Conv2d(c_mid, c_mid, 3, stride, 1, bias=False), nn.BatchNorm2d(c_mid)
        self.conv3, self.bn3 = nn.Conv2d(c_mid, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = conv_bn(c_in, c_out, 1, stride=stride)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        return self.relu(out)


class InvertedResidual(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        wide = 2 * channels
        self.conv = nn.Sequential(
            conv_bn(channels, wide, 1, nn.ReLU6(inplace=True)),
            conv_bn(wide, wide, 3, nn.ReLU6(inplace=True), groups=wide),
            *conv_bn(wide, channels, 1),
        )

    def forward(self, x):
        return x + self.conv(x)


class Dense(nn.Module):
    """Each layer takes all results before it, side by side."""

    def __init__(self, c=8, growth=4):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(c + i * growth) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(c + i * growth, growth, 3, padding=1) for i in range(3))

    def forward(self, x):
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)), inplace=True)))
        return torch.cat(features, 1)


class PreActivation(nn.Module):
    def __init__(self, c=8):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(out)))


class SqueezeExcite(nn.Module):
    def __init__(self, c=8):
        super().__init__()
        self.expand = conv_bn(c, 16, 1, nn.SiLU(inplace=True))
        self.depthwise = conv_bn(16, 16, 3, nn.SiLU(inplace=True), groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project = conv_bn(16, c, 1)

    def forward(self, x):
        x = self.depthwise(self.expand(x))
        gate = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return self.project(gate.sigmoid() * x)


class Functional(nn.Module):
    """An activation in every way to write one."""

    def __init__(self, c=8):
        super().__init__()
        self.layers = nn.ModuleList(conv_bn(c, c) for _ in range(8))

    def forward(self, x):
        a, b, c, d, e, f, g, h = self.layers
        x = torch.relu(b(F.relu(a(x), inplace=True)))
        x = d(c(x).relu())
        x = F.silu(f(F.hardswish(e(F.relu6(x)))), inplace=True)
        return h(g(x).relu_())


class SharedConv(nn.Module):
    def __init__(self, c=8):
        super().__init__()
        self.conv, self.norms = nn.Conv2d(c, c, 3, padding=1), nn.ModuleList([nn.BatchNorm2d(c) for _ in "12"])
        self.last = conv_bn(c, c)

    def forward(self, x):
        for norm in self.norms:
            x = F.relu(norm(self.conv(x)))
        return self.last(x)


# model -> the groups, "norm activation conv norm", without and with recomputation
SMALL = {
    Bottleneck: "bn1 relu conv2 | bn2 relu conv3 bn3 | downsample.0 downsample.1",
    InvertedResidual: "conv.0.1 relu6 conv.1.0 | conv.1.1 relu6 conv.2 conv.3",
    Dense: "norms.0 relu convs.0 | norms.1 relu convs.1 | norms.2 relu convs.2",
    PreActivation: "bn1 relu conv1 | bn2 relu conv2",
    SqueezeExcite: "expand.1 silu depthwise.0 depthwise.1 | project.0 project.1",
    Functional: "layers.0.1 relu layers.1.0 | layers.1.1 relu layers.2.0 | layers.2.1 relu layers.3.0 | "
    "layers.3.1 relu6 layers.4.0 | layers.4.1 hardswish layers.5.0 | layers.5.1 silu layers.6.0 | "
    "layers.6.1 relu layers.7.0 layers.7.1",
    SharedConv: "norms.1 relu last.0 last.1",
}


def groups_of(model):
    """The groups of the report, in the form of SMALL."""
    found = []
    for prefix, g in model.fusion_report.groups:
        names = [prefix + n if n else "" for n in (g.before, g.conv, g.after)]
        act = g.act.name if g.act.name != "none" else ""
        found.append(" ".join(n for n in (names[0], act, *names[1:]) if n))
    return " | ".join(found)


# -- training, fused and not -----------------------------------------------------------------------


def randomised(model, dtype=torch.float64, seed=0):
    """``model`` with nothing at its default in its norms."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.3)
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
    return model.to(dtype)


def image(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tensors_in(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for value in values for t in tensors_in(value)]


def loss_of(output):
    """A loss that weighs every value of every output in its own way."""
    return sum((t * image(*t.shape, dtype=t.dtype, seed=2)).sum() for t in tensors_in(output)) / 10


def state(model):
    found = {f"grad of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: t.detach().clone() for n, t in model.state_dict().items()}


def train(model, optimizer, x, steps=3, call=None, **options):
    """What comes out of ``steps`` steps: at each the outputs, dx, all gradients, parameters and buffers."""
    history = []
    for step in range(steps):
        torch.manual_seed(step)
        inputs = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        optimizer.zero_grad()
        output = model(inputs) if call is None else call(model, inputs)
        loss_of(output).backward()
        found = {f"output {i}": t.detach().clone() for i, t in enumerate(tensors_in(output))}
        optimizer.step()
        history.append(found | {"dx": inputs.grad} | state(model))
    return history


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02, momentum=0.9)


def assert_same(found, wanted, tolerance=1e-8):
    """Equal names; values equal up to ``tolerance`` of their norm (and of the largest norm of any)."""
    assert found.keys() == wanted.keys()
    largest = max(t.double().norm() for t in wanted.values())
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        difference = (found[name].double() - value.double()).norm()
        assert difference <= tolerance * (value.double().norm() + 1e-3 * largest), f"{name}: {difference}"


def check(model, x, steps=3, call=None, tolerance=1e-8, optimizer=sgd, after=None, **options):
    """Train ``model`` fused and plain, and compare everything. Returns the fused one.

    The optimizer is made before fusing. ``after(model)`` is done to both then.
    """
    plain = copy.deepcopy(model)
    optimizers = optimizer(plain), optimizer(model)
    fused = fuse_conv_bn(model, **options)
    assert fused is model
    for m in (plain, fused) if after else ():
        after(m)
    wanted = train(plain, optimizers[0], x, steps, call)
    found = train(fused, optimizers[1], x, steps, call)
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other, tolerance)
    return fused


def fused_at_all(model):
    return any(isinstance(m, Fused) for m in model.modules())


@pytest.mark.parametrize("recompute_conv", [True, False])
@pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.__name__)
def test_trains_as_the_plain_model(kind, recompute_conv):
    model = check(randomised(kind()), image(4, 8, 6, 6), recompute_conv=recompute_conv)
    assert groups_of(model) == SMALL[kind]


def small_vgg():
    model = models.vgg11_bn(num_classes=4)  # but for its classifier of 120 million parameters
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Dropout(), nn.Linear(512, 4))
    return model


# maker, image size, groups, steps
TORCHVISION = {
    "resnet18": (lambda: models.resnet18(num_classes=4), 32, 12, 2),
    "mobilenet_v2": (lambda: models.mobilenet_v2(num_classes=4, width_mult=0.25), 32, 35, 2),
    "densenet121": (lambda: models.DenseNet(8, (6, 12, 24, 16), 16, num_classes=4), 32, 120, 2),
    "efficientnet_b0": (lambda: models.efficientnet_b0(num_classes=4), 32, 32, 2),
    "vgg11_bn": (small_vgg, 32, 5, 2),
    "googlenet": (lambda: models.googlenet(num_classes=4, init_weights=False), 48, 40, 2),
    "fcn_resnet50": (
        lambda: models.segmentation.fcn_resnet50(None, weights_backbone=None, num_classes=4, aux_loss=True),
        16,
        39,
        1,
    ),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models_train_as_they_do_unfused(name):
    torch.manual_seed(0)
    make, size, groups, steps = TORCHVISION[name]
    model = make()
    plain = randomised(model)
    x = image(4, 3, size, size)
    others = [copy.deepcopy(plain) for _ in "12"]
    wanted = train(plain, sgd(plain), x, steps)
    for fused, recompute_conv in zip(others, (True, False), strict=True):
        optimizer = sgd(fused)
        fuse_conv_bn(fused, recompute_conv)
        assert len(fused.fusion_report.groups) == groups
        assert not fused.fusion_report.untraced
        for one, other in zip(train(fused, optimizer, x, steps), wanted, strict=True):
            assert_same(one, other, 1e-6)
