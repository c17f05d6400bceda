"""Two processes, each with a part of the batch, against one process with the whole of it and plain norms.

The scenarios run once, one after another in two gloo processes, and write down what they find; each test
reads its own.
"""

import copy
import datetime
import functools
import os
import sys
import time
import traceback
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # a process that is started here has not read conftest.py
    sys.path.insert(0, str(ROOT))

from helpers import FusedBlock2d, FusedConvBN2d, fuse_conv_bn, fused_conv_bn2d, unfuse  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)

TIMEOUT = 300  # seconds until a process that hangs is given up: no machine is as slow
EVEN, UNEVEN = (3, 3), (5, 1)  # images of the two processes


def image(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.double().parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator, dtype=p.dtype) / max(p[0].numel(), 4) ** 0.5 + 0.1
            )
    return model


class Net(nn.Module):
    """A norm before, one after, both around a convolution; the last pointwise one by algebra."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.conv4, self.bn4 = nn.Conv2d(12, 5, 3, stride=2), nn.BatchNorm2d(5)

    def forward(self, x):
        x = self.conv2(self.relu(self.bn1(self.conv1(x))))
        x = self.bn3(self.conv3(self.relu(self.bn2(x))))
        return self.bn4(self.conv4(x))


def block(before=True, after=True, kernel=3, c_out=6):
    """The modules of a FusedBlock2d by name, in the order in which they are called."""
    norms = [nn.BatchNorm2d(c) if there else None for c, there in ((3, before), (c_out, after))]
    conv = nn.Conv2d(3, c_out, kernel, padding=kernel // 2)
    return {"norm_before": norms[0], "activation": nn.SiLU(), "conv": conv, "norm_after": norms[1]}


def chain(**modules):
    """Those modules one after another, under the same names."""
    return nn.Sequential(OrderedDict((n, m) for n, m in modules.items() if m is not None))


def loss_of(output, first, whole):
    """Weighs every value in its own way; ``first`` is the place of its first image in the whole batch."""
    weights = image(whole, *output.shape[1:], seed=2)
    return (output * weights[first : first + len(output)]).sum() / whole


def train(model, x, first=0, whole=None, steps=3):
    """What ``steps`` steps on a part of a batch give: outputs, dx, and the state of the model."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    found = {}
    for step in range(steps):
        optimizer.zero_grad()
        inputs = x.clone().requires_grad_()
        output = model(inputs)
        processes = 1 if whole is None else dist.get_world_size()  # DDP averages over them
        (processes * loss_of(output, first, whole or len(x))).backward()
        optimizer.step()
        found |= {f"output {step}": output.detach(), f"dx {step}": inputs.grad / processes}
    found |= {f"grad {n}": p.grad for n, p in model.named_parameters()}
    return {n.replace("module.", ""): t.clone() for n, t in (found | model.state_dict()).items()}


def my_part(split, *shape):
    """This process' images of a batch, and the place of the first of them."""
    x, rank = image(sum(split), *shape), dist.get_rank()
    first = sum(split[:rank])
    return x[first : first + split[rank]], first


# -- scenarios: what a process finds ---------------------------------------------------------------

SCENARIOS = {}


def scenario(function=None, /, **arguments):
    """Make a function a scenario, under its name and its arguments."""
    if function is None:
        return functools.partial(scenario, **arguments)
    SCENARIOS[" ".join([function.__name__, *map(str, arguments.values())])] = functools.partial(
        function, **arguments
    )
    return function


convert = nn.SyncBatchNorm.convert_sync_batchnorm


def trained(model, split, *shape, then=None):
    """Train ``model`` on this process' part. ``then`` changes the module inside DistributedDataParallel.

    That itself takes no nn.SyncBatchNorm on a CPU, where PyTorch has none.
    """
    x, first = my_part(split, *shape)
    parallel = DistributedDataParallel(model)
    if then is not None:
        parallel.module = then(parallel.module)
    return train(parallel, x, first, sum(split))


@scenario(split=EVEN, recompute_conv=True)
@scenario(split=UNEVEN, recompute_conv=True)
@scenario(split=UNEVEN, recompute_conv=False)
def converted_then_fused(split, recompute_conv):
    model = randomised(Net())
    if not recompute_conv:  # its norm is not fused then, and nn.SyncBatchNorm wants a GPU
        model.bn4 = nn.Identity()
    return trained(model, split, 3, 6, 6, then=lambda m: fuse_conv_bn(convert(m), recompute_conv))


