"""Decoding specs: incompatible choices are errors with the path of the field."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from secateur_proto import spec_pb2 as pb
from secateur_server.errors import AmountOutOfRange, InvalidSpec
from secateur_server.granularity.block import Block
from secateur_server.granularity.element import Element
from secateur_server.granularity.group import Group, Member
from secateur_server.granularity.n_m import NM
from secateur_server.granularity.slice import Slice
from secateur_server.importance.magnitude import Magnitude
from secateur_server.importance.nuclear import Nuclear
from secateur_server.importance.random import Random
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Bytes, Count, Fraction, Macs, Table, Threshold
from secateur_server.spec.decode import decode_spec
from secateur_server.spec.rules import GuardRails, Rail, Selection
from tests.contract import raw

PATH = "spec.rules[0].selection"
SLICE = {"granularity": pb.GRANULARITY_SLICE}
BLOCK = {"granularity": pb.GRANULARITY_BLOCK, "block": pb.Block(shape=[2, 2])}
N_M = {"granularity": pb.GRANULARITY_N_M, "pattern": pb.Pattern(n=2, m=4)}
GLOBAL = {"scope": pb.SCOPE_GLOBAL}
RANDOM = {"random": pb.Random(), "magnitude": None}
MEMBER = pb.Member(tensor="w")
UNSCORED = pb.Member(tensor="w", unscored=True)
NUCLEAR = {"magnitude": pb.Magnitude(matrix_norm=pb.MATRIX_NORM_NUCLEAR)}
FROBENIUS = {"magnitude": pb.Magnitude(matrix_norm=pb.MATRIX_NORM_FROBENIUS)}
# Longer than any pattern of hardware.
LONG = pb.Pattern(n=2, m=1025)


def decode(tensors: Sequence[str] = ("w",), **fields: Any) -> Selection:
    """Decodes a spec of one rule, made like raw.spec, with the amount in `fields`."""
    if {"threshold", "bytes", "macs", "table"} & fields.keys():
        fields = {"fraction": None, **fields}
    (decoded,) = decode_spec(RequestContext(), raw.spec(*tensors, **fields))
    assert isinstance(decoded, Selection)
    return decoded


def grouped(*groups: pb.Group, **fields: Any) -> dict[str, Any]:
    return {"granularity": pb.GRANULARITY_GROUP, "groups": groups, "tensors": (), **fields}


def entries(*fractions: tuple[str, float]) -> pb.Table:
    return pb.Table(entries=[pb.TableEntry(tensors=n, fraction=f) for n, f in fractions])


def macs(target: float, **per_unit: float) -> pb.Macs:
    return pb.Macs(target=target, per_unit=per_unit)


def rails(**fields: Any) -> pb.GuardRails:
    return pb.GuardRails(rails=[pb.Rail(), pb.Rail(**fields)])


WRONG: list[tuple[dict[str, Any], str]] = [
    # Required fields.
    ({"granularity": None}, "granularity"),
    ({"granularity": 99}, "granularity"),
    ({"scope": None}, "scope"),
    ({"scope": 99}, "scope"),
    ({"magnitude": None}, "importance"),
    ({"fraction": None}, "amount"),
    ({**SLICE, "magnitude": pb.Magnitude()}, "magnitude.norm"),
    ({**SLICE, "magnitude": pb.Magnitude(p=math.nan)}, "magnitude.p"),
    ({"magnitude": pb.Magnitude(p=math.nan)}, "magnitude.p"),
    ({**SLICE, "magnitude": pb.Magnitude(matrix_norm=99)}, "magnitude.matrix_norm"),  # type: ignore[arg-type]
    ({**BLOCK, "block": None}, "block.shape"),
    ({**BLOCK, "block": pb.Block(shape=[0, 0])}, "block.shape"),
    ({**N_M, "pattern": None}, "pattern"),
    ({**N_M, "pattern": pb.Pattern(n=0, m=4)}, "pattern"),
    ({**N_M, "pattern": pb.Pattern(n=4, m=4)}, "pattern"),
    ({**N_M, "pattern": LONG}, "pattern"),
    # Amounts.
    ({"fraction": -0.01}, "fraction"),
    ({"fraction": 1.01}, "fraction"),
    ({"fraction": math.nan}, "fraction"),
    ({"threshold": math.nan}, "threshold"),
    ({"macs": macs(-1)}, "macs.target"),
    ({"macs": macs(math.nan)}, "macs.target"),
    ({"macs": macs(1, w=0)}, "macs.per_unit['w']"),
    ({"macs": macs(1, w=math.inf)}, "macs.per_unit['w']"),
    ({"macs": macs(1, w=math.nan)}, "macs.per_unit['w']"),
    ({"table": pb.Table()}, "table.entries"),
    ({"table": entries(("w", 0.5), ("v", 2))}, "table.entries[1].fraction"),
    ({"table": entries(("w", 0.5), ("w", 0.5))}, "table.entries[1].tensors"),
    ({"table": entries(("w", 0.5)), **GLOBAL}, "table"),
    ({"table": entries(("w", 0.5)), "scope": pb.SCOPE_ISOMORPHIC}, "table"),
    # Random importance.
    ({**RANDOM, "threshold": 1.0}, "threshold"),
    ({**RANDOM, "importance_scores": {"w": "s"}}, "importance_scores"),
    ({**RANDOM, "scales": {"w": "s"}}, "scales"),
    ({**RANDOM, "normalization": pb.NORMALIZATION_MEAN}, "normalization"),
    ({**RANDOM, **GLOBAL, "allocation": pb.ALLOCATION_LAMP}, "allocation"),
    # Matrix norms need slices of one tensor.
    ({**NUCLEAR, **SLICE, **GLOBAL}, "magnitude.matrix_norm"),
    ({**NUCLEAR, **BLOCK}, "magnitude.matrix_norm"),
    ({**NUCLEAR, **N_M}, "magnitude.matrix_norm"),
    ({**FROBENIUS, **SLICE, **GLOBAL}, "magnitude.matrix_norm"),
    ({**FROBENIUS, **BLOCK}, "magnitude.matrix_norm"),
    (grouped(pb.Group(members=[MEMBER]), **NUCLEAR), "magnitude.matrix_norm"),
    # Allocations and scopes.
    ({"allocation": pb.ALLOCATION_UNIFORM}, "allocation"),
    ({"allocation": pb.ALLOCATION_ERK, **GLOBAL, "threshold": 1.0}, "allocation"),
    ({"allocation": pb.ALLOCATION_LAMP, **GLOBAL, "bytes": 1}, "allocation"),
    ({"allocation": pb.ALLOCATION_UNIFORM, **GLOBAL, "macs": macs(1, w=1)}, "allocation"),
    ({"allocation": 99, **GLOBAL}, "allocation"),
    ({"normalization": 99}, "normalization"),
    ({"combination": 99}, "combination"),
    ({"of_all": True, "threshold": 1.0}, "of_all"),
    ({"of_all": True, "bytes": 1}, "of_all"),
    ({"of_all": True, "macs": macs(1, w=1)}, "of_all"),
    # Groups.
    (grouped(), "groups"),
    ({"groups": [pb.Group(members=[MEMBER])]}, "groups"),
    (grouped(pb.Group(members=[MEMBER]), tensors=("w",)), "tensors"),
    (grouped(pb.Group()), "groups[0].members"),
    (grouped(pb.Group(members=[UNSCORED])), "groups[0].members"),
    (
        grouped(pb.Group(members=[MEMBER]), pb.Group(name="groups[0]", members=[MEMBER])),
        "groups[1].name",
    ),
    (
        grouped(pb.Group(members=[MEMBER, pb.Member(indices=[1], offset=1)])),
        "groups[0].members[1].indices",
    ),
    (grouped(pb.Group(members=[pb.Member(indices=[1], stride=1)])), "groups[0].members[0].indices"),
    (grouped(pb.Group(members=[MEMBER]), scales={"w": "s"}), "scales"),
    (grouped(pb.Group(members=[MEMBER]), bytes=1), "bytes"),
    (grouped(pb.Group(members=[MEMBER]), allocation=pb.ALLOCATION_ERK, **GLOBAL), "allocation"),
    # Guard rails.
    ({"guard_rails": rails(min_sparsity=-0.1)}, "guard_rails.rails[1].min_sparsity"),
    ({"guard_rails": rails(min_sparsity=math.nan)}, "guard_rails.rails[1].min_sparsity"),
    ({"guard_rails": rails(max_sparsity=1.1)}, "guard_rails.rails[1].max_sparsity"),
    (
        {"guard_rails": rails(min_sparsity=0.5, max_sparsity=0.4)},
        "guard_rails.rails[1].min_sparsity",
    ),
    (
        {"guard_rails": rails(min_sparsity=0.1, max_sparsity=0.0)},
        "guard_rails.rails[1].min_sparsity",
    ),
]
RANGES = {"fraction", "target", "per_unit['w']", "min_sparsity", "max_sparsity"}


@pytest.mark.parametrize(("fields", "field"), WRONG, ids=lambda part: str(part)[:60])
def test_a_wrong_choice_is_refused_with_its_path(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        decode(**fields)
    assert caught.value.field == f"{PATH}.{field}"
    assert caught.value.description
    if field.rsplit(".", 1)[-1] in RANGES:
        assert isinstance(caught.value, AmountOutOfRange)


def test_a_spec_without_rules_methods_tensors_or_masks_is_an_error() -> None:
    second = pb.PruningSpec(rules=[*raw.spec("w").rules, *raw.spec().rules])
    for spec, field in (
        (pb.PruningSpec(), "spec.rules"),
        (pb.PruningSpec(rules=[pb.Rule()]), "spec.rules[0].method"),
        (raw.spec(), f"{PATH}.tensors"),
        (second, "spec.rules[1].selection.tensors"),
        (raw.masks(), "spec.rules[0].custom_masks.masks"),
    ):
        with pytest.raises(InvalidSpec) as caught:
            decode_spec(RequestContext(), spec)
        assert caught.value.field == field


def test_omitted_fields_have_their_defaults() -> None:
    assert decode() == Selection(PATH, ("w",), Magnitude(), Element(), "tensor", Fraction(0.5))
    rail = decode(guard_rails=pb.GuardRails(rails=[pb.Rail()])).guard_rails.rails[0]
    assert rail == Rail(f"{PATH}.guard_rails.rails[0]", (), 0.0, 1.0, 0)
    group = decode(**grouped(pb.Group(members=[MEMBER])))
    member = Member(f"{PATH}.groups[0].members[0]", "w", 0, 0, 1, 0, (), True)
    assert group.groups == (Group("groups[0]", (member,)),)
    assert (group.combination, group.normalization, group.allocation) == ("mean", None, "rank")
    named = pb.NORMALIZATION_NONE, pb.ALLOCATION_RANK, pb.COMBINATION_MEAN
    names = "normalization", "allocation", "combination"
    assert decode(("w",), **dict(zip(names, named, strict=True))) == decode()


@pytest.mark.parametrize(
    ("fields", "attribute", "expected"),
    [
        ({"fraction": 0.0}, "amount", Fraction(0.0)),
        ({"fraction": 1.0}, "amount", Fraction(1.0)),
        ({"count": 0}, "amount", Count(0)),
        ({"threshold": -math.inf}, "amount", Threshold(-math.inf)),
        ({"bytes": 0}, "amount", Bytes(0)),
        ({"macs": macs(math.inf, w=2)}, "amount", Macs(math.inf, {"w": 2.0})),
        (
            {"table": entries(("b*", 0.0), ("a", 1.0))},
            "amount",
            Table({"b*": 0.0, "a": 1.0}),
        ),
        ({**SLICE, "dim": -2}, "granularity", Slice(-2)),
        ({**N_M, "dim": 1}, "granularity", NM(2, 4, 1)),
        ({**N_M, "pattern": pb.Pattern(n=1, m=1024)}, "granularity", NM(1, 1024, 0)),
        (BLOCK, "granularity", Block((2, 2), as_matrix=False)),
        (
            {**BLOCK, "block": pb.Block(shape=[0, 4], as_matrix=True)},
            "granularity",
            Block((0, 4), as_matrix=True),
        ),
        ({**SLICE, **NUCLEAR}, "importance", Nuclear(0)),
        ({**SLICE, **FROBENIUS}, "importance", Magnitude(2.0)),
        ({"random": pb.Random(seed=2**64 - 1), "magnitude": None}, "importance", Random(2**64 - 1)),
        ({"scope": pb.SCOPE_ISOMORPHIC}, "scope", "isomorphic"),
        ({**GLOBAL, "allocation": pb.ALLOCATION_ERK}, "allocation", "erk"),
        ({**GLOBAL, "allocation": pb.ALLOCATION_UNIFORM, **RANDOM}, "allocation", "uniform"),
        ({"normalization": pb.NORMALIZATION_Z_SCORE}, "normalization", "z_score"),
        ({"combination": pb.COMBINATION_MAX}, "combination", "max"),
        ({"of_all": True}, "of_all", True),
        ({"scales": {"w": "bn"}}, "scales", {"w": "bn"}),
        (
            {"guard_rails": pb.GuardRails(keep_first=True, keep_last=True, exclude=["a", "b*"])},
            "guard_rails",
            GuardRails((), True, True, ("a", "b*")),
        ),
    ],
    ids=str,
)
def test_compatible_choices_are_decoded(
    fields: dict[str, Any], attribute: str, expected: object
) -> None:
    found = getattr(decode(**fields), attribute)
    assert found == expected
    assert type(found) is type(expected)


def test_a_cap_of_0_differs_from_no_cap() -> None:
    guard_rails = pb.GuardRails(rails=[pb.Rail(tensors=["w"], max_sparsity=0.0)])
    (rail,) = decode(guard_rails=guard_rails).guard_rails.rails
    assert (rail.tensors, rail.max_sparsity) == (("w",), 0.0)
