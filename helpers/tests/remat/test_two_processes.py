"""DDP, FSDP2, sums over processes and nn.SyncBatchNorm in two processes, as without `remat`."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as sync_batch_norm
from torch.nn.parallel import DistributedDataParallel

from helpers import remat
from helpers.predict import Held
from helpers.tests.processes import needs_gloo, two_processes
from helpers.tests.remat.support import (
    assert_close,
    check_scenario,
    gradients,
    image,
    network,
    randomised,
    under,
)


def steps(model, x, dz, cost):
    """Two steps of SGD; the gradients of the second, and the parameters after it."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        with under(cost):
            out = model(x)
        out.backward(dz)
        optimizer.step()
    found = {}
    for name, p in model.named_parameters():
        for what, t in (("", p.detach()), (".grad", p.grad)):
            t = t if t is None else t.full_tensor() if hasattr(t, "full_tensor") else t
            found[name.removeprefix("module.") + what] = t
    return found


def distributed(rank, folder):
    """DDP in three variants and FSDP2 block by block: as plain, at the prices that matter."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    x, dz = image(4, 3, 10, 9, seed=rank), image(4, 4, 10, 9, seed=10 + rank)
    ways = {
        "DDP": DistributedDataParallel,
        "unused": functools.partial(DistributedDataParallel, find_unused_parameters=True),
        "static": functools.partial(DistributedDataParallel, static_graph=True),
    }

    def sharded(model):
        for part in model:
            fully_shard(part, reshard_after_forward=True)
        return fully_shard(model)

    ways["FSDP2"] = sharded
    for name, way in ways.items():
        wanted = steps(way(network()), x, dz, None)
        for cost in (0, 1e9):
            assert_close(steps(way(network()), x, dz, cost), wanted, f"{name}, max_cost {cost},")


class Reduced(torch.autograd.Function):
    """As in tensor parallel layers: the sum over all processes takes the input's memory."""

    @staticmethod
    def forward(ctx, x):
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, dx):
        return dx


def collectives(rank, folder):
    """Sums over the processes that autograd does not see, in the memory of values of each kind."""

    def reduced(t):
        torch.distributed.all_reduce(t.detach())
        return t

    def waited_for(t):
        torch.distributed.all_reduce(t.detach(), async_op=True).wait()
        return t

    def scenario(context, at, change):
        model, x = network(), image(4, 3, 10, 9, seed=rank)
        with context():
            h = x
            for i, layer in enumerate([*model[0][:2], nn.ReLU(change is reduced), *model[1], model[2]]):
                h = layer(h)
                if i == at:
                    h = change(h)
        out = F.linear(h.flatten(1), torch.ones(5, h[0].numel(), dtype=h.dtype)).square()
        out.sum().backward()
        return gradients(model)

    for at in range(5):
        for change in (reduced, waited_for, Reduced.apply):
            check_scenario(functools.partial(scenario, at=at, change=change))


def add_cpu_kernels(library):
    """What nn.SyncBatchNorm calls, and PyTorch has for GPUs alone."""

    def cpu(kernel):
        library.impl(kernel.__name__, kernel, "CPU")

    @cpu
    def batch_norm_stats(y, eps):
        return y.mean((0, 2, 3)), (y.var((0, 2, 3), correction=0) + eps).rsqrt()

    @cpu
    def batch_norm_gather_stats_with_counts(
        y, means, invstds, running_mean, running_var, momentum, eps, counts
    ):
        m, counts = counts.sum(), counts[:, None]
        mean = (means * counts).sum(0) / m
        var = ((invstds**-2 - eps + (means - mean).square()) * counts).sum(0) / m
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * m / (m - 1), momentum)
        return mean, (var + eps).rsqrt()

    @cpu
    def batch_norm_elemt(y, gamma, beta, mean, invstd, eps):
        mean, invstd, gamma, beta = (t[:, None, None] for t in (mean, invstd, gamma, beta))
        return (y - mean) * invstd * gamma + beta

    @cpu
    def batch_norm_backward_reduce(dz, y, mean, invstd, gamma, *needs):
        sum_dz, sum_dz_y = (t.sum((0, 2, 3)) for t in (dz, dz * (y - mean[:, None, None])))
        return sum_dz, sum_dz_y, sum_dz_y * invstd, sum_dz

    @cpu
    def batch_norm_backward_elemt(dz, y, mean, invstd, gamma, sum_dz, sum_dz_y, counts):
        m = counts.sum()
        mean, invstd, gamma, *means = (
            t[:, None, None] for t in (mean, invstd, gamma, sum_dz / m, sum_dz_y * invstd.square() / m)
        )
        return (dz - means[0] - (y - mean) * means[1]) * invstd * gamma


class Synchronised(nn.SyncBatchNorm):
    """On a CPU."""

    def forward(self, y):
        group, statistics = torch.distributed.group.WORLD, (self.running_mean, self.running_var)
        numbers = self.eps, self.momentum, group, group.size()
        return sync_batch_norm.apply(y, self.weight, self.bias, *statistics, *numbers)


def synchronised(rank, folder):
    """nn.SyncBatchNorm keeps y, and its output is recomputed; also where y is the network's input."""

    def scenario(context):
        torch.manual_seed(0)
        acts = nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(), nn.Hardswish()
        layers = [m for act in acts for m in (nn.Conv2d(8, 8, 1), Synchronised(8), act)]
        model = randomised(nn.Sequential(Synchronised(8), *layers, nn.Conv2d(8, 4, 1)).double())
        x = image(4 + rank, 8, 6, 5, seed=rank).requires_grad_()
        with Held() as held, context():
            out = model(x)
        found.append(held.held)
        out.backward(image(*out.shape, seed=9))
        return gradients(model) | dict(model.named_buffers()) | {"out": out.detach(), "x": x.grad}

    found = []
    with torch.library._scoped_library("aten", "IMPL") as library:
        add_cpu_kernels(library)
        check_scenario(scenario)
        norm, x = Synchronised(8).double(), image(4, 8, 6, 5).requires_grad_()
        with torch.inference_mode(), remat():
            assert norm(x).shape == x.shape
    plain, *ours = found
    assert all(held < 0.65 * plain for held in ours), found


def in_two_processes(rank, folder):
    distributed(rank, folder)
    collectives(rank, folder)
    synchronised(rank, folder)


@pytest.mark.distributed
@needs_gloo
def test_two_processes(tmp_path):
    assert two_processes(tmp_path, in_two_processes) == [0, 0]
