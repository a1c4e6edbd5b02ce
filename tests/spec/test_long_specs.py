"""Specs with long lists: limits are checked first, and memory is proportional to the request."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import safetensors.torch
import torch

import secateur
from secateur_proto import spec_pb2 as pb
from secateur_server.errors import Cancelled, InvalidSpec
from secateur_server.runtime.context import RequestContext
from secateur_server.spec import resolve as resolve_module
from secateur_server.spec.amounts import MOST_ENTRIES
from secateur_server.spec.decode import (
    MOST_GROUPS,
    MOST_MEMBERS,
    MOST_RULES,
    decode_spec,
)
from secateur_server.spec.decode_rails import MOST_RAILS
from secateur_server.spec.resolve import resolve
from secateur_server.state_dict.globs import MOST_GLOB_CHARACTERS, MOST_GLOBS, MOST_VISITS
from secateur_server.state_dict.parameter import Parameter
from tests.contract.raw import check_invalid, send_file, spec
from tests.definition import catalog_of

ROOT = Path(__file__).parents[2]
SELECTION = spec("*").rules[0].selection
GROUP = pb.Group(members=[pb.Member(tensor="w")])


def selection(**fields: Any) -> pb.PruningSpec:
    """Makes a spec of one rule with these fields and the required ones."""
    made = pb.Selection(**fields)
    for field, value in SELECTION.ListFields():
        is_set = field.name in fields or (field.name == "tensors" and "groups" in fields)
        if not is_set and (field.name != "fraction" or "table" not in fields):
            made.MergeFrom(pb.Selection(**{field.name: value}))
    return pb.PruningSpec(rules=[pb.Rule(selection=made)])


def grouped(*groups: pb.Group) -> pb.PruningSpec:
    return selection(groups=groups, granularity=pb.GRANULARITY_GROUP, magnitude=pb.Magnitude(p=1))


PATH = "spec.rules[0].selection"
TOO_LONG: dict[str, tuple[Callable[[], pb.PruningSpec], str, int]] = {
    "rules": (
        lambda: pb.PruningSpec(rules=[pb.Rule()] * (MOST_RULES + 1)),
        "spec.rules",
        MOST_RULES,
    ),
    "rails": (
        lambda: selection(guard_rails=pb.GuardRails(rails=[pb.Rail()] * (MOST_RAILS + 1))),
        f"{PATH}.guard_rails.rails",
        MOST_RAILS,
    ),
    "entries": (
        lambda: selection(table=pb.Table(entries=[pb.TableEntry()] * (MOST_ENTRIES + 1))),
        f"{PATH}.table.entries",
        MOST_ENTRIES,
    ),
    "groups": (lambda: grouped(*[GROUP] * (MOST_GROUPS + 1)), f"{PATH}.groups", MOST_GROUPS),
    "members": (
        lambda: grouped(pb.Group(members=[pb.Member(tensor="w")] * (MOST_MEMBERS + 1))),
        f"{PATH}.groups",
        MOST_MEMBERS,
    ),
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_list_above_its_limit_is_an_error_with_the_limit(name: str) -> None:
    make, field, limit = TOO_LONG[name]
    with pytest.raises(InvalidSpec, match=f"are more than {limit}") as caught:
        decode_spec(RequestContext(), make())
    assert caught.value.field == field


LIMITS = (MOST_RULES, MOST_RAILS, MOST_ENTRIES, MOST_GROUPS, MOST_MEMBERS)
OF_GLOBS = (MOST_GLOBS, MOST_GLOB_CHARACTERS, MOST_VISITS)


@pytest.mark.parametrize("page", ["docs/operations.md", "protos/secateur/v1/spec.proto"])
def test_every_limit_is_documented(page: str) -> None:
    text = (ROOT / page).read_text()
    assert [limit for limit in (*LIMITS, *OF_GLOBS) if f"{limit:,}" not in text] == []


def test_indices_of_members_are_stored_in_a_few_bytes_each() -> None:
    count = 500_000
    given = grouped(pb.Group(members=[pb.Member(tensor="w", indices=range(count))]))
    tracemalloc.start()
    try:
        (rule,) = decode_spec(RequestContext(), given)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 8 * count <= kept < 10 * count
    assert peak < 20 * count
    assert list(rule.groups[0].members[0].indices) == list(range(count))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("indices", "part"),
    [
        ([0, 1, 2, 3, 4, 1], "twice"),
        ([0] * 100_000, "twice"),
        ([0, 6], "6 among them"),
        ([0, (1 << 64) - 1], f"{(1 << 64) - 1} among them"),
    ],
)
def test_wrong_indices_of_members_are_an_error(
    channel: grpc.Channel, indices: list[int], part: str
) -> None:
    data = safetensors.torch.save({"w": torch.ones(6, 2)})
    given = grouped(pb.Group(members=[pb.Member(tensor="w", indices=indices)]))
    found = send_file(channel, "Prune", data, spec=given)
    check_invalid(found, "INVALID_SPEC", f"{PATH}.groups[0].members[0].indices", [part])


@pytest.mark.parametrize(
    "given",
    [
        pb.PruningSpec(rules=[pb.Rule(selection=SELECTION)]),
        selection(guard_rails=pb.GuardRails(rails=[pb.Rail()])),
        selection(table=pb.Table(entries=[pb.TableEntry()])),
        grouped(GROUP),
    ],
)
def test_cancellation_ends_the_decoding(given: pb.PruningSpec) -> None:
    context = RequestContext()
    context.cancel()
    with pytest.raises(Cancelled):
        decode_spec(context, given)


def test_a_tensor_counts_once_for_each_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve_module, "MOST_PRUNED", 5)
    parameters = {f"w{number}": Parameter(torch.ones(2, 2)) for number in range(3)}
    rule = secateur.l1_unstructured("*", 1)

    def resolved(spec: secateur.Spec) -> int:
        message, _ = spec.encode({name: p.weight for name, p in parameters.items()})
        context = RequestContext()
        return len(resolve(context, decode_spec(context, message), catalog_of(parameters)))

    assert resolved(rule) == 1
    with pytest.raises(InvalidSpec, match=r"spec\.rules\[1\]\.selection: .* prune 6 tensors"):
        resolved(rule + rule)


def test_a_nuclear_norm_of_too_large_matrices_is_refused() -> None:
    rule = secateur.ln_structured("w", 1, n="nuc", dim=0)
    for side, is_refused in ((1 << 10, False), ((1 << 10) + 1, True)):
        weight = torch.empty(1, side, side)
        message, _ = rule.encode({"w": weight})
        context, catalog = RequestContext(), catalog_of({"w": Parameter(weight)})
        rules = decode_spec(context, message)
        if is_refused:
            with pytest.raises(InvalidSpec, match=rf"of {side} x {side}: .* limit of 2\^30"):
                resolve(context, rules, catalog)
        else:
            assert resolve(context, rules, catalog)
