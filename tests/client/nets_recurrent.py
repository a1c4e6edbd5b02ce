"""Recurrent networks by hand, with the groups of their units."""

from typing import Any

import torch
from torch import Tensor, nn

import secateur
from secateur.grouping import Member
from tests.client.net import Net, inputs


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(20, 6), layer, nn.Linear(features, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.embed(tokens))[0][:, -1])
        return out


def recurrent(layer: Any, gates: int) -> Net:
    """All layers and directions have one hidden size, so unit i is cut in all of them."""
    hidden, directions = layer.hidden_size, 2 if layer.bidirectional else 1
    blocks = [gate * hidden + unit for unit in range(hidden) for gate in range(gates)]
    both = [side * hidden + unit for unit in range(hidden) for side in range(directions)]
    members, first = [secateur.member("head.weight", 1, indices=both, units=hidden)], []
    suffixes = ("", "_reverse")[:directions]
    for number in range(layer.num_layers):
        for suffix in suffixes:
            end = f"l{number}{suffix}"
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                rows = {"indices": blocks, "units": hidden}
                members.append(secateur.member(f"layer.{name}_{end}", **rows))
            members.append(secateur.member(f"layer.weight_hh_{end}", 1))
            columns = secateur.member(f"layer.weight_ih_{end}", 1, indices=both, units=hidden)
            first.append(secateur.member(f"layer.weight_ih_{end}", 1)) if number == 0 else (
                members.append(columns)
            )
    groups = [
        secateur.group("hidden", *members),
        secateur.group("embed", secateur.member("embed.weight", 1), *first),
    ]
    return Net(Recurrent(layer, hidden * directions), groups, torch.randint(20, (3, 5)))


def lstm() -> Net:
    return recurrent(nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True), 4)


def gru() -> Net:
    return recurrent(nn.GRU(6, 8, batch_first=True), 3)


class Cells(nn.Module):
    """An LSTM cell and a GRU cell."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.LSTMCell(4, 6), nn.GRUCell(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = None
        second = None
        for step in x.unbind(1):
            hidden = self.one(step, hidden)
            second = self.two(hidden[0], second)
        out: Tensor = self.head(second)
        return out


def cells() -> Net:
    def rows(name: str, gates: int, hidden: int) -> list[Member]:
        indices = [gate * hidden + unit for unit in range(hidden) for gate in range(gates)]
        leaves = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        found = [
            secateur.member(f"{name}.{leaf}", indices=indices, units=hidden) for leaf in leaves
        ]
        return [*found, secateur.member(f"{name}.weight_hh", 1)]

    groups = [
        secateur.group("one", *rows("one", 4, 6), secateur.member("two.weight_ih", 1)),
        secateur.group("two", *rows("two", 3, 5), *inputs("head")),
    ]
    return Net(Cells(), groups, torch.randn(2, 3, 4))
