"""`shrink` of results: from a server to a smaller module."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import secateur
from secateur.errors import InvalidStateDict
from secateur.grouping import Group
from tests.shrinking.groups import outputs, two_layers


def test_a_result_of_finalize_shrinks_a_module(client: secateur.Client) -> None:
    module, groups = two_layers()
    pruned = copy.deepcopy(module)
    client.prune(module, secateur.grouped(groups, 2)).apply_to(pruned)
    small = client.finalize(pruned, output="shrunk", groups=groups).shrink(
        pruned, torch.randn(3, 4)
    )
    assert str(small[0]) == str(nn.Linear(4, 4))
    example = torch.randn(3, 4)
    assert torch.allclose(pruned(example), small(example), atol=1e-6)
    with pytest.raises(secateur.SecateurError, match="shrink: nothing was removed; ask for"):
        client.finalize(pruned).shrink(pruned)


@pytest.mark.parametrize("output", ["masks", "dense", "none"])
def test_only_shrunk_results_shrink_a_module(client: secateur.Client, output: Any) -> None:
    module, groups = two_layers()
    result = client.prune(module, secateur.grouped(groups, 2), output=output)
    with pytest.raises(secateur.SecateurError, match="shrink: nothing was removed; ask for"):
        result.shrink(module)


def test_a_checkpoint_or_a_file_shrinks_a_module(client: secateur.Client, tmp_path: Path) -> None:
    module, groups = two_layers()
    save_file(module.state_dict(), tmp_path / "net.safetensors")
    spec, checkpoint = secateur.grouped(groups, 2), client.upload(module)
    small = [
        client.prune(source, spec, output="shrunk").shrink(module, torch.randn(3, 4)).state_dict()
        for source in (module, tmp_path / "net.safetensors", checkpoint)
    ]
    for name, tensor in small[0].items():
        assert torch.equal(tensor, small[1][name])
        assert torch.equal(tensor, small[2][name])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, partial(torch.compile, backend="eager")], ids=["parallel", "compiled"]
)
def test_prefixes_of_wrappers_may_differ(client: secateur.Client, wrap: Any) -> None:
    module, groups = two_layers()
    result = client.prune(module, secateur.grouped(groups, 2), output="shrunk")
    small, example = result.shrink(wrap(module), torch.randn(3, 4)), torch.randn(3, 4)
    assert type(small) is type(wrap(module))
    assert torch.equal(small(example), result.shrink(module)(example))


def test_traced_groups_are_compared_on_their_example_inputs(client: secateur.Client) -> None:
    """The attribute is what `secateur.groups` leaves."""

    module, groups = two_layers()

    class Traced(list[Group]):
        example_inputs = torch.randn(3, 4)

    for member in groups[0].message.members:
        member.unmasked = member.tensor != "0.weight"
    for wrong in (groups, Traced(groups)):
        spec = secateur.grouped(wrong, 2).at(3, 3) + secateur.identity("0.weight")
        result = client.prune(module, spec, output="shrunk")
        if wrong is groups:
            result.shrink(module)
        else:
            with pytest.raises(InvalidStateDict, match=r"^2: its output differs by"):
                result.shrink(module)


def test_a_group_without_its_reader_is_an_error(client: secateur.Client) -> None:
    module, _ = two_layers()
    groups = [secateur.group("hidden", *outputs("0"))]
    result = client.prune(module, secateur.grouped(groups, 2), output="shrunk")
    with pytest.raises(InvalidStateDict, match=r"^2: takes 6 inputs, and 0 makes 4; put both"):
        result.shrink(module)


def test_a_group_that_guard_rails_exclude_keeps_its_units(client: secateur.Client) -> None:
    module, groups = two_layers()
    rails = secateur.guard_rails(exclude=[groups[0].message.name])
    extra = secateur.group("inputs", secateur.member("0.weight", 1))
    spec = secateur.grouped([*groups, extra], 1, guard_rails=rails, align=1)
    small = client.prune(module, spec, output="shrunk").state_dict()
    rows, columns = module.state_dict()["0.weight"].shape
    assert small["0.weight"].shape == (rows, columns - 1)
    kept = secateur.grouped([extra, *groups], 2, guard_rails={"exclude": ["inputs"]}, align=1)
    result = client.prune(module, kept, output="shrunk").shrink(module)
    assert result[0].out_features == rows - 2
