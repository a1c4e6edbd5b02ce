"""What a smaller module gains, against counting by hand."""

import torch
from torch import nn

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