@scenario(split=UNEVEN)
def fused_then_converted(split):
    return trained(fuse_conv_bn(randomised(Net())), split, 3, 6, 6, then=convert)


@scenario
def in_slabs():
    model = randomised(Net())
    return trained(model, UNEVEN, 3, 6, 6, then=lambda m: fuse_conv_bn(convert(m), slab_size=2))


@scenario
def each_on_its_own():
    """Without a group, a process has the statistics of its own images; DDP averages gradients alone."""
    x, first = my_part(UNEVEN, 3, 6, 6)
    model = fuse_conv_bn(randomised(Net()))
    return train(model, x)


BLOCKS = {
    "recompute": {"backward": "recompute"},
    "algebra": {"kernel": 1, "backward": "algebra"},
    "before": {"after": False},
    "after": {"before": False, "backward": "recompute"},
    "slabs": {"backward": "recompute", "slab_size": 1},
    "algebra in slabs": {"kernel": 1, "backward": "algebra", "slab_size": 2},
}


def split_options(name):
    options = dict(BLOCKS[name])
    return {k: options.pop(k) for k in ("before", "after", "kernel") if k in options}, options


def fused_block(name, group):
    modules, options = split_options(name)
    model = randomised(chain(**block(**modules)))
    modules = {n: getattr(model, n, None) for n in block()}
    if group == "argument":
        return trained(FusedBlock2d(**modules, **options, process_group=dist.group.WORLD), UNEVEN, 3, 5, 4)
    if group == "converted after":
        return trained(FusedBlock2d(**modules, **options), UNEVEN, 3, 5, 4, then=convert)

    def then(model):
        modules = {n: getattr(model, n, None) for n in block()}
        return FusedBlock2d(**{n: m and convert(m) for n, m in modules.items()}, **options)

    return trained(model, UNEVEN, 3, 5, 4, then=then)


for _name in BLOCKS:
    for _group in ("argument", "converted before", "converted after"):
        scenario(name=_name, group=_group)(fused_block)


def pair():
    return randomised(nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6))))


@scenario(how="constructor")
@scenario(how="from_pair")
@scenario(how="converted")
@scenario(how="from a converted pair")
@scenario(how="deepcopy")
def fused_pair(how):
    group, model, then = dist.group.WORLD, pair(), None
    if how == "constructor":
        model = FusedConvBN2d(3, 6, 3, process_group=group).double()
        model.load_state_dict(pair().state_dict())
    elif how == "converted":
        model, then = FusedConvBN2d.from_pair(*model), convert
    elif how == "from a converted pair":

        def then(model):
            return FusedConvBN2d.from_pair(*convert(model))

    else:
        model = FusedConvBN2d.from_pair(*model, process_group=group)
    return trained(copy.deepcopy(model) if how == "deepcopy" else model, UNEVEN, 3, 5, 4, then=then)


class Functional(nn.Module):
    """`fused_conv_bn2d` with a group."""

    def __init__(self, group):
        super().__init__()
        self.conv, self.bn, self.group = *pair(), group

    def forward(self, x):
        bn = self.bn
        stats = (bn.running_mean, bn.running_var, bn.training)
        return fused_conv_bn2d(
            x,
            self.conv.weight,
            self.conv.bias,
            bn.weight,
            bn.bias,
            *stats,
            num_batches_tracked=bn.num_batches_tracked,
            process_group=self.group,
        )


@scenario
def functional():
    return trained(Functional(dist.group.WORLD), UNEVEN, 3, 5, 4)


@scenario
def a_group_of_one():
    mine = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    x, _ = my_part(UNEVEN, 3, 5, 4)
    return train(FusedConvBN2d.from_pair(*pair(), process_group=mine), x)


@scenario
def one_pixel_each():
    """Two values in all are enough for a variance, though each process has one."""
    modules = {n: m for n, m in randomised(chain(**block(kernel=1))).named_children()}
    return trained(FusedBlock2d(**modules, process_group=dist.group.WORLD), (1, 1), 3, 1, 1)


def pixels(rank):
    """An image of its own size for each process, as a pointwise block may have them."""
    return image(1, 3, *((4, 4), (2, 5))[rank], seed=rank)


