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

from helpers import fuse, fuse_conv_bn, unfuse
from helpers.fuse import KEPT, Fused
from helpers.memory import MemoryTrace
from helpers.tests.rounding import rounding

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
        self.conv, self.norms = (
            nn.Conv2d(c, c, 3, padding=1),
            nn.ModuleList([nn.BatchNorm2d(c) for _ in "12"]),
        )
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
    """``model`` with numbers that depend on ``seed`` alone, and nothing at its default in its norms."""
    torch.manual_seed(seed)
    for m in model.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
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
        history.append(found | ({} if inputs.grad is None else {"dx": inputs.grad}) | state(model))
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
    "lraspp": (
        lambda: models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=4
        ),
        32,
        32,
        2,
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


def test_a_large_segmentation_model_trains_as_it_does_unfused():
    make = models.segmentation.fcn_resnet50
    model = randomised(make(weights=None, weights_backbone=None, num_classes=4, aux_loss=True))
    model = check(model, image(2, 3, 16, 16), steps=1)
    assert type(model(image(2, 3, 16, 16))) is collections.OrderedDict
    assert len(model.fusion_report.groups) == 39


# -- the model stays what it was -------------------------------------------------------------------


def small(kind=Bottleneck, **options):
    """A fused model and a plain copy of it."""
    plain = randomised(kind())
    return fuse_conv_bn(copy.deepcopy(plain), **options), plain


X = image(4, 8, 6, 6)


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.dropout = conv_bn(8, 8, act=nn.ReLU()), conv_bn(8, 8), nn.Dropout(0.3)

    def forward(self, x):
        x = F.dropout(self.a(x), 0.2, self.training)
        return self.b(self.dropout(x))


def test_dropout_draws_the_same_numbers():
    model = check(randomised(WithDropout()), X)
    assert len(model.fusion_report.groups) == 2


def test_a_checkpoint_of_either_loads_into_the_other():
    fused, plain = small()
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    for source, target in ((fused, Bottleneck().double()), (plain, fuse_conv_bn(Bottleneck().double()))):
        train(source, sgd(source), X, 1)
        target.load_state_dict(source.state_dict())
        assert_same(*(train(m, sgd(m), X, 1)[0] for m in (source, target)))


@pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.__name__)
def test_eval_and_train_again(kind):
    fused, plain = small(kind)
    for mode in (False, True, False):
        fused.train(mode), plain.train(mode)
        for model in (fused, plain):
            model.zero_grad()
        assert_same(*(train(m, sgd(m), X, 2)[-1] for m in (fused, plain)))
    with torch.inference_mode():
        torch.testing.assert_close(fused(X), plain(X))


