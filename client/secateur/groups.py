"""Groups: slices of several tensors that live and die together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.checks import UINT64, dimension, flag, integer, integers, made, shown
from secateur.choices import Plain
from secateur.errors import InvalidSpec
from secateur.tensors import is_text
from secateur_proto import spec_pb2 as pb


@dataclass(frozen=True)
class Member:
    """The part that a tensor has in a group: what `member` makes."""

    message: pb.Member


@dataclass(frozen=True)
class Group:
    """Slices of several tensors that live and die together: what `group` makes."""

    message: pb.Group


Groups = Sequence[Group | Plain]

COMBINATIONS = {
    "mean": pb.COMBINATION_MEAN,
    "sum": pb.COMBINATION_SUM,
    "max": pb.COMBINATION_MAX,
}


def member(
    tensor: str,
    dim: int = 0,
    offset: int = 0,
    stride: int = 1,
    units: int | None = None,
    indices: Iterable[int] | None = None,
    scored: bool = True,
) -> Member:
    """The part that a tensor has in a group: unit i has `stride` slices from offset + i * stride.

    dim: of the slices; negative counts from the end.  units: None is as many as fit.
    indices: in place of offset and stride: the slices of unit 0, of unit 1 and so on, as many for
        each; needs `units` where that is not one slice for each.
    scored: False where it goes with its unit without a say in how important that is.
    """
    message = pb.Member(
        tensor=_name("tensor", tensor), dim=dimension(dim), unscored=not flag("scored", scored)
    )
    if units is not None:
        message.units = integer("units", units, 1, UINT64)
    offset, stride = integer("offset", offset, 0, UINT64), integer("stride", stride, 1, UINT64)
    if indices is None:
        message.offset, message.stride = offset, stride
    elif (offset, stride) == (0, 1):
        message.indices.extend(integers("indices", indices))
    else:
        raise InvalidSpec("indices: they take the place of offset and stride")
    return Member(message)


def group(name: str, *members: Member | Plain) -> Group:
    """Slices of several tensors that live and die together, unit by unit.

    name: for reports, guard rails and errors; each only once in a rule.
    members: each what `member` makes, or its arguments.  All have the same number of units.
    """
    if not members:
        raise InvalidSpec("members: at least one is needed")
    found = [
        made(f"members[{index}]", given, Member, member).message
        for index, given in enumerate(members)
    ]
    return Group(pb.Group(name=_name("name", name), members=found))


def head_groups(
    q: str,
    k: str | None,
    v: str | None,
    o: str,
    head_dim: int,
    heads: int,
    kv_heads: int | None = None,
) -> list[Group]:
    """The heads of an attention layer, as the units of one group.

    q, k, v, o: the names of its projections' weights, as torch.nn.Linear has them.
    heads: of queries.  kv_heads: of keys and values, which divides `heads`; None is `heads`.
    Unit i is KV head i: its rows in k and v, the rows of its heads // kv_heads query heads in q,
    and their columns in o. With few KV heads that is coarse, with one all or nothing: see
    query_head_groups.
    """
    heads = integer("heads", heads, 1, UINT64)
    units = heads if kv_heads is None else integer("kv_heads", kv_heads, 1, UINT64)
    if heads % units:
        raise InvalidSpec(f"kv_heads: {units} does not divide {heads} heads")
    of_kv = integer("head_dim", head_dim, 1, UINT64)
    of_q = of_kv * (heads // units)
    members = [member(q, stride=of_q, units=units)]
    members += [member(name, stride=of_kv, units=units) for name in (k, v) if name is not None]
    return [group(f"heads of {q}", *members, member(o, dim=1, stride=of_q, units=units))]


def query_head_groups(q: str, o: str, head_dim: int, heads: int) -> list[Group]:
    """The query heads of an attention layer, as the units of one group; keys and values are kept.

    Unit i is query head i: its rows in q, and its columns in o. For layers in which several query
    heads share a key and a value. The mask may keep more query heads of one KV head than of
    another, which a dense model of that shape computes as it is.

    Args:
        q: The name of the query projection's weight, as torch.nn.Linear has it.
        o: The name of the output projection's weight.
        head_dim: Rows of a head.
        heads: Of queries.
    """
    return head_groups(q, None, None, o, head_dim, heads)


def groups_of(value: Any) -> list[pb.Group]:
    """Groups, each by itself, or from a map of its name and its members.  Errors: InvalidSpec."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InvalidSpec(f"groups: {shown(value)} is no list of groups, with at least one")
    return [
        made(f"groups[{index}]", given, Group, _plain_group).message
        for index, given in enumerate(value)
    ]


def _plain_group(name: str, members: Any) -> Group:
    if not isinstance(members, Sequence) or isinstance(members, str):
        raise InvalidSpec(f"members: {shown(members)} is no list")
    return group(name, *members)


def _name(field: str, value: Any) -> str:
    if not is_text(value) or not value:
        raise InvalidSpec(f"{field}: {shown(value)} is no name")
    return str(value)
