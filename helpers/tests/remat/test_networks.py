"""Forward is PyTorch's to the bit, gradients to rounding, in networks of every make."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from helpers.remat import passes
from helpers.tests.remat.examples import ACTIVATIONS, NETWORKS, example
from helpers.tests.remat.support import Net, X, block, check, image


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    check(example(name), X)


@pytest.fixture
def accelerator(monkeypatch):
    """The engine goes an accelerator's way, with PyTorch's kernels for the passes."""
    monkeypatch.setattr(passes, "has_kernel", lambda device: True)
    monkeypatch.setattr(passes, "one_pass", lambda *given: False)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_as_on_an_accelerator(accelerator, name):
    check(example(name), X, costs=(0, 1e9))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_place_on_an_accelerator(accelerator, name):
    check(lambda: block(activation=lambda: ACTIVATIONS[name](inplace=True)), X, costs=(0, 1e9))


@pytest.mark.parametrize("what", ["gamma", "y", "a"])
@pytest.mark.parametrize("act", [F.relu, F.silu])
def test_unseen_changes_after_an_activation_in_place(accelerator, act, what):
    """Each formula gets what PyTorch's node would find: the norm's the new γ and y, ReLU's the new a."""

    def run(self, x):
        y = self.conv(x)
        a = act(self.norm(y), inplace=True)
        {"gamma": self.norm.weight, "y": y, "a": a}[what].data.mul_(-3)
        return self.last(a)

    parts = {"conv": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "last": nn.Conv2d(8, 4, 1)}
    check(lambda: Net(run, **copy.deepcopy(parts)), X)


def test_optional_input():
    check(example("dicts and optional arguments"), X, image(4, 8, 10, 9))


def test_parts_of_a_model_called_alone():
    def run(self, x):
        return self.inner[1][0](self.inner[0](x))

    check(lambda: Net(run, inner=nn.Sequential(block(), block(8, 8))), X)


def test_functional_call():
    inner = block().double()
    state = {name: t.detach() for name, t in inner.state_dict().items()}

    def run(self, x):
        mine = {**state, "0.weight": self.w}
        return torch.func.functional_call(inner, mine, (x,)).mean((2, 3))

    check(lambda: Net(run, w=nn.Parameter(torch.randn(8, 3, 3, 3))), X)


def test_parametrized_weights():
    def make():
        model = nn.Sequential(block(), nn.Conv2d(8, 4, 1))
        nn.utils.parametrizations.weight_norm(model[0][0])
        nn.utils.parametrizations.spectral_norm(model[1])
        return model

    check(make, X)


TORCHVISION = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "efficientnet_b0",
    "shufflenet_v2_x0_5", "regnet_y_400mf", "squeezenet1_1", "mnasnet0_5",
)  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    narrow = {"width_per_group": 16} if name == "resnet50" else {}
    check(lambda: getattr(torchvision.models, name)(num_classes=7, **narrow), image(2, 3, 32, 32))
