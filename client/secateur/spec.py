"""What to prune: torch.nn.utils.prune's methods, others in their manner, and their sums."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from google.protobuf.text_format import MessageToString

from secateur.checks import mismatch, norm, one_of, patterns, shown
from secateur.choices import (
    ALLOCATIONS,
    AnyAmount,
    AnyGranularity,
    AnyGuardRails,
    AnyImportance,
    amount_of,
    blocks,
    granularity_of,
    importance_of,
    magnitude,
    n_m,
    random,
    ranking_of,
    slices,
)
from secateur.errors import InvalidSpec, InvalidStateDict
from secateur.groups import COMBINATIONS, Groups, groups_of
from secateur.mask_files import read_masks
from secateur.paths import source_path
from secateur.steps import Schedule, scale, step_of
from secateur.tensors import LocalTensor, from_value, is_text
from secateur_proto import spec_pb2 as pb

Names = str | Sequence[str]
Arrays = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """One rule as the wire has it, and the arrays that travel with it by the tensors' names."""

    message: pb.Rule
    arrays: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """Rules, applied in order. `a + b` applies a, then b to what a left."""

    rules: tuple[Rule, ...]

    def __repr__(self) -> str:
        return f"Spec({'; '.join(map(_described, self.rules))})"

    def __add__(self, other: "Spec") -> "Spec":
        return Spec(self.rules + other.rules)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "Spec":
        """A spec from plain data: {"rules": [{"method": NAME, **arguments of that function}]}.

        Errors: InvalidSpec, naming the rule.
        """
        rules = table.get("rules") if isinstance(table, Mapping) else None
        if isinstance(table, Mapping) and (near := _misspelled(table, "rules")):
            raise InvalidSpec(near)
        if not isinstance(rules, Sequence) or isinstance(rules, str) or not rules:
            raise InvalidSpec("a spec is a map with a list of `rules`, at least one")
        specs = [_from_plain(rule, f"rules[{index}]") for index, rule in enumerate(rules)]
        return cls(tuple(rule for spec in specs for rule in spec.rules))

    def at(self, step: int, steps: int, schedule: Schedule = "cubic") -> "Spec":
        """The same spec with as much of each amount as is due at a step, of all units.

        step: in [1, steps]; the last one prunes the whole amount. The result of each is the source
            of the next.
        schedule: a name of secateur.schedules, or a function from [0, 1], the part of the steps
            that are done, to [0, 1].
        Masks that the caller brings stay.  Errors: InvalidSpec, as for an amount that is neither
        a fraction nor a count, nor a table of fractions.
        """
        due = step_of(step, steps, schedule)
        rules = []
        for index, rule in enumerate(self.rules):
            message = _copy(rule.message)
            if message.HasField("selection"):
                with _at(f"rules[{index}]"):
                    scale(message.selection, due)
            rules.append(Rule(message, rule.arrays))
        return Spec(tuple(rules))

    def keep_ends(self, names: Mapping[str, str]) -> "Spec":
        """The spec with `keep_first` and `keep_last` replaced by the names that they spare.

        The server knows a tied tensor by its first name alone, and this process knows where the
        other names are: the last layer of a model may be its first one's weight.

        Args:
            names: From every name of a tensor, in the state_dict's order, to the tensor's; empty
                where no tensor is tied.
        """
        if not names:
            return self
        rules = []
        for rule in self.rules:
            message = _copy(rule.message)
            tensors, rails = message.selection.tensors, message.selection.guard_rails
            if rails.keep_first or rails.keep_last:
                matched = {known for pattern in tensors for known in _known(pattern, names)}
                if ordered := [name for known, name in names.items() if known in matched]:
                    ends = ordered[:1] * rails.keep_first + ordered[-1:] * rails.keep_last
                    rails.exclude.extend(ends)
                    rails.keep_first = rails.keep_last = False
            rules.append(Rule(message, rule.arrays))
        return Spec(tuple(rules))

    def share_arrays(self, other_names: Mapping[str, str]) -> "Spec":
        """The spec with equal arrays under several names of a tied tensor made one array.

        The server knows arrays by their names alone, and would take them for different ones.

        Args:
            other_names: From each other name of a tied tensor to the tensor's.
        """
        return Spec(tuple(Rule(r.message, _shared(r.arrays, other_names)) for r in self.rules))

    def encode(self, taken: Iterable[str]) -> tuple[pb.PruningSpec, dict[str, LocalTensor]]:
        """The spec for the wire, and the arrays to send beside the model under their new names.

        taken: names of the model's tensors, which no array may get.  Errors: InvalidSpec.
        An array that stands under several names is sent once.
        """
        message = pb.PruningSpec()
        arrays: dict[str, LocalTensor] = {}
        holders: dict[int, str] = {}
        free = _free_names(set(taken))
        for rule in self.rules:
            encoded = message.rules.add()
            encoded.CopyFrom(rule.message)
            for name, array in rule.arrays.items():
                if id(array) not in holders:
                    holders[id(array)] = next(free)
                    arrays[holders[id(array)]] = _array(name, array)
                holder = holders[id(array)]
                if encoded.HasField("custom_masks"):
                    encoded.custom_masks.masks[name] = holder
                else:
                    encoded.selection.importance_scores[name] = holder
        return message, arrays