def saved(model):
    """``model`` after torch.save and torch.load of the whole of it."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved],
    ids=["deepcopy", "pickle", "save"],
)
@pytest.mark.parametrize("traced", [True, False], ids=["whole", "inside"])
def test_copies_are_fused_and_on_their_own(copied, traced):
    fused, plain = small() if traced else small(DataDependent)
    other = copied(fused)
    assert_same(*(train(m, sgd(m), X)[-1] for m in (other, plain)))
    assert [type(m) for m in other.modules()] == [type(m) for m in fused.modules()]
    assert fused_at_all(other)
    assert all(p is not q for p, q in zip(fused.parameters(), other.parameters(), strict=True))
    assert kept(other, X) == kept(fused, X) < kept(plain, X)
    assert all(p.grad is None for p in fused.parameters())


def test_fused_twice_is_fused_once():
    fused, plain = small()
    text = str(fused.fusion_report)
    kind, forward = type(fused), groups_of(fused)
    assert fuse_conv_bn(fused) is fused
    assert (type(fused), groups_of(fused), str(fused.fusion_report)) == (kind, forward, text)
    assert_same(*(train(m, sgd(m), X)[-1] for m in (fused, plain)))


def test_unfuse_leaves_nothing():
    for kind in (Bottleneck, DataDependent):
        fused, plain = small(kind)
        assert fused_at_all(fused)
        assert unfuse(fused) is fused
        assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]
        assert [list(vars(m)) for m in fused.modules()] == [list(vars(m)) for m in plain.modules()]
        assert kept(fused, X) == kept(plain, X)


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Linear(8, 8)), nn.Conv2d(8, 8, 1), nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())],
)
def test_nothing_to_fuse(model):
    kinds = [type(m) for m in model.modules()]
    assert fuse_conv_bn(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert model.fusion_report.groups == []
    assert "fused: 0 groups" in str(model.fusion_report)


def test_bad_arguments_are_named_and_nothing_changes():
    model = Bottleneck()
    with pytest.raises(ValueError, match="slab_size must be None"):
        fuse_conv_bn(model, slab_size=0)
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        fuse_conv_bn(loss_of)
    assert not fused_at_all(model)


# -- what must be left alone, and what comes later -------------------------------------------------


class Net(nn.Module):
    """Two convolutions, their norms and what a test puts between, beside a part that can be fused."""

    def __init__(self, c=8):
        super().__init__()
        self.stem = conv_bn(c, c, act=nn.ReLU())
        self.conv, self.bn, self.relu, self.conv2 = (
            nn.Conv2d(c, c, 3, padding=1),
            nn.BatchNorm2d(c),
            nn.ReLU(),
            nn.Conv2d(c, 2 * c, 1),
        )
        self.bn2 = nn.BatchNorm2d(2 * c)

    def forward(self, x):
        return self.bn2(self.conv2(self.relu(self.bn(self.conv(self.stem(x))))))


NET = "stem.1 relu conv | bn relu conv2 bn2"


class DataDependent(Net):
    def forward(self, x):
        return super().forward(-x if x.mean() > 0 else x)


def test_net_is_fused_where_nothing_is_in_the_way():
    assert groups_of(check(randomised(Net()), X)) == NET


def test_what_cannot_be_traced_is_fused_inside():
    for x in (X, -X):
        model = check(randomised(DataDependent()), x)
        assert groups_of(model) == "stem.0 stem.1"
        assert "TraceError" in model.fusion_report.untraced["the model"]


class Counted:
    """Hooks that note what passes, to be compared between two models."""

    def __init__(self, kind):
        self.kind, self.seen = kind, []

    def __call__(self, module, *args):
        tensors = [t for a in args for t in (a if isinstance(a, tuple) else [a]) if t is not None]
        self.seen.append([t.detach().clone() for t in tensors])

    def put_on(self, module):
        return getattr(module, f"register_{self.kind}")(self)


HOOK_KINDS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", ["conv2", "bn", "relu", "stem", "stem.0"])
@pytest.mark.parametrize("kind", HOOK_KINDS)
def test_hooks_inside_run_and_see_the_same(kind, name, late):
    plain, model = randomised(Net()), randomised(Net())
    hooks = Counted(kind), Counted(kind)
    if late:
        fuse_conv_bn(model)
        model(X)
        plain(X)
    for m, hook in zip((plain, model), hooks, strict=True):
        hook.put_on(m.get_submodule(name))
    if not late:
        fuse_conv_bn(model)
        if name == "relu":
            assert groups_of(model) == "stem.1 relu conv bn | conv2 bn2"
        elif name == "stem":  # it is called as it is, and fused inside
            assert groups_of(model) == "bn relu conv2 bn2 | stem.0 stem.1"
            assert list(model.fusion_report.alone) == ["conv"]
        else:
            assert name not in groups_of(model).split()
            assert model.fusion_report.alone[name] == "it has hooks"
    assert_same(*(train(m, sgd(m), X, 2)[-1] for m in (model, plain)))
    assert len(hooks[0].seen) == len(hooks[1].seen) == 2
    for one, other in zip(*(h.seen for h in hooks), strict=True):
        torch.testing.assert_close(one, other)


def test_without_its_hooks_a_model_is_fused_again():
    fused, plain = small(Net)
    handle = fused.bn.register_forward_hook(lambda *_: None)
    assert kept(fused, X) > kept(small(Net)[0], X)
    handle.remove()
    assert kept(fused, X) == kept(small(Net)[0], X)


def test_hooks_of_all_modules_see_all_modules():
    fused, _ = small(Net)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        fused(X)
    finally:
        handle.remove()
    assert {m for m in fused.modules() if not list(m.children())} <= set(seen)


class TwoUsers(Net):
    def forward(self, x):
        y = self.conv(self.stem(x))
        a = self.bn(y)
        return self.bn2(self.conv2(self.relu(a))) + y.mean() + a.mean()


class Called(Net):
    """Its conv2 is called twice, so bn2 has two results to choose from."""

    def forward(self, x):
        a = self.relu(self.bn(self.conv(self.stem(x))))
        return self.bn2(self.conv2(a)) + self.conv2(a)


class MyConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class MyNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + x


class MyReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x) + 0.1 * x


class Uncalled(Net):
    def forward(self, x):
        return self.stem(x)


class Keyword(Net):
    def forward(self, x):
        return self.bn2(self.conv2(input=self.relu(self.bn(input=self.conv(self.stem(x))))))


def with_(**modules):
    """A maker of Net with other modules in places of it."""

    def make():
        net = Net()
        for name, module in modules.items():
            net.set_submodule(name, module())
        return net

    return make


def changed(name, change):
    def make():
        net = Net()
        change(net.get_submodule(name))
        return net

    return make


ALONE = {
    "two users": (TwoUsers, "stem.1 relu conv | conv2 bn2", "bn"),
    "called twice": (Called, "stem.1 relu conv bn", "conv2"),
    "group norm": (with_(bn=lambda: nn.GroupNorm(2, 8)), "stem.1 relu conv | conv2 bn2", None),
    "instance norm": (
        with_(bn=lambda: nn.InstanceNorm2d(8, affine=True)),
        "stem.1 relu conv | conv2 bn2",
        None,
    ),
    "frozen norm": (with_(bn=lambda: ops.FrozenBatchNorm2d(8)), "stem.1 relu conv | conv2 bn2", None),
    "other norm": (with_(bn=lambda: MyNorm(8)), "stem.1 relu conv | conv2 bn2", "bn"),
    "other conv": (with_(conv2=lambda: MyConv(8, 16, 1)), "stem.1 relu conv bn", "conv2"),
    "activation": (with_(relu=nn.Tanh), "stem.1 relu conv bn | conv2 bn2", None),
    "other relu": (with_(relu=lambda: MyReLU()), "stem.1 relu conv bn | conv2 bn2", None),
    "padding": (
        with_(conv=lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
        "stem.0 stem.1 | bn relu conv2 bn2",
        None,
    ),
    "weight norm": (changed("conv2", parametrizations.weight_norm), "stem.1 relu conv bn", "conv2"),
    "spectral norm": (changed("conv2", parametrizations.spectral_norm), "stem.1 relu conv bn", "conv2"),
    "old spectral norm": (changed("conv2", nn.utils.spectral_norm), "stem.1 relu conv bn", "conv2"),
    "uncalled": (Uncalled, "stem.0 stem.1", "bn"),
    "keyword": (Keyword, "stem.1 relu conv", "conv2"),
}


@pytest.mark.parametrize("case", ALONE)
def test_left_alone(case):
    make, groups, named = ALONE[case]
    model = check(randomised(make()), X)
    assert groups_of(model) == groups
    if named:
        assert model.fusion_report.alone[named]


@pytest.mark.parametrize("change", [parametrizations.weight_norm, nn.utils.spectral_norm], ids=["new", "old"])
def test_weights_that_are_parametrised_later(change):
    def after(model):
        torch.manual_seed(0)
        change(model.conv2)

    check(randomised(Net()), X, optimizer=lambda m: sgd(m.stem), after=after)


def patch(model):
    """Double what conv2 gives, by a forward of its own."""
    forward = model.conv2.forward
    model.conv2.forward = lambda x: 2 * forward(x)


def patch_container(model):
    forward = model.stem.forward
    model.stem.forward = lambda x: 2 * forward(x)


def patch_root(model):
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("change", [patch, patch_container, patch_root])
def test_forwards_that_are_replaced(change):
    check(randomised(Net()), X, after=change)
    model, plain = randomised(Net()), randomised(Net())
    change(model), change(plain)
    fuse_conv_bn(model)
    assert "conv2" not in groups_of(model) or change is not patch
    assert_same(*(train(m, sgd(m), X)[-1] for m in (model, plain)))


def test_a_wrapped_forward_is_still_the_fused_one():
    fused, _ = small(Net)
    wanted = kept(fused, X)
    fused.forward = torch.autocast("cpu", enabled=False)(fused.forward)
    assert kept(fused, X) == wanted


class PythonRandom(Net):
    def forward(self, x):
        return super().forward(x) * (2 if random.random() < 0.5 else 1)


class TorchRandom(Net):
    def forward(self, x):
        return super().forward(x) * (2 if torch.rand(()) < 0.5 else 1)


class NumpyRandom(Net):
    def forward(self, x):
        import numpy

        return super().forward(x) * (2 if numpy.random.rand() < 0.5 else 1)


@pytest.mark.parametrize("kind", [PythonRandom, TorchRandom, NumpyRandom])
def test_random_control_flow(kind):
    import numpy

    def call(model, x):
        seed = torch.initial_seed()
        random.seed(seed), numpy.random.seed(seed)
        return sum(model(x) for _ in range(4))

    random.seed(5)
    torch.manual_seed(5)
    numpy.random.seed(5)
    wanted = random.random(), torch.rand(()), numpy.random.rand()
    random.seed(5)
    torch.manual_seed(5)
    numpy.random.seed(5)
    model = kind()
    torch.manual_seed(5)
    model = fuse_conv_bn(model)
    assert (random.random(), torch.rand(()), numpy.random.rand()) == wanted
    assert "random" in model.fusion_report.untraced["the model"]
    check(randomised(kind()), X, call=call)


class Counting(Net):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Storing(Net):
    def forward(self, x):
        self.activation = self.stem(x)
        return super().forward(x) + self.activation.mean()


class StoringInAList(Net):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(self.stem(x))
        return super().forward(x)


class CountingInADict(Net):
    def __init__(self):
        super().__init__()
        self.stats = {"calls": 0}

    def forward(self, x):
        self.stats["calls"] += 1
        return super().forward(x) * self.stats["calls"]


class CountingInABuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class DecidingByABuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.zeros(()))

    def forward(self, x):
        return super().forward(x) * (2 if self.scale > 0 else 1)


def set_scale(model):
    model.scale += 1


@pytest.mark.parametrize(
    "kind", [Counting, Storing, StoringInAList, CountingInADict, CountingInABuffer, DecidingByABuffer]
)
def test_state_of_the_model(kind):
    """What a forward changes is changed at every call, and tracing changes nothing."""
    plain = randomised(kind())
    fused = check(copy.deepcopy(plain), X, after=set_scale if kind is DecidingByABuffer else None)
    train(plain, sgd(plain), X)
    for name in ("calls", "stats", "activation", "seen"):
        if hasattr(plain, name):
            torch.testing.assert_close(getattr(fused, name), getattr(plain, name))
    assert "stem.1" in groups_of(fused)


class TrainingDependent(Net):
    def forward(self, x):
        if self.training:
            return self.conv2(self.relu(self.bn(self.conv(x))))
        return super().forward(x) + 1


class PartsInTwoModes(Net):
    """Only its stem decides by the mode, and the stem may be in another one than the whole."""

    def __init__(self):
        super().__init__()
        self.stem = TrainingDependent()
        self.stem.conv2 = nn.Conv2d(8, 8, 1)
        self.stem.bn2 = nn.BatchNorm2d(8)


def test_branches_that_depend_on_the_mode():
    fused, plain = small(TrainingDependent)
    for mode in (True, False, True):
        fused.train(mode), plain.train(mode)
        assert_same(*(train(m, sgd(m), X)[-1] for m in (fused, plain)))
    fused = check(randomised(PartsInTwoModes()), X, after=lambda m: m.stem.eval())
    assert groups_of(fused) == "stem.bn relu stem.conv2 | bn relu conv2 bn2"


class Switched(Net):
    """Has a switch in every place where one can be."""

    by_class = False

    def __init__(self):
        super().__init__()
        self.use_skip, self.scale, self.name = True, 1.0, "one"
        self.listed, self.dict = [True, [1]], {"deep": {"on": True}}
        self.config = types.SimpleNamespace(on=True)
        self.function, self.nothing = F.relu, None
        self.register_buffer("shift", None)

    def forward(self, x):
        y = x + self.stem(x) if self.use_skip else self.stem(x)
        y = y * self.scale + (0 if self.name == "one" else 1)
        y = y + 1 if self.listed[0] else y
        y = y + self.listed[1][0]
        y = y * 2 if self.dict["deep"]["on"] else y
        y = y * 2 if self.config.on else y
        y = self.function(y) if self.nothing is None else self.nothing
        y = y if self.shift is None else y + self.shift
        return self.bn2(self.conv2(self.relu(self.bn(self.conv(y)))))


SWITCHES = {
    "bool": lambda m: setattr(m, "use_skip", False),
    "float": lambda m: setattr(m, "scale", 3.0),
    "text": lambda m: setattr(m, "name", "two"),
    "list": lambda m: m.listed.__setitem__(0, False),
    "nested list": lambda m: m.listed[1].__setitem__(0, 5),
    "dict": lambda m: m.dict["deep"].update(on=False),
    "namespace": lambda m: setattr(m.config, "on", False),
    "function": lambda m: setattr(m, "function", torch.tanh),
    "buffer": lambda m: setattr(m, "shift", torch.ones(8, 1, 1, dtype=torch.float64)),
    "deleted": lambda m: delattr(m, "nothing") or setattr(type(m), "nothing", None),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_that_are_turned_later(switch):
    fused, plain = small(Switched)
    assert groups_of(fused) == "stem.0 stem.1 | bn relu conv2 bn2"
    for m in (fused, plain):
        m(X)
        SWITCHES[switch](m)
    assert_same(*(train(m, sgd(m), X, 2)[-1] for m in (fused, plain)))


def test_attributes_that_always_change_cost_no_memory():
    """One that the forward reads makes a graph each, of which some are kept; any other makes none."""
    fused, plain = small(Switched)
    for step in range(40):
        fused.scale = plain.scale = step
        torch.testing.assert_close(fused(X), plain(X))
    assert len(fused._plan.forwards) == KEPT
    fused, _ = small(Net)
    made = dict(fused._plan.forwards)  # for training with gradients, and for eval mode without
    for step in range(3):
        fused.step = step
        for mode in (True, False):
            with torch.set_grad_enabled(mode):
                fused.train(mode)(X)
    assert fused._plan.forwards == made


REPLACED = {
    "norm": lambda m: m.set_submodule("bn", randomised(nn.BatchNorm2d(8, eps=0.1), seed=5)),
    "another norm": lambda m: m.set_submodule("bn", nn.GroupNorm(2, 8).double()),
    "none": lambda m: m.set_submodule("bn", nn.Identity()),
    "activation": lambda m: m.set_submodule("relu", nn.SiLU()),
    "conv": lambda m: m.set_submodule("conv2", randomised(nn.Conv2d(8, 16, 1), seed=5)),
    "container": lambda m: m.set_submodule("stem", randomised(conv_bn(8, 8, 1, nn.SiLU()), seed=5)),
    "in a container": lambda m: m.stem.__setitem__(2, nn.Hardswish()),
    "appended": lambda m: m.stem.append(nn.Hardswish()),
    "sync": nn.SyncBatchNorm.convert_sync_batchnorm,
    "untraceable": lambda m: m.set_submodule("stem", randomised(Untraceable(), seed=5)),
    "parameter": lambda m: setattr(m.conv2, "weight", nn.Parameter(image(16, 8, 1, 1, seed=7))),
    "no affine": lambda m: [setattr(m.bn, n, None) for n in ("weight", "bias")],
}


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = conv_bn(8, 8)

    def forward(self, x):
        return self.inside(-x if x.mean() > 0 else x)


@pytest.mark.parametrize("what", REPLACED)
def test_modules_that_are_replaced_later(what):
    fused, plain = small(Net)
    for m in (fused, plain):
        m(X)
        REPLACED[what](m)
    assert_same(*(train(m, sgd(m), X)[-1] for m in (fused, plain)))
    again = copy.deepcopy(fused)
    assert_same(*(train(m, sgd(m), X)[-1] for m in (again, plain)))


def freeze(*names):
    def after(model):
        for name in names:
            model.get_submodule(name).eval()

    return after


@pytest.mark.parametrize("recompute_conv", [True, False])
@pytest.mark.parametrize("names", [["bn"], ["bn2"], ["stem"], ["bn", "bn2", "stem.1"]], ids=" ".join)
def test_frozen_statistics(names, recompute_conv):
    model = check(randomised(Net()), X, after=freeze(*names), recompute_conv=recompute_conv)
    assert groups_of(model) == NET


@pytest.mark.parametrize("recompute_conv", [True, False])
def test_a_constant_norm_without_gradients_keeps_no_image(recompute_conv):
    fused, plain = small(lambda: nn.Sequential(conv_bn(8, 8)), recompute_conv=recompute_conv)
    for model in (fused, plain):
        model[0][1].eval().requires_grad_(False)
        train(model, sgd(model), X, 1)
    assert kept(fused, X) == 2 * 8 * 8 < kept(plain, X)  # mean and variance


def without_statistics(model):
    model.bn.track_running_stats = False


@pytest.mark.parametrize("recompute_conv", [True, False])
def test_a_norm_that_stops_tracking(recompute_conv):
    check(randomised(Net()), X, after=without_statistics, recompute_conv=recompute_conv)
    fused, plain = small(Net, recompute_conv=recompute_conv)
    for m in (fused, plain):
        without_statistics(m)
        m.eval()
    torch.testing.assert_close(fused(X), plain(X))


@pytest.mark.parametrize("recompute_conv", [True, False])
@pytest.mark.parametrize("kind", [Bottleneck, InvertedResidual, Net], ids=lambda kind: kind.__name__)
def test_parameters_that_need_no_gradient(kind, recompute_conv):
    torch.manual_seed(3)
    for _ in range(6):
        model = randomised(kind())
        for p in model.parameters():
            p.requires_grad_(bool(torch.rand(()) < 0.5))
        check(model, X, steps=2, recompute_conv=recompute_conv)


class InPlaceBetween(Net):
    """Changes the norm's input between the norm and the convolution behind it."""

    def forward(self, x):
        y = self.conv(self.stem(x))
        a = self.bn(y)
        z = y.zero_()
        return self.bn2(self.conv2(self.relu(a))) + z.mean()


