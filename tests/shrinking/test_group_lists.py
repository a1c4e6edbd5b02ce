"""What Python shows of groups, and how lists of them are read."""

import pytest
import torch
from torch import nn

import secateur
from tests.shrinking.nets import traced

CONFIG = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 9,
}


def test_a_group_has_a_name_members_and_a_line() -> None:
    members = [
        secateur.member("a.weight"),
        secateur.member("b.weight", dim=1, stride=4),
        secateur.member("mean", masked=False),
    ]
    group = secateur.group("channels", *members)
    assert (group.name, group.units, group.members) == ("channels", None, tuple(members))
    assert [(one.tensor, one.dim) for one in group.members] == [
        ("a.weight", 0),
        ("b.weight", 1),
        ("mean", 0),
    ]
    assert repr(group) == "channels: a.weight dim 0, b.weight dim 1, mean dim 0 (not masked)"
    with pytest.raises(AttributeError):
        group.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "sized",
    [
        secateur.member("b", stride=4, units=6),
        secateur.member("b", indices=range(6)),
        secateur.member("b", indices=range(12), units=6),
    ],
)
def test_any_member_says_how_many_units_there_are(sized: object) -> None:
    group = secateur.group("g", secateur.member("a"), sized)  # type: ignore[arg-type]
    assert group.units == 6
    assert str(group) == "g: 6 units: a dim 0, b dim 0"


def test_a_list_prints_one_line_for_each_group() -> None:
    groups = secateur.transformer_groups(CONFIG)
    lines = str(groups).splitlines()
    assert lines == [repr(group) for group in groups]
    assert len(lines) == 4
    assert all(line.startswith(f"{one.name}: ") for line, one in zip(lines, groups, strict=True))
    assert groups[lines[2].partition(": ")[0]] == groups[2]


def test_a_part_of_a_list_is_such_a_list(client: secateur.Client) -> None:
    module, inputs, groups = traced("LeNet")
    part = groups[1:3]
    assert type(part) is secateur.TracedGroups
    assert part.example_inputs is inputs
    assert part.kept == groups.kept
    assert [group.name for group in part] == ["conv2.weight", "fc1.weight"]
    assert len(groups) == 4  # is not changed
    assert type(secateur.transformer_groups(CONFIG)[:1]) is type(
        secateur.transformer_groups(CONFIG)
    )
    spec = secateur.grouped(part, 0.5, scope="tensor")
    small = client.prune(module, spec, output="shrunk").shrink(module)
    assert small.get_submodule("conv1").out_channels == 6
    assert small.get_submodule("conv2").out_channels == 8


def test_a_group_is_found_by_its_name() -> None:
    groups = secateur.groups(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), torch.zeros(1, 2))
    assert groups["0.weight"] is groups[0] is groups[-1]
    with pytest.raises(KeyError, match=r"no group has the name .2\.weight"):
        groups["2.weight"]