def checked(spec: Any) -> Spec:
    """What a caller gives as a spec.  Errors: InvalidSpec."""
    if not isinstance(spec, Spec):
        raise InvalidSpec(f"a spec is what secateur's methods make, not {type(spec).__name__}")
    return spec


def identity(tensors: Names) -> Spec:
    """Prunes nothing, but gives the tensors a mask: torch.nn.utils.prune.identity."""
    return l1_unstructured(tensors, 0)


def l1_unstructured(
    tensors: Names, amount: AnyAmount, importance_scores: Arrays | None = None
) -> Spec:
    """Prunes the elements with the lowest |w| in each tensor.

    tensors: a name, a glob or a list of them.  amount: an int is a number of elements, a float the
    fraction, in [0, 1], of those that are still unpruned.  importance_scores: arrays by tensor
    name, of the tensors' shapes, that rank in the weights' place.
    Errors: InvalidSpec.  As torch.nn.utils.prune.l1_unstructured.
    """
    return _selection(patterns(tensors), amount, importance_scores, magnitude=pb.Magnitude())


def random_unstructured(tensors: Names, amount: AnyAmount, seed: int = 0) -> Spec:
    """Prunes elements of each tensor at random: torch.nn.utils.prune.random_unstructured.

    seed: in [0, 2^64). The same seed prunes the same elements on every machine.
    """
    return _selection(patterns(tensors), amount, **random(seed).fields)


def ln_structured(
    tensors: Names,
    amount: AnyAmount,
    n: float | str,
    dim: int,
    importance_scores: Arrays | None = None,
) -> Spec:
    """Prunes the slices along `dim` with the lowest Ln norm in each tensor.

    n: a number, inf or -inf; "fro"; or "nuc" for tensors of 3 dimensions.
    dim: negative counts from the end.  As torch.nn.utils.prune.ln_structured.
    """
    choices = {"magnitude": norm("n", n), **slices(dim).fields}
    return _selection(patterns(tensors), amount, importance_scores, **choices)


def random_structured(tensors: Names, amount: AnyAmount, dim: int, seed: int = 0) -> Spec:
    """Prunes slices along `dim` at random: torch.nn.utils.prune.random_structured."""
    return _selection(patterns(tensors), amount, **random(seed).fields, **slices(dim).fields)


def global_unstructured(
    tensors: Names,
    amount: AnyAmount,
    importance: str = "l1",
    seed: int = 0,
    importance_scores: Arrays | None = None,
) -> Spec:
    """Prunes elements ranked over all tensors together.

    importance: "l1", or "random" with a seed.  As torch.nn.utils.prune.global_unstructured.
    """
    if isinstance(importance, str) and importance == "random":
        if importance_scores:
            raise InvalidSpec("importance_scores: random importance takes none")
        return select(tensors, amount, random(seed), scope="global")
    if not isinstance(importance, str) or importance != "l1":
        raise InvalidSpec(f"importance: {shown(importance)} is neither 'l1' nor 'random'")
    return select(tensors, amount, scope="global", importance_scores=importance_scores)


