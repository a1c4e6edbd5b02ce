"""Permutes the channels of groups, so that N:M masks keep more of what matters."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.calibration.statistics import Statistics
from secateur.checks import dimension, integer
from secateur.errors import InvalidSpec
from secateur.grouping import Groups
from secateur.model import Source
from secateur.tables import text_table
from secateur.tensors import Bytes, LocalTensor
from secateur.ties import tied, values_of
from secateur.units.channel_search import found_order, kept_importance
from secateur.units.importances import Importances
from secateur.units.slices import Indices, Slices, checked_groups, slices_in
from secateur.units.weights import Array, read_here, weight_of
from secateur_proto import spec_pb2 as pb

_MOST = 1024  # the longest pattern of the server


@dataclass(frozen=True, eq=False)
class PermutedGroup:
    """A new order of the units of a group.

    Attributes:
        permutation: New unit i is the old unit permutation[i].
        readers: The weights whose masks keep more.
        before: The importance that N:M masks of these keep in the old order.
        after: What they keep in the new order.
        total: The importance of all elements.
    """

    permutation: Indices
    readers: tuple[str, ...]
    before: float
    after: float
    total: float

    @property
    def gain(self) -> float:
        """What more is kept, as a share of all."""
        return (self.after - self.before) / self.total if self.total else 0.0


@dataclass(frozen=True, eq=False)
class ChannelPermutation:
    """New orders of the units of groups. Print it for a table.

    Attributes:
        groups: The new order of each group, by its name.
    """

    groups: Mapping[str, PermutedGroup]
    _members: Mapping[str, pb.Group]

    @property
    def permutations(self) -> dict[str, Indices]:
        """The permutation of each group: new unit i is the old unit permutation[i]."""
        return {name: group.permutation for name, group in self.groups.items()}

    @property
    def gain(self) -> float:
        """What N:M masks of all readers keep more, as a share of their importance."""
        total = sum(group.total for group in self.groups.values())
        more = sum(group.after - group.before for group in self.groups.values())
        return more / total if total else 0.0

    def apply(self, source: Any, key: str | None = None) -> dict[str, Any]:
        """Permutes all members of the groups, buffers among them.

        The model computes the same, up to the rounding of sums.

        Args:
            source: The model that was planned for, or one with the same shapes; see `Client`; not
                a model on the server.
            key: See `Client`.

        Returns:
            The whole state_dict.

        Raises:
            InvalidSpec: The groups do not fit the model.
        """
        model = read_here(source, key)
        tensors = dict(model.tensors)
        for (name, dim), index in self._indices(model).items():
            stored = (name, f"{name}_orig", f"{name}_mask") if name in model.pairs() else (name,)
            for each in filter(tensors.__contains__, stored):
                tensors[each] = _taken(tensors[each], dim, index)
        entries = tied({**tensors, **model.others}, model.other_names)
        return model.ordered(values_of(entries, model.as_torch))

    def _indices(self, model: Source) -> dict[tuple[str, int], Indices]:
        """Where each slice of a dimension of a tensor comes from."""
        found: dict[tuple[str, int], Indices] = {}
        for name, group in self._members.items():
            permutation = self.groups[name].permutation
            for one in slices_in(group, model):
                size = _shape(model, one.name)[one.dim]
                index = found.setdefault((one.name, one.dim), np.arange(size))
                if len(one.of) != len(permutation):
                    raise InvalidSpec(f"{name}: {one.given}: has other units than planned for")
                index[one.of] = one.of[permutation]
        return found

    def __repr__(self) -> str:
        return f"ChannelPermutation({len(self.groups)} groups, gain {self.gain:.2%})"

    def __str__(self) -> str:
        rows = [("group", "units", "readers", "kept before", "kept after", "gain")]
        rows += [
            (name, f"{len(one.permutation):,}", f"{len(one.readers)}", *_shares(one))
            for name, one in self.groups.items()
        ]
        return text_table(rows)


def _shares(one: PermutedGroup) -> tuple[str, str, str]:
    total = one.total or math.inf
    return f"{one.before / total:.2%}", f"{one.after / total:.2%}", f"{one.gain:.2%}"


def channel_permutation(
    source: Any,
    groups: Groups,
    n: int = 2,
    m: int = 4,
    dim: int = 1,
    importance: Any = "magnitude",
    statistics: Statistics | None = None,
    seed: int = 0,
    key: str | None = None,
) -> ChannelPermutation:
    """Finds an order of the units of groups in which N:M masks keep more importance.

    Args:
        source: See `Client`; not a model on the server.
        groups: What `groups` or `transformer_groups` returns, for example. Their members are all
            tensors with a slice for each unit.
        n: How many of m elements are kept.
        m: The size of a block.
        dim: The dimension along which the m elements lie, as in `n_m_structured`. A member with
            this dimension, and one slice for each unit in whole blocks, is a reader: a weight whose
            masks keep more. The others are permuted with it.
        importance: "magnitude", "wanda", "ria", or arrays by the names of the readers, such as the
            scores of another method.
        statistics: What `calibrate` returns, for "wanda" and "ria".
        seed: For the search.
        key: See `Client`.

    Raises:
        InvalidSpec: An argument is wrong, or two groups share slices.
        InvalidStatistics: They do not fit the model.
    """
    size = integer("m", m, 2, _MOST + 1)
    pattern = integer("n", n, 1, size), size
    model, importances = read_here(source, key), Importances(importance, statistics)
    dim, seed = dimension(dim), integer("seed", seed)
    named = checked_groups(groups)
    slices = {name: slices_in(group, model) for name, group in named.items()}
    _check_apart(model, slices)
    found = {
        name: _permuted(model, members, pattern, dim, importances, seed)
        for name, members in slices.items()
    }
    return ChannelPermutation(found, named)


def _check_apart(model: Source, slices: Mapping[str, list[Slices]]) -> None:
    """Refuses groups that permute one slice twice."""
    owners: dict[tuple[str, int], Indices] = {}
    for name, members in slices.items():
        for one in members:
            size = _shape(model, one.name)[one.dim]
            uses = owners.setdefault((one.name, one.dim), np.zeros(size, np.intp))
            np.add.at(uses, one.of, 1)
            if uses.max() > 1:
                index = int(uses.argmax())
                raise InvalidSpec(
                    f"{name}: slice {index} of dim {one.dim} of {one.given} is in the groups twice"
                )


def _shape(model: Source, name: str) -> tuple[int, ...]:
    tensor = model.prunable().get(name) or model.tensors[name]
    return tensor.shape


def _permuted(
    model: Source,
    members: list[Slices],
    pattern: tuple[int, int],
    dim: int,
    importances: Importances,
    seed: int,
) -> PermutedGroup:
    """The new order of a group; the old one if no other is better."""
    (n, m), units = pattern, len(members[0].of)
    identity = np.arange(units)
    readers = list(_readers(model, members, m, dim))
    if not readers:
        return PermutedGroup(identity, (), 0.0, 0.0, 0.0)
    scores = np.concatenate([_rows(model, one, importances) for one in readers], axis=1)
    blocks = identity.reshape(-1, m)
    before, total = kept_importance(scores, blocks, n), float(scores.sum(dtype=np.float64))
    order = found_order(scores.astype(np.float32), n, m, seed)
    after = kept_importance(scores, order, n)
    names = tuple(dict.fromkeys(one.given for one in readers))
    if after <= before:
        return PermutedGroup(identity, names, before, before, total)
    return PermutedGroup(order.reshape(-1), names, before, after, total)


def _readers(model: Source, members: list[Slices], m: int, dim: int) -> Iterator[Slices]:
    """The members whose units are consecutive elements of whole blocks."""
    weights = model.prunable()
    for one in members:
        if one.name not in weights or not one.is_scored:
            continue
        dims = len(weights[one.name].shape)
        units, stride = one.of.shape
        first = int(one.of[0, 0])
        is_whole = stride == 1 and first % m == 0 and units % m == 0
        in_order = is_whole and (one.of[:, 0] == first + np.arange(units)).all()
        if dims > 1 and -dims <= dim < dims and one.dim == dim % dims and in_order:
            yield one


def _rows(model: Source, one: Slices, importances: Importances) -> Array:
    """The importances of a reader, [units, rows]."""
    weight = weight_of(model, one.name)
    values = np.moveaxis(importances.of(one.given, weight, one.dim), one.dim, 0)
    return values.reshape(len(values), -1)[one.of[:, 0]]


def _taken(tensor: LocalTensor, dim: int, index: Indices) -> LocalTensor:
    """A tensor with the slices of a dimension in another order."""

    def read() -> Bytes:
        data = tensor.read()
        values = data.reshape(*tensor.shape, -1)
        return np.take(values, index, axis=dim).reshape(-1)

    return LocalTensor(tensor.dtype, tensor.shape, read)