class InPlaceAfter(Net):
    """An in-place sum with the norm's result: it may not be the memory that the block keeps."""

    def forward(self, x):
        y = self.stem(x)
        out = self.conv(y)
        out += y
        out = self.relu(self.bn(out))
        out = self.conv2(out)
        out *= 2
        out = self.bn2(out)
        return out.add_(1).relu_()


class InPlaceSkip(Net):
    """A pre-activation in place: the sum takes what relu_ left in the norm's result."""

    def forward(self, x):
        y = self.conv(self.stem(x))
        a = self.bn(y)
        b = self.conv2(a.relu_())
        return self.bn2(b) + torch.cat([a, a], 1)


class InPlaceInput(Net):
    """In place on what goes into a norm, and on what comes out of it."""

    def forward(self, x):
        y = self.conv(self.stem(x))
        y.mul_(2).add_(1)
        return self.bn2(self.conv2(F.relu_(self.bn(y)))).mul_(2)


@pytest.mark.parametrize("kind", [InPlaceAfter, InPlaceSkip, InPlaceInput], ids=lambda kind: kind.__name__)
def test_operations_in_place(kind):
    check(randomised(kind()), X)


def test_what_happens_between_a_norm_and_a_convolution():
    fused, plain = small(InPlaceBetween)
    with torch.no_grad():
        for mode in (True, False):
            fused.train(mode), plain.train(mode)
            torch.testing.assert_close(fused(X), plain(X))
    assert "bn relu conv2" not in groups_of(fused)


