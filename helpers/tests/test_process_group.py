"""fuse_conv_bn with a process group: two processes on the CPU do what one does with the whole batch."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers import fuse_conv_bn
from helpers.tests import test_distributed
from helpers.tests.test_distributed import two_processes

pytestmark = test_distributed.pytestmark


def network(seed=0):
    """Norm before with recomputation, norm before with algebra, a plain pair, each with a norm behind."""
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Conv2d(4, 16, 1),
        nn.BatchNorm2d(16),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 4, 3, stride=2, groups=2),
        nn.BatchNorm2d(4),
    ]
    net = nn.Sequential(*layers).double()
    for norm in net:
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return net


def data(sizes):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), 3, 8, 9, generator=generator, dtype=torch.float64)
    grad_out = torch.randn(sum(sizes), 4, 2, 3, generator=generator, dtype=torch.float64)
    return x.split(sizes), grad_out.split(sizes)


def same_as_one_process(rank, folder, sizes):
    xs, grads = data(sizes)
    alone, net, world = network(), network(), dist.group.WORLD
    whole = torch.cat(xs).requires_grad_()
    z = alone(whole)
    z.backward(torch.cat(grads))
    net = fuse_conv_bn(net, process_group=world)
    parallel = DistributedDataParallel(net)
    x = xs[rank].clone().requires_grad_()
    out = parallel(x)
    out.backward(2 * grads[rank])  # the gradients are averaged over the processes
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    close(out, z.split(sizes)[rank])
    close(x.grad / 2, whole.grad.split(sizes)[rank])
    for (name, p), q in zip(net.named_parameters(), alone.parameters(), strict=True):
        close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
    for (name, b), c in zip(net.named_buffers(), alone.buffers(), strict=True):
        close(b, c, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("sizes", [[3, 3], [5, 2]], ids=["equal", "unequal"])
def test_two_processes_are_one(tmp_path, sizes):
    assert two_processes(tmp_path, functools.partial(same_as_one_process, sizes=sizes)) == [0, 0]


def refused(rank, folder):
    net, world = network(), dist.group.WORLD
    with pytest.raises(ValueError, match="process_group needs recompute_conv=True"):
        fuse_conv_bn(net, recompute_conv=False, process_group=world)
    net.append(nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="process_group: 10 would be left to one process"):
        fuse_conv_bn(net, process_group=world)
    assert type(net) is nn.Sequential
    with pytest.raises(ValueError, match="process_group must be None or .*ProcessGroup, got str"):
        fuse_conv_bn(net, process_group="world")


def test_arguments_that_do_not_fit_are_named(tmp_path):
    assert two_processes(tmp_path, refused) == [0, 0]


def changed_later(rank, folder):
    """A norm that would run by itself from now on is an error, in training; in eval mode it is not."""
    x, world = data([3, 3])[0][rank], dist.group.WORLD
    hooked, replaced, parametrized = (fuse_conv_bn(network(), process_group=world) for _ in range(3))
    hooked[1].register_forward_hook(lambda *_: None)
    replaced[4].forward = functools.partial(nn.Conv2d.forward, replaced[4])
    nn.utils.parametrizations.weight_norm(parametrized[8])
    for net in (hooked, replaced, parametrized):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="would run unfused, over its own process alone"):
                net(x)
        net.eval()(x)


def test_a_norm_that_would_run_alone_later_is_an_error(tmp_path):
    assert two_processes(tmp_path, changed_later) == [0, 0]
