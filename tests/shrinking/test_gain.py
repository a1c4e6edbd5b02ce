"""What a smaller module gains, against counting by hand."""

import random
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import secateur


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 5)
    )


def test_a_gain_counts_each_forward_pass() -> None:
    before, after, inputs = network(8), network(2), torch.randn(1, 3, 6, 6)
    before.train()
    gain = secateur.gain(before, after, inputs)
    for cost, width in ((gain.before, 8), (gain.after, 2)):
        assert cost.parameters == 27 * width + 16 * width * 5 + 5
        assert cost.bytes == 4 * cost.parameters
        assert cost.macs == 16 * 27 * width + 16 * width * 5
        assert cost.seconds > 0
    assert gain.speedup == gain.before.seconds / gain.after.seconds
    assert before.training
    assert not any(parameter.grad is not None for parameter in before.parameters())
    lines = str(gain).splitlines()
    assert lines[1].split() == ["parameters", "861", "219", "3.93"]
    assert lines[3].split() == ["multiply-accumulates", "4,096", "1,024", "4.00"]
    assert "4,096" in gain._repr_html_()


def test_a_time_has_a_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the test: passes of `before` take 1 to 11 ms, those of `after` 2 to 22 ms."""
    passes = [one for count in range(1, 12) for one in (count, 2 * count)]
    random.Random(0).shuffle(passes)
    before, after = passes[::2], passes[1::2]
    times = iter([time for one in passes for time in (0.0, one / 1000)])
    clock = SimpleNamespace(perf_counter=lambda: next(times))
    monkeypatch.setattr(sys.modules["secateur.gain"], "time", clock)
    gain = secateur.gain(network(2), network(1), torch.randn(1, 3, 6, 6))
    for cost, found in ((gain.before, before), (gain.after, after)):
        assert cost.seconds == sorted(found)[5] / 1000
        assert (cost.fastest, cost.slowest) == (min(found) / 1000, max(found) / 1000)
        assert cost.times == f"{sorted(found)[5]}.00 ms ({min(found)}.00-{max(found)}.00)"
        assert cost.times in str(gain)


class Buffers(nn.Module):
    """Two tied weights, a batch norm, and buffers that no group names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("table", torch.zeros(7, dtype=torch.int16))
        self.register_buffer("unsaved", torch.zeros(5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.norm(self.a(x) * self.b(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
def test_a_gain_counts_as_the_report_does(
    client: secateur.Client, is_masked: bool, keep: bool
) -> None:
    module, inputs = Buffers().eval(), torch.randn(4, 6)
    if is_masked:
        prune.random_unstructured(module.c, "weight", 0.5)  # type: ignore[no-untyped-call]
    groups = secateur.groups(module, inputs)
    spec = secateur.grouped(groups, 4, scope="tensor", align=1)
    result = client.prune(module, spec, output="shrunk", keep=keep)
    gain, shrinkage = secateur.gain(module, result.shrink(module), inputs), result.report.shrinkage
    assert shrinkage is not None
    parameters = 6 * 8 + 8 + 8 + 8 * 3 + 3 + 4 * 8 + 1 + 7
    assert gain.before.parameters == shrinkage.parameters_before == parameters
    assert gain.before.bytes == shrinkage.bytes_before == 4 * parameters + 4 - 2 * 7
    assert gain.after.parameters == shrinkage.parameters == parameters - 4 * (6 + 2 + 3 + 4)
    assert gain.after.bytes == shrinkage.bytes


def test_inputs_are_a_tensor_arguments_or_keywords() -> None:
    class Named(nn.Linear):
        def forward(self, input: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return super().forward(input) * scale

    module, values = Named(4, 4), torch.ones(1, 4)
    for inputs in (values, (values, 2.0), {"input": values, "scale": 2.0}):
        assert secateur.gain(module, module, inputs).before.macs == 16


def test_a_tied_tensor_counts_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    assert secateur.gain(module, module, torch.ones(1, 4)).before.parameters == 16