class Without(Net):
    """A part of it without gradients."""

    def forward(self, x):
        with torch.no_grad():
            x = self.stem(x)
        return self.bn2(self.conv2(self.relu(self.bn(self.conv(x)))))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return -dx


class Returned(Reversed):
    @staticmethod
    def forward(ctx, x):
        return x


class Setup(Reversed):
    @staticmethod
    def forward(x):
        return x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


reversed_apply = Returned.apply


class WithFunction(Net):
    def forward(self, x):
        return super().forward(Reversed.apply(self.stem(x)))


class WithFunction2(Net):
    def forward(self, x):
        return super().forward(reversed_apply(self.stem(x)))


class WithFunction3(Net):
    def forward(self, x):
        return super().forward(Setup.apply(self.stem(x)))


class WithoutAutocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x.float())


class Checkpointed(Net):
    reentrant = False

    def forward(self, x):
        y = torch.utils.checkpoint.checkpoint(self.stem, x, use_reentrant=self.reentrant)
        return self.bn2(self.conv2(self.relu(self.bn(self.conv(y)))))


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class AsksForTypes(Net):
    def forward(self, x):
        y = self.stem(x)
        y = torch.cat([y, y]) if isinstance(y, torch.Tensor) else y[0]
        return super().forward(y)


class AsksForAFlag(Net):
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if torch.is_grad_enabled() else y


