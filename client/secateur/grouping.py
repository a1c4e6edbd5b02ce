"""Groups: slices of several tensors that are pruned together."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Self, SupportsIndex, overload

from secateur.checks import chosen, dimension, flag, integer, integers, made, shown, text
from secateur.choices import Plain
from secateur.errors import InvalidSpec
from secateur_proto import spec_pb2 as pb


@dataclass(frozen=True)
class Member:
    """The slices of one tensor in a group, as `member` makes them."""

    message: pb.Member

    @property
    def tensor(self) -> str:
        """The tensor's name."""
        return self.message.tensor

    @property
    def dim(self) -> int:
        """The dimension of the slices."""
        return self.message.dim

    def __repr__(self) -> str:
        note = " (not masked)" if self.message.unmasked else ""
        return f"{self.tensor} dim {self.dim}{note}"


@dataclass(frozen=True)
class Group:
    """Slices of several tensors that are pruned together, as `group` makes them."""

    message: pb.Group

    @property
    def name(self) -> str:
        """The name for reports, guard rails and errors."""
        return self.message.name

    @property
    def members(self) -> tuple[Member, ...]:
        """The slices of each tensor."""
        return tuple(map(Member, self.message.members))

    @property
    def units(self) -> int | None:
        """How many units the group has; None if that follows from the shapes of its tensors."""
        given = (one.units or len(one.indices) for one in self.message.members)
        return next(filter(None, given), None)

    def __repr__(self) -> str:
        units = "" if self.units is None else f"{self.units} units: "
        return f"{self.name}: {units}{', '.join(map(repr, self.members))}"


class GroupList(list[Group]):
    """Groups, by their indices or names: groups["0.weight"]. It prints one line for each."""

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> Group: ...
    @overload
    def __getitem__(self, key: slice) -> Self: ...

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            named = [group for group in self if group.name == key]
            if not named:
                raise KeyError(f"no group has the name {key!r}")
            return named[0]
        found = super().__getitem__(key)
        if not isinstance(key, slice):
            return found
        part = copy(self)  # has the attributes of a subclass
        part[:] = found
        return part

    def __str__(self) -> str:
        return "\n".join(map(repr, self))


Groups = Sequence[Group | Plain] | Plain

# The functions that make groups of plain data, by their names; secateur.architectures adds them.
GROUPS: dict[str, Callable[..., GroupList]] = {}


def member(
    tensor: str,
    dim: int = 0,
    offset: int = 0,
    stride: int = 1,
    units: int | None = None,
    indices: Iterable[int] | None = None,
    scored: bool = True,
    masked: bool = True,
) -> Member:
    """Describes the slices of a tensor in a group: unit i has `stride` of them.

    Args:
        tensor: The tensor's name.
        dim: The dimension of the slices; negative counts from the end.
        offset: The first slice of unit 0; that of unit i is offset + i * stride.
        stride: Slices of a unit, 1 or more.
        units: How many units there are; None is as many as fit.
        indices: In place of offset and stride: the slices of unit 0, then of unit 1 and so on, as
            many for each. Needs `units` if a unit has more than one slice.
        scored: False if the tensor has no influence on how important a unit is.
        masked: False if the tensor keeps its values, and is only cut by output="shrunk": running
            statistics, or a table of positions. It is not scored either.
    """
    stride = integer("stride", stride, 1)
    message = pb.Member(
        tensor=text("tensor", tensor),
        dim=dimension(dim),
        offset=integer("offset", offset),
        stride=0 if stride == 1 and indices is not None else stride,  # 0 is the default
        unscored=not flag("scored", scored),
        unmasked=not flag("masked", masked),
    )
    if units is not None:
        message.units = integer("units", units, 1)
    if indices is not None:
        message.indices.extend(integers("indices", indices))
        if not message.indices:  # an empty list is no list on the wire
            raise InvalidSpec("indices: at least one is needed")
    return Member(message)


def group(name: str, *members: Member | Plain) -> Group:
    """Makes a group of slices of several tensors, which are pruned together, unit by unit.

    Args:
        name: For reports, guard rails and errors; different for each group of a rule.
        members: Each is what `member` returns, or its arguments. All have the same number of units.
    """
    messages = [
        made(f"members[{index}]", given, Member, member).message
        for index, given in enumerate(members)
    ]
    return Group(pb.Group(name=text("name", name), members=messages))


def head_groups(
    q: str,
    k: str | None,
    v: str | None,
    o: str,
    head_dim: int,
    heads: int,
    kv_heads: int | None = None,
) -> list[Group]:
    """Makes the heads of an attention layer the units of one group.

    Unit i is KV head i: its rows in k and v, the rows of its heads // kv_heads query heads in q,
    and their columns in o. With few KV heads such units are coarse, and a layer with one KV head is
    pruned whole or not at all: see query_head_groups.

    Args:
        q: The name of the query projection's weight, as torch.nn.Linear has it.
        k: The name of the key projection's weight; None keeps the keys.
        v: The name of the value projection's weight; None keeps the values.
        o: The name of the output projection's weight.
        head_dim: Rows of a head.
        heads: Heads of queries.
        kv_heads: Heads of keys and values, which divides `heads`; None is `heads`.
    """
    heads = integer("heads", heads, 1)
    units = heads if kv_heads is None else integer("kv_heads", kv_heads, 1)
    if heads % units:
        raise InvalidSpec(f"kv_heads: {units} does not divide {heads} heads")
    kv_rows = integer("head_dim", head_dim, 1)
    q_rows = kv_rows * (heads // units)
    members = [member(q, stride=q_rows, units=units)]
    members += [member(name, stride=kv_rows, units=units) for name in (k, v) if name is not None]
    return [group(f"heads of {q}", *members, member(o, dim=1, stride=q_rows, units=units))]


def query_head_groups(q: str, o: str, head_dim: int, heads: int) -> list[Group]:
    """Makes the query heads of an attention layer the units of one group; keys and values are kept.

    Unit i is query head i: its rows in q, and its columns in o. For layers in which several query
    heads share a key and a value. The mask may keep more query heads of one KV head than of
    another, which a dense model of that shape computes as it is.

    Args:
        q: The name of the query projection's weight, as torch.nn.Linear has it.
        o: The name of the output projection's weight.
        head_dim: Rows of a head.
        heads: Heads of queries.
    """
    return head_groups(q, None, None, o, head_dim, heads)


def example_inputs_of(groups: Any) -> Any:
    """Returns those with which groups were traced; None if they were not."""
    return getattr(groups, "example_inputs", None)


def groups_of(value: Any) -> list[pb.Group]:
    """Returns groups: a list of groups, or of their plain data; or {function: arguments}."""
    if isinstance(value, Mapping):
        value = chosen("groups", value, GroupList, GROUPS)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidSpec(f"groups: {shown(value)} is not a list of groups")
    return [_named(f"groups[{index}]", given) for index, given in enumerate(value)]


def _named(place: str, given: Any) -> pb.Group:
    """A group; one without a name gets the name that the server reports."""
    message = made(place, given, Group, plain_group).message
    return message if message.name else pb.Group(name=place, members=message.members)


def plain_group(name: str, members: Any) -> Group:
    """Makes a group of its name and a list of members."""
    if not isinstance(members, Sequence) or isinstance(members, str):
        raise InvalidSpec(f"members: {shown(members)} is not a list")
    return group(name, *members)
