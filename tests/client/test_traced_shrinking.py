"""From a module to a smaller one: traced, pruned and cut by a server, and shrunk."""

import copy

import pytest
import torch

import secateur
from secateur.grouping import Group
from secateur_proto import spec_pb2
from tests.client.nets import NETS, net


@pytest.mark.parametrize("name", NETS)
def test_a_shrunk_module_computes_what_the_masked_one_does(
    client: secateur.Client, name: str
) -> None:
    module, inputs = net(name)
    spec = secateur.grouped(secateur.groups(module, inputs), 0.5, scope="tensor", align=1)
    result = client.prune(module, spec, output="shrunk")
    smaller = result.shrink(module)  # which compares them too, as the groups were traced
    masked = copy.deepcopy(module)
    client.prune(module, spec).apply_to(masked)
    with torch.no_grad():
        expected, found = masked(inputs), smaller(inputs)
        assert not torch.allclose(module(inputs), expected)
    assert float((expected - found).abs().max()) <= 1e-12 * float(expected.abs().max())
    sizes = [sum(p.numel() for p in one.parameters()) for one in (module, smaller)]
    assert sizes[1] < sizes[0]


def test_a_group_without_a_consumer_is_found(client: secateur.Client) -> None:
    module, inputs = net("LeNet")
    groups = secateur.groups(module, inputs)
    message = spec_pb2.Group()
    message.CopyFrom(groups[0].message)
    (consumer,) = (m for m in message.members if m.tensor == "conv2.weight")
    message.members.remove(consumer)
    groups[0] = Group(message)
    spec = secateur.grouped(groups, 0.5, scope="tensor", align=1)
    result = client.prune(module, spec, output="shrunk")
    with pytest.raises(secateur.InvalidStateDict, match="conv2"):
        result.shrink(module)