@pytest.mark.parametrize(
    "kind",
    [Without, WithFunction, WithFunction2, WithFunction3, Checkpointed, CheckpointedReentrant, AsksForTypes],
    ids=lambda kind: kind.__name__,
)
def test_what_a_trace_would_not_see(kind):
    model = check(randomised(kind()), X)
    assert model.fusion_report.untraced["the model"]
    assert groups_of(model) == "stem.0 stem.1"


def test_autocast_inside_a_forward():
    tolerance = rounding(torch.bfloat16, 8)  # tensors that bfloat16 rounds on the way to a gradient
    model = check(randomised(WithoutAutocast(), torch.float32), X, tolerance=tolerance)
    assert model.fusion_report.untraced["the model"]


def test_a_forward_that_asks_whether_gradients_are_wanted():
    fused, plain = small(AsksForAFlag)
    for m in (fused, plain):
        m(X)
    with torch.no_grad():
        torch.testing.assert_close(fused(X), plain(X))
    torch.testing.assert_close(fused(X), plain(X))


# -- arguments and results -------------------------------------------------------------------------


class Arguments(Net):
    def forward(self, x, y, *more, scale=1.0, shift=None):
        x = super().forward(x + (1 if y is None else y))
        for m in more:
            x = x + m
        return x * scale if shift is None else x * scale + shift


