"""Groups that forget a tensor: the first layer that does not fit, or differs, is named."""

import re

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import InvalidStateDict
from secateur.grouping import Group
from secateur_proto import spec_pb2 as pb
from tests.shrinking.cutting import shrink
from tests.shrinking.nets import traced


def message_of(name: str, group: str) -> pb.Group:
    """A copy of a traced group."""
    found = pb.Group()
    found.CopyFrom(next(one.message for one in traced(name)[2] if one.message.name == group))
    return found


@pytest.mark.parametrize(
    ("name", "group", "forgotten", "at"),
    [
        ("LeNet", "conv1.weight", "conv2.weight", "conv2: takes 6 inputs, and conv1 makes"),
        ("LeNet", "conv2.weight", "fc1.weight", "fc1: takes 256 inputs, and conv2 makes"),
        ("LeNet", "fc1.weight", "fc2.weight", "fc2: takes 120 inputs, and fc1 makes"),
        ("LeNet", "conv1.weight", "conv1.bias", "conv1: bias has shape"),
        (
            "ResNet-18",
            "layers.1.0.conv2.weight",
            "layers.1.1.conv1.weight",
            "layers.1.1.conv1: takes 16 inputs, and ",
        ),
        ("ResNet-18", "conv1.weight", "layers.0.0.bn2", "layers.0.0.bn2: takes"),
        (
            "MobileNetV2",
            "features.4.body.0.weight",
            "features.4.body.4.bias",
            "features.4.body.4: bias has shape",
        ),
        (
            "MobileNetV2",
            "features.4.body.0.weight",
            "features.4.body.3.weight",
            "features.4.body.3: takes 48 ",
        ),
        ("U-Net", "down1.0.weight", "join1.0.weight", "join1.0: takes "),
        ("decoder", "fc.weight", "up1.weight", "up1: fails in the shrunk module: "),
        (
            "LSTM, 2 layers, both directions",
            "rnn.weight_ih_l0",
            "rnn.weight_hh_l1",
            "rnn: weight_hh_l1 has shape",
        ),
        ("LSTM", "rnn.weight_ih_l0", "fc.weight", "fc: fails in the shrunk module: "),
        ("cells", "lstm.weight_ih", "gru.weight_ih", "gru: fails in the shrunk module: "),
        (
            "TransformerEncoder",
            "encoder.layers.0.linear1.weight",
            "encoder.layers.0.linear2.weight",
            "encoder.layers.0.linear2: fails in the shrunk module: ",
        ),
    ],
)
def test_the_first_layer_that_does_not_fit_is_named(
    name: str, group: str, forgotten: str, at: str
) -> None:
    module, example, _ = traced(name)
    message = message_of(name, group)
    kept = [one for one in message.members if not one.tensor.startswith(forgotten)]
    assert len(kept) < len(message.members)
    forgetful = Group(pb.Group(name=message.name, members=kept))
    for given in [example] if "fails" in at else [None, example]:
        with pytest.raises(InvalidStateDict) as error:
            shrink(module, [forgetful], given)
        assert str(error.value).startswith(at)


def test_two_layers_that_are_added_are_named() -> None:
    module, example, _ = traced("ResNet-18")
    message = message_of("ResNet-18", "conv1.weight")
    forgotten = ("layers.0.0.conv2.weight", "layers.0.0.bn2.")
    members = [one for one in message.members if not one.tensor.startswith(forgotten)]
    match = r"^conv1: makes \d of 8 .*, and layers.0.0.conv2, "
    for given in (None, example):
        with pytest.raises(InvalidStateDict, match=match):
            shrink(module, [Group(pb.Group(name="stream", members=members))], given)


@pytest.mark.parametrize(
    ("name", "group", "unmasked", "at"),
    [
        ("LeNet", "conv2.weight", "conv2.bias", "fc1"),
        ("LeNet", "fc2.weight", "fc2.bias", "fc3"),
        ("MobileNetV2", "features.4.body.0.weight", "features.4.body.4.bias", "features.4.body.6"),
        ("LSTM", "rnn.weight_ih_l0", "rnn.bias_ih_l0", "fc"),
    ],
)
def test_the_first_layer_that_computes_something_else_is_named(
    name: str, group: str, unmasked: str, at: str
) -> None:
    """The group masks neither a tensor nor what reads the units: they are not zero, and cut."""
    module, example, _ = traced(name)
    message = message_of(name, group)
    for one in message.members:
        one.unmasked |= one.tensor == unmasked or one.dim == 1
    with pytest.raises(InvalidStateDict, match=rf"^{at}: its output differs by .* from the masked"):
        shrink(module, [Group(message)], example)


class Joined(nn.Module):
    """Two convolutions whose channels are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b, self.end = nn.Conv1d(2, 8, 1), nn.Conv1d(2, 6, 1), nn.Conv1d(14, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.cat([self.stem(x), self.b(x)], 1))  # type: ignore[no-any-return]


def test_layers_whose_channels_are_concatenated_are_both_named() -> None:
    groups = [secateur.group("b", secateur.member("b.weight"), secateur.member("b.bias"))]
    with pytest.raises(InvalidStateDict) as error:
        shrink(Joined(), groups, torch.randn(1, 2, 3))
    match = r"end: takes 14 inputs, and stem and b make \d+; put both in one group"
    assert re.fullmatch(match, str(error.value))


@pytest.mark.parametrize(
    ("sizes", "fact"),
    [
        ({"b.weight": [4, 2, 1]}, "b: bias has shape [6], and [4] fits the layer's other tensors"),
        (
            {"b.weight": [4, 2, 1], "b.bias": [4]},
            "end: takes 14 inputs, and stem and b make 12",
        ),
    ],
)
def test_sizes_that_lack_one_name_no_groups(sizes: dict[str, list[int]], fact: str) -> None:
    with pytest.raises(InvalidStateDict) as error:
        secateur.resize(Joined(), sizes)
    assert str(error.value) == f"{fact}; give all sizes that secateur.sizes returns"