@scenario
def images_of_two_sizes():
    modules = {n: m for n, m in randomised(chain(**block(kernel=1))).named_children()}
    model = FusedBlock2d(**modules, process_group=dist.group.WORLD)
    z = model(pixels(dist.get_rank()))
    (z**3).sum().backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    return {"output": z.detach().flatten(2), **{n: p.grad for n, p in model.named_parameters()}}


@scenario
def eval_mode_says_nothing():
    """One process alone: it would wait for ever for the other."""
    if dist.get_rank():
        return {}
    model = FusedConvBN2d.from_pair(*pair(), process_group=dist.group.WORLD).eval()
    converted = convert(fuse_conv_bn(randomised(Net()))).eval()
    own = FusedConvBN2d.from_pair(*pair(), process_group=dist.group.WORLD).eval()
    own.bn.running_mean = own.bn.running_var = None  # then it takes the batch's, of this process
    return {
        "pair": model(image(2, 3, 5, 4)),
        "net": converted(image(2, 3, 6, 6)),
        "own": own(image(2, 3, 5, 4)),
    }


@scenario
def an_empty_batch():
    """One process alone: the error comes before anything is sent."""
    if dist.get_rank():
        return {}
    found = {}
    models = {
        "after": FusedConvBN2d.from_pair(*pair(), process_group=dist.group.WORLD),
        "before": FusedBlock2d(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(3), process_group=dist.group.WORLD
        ).double(),
        "converted": convert(fuse_conv_bn(randomised(Net()))),
    }
    for name, model in models.items():
        before = copy.deepcopy(model.state_dict())
        try:
            model(image(0, 3, 6, 6))
            found[name] = "no error"
        except ValueError as error:
            found[name] = str(error)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    return found


@scenario
def compiled():
    model = convert(fuse_conv_bn(randomised(Net())))
    x, first = my_part(UNEVEN, 3, 6, 6)
    model.compile(backend="aot_eager_decomp_partition")
    found = train(model, x, first, 6)
    for name in [n for n in found if n.startswith("grad")]:  # without DDP
        dist.all_reduce(found[name])
        found[name] /= 2
    return {n: t for n, t in found.items() if n.startswith("output 0") or n.startswith("dx 0")}


@scenario
def accumulated():
    """Two backward passes before the gradients are averaged, as for a batch that does not fit."""
    model = DistributedDataParallel(randomised(Net()))
    model.module = convert(fuse_conv_bn(model.module))
    x, first = my_part(UNEVEN, 3, 6, 6)
    with model.no_sync():
        (2 * loss_of(model(x), first, 6)).backward()
    (2 * loss_of(model(x), first, 6)).backward()
    return {f"grad {n.replace('module.', '')}": p.grad for n, p in model.named_parameters()}


class Stack(nn.Sequential):
    def __init__(self):
        super().__init__(Net(), nn.Sequential(nn.ReLU(), nn.Conv2d(5, 8, 3), nn.BatchNorm2d(8)))


def images_kept(model, x):
    """Bytes of the images that autograd keeps; those of FSDP's parameters have no memory of their own."""
    kept = {}

    def pack(t):
        if t.dim() == 4 and len(t) == len(x):
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    del output
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@scenario(how="not at all")
@scenario(how="fuse and shard the whole")
@scenario(how="fuse parts and shard each")
@scenario(how="fuse the whole and shard parts")
@scenario(how="shard and fuse")
def fully_sharded(how):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh, model = init_device_mesh("cpu", (2,)), randomised(Stack())
    if "whole" in how:
        fuse_conv_bn(model)
    for part in model if "whole" != how.split()[-1] and how != "not at all" else ():
        if how == "fuse parts and shard each":
            fuse_conv_bn(part)
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if how == "shard and fuse":
        fuse_conv_bn(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x = image(7, 3, 9, 9, seed=dist.get_rank())
    found = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            optimizer.zero_grad()
            output = model(x)
            loss_of(output, 0, 7).backward()
            optimizer.step()
            found[f"output {step}"] = output.detach()
        found |= {n: p.full_tensor().detach() for n, p in model.named_parameters()}
        found["kept"] = images_kept(model, x)
        report = str(getattr(model, "fusion_report", ""))
    found["warnings"] = [str(w.message) for w in caught if "unfused" in str(w.message)]
    with torch.no_grad():
        found["output unfused"] = unfuse(model)(x)
    found["sharded"] = [isinstance(m, FSDPModule) for m in (model, *model)]
    found["report"] = report
    return found


# -- running them ----------------------------------------------------------------------------------


def start(rank, folder, work):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    method = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2, timeout=timeout)
    work(rank, Path(folder))
    dist.destroy_process_group()