def custom_from_mask(masks: Arrays | str | os.PathLike[str]) -> Spec:
    """Prunes by the caller's masks: torch.nn.utils.prune.custom_from_mask.

    masks: arrays by tensor name, of the tensors' shapes, 0 is pruned and 1 is kept; or the path of
        a file of them: what result.save(path, "masks") wrote, or .safetensors, .pt or .npz.
    """
    if isinstance(masks, str | os.PathLike):
        try:
            masks = read_masks(source_path(masks, InvalidStateDict))
        except InvalidStateDict as error:
            raise InvalidSpec(f"masks: {error}") from None
    if not isinstance(masks, Mapping) or not masks or not all(map(is_text, masks)):
        raise InvalidSpec("masks: a map from names to masks is needed, with at least one")
    return Spec((Rule(pb.Rule(custom_masks=pb.CustomMasks()), dict(masks)),))


def select(
    tensors: Names,
    amount: AnyAmount,
    importance: AnyImportance = "magnitude",
    granularity: AnyGranularity = "element",
    scope: str = "tensor",
    normalization: str | None = None,
    allocation: str | None = None,
    of_all: bool = False,
    guard_rails: AnyGuardRails | None = None,
    importance_scores: Arrays | None = None,
    scales: Mapping[str, str] | None = None,
) -> Spec:
    """Prunes the least important units of tensors: every choice by itself.

    importance, granularity: what the functions of secateur.choices make, or the name of one.
    scope: what is ranked together: the units of each output "row" of a tensor, each "tensor", all
        ("global"), or tensors of names that differ in their numbers alone ("isomorphic").
    normalization: of each tensor's importances: "mean", "norm" or "z_score".
    allocation: how a total is divided: by "rank" (None), "uniform", "erk" or "lamp".
    of_all: whether the amount is of all units, those that are pruned already among them.
    guard_rails: bounds on what is pruned of each tensor.
    importance_scores: as of l1_unstructured, or with a score for each unit.
    scales: from a tensor's name to that of the 1-D tensor of the model that ranks its units.
    """
    named = scales.items() if isinstance(scales, Mapping) else ()
    is_map = isinstance(scales, Mapping | None)
    if not is_map or not all(is_text(a) and is_text(b) for a, b in named):
        raise InvalidSpec(f"scales: {shown(scales)} is no map from names to names")
    return _selection(
        patterns(tensors),
        amount,
        importance_scores,
        scales=dict(scales or {}),
        **importance_of(importance).fields,
        **granularity_of(granularity).fields,
        **ranking_of(scope, normalization, of_all, guard_rails),
        allocation=None if allocation is None else one_of("allocation", allocation, ALLOCATIONS),
    )


def grouped(
    groups: Groups,
    amount: AnyAmount,
    p: float = 1,
    combination: str = "mean",
    normalization: str | None = None,
    scope: str = "global",
    of_all: bool = False,
    guard_rails: AnyGuardRails | None = None,
    importance: AnyImportance = "magnitude",
    importance_scores: Arrays | None = None,
) -> Spec:
    """Prunes units of groups: slices of several tensors that live and die together.

    groups: what secateur.group or secateur.head_groups makes.
    p: of the norm that ranks what each member has of a unit.
    combination: how that becomes the unit's importance: their "mean", "sum" or "max".
    scope: "global" ranks all groups together, "tensor" each by itself.
    importance: "magnitude" by p, or "random".  The others as of `select`.
    importance_scores: arrays by a group's name, a score for each unit, that rank in its place.
    """
    if isinstance(importance, str) and importance == "magnitude":
        importance = magnitude(p)
    return _selection(
        (),
        amount,
        importance_scores,
        groups=groups_of(groups),
        granularity=pb.GRANULARITY_GROUP,
        combination=one_of("combination", combination, COMBINATIONS),
        **importance_of(importance).fields,
        **ranking_of(scope, normalization, of_all, guard_rails),
    )


def n_m_structured(tensors: Names, n: int = 2, m: int = 4, dim: int = 1) -> Spec:
    """Keeps n of each m elements along `dim`: the N:M sparsity of sparse tensor cores."""
    return select(tensors, 1.0, granularity=n_m(n, m, dim))


def block_structured(tensors: Names, amount: AnyAmount, rows: int, cols: int, n: float = 1) -> Spec:
    """Prunes the blocks with the lowest Ln norm in each tensor, which is taken as a matrix."""
    return select(tensors, amount, magnitude(n), blocks(rows, cols))


