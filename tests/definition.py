"""The definition of a selection, by plain sorting of exact scores; and small models with many ties.

Tests compare the masks and choices of the server with these.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from secateur_server.cut.choice import Choice
from secateur_server.cut.prune import prune
from secateur_server.granularity.element import Element
from secateur_server.granularity.group import Group, Member
from secateur_server.importance.magnitude import Magnitude
from secateur_server.runtime.context import RequestContext
from secateur_server.spec import amounts
from secateur_server.spec.resolve import resolve
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.catalog import Catalog, Stored, read_catalog
from secateur_server.state_dict.parameter import Parameter
from tests.masks import packed, unpacked

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3)
# The first two are isomorphic: they differ only in their numbers.
NAMES = ("layer1.0.weight", "layer2.1.weight", "head.weight", "layer3.0.bias2")
# By scope: the sets of tensors whose units are compared, for the first few of NAMES.
SCOPES: dict[str, Callable[[list[str]], list[list[str]]]] = {
    "tensor": lambda names: [[name] for name in names],
    "global": lambda names: [names],
    "isomorphic": lambda names: [names[:2], *([name] for name in names[2:])],
}


@dataclass(frozen=True)
class Ranked:
    """The units of a tensor: their scores, and which of them are unpruned."""

    scores: Sequence[Fraction]
    candidates: Sequence[bool]

    @property
    def order(self) -> list[int]:
        """The unpruned units, least important first."""
        unpruned = [i for i, is_candidate in enumerate(self.candidates) if is_candidate]
        return sorted(unpruned, key=lambda i: (self.scores[i], i))


@dataclass(frozen=True)
class Chosen:
    """The units that are pruned.

    Attributes:
        counts: How many of each tensor.
        pruned: The units of each tensor, by index.
        last: The score of the last unit that the walk passed, or None.
    """

    counts: list[int]
    pruned: list[list[int]]
    last: Fraction | None


def choose(
    ranked: Sequence[Ranked],
    reached: Callable[[list[int]], bool],
    lows: Sequence[int] | None = None,
    highs: Sequence[int] | None = None,
) -> Chosen:
    """Walks along all units, by score, tensor and index, until enough are pruned.

    A tensor loses the units that the walk has passed, but at least its number in `lows`, and at
    most its number in `highs`.
    """
    lows = lows or [0] * len(ranked)
    highs = highs or [len(r.order) for r in ranked]
    for passed, last in positions(ranked):
        counts = [min(max(p, a), b) for p, a, b in zip(passed, lows, highs, strict=True)]
        if reached(counts):
            pruned = [sorted(r.order[:c]) for r, c in zip(ranked, counts, strict=True)]
            return Chosen(counts, pruned, last)
    raise AssertionError("no position of the walk is enough")


def positions(ranked: Sequence[Ranked]) -> Iterator[tuple[list[int], Fraction | None]]:
    """Yields how many units of each tensor the walk has passed, and the score of the last one."""
    passed = [0] * len(ranked)
    yield list(passed), None
    units = [(r.scores[i], tensor, i) for tensor, r in enumerate(ranked) for i in r.order]
    for score, tensor, _ in sorted(units):
        passed[tensor] += 1
        yield list(passed), score


def at_least(count: float) -> Callable[[list[int]], bool]:
    """A condition for `choose`: at least `count` units in all."""
    return lambda counts: sum(counts) >= count


def at_cut(ranked: Sequence[Ranked], chosen: Chosen) -> tuple[float | None, int, int]:
    """Returns the threshold, how many unpruned units have it, and how many of them are pruned."""
    if chosen.last is None:
        return None, 0, 0
    units = [(t, i) for t, r in enumerate(ranked) for i in r.order if r.scores[i] == chosen.last]
    return float(chosen.last), len(units), sum(i in chosen.pruned[t] for t, i in units)


def sizes(ranked: Sequence[Ranked]) -> tuple[int, int]:
    """Returns the number of all units, and of the unpruned ones."""
    return sum(len(r.candidates) for r in ranked), sum(len(r.order) for r in ranked)


def elements(parameter: Parameter) -> Ranked:
    """Returns the elements of a tensor, scored by magnitude."""
    return Ranked([abs(w) for w in exact(parameter.weight)], kept_of(parameter).flatten().tolist())


def exact(tensor: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in tensor.double().flatten().tolist()]


def kept_of(parameter: Parameter) -> Tensor:
    if parameter.mask is None:
        return torch.ones(parameter.weight.shape, dtype=torch.bool)
    return unpacked(parameter)


def without(parameter: Parameter, pruned: Sequence[int]) -> Tensor:
    """Returns the mask of a tensor after more elements were pruned, given their flat indices."""
    kept = kept_of(parameter).flatten()
    kept[list(pruned)] = False
    return kept.view(parameter.weight.shape)


def parameter(seed: int, shape: Sequence[int], dtype: torch.dtype, kept: float | None) -> Parameter:
    """Makes a tensor of few values that every dtype represents exactly.

    Args:
        seed: Of the values and the mask.
        shape: Its shape.
        dtype: Its dtype.
        kept: About which share is unpruned; None for no mask.
    """
    numbers = np.random.default_rng(seed)
    weight = torch.from_numpy(numbers.integers(-6, 7, tuple(shape)) / 4).to(dtype)
    if kept is None:
        return Parameter(weight)
    return Parameter(weight, packed(torch.from_numpy(numbers.random(weight.shape) < kept)))


@st.composite
def models(
    draw: st.DrawFn,
    shapes: st.SearchStrategy[list[int]] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    most: int = 4,
) -> dict[str, Parameter]:
    """Draws up to `most` tensors, some of them partly pruned."""
    names = NAMES[: draw(st.integers(1, most))]
    seed, kept = draw(st.integers(0, 1 << 32)), st.sampled_from([None, 0.0, 0.2, 0.8])
    return {
        name: parameter(seed + i, draw(shapes), draw(st.sampled_from(dtypes)), draw(kept))
        for i, name in enumerate(names)
    }


def amount_of(given: Any) -> amounts.Amount:
    """Converts a client's float or int; returns other amounts unchanged."""
    if isinstance(given, float):
        return amounts.Fraction(given)
    return amounts.Count(given) if isinstance(given, int) else given