def all_scenarios(rank, folder):
    found = {}
    for name, run in SCENARIOS.items():
        try:
            found[name] = run()
        except Exception:
            found[name] = traceback.format_exc()
            # the other process may wait in another scenario: nothing that follows could be believed
            break
    torch.save(found, folder / f"{rank}.pt")


def two_processes(folder, work):
    """Run ``work`` in two processes, and kill what has not ended in time; returns their exit codes."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=start, args=(rank, str(folder), work)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found: {scenario: [of process 0, of process 1]}."""
    folder = tmp_path_factory.mktemp("processes")
    codes = two_processes(folder, all_scenarios)
    files = [folder / f"{rank}.pt" for rank in (0, 1)]
    assert all(file.exists() for file in files), f"exit codes {codes}"
    of_process = [torch.load(file, weights_only=False) for file in files]
    return {name: [o.get(name, "was not reached") for o in of_process] for name in SCENARIOS}


def of(found, name):
    for process in found[name]:
        assert isinstance(process, dict), process
    return found[name]


def assert_is_the_whole(processes, wanted):
    """Outputs and dx one behind the other, and all else in each process, are those of the whole batch."""
    for name, value in wanted.items():
        ours = [p[name] for p in processes if name in p]
        assert len(ours) == 2, name
        if name.startswith(("output", "dx")):
            torch.testing.assert_close(torch.cat(ours), value, msg=lambda m, n=name: f"{n}: {m}")
        else:
            for t in ours:
                torch.testing.assert_close(t, value, msg=lambda m, n=name: f"{n}: {m}")


@functools.cache
def whole(make, batch, *shape):
    return train(make(), image(batch, *shape))


def net():
    return randomised(Net())


@pytest.mark.parametrize(
    "name",
    [n for n in SCENARIOS if n.split()[0] in ("converted_then_fused", "fused_then_converted", "in_slabs")],
)
def test_a_fused_model_trains_as_one_process_with_the_whole_batch(found, name):
    def without_the_last():
        model = net()
        model.bn4 = nn.Identity()
        return model

    wanted = whole(without_the_last if name.endswith("False") else net, 6, 3, 6, 6)
    assert_is_the_whole(of(found, name), wanted)