class Default(Net):
    def forward(self, x, double=False):
        x = super().forward(x)
        return 2 * x if double else x


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(X, X),
        lambda m: m(X, y=X),
        lambda m: m(y=X, x=X),
        lambda m: m(X, None),
        lambda m: m(X, 2.0),
        lambda m: m(X, X, 3.0, 4.0),
        lambda m: m(X, X, scale=2.0),
        lambda m: m(X, X, shift=X.mean()),
        lambda m: m.forward(X, X),
    ],
)
def test_arguments(call):
    fused, plain = small(Arguments)
    assert groups_of(fused) == NET
    torch.testing.assert_close(call(fused), call(plain))


def test_arguments_that_are_missing_or_too_many():
    fused, plain = small(Arguments)
    for bad in (lambda m: m(), lambda m: m(X), lambda m: m(X, X, scales=2), lambda m: m(X, X, x=X)):
        with pytest.raises(TypeError) as wanted:
            bad(plain)
        with pytest.raises(TypeError) as found:
            bad(fused)
        assert str(found.value) == str(wanted.value)


def test_an_argument_with_a_default():
    fused, plain = small(Default)
    for call in (lambda m: m(X), lambda m: m(X, True), lambda m: m(X, double=True), lambda m: m(X, False)):
        torch.testing.assert_close(call(fused), call(plain))


Pair = collections.namedtuple("Pair", "one two")


class Named(dict):
    """A dict whose values are attributes too."""

    __getattr__ = dict.__getitem__


RESULTS = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, [b]],
    "dict": lambda a, b: {"a": a, "b": b},
    "OrderedDict": lambda a, b: collections.OrderedDict(b=b, a=a),
    "namedtuple": Pair,
    "dict's subclass": lambda a, b: Named(a=a, b=b),
    "OrderedDict's subclass": lambda a, b: type("O", (collections.OrderedDict,), {})(a=a),
    "defaultdict": lambda a, b: collections.defaultdict(list, a=a),
    "list's subclass": lambda a, b: type("L", (list,), {})([a, b]),
    "tuple's subclass": lambda a, b: type("T", (tuple,), {})([a, b]),
}


@pytest.mark.parametrize("what", RESULTS)
def test_results_of_every_kind(what):
    class WithResult(Net):
        def forward(self, x):
            a = self.stem(x)
            return RESULTS[what](a, self.bn2(self.conv2(a)))

    fused, plain = (randomised(WithResult()) for _ in "12")
    found, wanted = fuse_conv_bn(fused)(X), plain(X)
    assert type(found).__name__ == type(wanted).__name__
    torch.testing.assert_close(tensors_in(found), tensors_in(wanted))
    assert fused_at_all(fused)


# -- memory ----------------------------------------------------------------------------------------


