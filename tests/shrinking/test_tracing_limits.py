"""What secateur.groups leaves whole, how it names tensors, and what it refuses."""

import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, prune

import secateur
from tests.shrinking.cutting import difference, members
from tests.shrinking.nets import prepared


class Small(nn.Module):
    """Two Linears, and what a test does between them."""

    def __init__(self, between: str = "relu") -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(8, 3)
        self.c = nn.Linear(6, 8)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.between == "twice":
            y = y * self.c(x)
        elif self.between == "input":
            y = y + F.pad(x, (0, 2))
        elif self.between == "positions":
            y = torch.cat([y[:, :3].sigmoid(), y[:, 3:]], 1)
        elif self.between == "shuffle":
            y = y.view(-1, 2, 4).transpose(1, 2).flatten(1)
        elif self.between == "softmax":
            y = y.softmax(1)
        elif self.between == "unknown":
            y = torch.cummax(y, 1).values
        elif self.between == "quotient":
            y = 1 / y
        elif self.between == "mean":
            y = y - y.mean(1, keepdim=True)
        elif self.between == "attention":
            y = F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])[:, 0]
        elif self.between == "values":
            y = y if bool(y.sum() > 0) else -y
        return self.b(y)  # type: ignore[no-any-return]


X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)


def small(between: str) -> secateur.TracedGroups:
    return secateur.groups(prepared(Small(between)), X)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("input", "is combined with a tensor that is not cut"),
        ("positions", "takes channels by their positions"),
        ("shuffle", "a reshape divides these slices"),
        ("softmax", "mixes the channels"),
        ("unknown", "secateur does not know this operation"),
        ("quotient", "secateur does not know this operation"),
        ("mean", "mixes the channels"),
        ("attention", "mixes the channels of a head"),
    ],
)
def test_what_cannot_be_cut_stays_whole_with_the_reason(between: str, reason: str) -> None:
    groups = small(between)
    assert groups == []
    assert reason in groups.kept["a.weight"]
    assert f"a.weight: whole: {groups.kept['a.weight']}" in str(groups)


def test_a_tied_tensor_is_one_member() -> None:
    module = Small("twice")
    module.c.weight = module.a.weight
    (group,) = secateur.groups(prepared(module), X)
    expected = [("a.bias", 0), ("a.weight", 0), ("b.weight", 1), ("c.bias", 0)]
    assert sorted(members(group)) == expected


def test_a_pair_has_the_name_of_its_parameter() -> None:
    module = Small()
    prune.l1_unstructured(module.a, "weight", 0.5)  # type: ignore[no-untyped-call]
    before = dict(module.a.__dict__)
    (group,) = secateur.groups(module.double(), X)
    assert sorted(members(group)) == [("a.bias", 0), ("a.weight", 0), ("b.weight", 1)]
    assert all(module.a.__dict__[name] is value for name, value in before.items())


def test_a_weight_that_is_computed_stays_whole() -> None:
    module = Small()
    parametrizations.weight_norm(module.a)
    groups = secateur.groups(prepared(module), X)
    assert groups == []
    assert "does not know" in groups.kept["a.parametrizations.weight.original1"]


def test_a_layer_without_effect_is_listed() -> None:
    assert small("relu").kept["c.weight"] == ("it is not used for these inputs")


@pytest.mark.parametrize("inputs", [(X,), [X], {"x": X}])
def test_inputs_are_a_tensor_arguments_or_keywords(inputs: object) -> None:
    groups = secateur.groups(prepared(Small()), inputs)
    assert [members(group) for group in groups] == [
        [("a.weight", 0), ("a.bias", 0), ("b.weight", 1)]
    ]


def test_what_cannot_be_traced_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("torch").level
    for between, inputs in [("values", X), ("relu", torch.zeros(2, 5)), ("relu", ())]:
        with pytest.raises(secateur.InvalidSpec, match=r"^module: torch\.export cannot") as error:
            secateur.groups(prepared(Small(between)), inputs)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500
    assert capfd.readouterr() == ("", "")  # torch writes graphs
    assert logging.getLogger("torch").level == level


def test_the_line_that_cannot_be_traced_is_named() -> None:
    with pytest.raises(secateur.InvalidSpec) as error:
        secateur.groups(prepared(Small("values")), X)
    path, line = re.search(r" \((\S+):(\d+)\); if the module runs", str(error.value)).groups()  # type: ignore[union-attr]
    assert "y if bool(y.sum() > 0) else -y" in Path(path).read_text().splitlines()[int(line) - 1]


class Packing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.GRU(3, 6, batch_first=True), nn.Linear(6, 2)
        self.is_packing = True

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([5, 3])
        if self.is_packing:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return self.fc(self.rnn(packed)[1][0])  # type: ignore[no-any-return]
        return self.fc(self.rnn(x)[1][0])  # type: ignore[no-any-return]


def test_a_module_that_packs_is_traced_without() -> None:
    module: Any = prepared(Packing())
    example = torch.randn(2, 5, 3).double()
    with pytest.raises(secateur.InvalidSpec, match="cannot trace it"):
        secateur.groups(module, example)
    module.is_packing = False
    groups = secateur.groups(module, example)
    module.is_packing = True
    assert [group.name for group in groups] == ["rnn.weight_ih_l0"]
    assert difference(module, example, groups, 0) < 1e-12


class Failing(nn.Module):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError(self.text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Short.\nIndeed.\n\nFor more see torch.", "Short. Indeed"),
        (f"One {'word ' * 30}end. Two {'word ' * 30}.", f"One {'word ' * 30}end"),
        ("word " * 100, f"{'word ' * 39}word ..."),
        ("", "ValueError"),
    ],
)
def test_a_long_error_ends_with_a_sentence_or_a_word(text: str, shown: str) -> None:
    with pytest.raises(secateur.InvalidSpec, match=re.escape(f"example_inputs: {shown} (")):
        secateur.groups(Failing(text), X)


def test_a_wrong_module_is_refused() -> None:
    with pytest.raises(secateur.InvalidSpec, match=r"^module: 3 is not a torch\.nn\.Module"):
        secateur.groups(3, X)


def test_without_torch_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "secateur.traced.exporting", None)
    with pytest.raises(secateur.SecateurError, match=r"pip install 'secateur\[trace\]'"):
        secateur.groups(3, X)
