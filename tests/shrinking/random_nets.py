"""Random convolutional networks for hypothesis."""

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.shrinking.nets import prepared

Step = tuple[str, int, int, int]
KINDS = ["conv", "up", "depthwise", "grouped", "bn", "act", "pool", "add", "mul", "cat", "halves"]
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9), st.integers(2, 5)),
    min_size=1,
    max_size=9,
)


class RandomNet(nn.Module):
    """Each step makes a tensor from earlier ones, the first of which is the input."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        self.plan: list[tuple[str, int, int]] = []
        widths = [4]
        for kind, i, j, width in steps:
            # Later tensors are likelier, so that networks are deep.
            a, b = (max(0, len(widths) - 1 - index // 2) for index in (i, j))
            kind = "act" if kind in ("halves", "grouped") and widths[a] % 2 else kind
            part, outputs = self._part(kind, widths[a], widths[b], 2 * width)
            self.parts.append(part)
            self.plan.append((kind, a, b))
            widths.append(outputs)
        self.fc1 = nn.Linear((sum(widths[:-3]) + 9 * widths[-1]), 6)
        self.fc2 = nn.Linear(6, 3)

    def _part(self, kind: str, a: int, b: int, width: int) -> tuple[nn.Module, int]:
        makers: dict[str, Callable[[], tuple[nn.Module, int]]] = {
            "conv": lambda: (nn.Conv2d(a, width, 3, padding=1), width),
            "up": lambda: (nn.ConvTranspose2d(a, width, 3, padding=1), width),
            "depthwise": lambda: (nn.Conv2d(a, 2 * a, 1, groups=a), 2 * a),
            "grouped": lambda: (nn.Conv2d(a, width, 1, groups=2, bias=False), width),
            "bn": lambda: (nn.BatchNorm2d(a), a),
            "cat": lambda: (nn.Identity(), a + b),
            "halves": lambda: (nn.Identity(), a // 2),
        }
        if kind in ("add", "mul"):
            return (nn.Identity() if a == b else nn.Conv2d(b, a, 1)), a
        return makers.get(kind, lambda: (nn.Identity(), a))()

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for (kind, a, b), part in zip(self.plan, self.parts, strict=True):
            made.append(self._step(kind, part, made[a], made[b]))
        pooled = [one.mean((2, 3)) for one in made[:-3]]
        x = torch.cat([*pooled, F.adaptive_avg_pool2d(made[-1], 3).flatten(1)], 1)
        return self.fc2(torch.sigmoid(self.fc1(x)))  # type: ignore[no-any-return]

    def _step(self, kind: str, part: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        if kind == "add":
            return a + part(b)  # type: ignore[no-any-return]
        if kind == "mul":
            return a * torch.sigmoid(part(b))
        if kind == "cat":
            return torch.cat([a, b], 1)
        if kind == "halves":
            first, second = a.chunk(2, 1)
            return first * torch.tanh(second)
        if kind == "act":
            return F.softplus(a)
        return F.max_pool2d(a, 3, 1, 1) if kind == "pool" else part(a)


def random_net(steps: list[Step]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return prepared(RandomNet(steps)), torch.randn(2, 4, 4, 4, dtype=torch.float64)
