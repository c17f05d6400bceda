"""The benchmark's networks: each is the same function, and holds what its name says."""

import functools

import pytest
import torch

from helpers.book import bench


@pytest.mark.parametrize("under_checkpoints", [bench.block_by_block, bench.stage_by_stage])
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "densenet121"])
def test_checkpoints_change_no_gradient(name, under_checkpoints):
    make = functools.partial(bench.real_network, name)
    plain, ours = make().double(), under_checkpoints(make()).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    want, got = plain(x), ours(x)
    assert torch.equal(got, want)
    assert any(isinstance(m, bench.Checkpointed) for m in ours.modules())
    grad_out = torch.randn_like(want)
    want.backward(grad_out)
    got.backward(grad_out)
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


def test_front_has_every_way():
    for name in bench.FRONT:
        ways = list(bench.front_of(name))
        assert ways[0] == "unfused" and ways[1:9] == [f"remat, {q}" for q in bench.FRONT_PRICES]
        assert ways[9:11] == ["checkpoint, blocks", "checkpoint, stages"]
        assert len(ways) == 11 + len(bench.BUDGETS.get(name, ()))


def test_front_is_a_parameter(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(bench, "run", lambda *args: called.append(args))
    assert bench.main(["FRONT=1", "QUICK=1"]) == 0 and called[0][-1] is True
    assert bench.main(["QUICK=1"]) == 0 and called[1][-1] is False
    assert bench.main(["FRONT=much"]) == 2
    assert "FRONT must be of type int" in capsys.readouterr().err
