"""Many small groups are pruned in a batch: with the results of each by itself, and in less work."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from secateur_proto import spec_pb2 as pb
from secateur_server.cut import select_each
from secateur_server.cut.prune import prune
from secateur_server.errors import AmountOutOfRange
from secateur_server.granularity import groups_at_once
from secateur_server.granularity.group import Group
from secateur_server.importance.magnitude import Magnitude
from secateur_server.importance.random import Random
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Table, Threshold
from secateur_server.spec.decode import decode_spec
from secateur_server.spec.resolve import resolve
from secateur_server.spec.rules import GuardRails, Rail, Selection
from secateur_server.state_dict.parameter import Parameter
from tests.definition import applied, catalog_of, member, parameter, resolved
from tests.granularity.test_groups import many, networks


@st.composite
def copied_groups(draw: st.DrawFn) -> tuple[dict[str, Parameter], list[Group]]:
    """Draws copies of some groups, each with its own tensors, some of them partly pruned."""
    model: dict[str, Parameter] = {}
    groups = []
    for kind, copies in enumerate(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))):
        tensors, group = draw(networks())
        for copy in range(copies):
            prefix = f"layers.{kind}.{copy}."
            model |= {prefix + name: _another(draw, each) for name, each in tensors.items()}
            parts = [replace(part, tensor=prefix + part.tensor) for part in group.members]
            groups.append(Group(f"{kind}.{copy}", tuple(parts)))
    return model, draw(st.permutations(groups))


def _another(draw: st.DrawFn, of: Parameter) -> Parameter:
    kept = draw(st.sampled_from([None, None, 0.3])) if of.mask is None else 0.5
    return parameter(draw(st.integers(0, 1 << 32)), of.weight.shape, of.weight.dtype, kept)


RAILS = GuardRails((Rail("rail", ("*",), keep_at_least=1),))
AMOUNTS = st.one_of(st.floats(0, 1), st.just(1), st.just(Threshold(0.5)))


@many
@given(
    network=copied_groups(),
    combination=st.sampled_from(["mean", "sum", "max"]),
    normalization=st.sampled_from([None, None, "mean", "z_score"]),
    importance=st.sampled_from([Magnitude(1.0), Magnitude(2.0), Magnitude(0.5), Random(3)]),
    amount=AMOUNTS,
    scope=st.sampled_from(["tensor", "global", "isomorphic"]),
    guard_rails=st.sampled_from([GuardRails(), GuardRails(), RAILS]),
)
def test_groups_in_a_batch_are_pruned_as_each_by_itself(
    network: tuple[dict[str, Parameter], list[Group]], amount: Any, **choices: Any
) -> None:
    model, groups = network
    if isinstance(choices["importance"], Random):
        choices["normalization"] = None
        amount = 0.5
    rule = resolved(model, groups, amount=amount, **choices)
    found = _outcome(model, rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups_at_once, "AT_ONCE", 0)
        patch.setattr(select_each, "AT_ONCE", 0)
        assert _outcome(model, rule) == found


def _outcome(model: dict[str, Parameter], rule: Selection) -> tuple[dict[str, Any], Any]:
    """Returns the masks and the choices, or the message of the error."""
    try:
        masks, choices = applied(model, rule)
    except AmountOutOfRange as error:
        return {}, str(error)
    return {name: mask.tolist() for name, mask in masks.items()}, choices


def test_each_group_has_its_own_amount_by_a_table() -> None:
    model = {f"w{i}": parameter(i, (8, 2), torch.float32, None) for i in range(6)}
    groups = [Group(f"g{i}", (member(f"w{i}"),)) for i in range(6)]
    table = Table({f"g{i}": i / 8 for i in range(6)})
    _, choices = applied(model, resolved(model, groups, amount=table, scope="tensor"))
    assert [choice.pruned for choice in choices] == list(range(6))


# Work ----------------------------------------------------------------------------------------

MEMBERS = 3
# Operations of torch for each more group of three members. One by one it took 167 to 179.
MOST_OPERATIONS = 30


class Operations(TorchDispatchMode):
    """Counts the operations of torch in a block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations_of(count: int, kept: float | None, choices: Mapping[str, Any]) -> int:
    """Counts the operations of a prune by a spec of `count` groups."""
    model = {f"w{i}": parameter(i, (4, 4), torch.float32, kept) for i in range(count)}
    groups = [
        pb.Group(
            name=f"g{i}",
            members=[pb.Member(tensor=f"w{(i + j) % count}", dim=j % 2) for j in range(MEMBERS)],
        )
        for i in range(count)
    ]
    given = {"scope": pb.SCOPE_PER_TENSOR, "magnitude": pb.Magnitude(p=2), **choices}
    if "threshold" not in given:
        given["fraction"] = 0.5
    selection = pb.Selection(groups=groups, granularity=pb.GRANULARITY_GROUP, **given)
    context, spec = RequestContext(), pb.PruningSpec(rules=[pb.Rule(selection=selection)])
    with Operations() as operations:
        prune(context, model, resolve(context, decode_spec(context, spec), catalog_of(model)), {})
    return int(operations.count)


@pytest.mark.parametrize("kept", [None, 0.7])
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"scope": pb.SCOPE_GLOBAL},
        {"scope": pb.SCOPE_ISOMORPHIC, "combination": pb.COMBINATION_MAX},
        {"scope": pb.SCOPE_GLOBAL, "threshold": 0.5},
    ],
)
def test_the_number_of_operations_is_linear_in_the_groups(
    kept: float | None, choices: Mapping[str, Any]
) -> None:
    few, more, most = (operations_of(count, kept, choices) for count in (40, 80, 160))
    assert (most - more) / 80 < MOST_OPERATIONS
    assert most - more < 2.1 * (more - few)