def kept(model, x, dtype=None):
    """Bytes that autograd keeps of ``model(x)`` beside x, parameters and buffers."""
    outside = {t.untyped_storage().data_ptr() for t in [x, *model.parameters(), *model.buffers()]}
    storages = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in outside:
            storages[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    del output
    return sum(t.untyped_storage().nbytes() for t in storages.values())


def end_of_forward(model, x):
    """Bytes that stand when forward is done, by the allocator: what is kept, and the output."""
    model(x).sum().backward()
    with MemoryTrace() as trace:
        output = model(x)
        trace.mark("end of forward")
    del output
    return trace.marks["end of forward"]


def test_a_resnet_block_keeps_what_it_must_and_no_more():
    x = image(4, 8, 8, 8, dtype=torch.float32)
    plain = randomised(Bottleneck(), torch.float32)
    fused = fuse_conv_bn(copy.deepcopy(plain))
    wide, small_ = 4 * 4 * 8 * 8 * 4, 4 * 4 * 4 * 4 * 4  # bytes of 4 channels at either size
    statistics = 2 * 4 * (4 + 4 + 16 + 16)  # mean and variance of four norms
    # conv1's and conv2's results; and the last relu's. Unfused also what stands before each of the other
    # convolutions and norms.
    assert kept(fused, x) == wide + small_ + 4 * small_ + statistics
    assert kept(plain, x) == 2 * wide + 2 * small_ + 3 * 4 * small_ + statistics
    saving = kept(plain, x) - kept(fused, x)
    # out += downsample(x) adds into conv3's norm's result; the other one and the fused conv3's output go.
    assert end_of_forward(plain, x) - end_of_forward(fused, x) == saving


@pytest.mark.parametrize("recompute_conv", [True, False])
@pytest.mark.parametrize("kind", SMALL, ids=lambda kind: kind.__name__)
def test_the_report_says_what_autograd_keeps(kind, recompute_conv):
    fused, plain = small(kind, recompute_conv=recompute_conv)
    for mode, needs in ((True, True), (True, False), (False, False)):
        fused.train(mode), plain.train(mode)
        x = X.clone().requires_grad_(needs)
        before = copy.deepcopy(fused.state_dict())
        report = fused.fusion_report.measured(fused, x)
        assert all(torch.equal(v, before[k]) for k, v in fused.state_dict().items())
        assert sum(a - b for a, b, _ in report.saved) == kept(plain, x) - kept(fused, x)


def test_the_report_measures_a_frozen_backbone():
    for frozen in (["conv2"], ["bn", "bn2"], ["stem", "conv", "bn"], ["conv", "conv2"]):
        fused, plain = small(Net)
        for model in (fused, plain):
            for name in frozen:
                model.get_submodule(name).requires_grad_(False)
        report = fused.fusion_report.measured(fused, X)
        assert sum(a - b for a, b, _ in report.saved) == kept(plain, X) - kept(fused, X), frozen


def test_the_report_reads_well():
    fused, _ = small(Bottleneck)
    assert str(fused.fusion_report).splitlines() == [
        "fused: 3 groups",
        "  conv2         bn1 → relu → conv2",
        "  conv3         bn2 → relu → conv3 → bn3",
        "  downsample.0  0 → 1",
        "left alone: 1 convolutions and norms",
        "  conv1  the norm behind it goes to conv2",
    ]
    # 64 images: 4 channels of 32x32 pixels in float64 are 2 MiB, of 16x16 half a MiB
    assert str(fused.fusion_report.measured(fused, image(64, 8, 32, 32))).splitlines() == [
        "fused: 3 groups",
        "  conv2         bn1 → relu → conv2        no convolution twice  2.0 MiB → 0.0 MiB",
        "  conv3         bn2 → relu → conv3 → bn3  by algebra            2.5 MiB → 0.0 MiB",
        "  downsample.0  0 → 1                     by algebra            2.0 MiB → 0.0 MiB",
        "saved in all: 6.5 MiB",
        "left alone: 1 convolutions and norms",
        "  conv1  the norm behind it goes to conv2",
    ]
    for recompute_conv, how in ((True, "recomputed  1.0 MiB → 0.0"), (False, "without 1  1.0 MiB → 0.5")):
        fused, _ = small(SharedConv, recompute_conv=recompute_conv)
        assert how in str(fused.fusion_report.measured(fused, image(32, 8, 16, 16)))


@pytest.mark.parametrize(("channels", "how"), [(64, "recomputed"), (65, "without 1")])
def test_a_convolution_that_costs_too_much_is_not_computed_twice(channels, how, monkeypatch):
    monkeypatch.setattr(fuse, "RECOMPUTE_AT_MOST", 9 * 64)
    plain = randomised(nn.Sequential(nn.Conv2d(channels, 8, 3, bias=False), nn.BatchNorm2d(8)))
    fused = fuse_conv_bn(copy.deepcopy(plain))
    x = image(2, channels, 5, 5)
    report = fused.fusion_report.measured(fused, x)
    assert how in str(report)
    assert sum(a - b for a, b, _ in report.saved) == kept(plain, x) - kept(fused, x)
    check(plain, x)


REASONS = {
    "hooks": (changed("bn", lambda m: m.register_forward_hook(lambda *_: None)), "bn     it has hooks"),
    "uncalled": (Uncalled, "bn     this forward does not call it by itself"),
    "untraced": (
        DataDependent,
        "not traced, so fused inside only:\n  the model  it cannot be traced: TraceError: sy",
    ),
    "two users": (TwoUsers, "bn    no convolution before or behind it takes its input or its result alone"),
    "twice": (Called, "conv2  it is called 2 times"),
    "kind": (with_(bn=lambda: MyNorm(8)), "bn      it is a MyNorm"),
    "kind of conv": (changed("conv2", parametrizations.weight_norm), "conv2   it is a ParametrizedConv2d"),
    "no norm": (with_(bn=nn.Identity, bn2=nn.Identity), "conv2   no batch norm is next to it"),
    "keyword": (Keyword, "conv2   it is not called with one input"),
}


@pytest.mark.parametrize("what", REASONS)
def test_the_report_names_reasons(what):
    make, text = REASONS[what]
    report = str(fuse_conv_bn(make()).fusion_report)
    assert " ".join(text.split()) in " ".join(report.split())


# -- how people train ------------------------------------------------------------------------------


def with_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def assert_no_worse(found, rival, exact):
    """``found`` is as close to ``exact`` as ``rival`` is."""
    assert found.keys() == rival.keys() == exact.keys()
    for name, value in exact.items():
        assert found[name].dtype == rival[name].dtype, name
        ours, theirs = ((t[name].double() - value.double()).norm() for t in (found, rival))
        assert ours <= 1.5 * theirs + 1e-3 * value.double().norm() + 1e-4, name


@pytest.mark.parametrize("recompute_conv", [True, False])
@pytest.mark.parametrize(
    "kind", [Bottleneck, InvertedResidual, SqueezeExcite], ids=lambda kind: kind.__name__
)
def test_autocast_is_as_exact_as_unfused(kind, recompute_conv):
    exact = randomised(kind())
    plain, fused = copy.deepcopy(exact).float(), fuse_conv_bn(copy.deepcopy(exact).float(), recompute_conv)
    x = image(8, 8, 8, 8)
    wanted = train(exact, sgd(exact), x, 1)[0]
    found, rival = (train(m, sgd(m), x.float(), 1, with_autocast)[0] for m in (fused, plain))
    assert kind is InvertedResidual or found["output 0"].dtype == torch.bfloat16
    assert_no_worse(found, rival, wanted)


def test_a_gradient_scaler():
    def run(model, autocast=True):
        optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
        if model is fused:
            fuse_conv_bn(model)
        scales = []
        for step in range(6):
            optimizer.zero_grad()
            x = image(8, 8, 8, 8, dtype=torch.float32, seed=step)
            scaler.scale(loss_of(with_autocast(model, x) if autocast else model(x))).backward()
            if step == 1:  # a step with an overflow, which the scaler skips
                model.conv2.weight.grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return state(model), scales

    plain = randomised(Net(), torch.float32)
    fused = copy.deepcopy(plain)
    exact = copy.deepcopy(plain)
    (exact, _), (rival, wanted_scales), (found, scales) = run(exact, False), run(plain), run(fused)
    assert fused_at_all(fused)
    assert scales == wanted_scales
    assert_no_worse(found, rival, exact)


@pytest.mark.parametrize("recompute_conv", [True, False])
def test_channels_last(recompute_conv):
    model = randomised(Bottleneck()).to(memory_format=torch.channels_last)
    x = X.contiguous(memory_format=torch.channels_last)
    model = check(model, x, recompute_conv=recompute_conv)
    assert model(x).is_contiguous(memory_format=torch.channels_last)


def test_gradient_accumulation():
    def accumulated(model):
        for step in range(3):
            loss_of(model(image(4, 8, 6, 6, seed=step))).backward()
        return state(model)

    assert_same(*map(accumulated, small()))


def test_averaged_copies_and_update_bn():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

    found = []
    for model in small():
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        optimizer = sgd(model)
        for step in range(3):
            train(model, optimizer, image(4, 8, 6, 6, seed=step), 1)
            average.update_parameters(model)
        averaged = state(average)
        update_bn([image(4, 8, 6, 6, seed=s) for s in range(3)], average)
        averaged |= {f"{n} again": t for n, t in state(average).items()}
        average.eval()
        found.append(averaged | {"output": average(X).detach()})
        assert fused_at_all(average) == fused_at_all(model)
    assert_same(*found)


def test_other_optimizers_and_a_schedule():
    def adam(model):
        return torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-3)

    check(randomised(Net()), X, steps=5, optimizer=adam)


