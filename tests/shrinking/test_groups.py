"""Which groups secateur.groups finds."""

import pytest
import torch
from hypothesis import given, settings

import secateur
from secateur.grouping import Group
from tests.shrinking.cutting import difference, members, slices
from tests.shrinking.nets import net, traced
from tests.shrinking.random_nets import STEPS, Step, random_net


def found(groups: secateur.TracedGroups, name: str) -> Group:
    return next(group for group in groups if group.message.name == name)


@given(STEPS)
@settings(max_examples=6, deadline=None)
def test_random_networks(steps: list[Step]) -> None:
    module, example = random_net(steps)
    groups = secateur.groups(module, example)
    assert difference(module, example, groups, 0) < 1e-12


@pytest.mark.slow
@given(STEPS)
@settings(max_examples=400, deadline=None)
def test_many_random_networks(steps: list[Step]) -> None:
    module, example = random_net(steps)
    groups = secateur.groups(module, example)
    assert max(difference(module, example, groups, seed) for seed in range(2)) < 1e-12


def test_every_hidden_channel_of_a_resnet_is_in_a_group() -> None:
    module, _, groups = traced("ResNet-18")
    assert len(groups) == 12  # a stem with the first residual stream, 8 inner, 3 other streams
    cut = {member for group in groups for member in members(group)}
    whole = {("conv1.weight", 1), ("fc.weight", 0)}
    weights = {name for name, one in module.named_parameters() if one.dim() > 1}
    assert {(name, dim) for name in weights for dim in (0, 1)} - cut == whole
    assert list(groups.kept) == ["fc.weight"]


def test_running_statistics_are_cut_and_not_masked() -> None:
    module, _, groups = traced("MobileNetV2")
    every = [member for group in groups for member in group.message.members]
    unmasked = {member.tensor for member in every if member.unmasked}
    assert unmasked == {name for name, _ in module.named_buffers() if "running" in name}
    assert {member.tensor for member in every if not member.unscored} == {
        name for name, one in module.named_parameters() if one.dim() > 1
    }


def test_flattened_channels_have_a_stride_and_joined_ones_an_offset() -> None:
    lenet = traced("LeNet")[2]
    columns = found(lenet, "conv2.weight").message.members[-1]
    assert (columns.tensor, columns.dim, columns.stride, columns.units) == ("fc1.weight", 1, 16, 16)
    unet = traced("U-Net")[2]
    joined = [m for m in found(unet, "up2.weight").message.members if m.tensor == "join2.0.weight"]
    assert [(m.dim, m.offset, m.stride) for m in joined] == [(1, 12, 1)]


@pytest.mark.parametrize(("name", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_a_unit_of_a_recurrent_layer_is_its_rows_of_all_gates(name: str, gates: int) -> None:
    group = found(traced(name)[2], "rnn.weight_ih_l0")
    by_place = {(m.tensor, m.dim): slices(m, 3, 8) for m in group.message.members}
    rows = [3 + 8 * gate for gate in range(gates)]
    assert by_place["rnn.weight_ih_l0", 0] == rows
    assert by_place["rnn.weight_hh_l0", 0] == rows
    assert by_place["rnn.weight_hh_l0", 1] == [3]
    assert by_place["fc.weight", 1] == [3]


@pytest.mark.parametrize("name", ["grouped queries", "grouped queries, repeated keys"])
def test_a_key_is_one_unit_with_its_queries(name: str) -> None:
    group = found(traced(name)[2], "attention.q.weight")
    by_place = {(m.tensor, m.dim): slices(m, 1, 4) for m in group.message.members}
    assert by_place["attention.q.weight", 0] == list(range(8, 16))
    assert by_place["attention.k.weight", 0] == list(range(4, 8))
    assert by_place["attention.v.weight", 0] == list(range(4, 8))
    assert by_place["attention.o.weight", 1] == list(range(8, 16))


def test_norms_over_channels_keep_them_whole() -> None:
    groups = traced("norms")[2]
    assert {name: reason.split(":")[0] for name, reason in groups.kept.items()} == {
        "conv1.weight": "group_norm (group_norm)",
        "fc1.weight": "layer_norm (layer_norm)",
        "fc3.weight": "makes the model's output",
    }


def test_a_residual_stream_with_norms_stays_whole() -> None:
    groups = traced("ViT")[2]
    streams = ["patches.weight", "attentions.0.proj.weight", "mlps.1.2.weight", "token"]
    for name in streams:
        assert "layer_norm" in groups.kept[name]
    assert not {(name, 0) for name in streams} & {m for g in groups for m in members(g)}


def test_the_module_is_as_it_was() -> None:
    module, example = net("TransformerEncoder")
    module.train()
    layer = module.get_submodule("encoder.layers.0").eval()
    calls: list[object] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    is_fused = torch.backends.mha.get_fastpath_enabled()
    secateur.groups(module, example)
    assert module.training
    assert not any(part.training for part in layer.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert torch.backends.mha.get_fastpath_enabled() is is_fused
    assert torch.is_grad_enabled()
    assert all(torch.equal(state[name], one) for name, one in module.state_dict().items())
    calls.clear()
    module(example)
    assert calls == [1]