def test_without_a_group_each_has_its_own_statistics(found):
    x, processes = image(6, 3, 6, 6), of(found, "each_on_its_own")
    for process, part in zip(processes, x.split(UNEVEN), strict=True):
        wanted = train(net(), part)
        for name, value in wanted.items():
            torch.testing.assert_close(process[name], value, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.allclose(processes[0]["bn1.running_mean"], processes[1]["bn1.running_mean"])


@pytest.mark.parametrize("group", ["argument", "converted before", "converted after"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(found, name, group):
    wanted = whole(lambda: randomised(chain(**block(**split_options(name)[0]))), 6, 3, 5, 4)
    assert_is_the_whole(of(found, f"fused_block {name} {group}"), wanted)


@pytest.mark.parametrize("name", [n for n in SCENARIOS if n.split()[0] in ("fused_pair", "functional")])
def test_pairs(found, name):
    assert_is_the_whole(of(found, name), whole(pair, 6, 3, 5, 4))


def test_a_group_of_one_process_is_no_group(found):
    for process, part in zip(of(found, "a_group_of_one"), image(6, 3, 5, 4).split(UNEVEN), strict=True):
        for name, value in train(pair(), part).items():
            torch.testing.assert_close(process[name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_one_value_in_each_process(found):
    wanted = whole(lambda: randomised(chain(**block(kernel=1))), 2, 3, 1, 1)
    assert_is_the_whole(of(found, "one_pixel_each"), wanted)


def test_images_of_two_sizes(found):
    model, processes = randomised(chain(**block(kernel=1))), of(found, "images_of_two_sizes")
    z = model(torch.cat([pixels(rank).flatten(2) for rank in (0, 1)], 2)[:, :, None])
    (z**3).sum().backward()
    torch.testing.assert_close(torch.cat([p["output"] for p in processes], 2), z[:, :, 0])
    for name, p in model.named_parameters():
        torch.testing.assert_close(processes[0][name], p.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_in_eval_mode_nothing_is_sent(found):
    process = of(found, "eval_mode_says_nothing")[0]
    torch.testing.assert_close(process["pair"], pair().eval()(image(2, 3, 5, 4)))
    torch.testing.assert_close(process["net"], net().eval()(image(2, 3, 6, 6)))
    torch.testing.assert_close(process["own"], pair()(image(2, 3, 5, 4)))


def test_an_empty_batch_is_an_error_at_once(found):
    process = of(found, "an_empty_batch")[0]
    assert set(process) == {"after", "before", "converted"}
    for message in process.values():
        assert message.startswith("input: ") and "empty" in message


def test_compiled(found):
    wanted = whole(net, 6, 3, 6, 6)
    processes = of(found, "compiled")
    assert_is_the_whole(processes, {n: wanted[n] for n in ("output 0", "dx 0")})


def test_gradients_accumulate(found):
    model = net()
    for _ in "12":
        loss_of(model(image(6, 3, 6, 6)), 0, 6).backward()
    assert_is_the_whole(of(found, "accumulated"), {f"grad {n}": p.grad for n, p in model.named_parameters()})


@pytest.mark.parametrize("how", ["the whole", "parts and shard each"])
def test_fully_shard(found, how):
    """FSDP2 trains a fused model as it trains a plain one, in less memory."""
    name = "fully_sharded fuse and shard the whole" if how == "the whole" else f"fully_sharded fuse {how}"
    for fused, plain in zip(of(found, name), of(found, "fully_sharded not at all"), strict=True):
        assert fused["warnings"] == plain["warnings"] == []
        assert fused["kept"] < plain["kept"]
        assert fused["sharded"] == [True, how != "the whole", how != "the whole"]
        for key in (k for k, v in plain.items() if isinstance(v, torch.Tensor)):
            torch.testing.assert_close(fused[key], plain[key], msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("how", ["fuse the whole and shard parts", "shard and fuse"])
def test_fully_shard_in_the_wrong_order_says_so(found, how):
    """The result is right, but it is the plain model's, and the model says why."""
    for fused, plain in zip(
        of(found, f"fully_sharded {how}"), of(found, "fully_sharded not at all"), strict=True
    ):
        said = " ".join(fused["warnings"]) + fused["report"]
        assert "FSDP does not support deepcopy" in said
        assert fused["kept"] == plain["kept"]
        for key in (k for k, v in plain.items() if isinstance(v, torch.Tensor)):
            torch.testing.assert_close(fused[key], plain[key], msg=lambda m, k=key: f"{k}: {m}")


# -- a process that dies ---------------------------------------------------------------------------


SECONDS = 10  # that a group waits


def one_is_gone(rank, folder, when, how):
    group = dist.new_group(timeout=datetime.timedelta(seconds=SECONDS))
    model = FusedConvBN2d.from_pair(*pair(), process_group=group)
    model(image(2, 3, 5, 4)).sum().backward()
    noted = folder / "error"

    def step():
        if rank == 1 and when == "forward":
            go(how, noted)
        z = model(image(2, 3, 5, 4))
        if rank == 1:
            go(how, noted)
        z.sum().backward()

    try:
        step()
    except Exception as error:
        noted.write_text(f"{type(error).__name__}: {error}")
    os._exit(0)  # there is nobody to take leave of


def go(how, noted):
    """Die, or sleep until the other process has noticed."""
    while how == "asleep" and not noted.exists():
        time.sleep(0.1)
    os._exit(1)


@pytest.mark.parametrize(("when", "how"), [("forward", "dead"), ("backward", "dead"), ("backward", "asleep")])
def test_a_process_that_is_gone_leaves_an_error(tmp_path, when, how):
    codes = two_processes(tmp_path, functools.partial(one_is_gone, when=when, how=how))
    assert codes == [0, 1]  # not killed: the error came without waiting for good
    assert "Error" in (tmp_path / "error").read_text()


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["world", 0, -100, object()], ids=str)
def test_a_group_that_is_none_is_named(bad):
    message = f"process_group must be None or a torch.distributed.ProcessGroup, got {type(bad).__name__}"
    conv, bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    for make in (
        lambda: FusedBlock2d(conv, None, None, bn, process_group=bad),
        lambda: FusedConvBN2d(3, 4, 1, process_group=bad),
        lambda: FusedConvBN2d.from_pair(conv, bn, process_group=bad),
        lambda: fused_conv_bn2d(torch.zeros(2, 3, 4, 4), conv.weight, process_group=bad),
    ):
        with pytest.raises(ValueError, match=message):
            make()