def compiled(model, **options):
    return torch.compile(model, backend="aot_eager_decomp_partition", **options)


@pytest.mark.parametrize("kind", [Bottleneck, SqueezeExcite], ids=lambda kind: kind.__name__)
def test_compile_is_right_and_keeps_the_saving(kind):
    torch._dynamo.reset()
    eager, plain = small(kind)
    model = copy.deepcopy(eager)
    x = image(8, 8, 16, 16)
    run = compiled(model, fullgraph=True)
    found, wanted = train(model, sgd(model), x, 2, lambda m, x: run(x)), train(plain, sgd(plain), x, 2)
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)
    model.eval(), plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(x), plain(x))
    model.train(), plain.train()
    run(x)  # compiled once more, for an input that needs no gradient
    held = {}
    for name, forward in (("compiled", run), ("eager", eager), ("plain", plain)):
        with MemoryTrace() as trace:
            output = forward(x)
            trace.mark("end of forward")
        held[name] = trace.marks["end of forward"]
        del output
    assert held["compiled"] <= 1.1 * held["eager"] < held["plain"]


@pytest.mark.parametrize("switch", ["bool", "float", "text", "function", None])
def test_compiled_models_follow_their_switches(switch):
    torch._dynamo.reset()
    fused, plain = small(Switched)
    run = compiled(fused, fullgraph=True)
    for change in (None, switch):
        if change == "function":
            torch._dynamo.reset()  # numbers, flags and texts are watched
        for m in (fused, plain):
            if change is not None:
                SWITCHES[change](m)
        torch.testing.assert_close(run(X), plain(X))
    if switch is None:
        counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        run = torch.compile(fused, backend=counter)
        for mode in (True, False, True, False):
            fused.train(mode), plain.train(mode)
            torch.testing.assert_close(run(X), plain(X))
        assert counter.frame_count == 2


def test_compile_with_hooks_and_what_cannot_be_traced():
    torch._dynamo.reset()
    fused, plain = small(DataDependent)
    torch.testing.assert_close(compiled(fused)(X), plain(X))
    fused, plain = small(Net)
    hooks = Counted("forward_hook"), Counted("forward_hook")
    for model, hook in zip((fused, plain), hooks, strict=True):
        hook.put_on(model.bn)
    torch.testing.assert_close(compiled(fused)(X), plain(X))
    assert len(hooks[0].seen) == len(hooks[1].seen) == 1


def test_parts_of_a_fused_model_are_models():
    fused = fuse_conv_bn(randomised(nn.Sequential(conv_bn(8, 8, act=nn.ReLU()), conv_bn(8, 8), nn.ReLU())))
    plain = unfuse(copy.deepcopy(fused))
    assert groups_of(fused) == "0.1 relu 1.0 1.1"
    for of in (lambda m: m[:2], lambda m: m[0], lambda m: nn.Sequential(*m, nn.ReLU()), lambda m: m[1][:1]):
        assert_same(*(train(of(m), sgd(m), X, 2)[-1] for m in (fused, plain)))


def test_a_module_in_two_places():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = conv_bn(8, 8)
            self.listed = nn.ModuleList([self.a])

        def forward(self, x):
            return self.a(-x if x.mean() > 0 else x)

    fused, plain = small(Twice)
    assert type(fused.a).__name__ == "FusedSequential"
    assert_same(*(train(m, sgd(m), X, 2)[-1] for m in (fused, plain)))
    assert type(unfuse(fused).a) is nn.Sequential


def test_functional_call_and_lazy_modules():
    fused, plain = small(Net)
    parameters = {n: p + 0.1 for n, p in plain.named_parameters()}
    torch.testing.assert_close(*(torch.func.functional_call(m, parameters, X) for m in (fused, plain)))
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU()).double()
    fuse_conv_bn(lazy)
    lazy(X)
    again = fuse_conv_bn(lazy)
    assert groups_of(again) == "0 1"
    assert_same(*(train(m, sgd(m), X, 2)[-1] for m in (again, unfuse(copy.deepcopy(again)))))