def global_structured(tensors: Names, amount: AnyAmount, n: float, dim: int) -> Spec:
    """Prunes slices along `dim`, ranked by their power mean of order n over all tensors."""
    return select(tensors, amount, magnitude(n), slices(dim), scope="global")


def lamp(tensors: Names, amount: AnyAmount) -> Spec:
    """Prunes elements by layer-adaptive magnitude over all tensors: Lee et al. 2021."""
    return select(tensors, amount, scope="global", allocation="lamp")


def erk(tensors: Names, amount: AnyAmount) -> Spec:
    """Prunes elements by |w|, each tensor by its Erdos-Renyi-Kernel share: Evci et al. 2020."""
    return select(tensors, amount, scope="global", allocation="erk")


METHODS: dict[str, Callable[..., Spec]] = {
    method.__name__: method
    for method in (
        identity,
        l1_unstructured,
        random_unstructured,
        ln_structured,
        random_structured,
        global_unstructured,
        custom_from_mask,
        n_m_structured,
        block_structured,
        global_structured,
        lamp,
        erk,
        select,
        grouped,
    )
}


def _from_plain(rule: Any, path: str) -> Spec:
    if not isinstance(rule, Mapping):
        raise InvalidSpec(f"{path}: {shown(rule)} is no map")
    arguments = dict(rule)
    name = arguments.pop("method", None)
    with _at(path):
        if "method" not in rule:
            raise InvalidSpec(_misspelled(rule, "method") or "method: is missing")
        method = one_of("method", name, METHODS)
        if problem := mismatch(method, arguments):
            raise InvalidSpec(f"{name}: {problem}")
        return method(**arguments)


def _misspelled(table: Mapping[Any, Any], key: str) -> str | None:
    """What is wrong where a key that is needed is likely there with a typing error."""
    names = () if key in table else [name for name in table if isinstance(name, str)]
    near = get_close_matches(key, names, 1)
    return f"{near[0]}: is unknown; the nearest is {key}" if near else None


@contextmanager
def _at(path: str) -> Iterator[None]:
    """Names the rule in an error."""
    try:
        yield
    except InvalidSpec as error:
        raise InvalidSpec(f"{path}.{error}") from None


def _described(rule: Rule) -> str:
    """A rule in one line: its fields as the wire has them, and the names of its arrays."""
    text = MessageToString(rule.message, as_one_line=True)
    return f"{text} arrays: {', '.join(rule.arrays)}" if rule.arrays else text


def _copy(message: pb.Rule) -> pb.Rule:
    copy = pb.Rule()
    copy.CopyFrom(message)
    return copy


def _array(name: str, array: Any) -> LocalTensor:
    if isinstance(array, LocalTensor):
        return array
    try:
        return from_value(name, array)
    except InvalidStateDict as error:
        raise InvalidSpec(f"scores or mask of {error}") from None


def _shared(arrays: Arrays, other_names: Mapping[str, str]) -> Arrays:
    first: dict[str, Any] = {}
    shared = {}
    for name, array in arrays.items():
        known = first.setdefault(other_names.get(name, name), array)
        shared[name] = known if known is array or _are_equal(name, known, array) else array
    return shared


def _are_equal(name: str, one: Any, other: Any) -> bool:
    a, b = _array(name, one), _array(name, other)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a.read(), b.read())


def _selection(
    tensors: Sequence[str], amount: AnyAmount, scores: Arrays | None = None, **choices: Any
) -> Spec:
    if not isinstance(scores, Mapping | None) or not all(map(is_text, scores or ())):
        raise InvalidSpec(f"importance_scores: {shown(scores)} is no map from names to arrays")
    defaults = {"granularity": pb.GRANULARITY_ELEMENT, "scope": pb.SCOPE_PER_TENSOR}
    fields = {**defaults, **choices, **amount_of(amount).fields}
    selection = pb.Selection(tensors=tensors, **fields)
    return Spec((Rule(pb.Rule(selection=selection), dict(scores or {})),))


def _known(pattern: str, names: Mapping[str, str]) -> list[str]:
    """The names that a name or a glob matches."""
    return [pattern] if pattern in names else [n for n in names if fnmatchcase(n, pattern)]


def _free_names(taken: set[str]) -> Iterator[str]:
    number = 0
    while True:
        name = f"secateur.{number}"
        if name not in taken:
            yield name
        number += 1