def rule(names: Sequence[str], amount: Any = 0.5, **choices: Any) -> Selection:
    """Makes a resolved rule. By default it compares the elements of all tensors."""
    given = {"importance": Magnitude(), "granularity": Element(), "scope": "global", **choices}
    return Selection("rule", tuple(names), amount=amount_of(amount), **given)


def applied(
    model: dict[str, Parameter], selection: Selection, **extras: Tensor
) -> tuple[dict[str, Tensor], Sequence[Choice]]:
    """Applies a rule. Returns the masks as bool, and its choices."""
    pruned, (choices,) = prune(RequestContext(), model, [selection], extras)
    return {name: unpacked(parameter) for name, parameter in pruned.items()}, choices


def member(tensor: str, dim: int = 0, **choices: Any) -> Member:
    """Makes a member with the defaults of a spec."""
    given = {"offset": 0, "stride": 1, "units": 0, "indices": (), "is_scored": True, **choices}
    return Member("member", tensor, dim, **given)


def assert_pruned(
    model: dict[str, Parameter], masks: dict[str, Tensor], names: Sequence[str], chosen: Chosen
) -> None:
    """Checks that exactly the chosen elements were pruned."""
    for name, pruned in zip(names, chosen.pruned, strict=True):
        assert torch.equal(masks[name], without(model[name], pruned)), name


def catalog_of(
    model: Mapping[str, Parameter], extras: Mapping[str, Tensor] | None = None
) -> Catalog:
    weights = {name: parameter.weight for name, parameter in model.items()}
    stored, uploaded = (
        {name: Stored("?", t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        for tensors in (weights, extras or {})
    )
    return read_catalog(stored, uploaded)


def resolved(
    model: Mapping[str, Parameter],
    groups: Sequence[Group],
    extras: Mapping[str, Tensor] | None = None,
    **choices: Any,
) -> Selection:
    """Makes and resolves a rule of groups. By default it scores by the mean of |w|."""
    given = {"granularity": None, "groups": tuple(groups), "importance": Magnitude(1.0), **choices}
    (found,) = resolve(RequestContext(), [rule([], **given)], catalog_of(model, extras))
    assert isinstance(found, Selection)
    return found


def grouped(
    model: dict[str, Parameter],
    groups: Sequence[Group],
    extras: Mapping[str, Tensor] | None = None,
    **choices: Any,
) -> tuple[dict[str, Tensor], Sequence[Choice]]:
    extras = extras or {}
    return applied(model, resolved(model, groups, extras, **choices), **extras)
