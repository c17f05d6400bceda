"""FusedConvBN2d in two processes trains as the pair does there: each with its own batch, and one gradient."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers import FusedConvBN2d
from helpers.tests.processes import needs_gloo, two_processes

pytestmark = [pytest.mark.distributed, needs_gloo]


def network(fused):
    """The same parameters in each process, fused or not."""
    torch.manual_seed(0)
    layers = []
    for channels in ((3, 4), (4, 5)):
        pair = nn.Conv2d(*channels, 3, padding=1), nn.BatchNorm2d(channels[1])
        layers += [FusedConvBN2d.from_pair(*pair, slab_size=2) if fused else nn.Sequential(*pair), nn.ReLU()]
    return nn.Sequential(*layers).double()


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model[::2]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS = {"DDP": DistributedDataParallel, "FSDP2": sharded}


def train(way, fused, rank):
    """The model's tensors after three steps; the second step has a gradient accumulated before it."""
    model = WAYS[way](network(fused))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1 + rank)
    for images in (5, 3, 4):
        x, dz = (torch.randn(images, c, 6, 7, dtype=torch.float64, generator=generator) for c in (3, 5))
        if images == 3 and way == "DDP":
            with model.no_sync():
                model(x).backward(dz)
        model(x).backward(dz)
        optimizer.step()
        optimizer.zero_grad()
    tensors = model.state_dict().values()
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]


def trains_as_the_pair(rank, folder, way):
    ours, wanted = (train(way, fused, rank) for fused in (True, False))
    start = network(True).state_dict().values()
    # A bias in front of the norm has the gradient 0; the pair's is rounding.
    torch.testing.assert_close(ours, wanted)
    assert not any(torch.equal(t, s) for t, s in zip(ours, start, strict=True) if t.dim() == 4)


@pytest.mark.parametrize("way", WAYS)
def test_trains_as_the_pair_does_in_two_processes(tmp_path, way):
    assert two_processes(tmp_path, functools.partial(trains_as_the_pair, way=way)) == [0, 0]
