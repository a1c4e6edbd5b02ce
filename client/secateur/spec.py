"""Specs: rules that say what to prune. The functions of secateur.methods make them."""

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import reduce
from typing import Any

import numpy as np
from google.protobuf.text_format import MessageToString

from secateur.calibration.triangle import Triangle, triangle_length
from secateur.checks import mismatch, one_of, shown
from secateur.errors import InvalidSpec, InvalidStateDict, InvalidStatistics
from secateur.steps import Schedule, scale, step_of
from secateur.tensors import LocalTensor, from_value
from secateur_proto import spec_pb2 as pb

Arrays = Mapping[str, Any]

# The fields of a rule that refer to arrays.
MASKS, SCORES = "custom_masks.masks", "selection.importance_scores"
INPUTS, OUTPUTS = "selection.activation.inputs", "selection.activation.outputs"
GRAMS = "solver.grams"


@dataclass(frozen=True, eq=False)
class Rule:
    """One rule. Rules are equal if what they send is.

    Attributes:
        message: The rule as it is sent, without the names of its arrays.
        arrays: The arrays that are sent with it, by the names of the tensors that they are for; of
            each field of the message that refers to arrays, such as "custom_masks.masks".
        example_inputs: Those with which its groups were traced, if they were.
        files: The arguments, as a spec file has them, that its arrays were read from; without
            those of arrays that were given in memory.
        place: Finds the line of a spec file that a field of the rule was read from, as "FILE:LINE".
    """

    message: pb.Rule
    arrays: Mapping[str, Arrays] = field(default_factory=dict)
    example_inputs: Any = field(default=None, repr=False)
    files: Mapping[str, Any] = field(default_factory=dict)
    place: Callable[[str], str] | None = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rule):
            return NotImplemented
        return self.message == other.message and _are_equal(self.arrays, other.arrays)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        text = MessageToString(self.message, as_one_line=True)
        names = [name for arrays in self.arrays.values() for name in arrays]
        return f"{text} arrays: {', '.join(names)}" if names else text


@dataclass(frozen=True)
class Spec:
    """Rules, applied in order; `a + b` applies a, then b to what a left unpruned."""

    rules: tuple[Rule, ...]

    def __repr__(self) -> str:
        return f"Spec({'; '.join(map(repr, self.rules))})"

    def __add__(self, other: "Spec") -> "Spec":
        return Spec(self.rules + other.rules)

    @property
    def example_inputs(self) -> Any:
        """Those with which the groups were traced; None if they were not."""
        given = (rule.example_inputs for rule in self.rules)
        return next((inputs for inputs in given if inputs is not None), None)

    @property
    def solvers(self) -> tuple[str, ...]:
        """The names of the methods that update weights, such as "sparsegpt"."""
        methods = (rule.message.solver.WhichOneof("method") for rule in self.rules)
        return tuple(method for method in methods if method)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "Spec":
        """Makes a spec of plain data.

        Args:
            table: {"rules": [{"method": NAME, **arguments of that function}]}.

        Raises:
            InvalidSpec: It is not a spec; the message names the rule.
        """
        parts = [from_plain(rule, path) for path, rule in plain_rules(table).items()]
        return cls(tuple(rule for spec in parts for rule in spec.rules))

    def to_dict(self) -> dict[str, Any]:
        """Returns the spec as plain data, for `from_dict`, JSON and YAML.

        Groups are written out, traced ones too. Arrays have no plain form: give masks, scores and
        statistics as paths of files.

        Raises:
            InvalidSpec: A rule has arrays that are in memory only.
        """
        from secateur.spec_files.plain import plain_spec

        return plain_spec(self.rules)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the spec to a file that `read_spec` and `--spec` read, whole or not at all.

        Args:
            path: .yaml, .yml or .json. Paths of files in the spec are written as they were given.

        Raises:
            InvalidSpec: See `to_dict`.
            SecateurError: The file cannot be written.
        """
        from secateur.spec_files.writing import write_spec

        write_spec(path, self.to_dict())

    def at(self, step: int, steps: int, schedule: Schedule = "cubic") -> "Spec":
        """Scales each amount to what is due at a step; amounts are then of all units.

        The result of each step is the source of the next. The caller's own masks are not scaled,
        and a `refit` is done at each step.

        Args:
            step: In [1, steps]; the last one prunes the whole amount.
            steps: How many there are.
            schedule: A name of secateur.schedules, or a function from the part of the steps that
                are done to the share of the amount, both in [0, 1].

        Raises:
            InvalidSpec: An argument is wrong, an amount is not a fraction, a count or a table, or a
                rule is a `sparsegpt` or an `alps`.
        """
        due = step_of(step, steps, schedule)
        rules = []
        for index, rule in enumerate(self.rules):
            message = pb.Rule()
            message.CopyFrom(rule.message)
            if message.HasField("selection"):
                with _rule_in_errors(f"rules[{index}]"):
                    scale(message.selection, due)
            elif (solver := message.solver.WhichOneof("method")) and solver != "refit":
                raise InvalidSpec(
                    f"rules[{index}]: {solver} has no steps; prune by wanda(...).at(...), with a "
                    "refit after it, or give each step its own amount"
                )
            rules.append(replace(rule, message=message))
        return Spec(tuple(rules))

    def encode(self, taken: Iterable[str]) -> tuple[pb.PruningSpec, dict[str, LocalTensor]]:
        """Encodes the spec.

        Args:
            taken: The names of the model's tensors; no array gets one of them.

        Returns:
            The message, and the arrays to send beside the model, by the names that the message has
            for them: Gram matrices last. An array under several names is sent once.

        Raises:
            InvalidSpec: An array cannot be sent.
        """
        message = pb.PruningSpec()
        arrays: dict[str, LocalTensor] = {}
        grams: dict[str, LocalTensor] = {}
        holders: dict[int, str] = {}
        free = _free_names(set(taken))
        for rule in self.rules:
            encoded = message.rules.add()
            encoded.CopyFrom(rule.message)
            for path, of_field in rule.arrays.items():
                for name, array in of_field.items():
                    if id(array) not in holders:
                        holders[id(array)] = next(free)
                        to_send = grams if path == GRAMS else arrays
                        to_send[holders[id(array)]] = local_array(name, array)
                    _refer(encoded, path, name, holders[id(array)])
        return message, arrays | grams


def _refer(rule: pb.Rule, path: str, name: str, holder: str) -> None:
    """Makes a field of a rule say which array is for a tensor."""
    *outer, field_name = path.split(".")
    holders: Any = reduce(getattr, outer, rule)
    holders = getattr(holders, field_name)
    if path == GRAMS:
        holders[name].holder = holder
    else:
        holders[name] = holder


def _are_equal(one: Any, other: Any) -> bool:
    """Whether arrays are equal, or mappings to them."""
    if one is other:
        return True
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_are_equal(one[k], other[k]) for k in one)
    a, b = local_array("", one), local_array("", other)
    return a[:2] == b[:2] and bytes(a.read()) == bytes(b.read())


def local_array(name: str, array: Any) -> LocalTensor:
    """Reads the array that is for a tensor.

    Raises:
        InvalidSpec: It cannot be sent.
    """
    if isinstance(array, LocalTensor):
        return array
    if isinstance(array, Triangle):
        shape = (triangle_length(array.size),)
        return LocalTensor("F32", shape, lambda: array.values().view(np.uint8))
    try:
        return from_value(name, array)
    except InvalidStateDict as error:
        raise InvalidSpec(f"array for {error}") from None


def _free_names(taken: Collection[str]) -> Iterator[str]:
    names = (f"secateur.{number}" for number in itertools.count())
    return (name for name in names if name not in taken)


# By their names; secateur.methods adds them.
METHODS: dict[str, Callable[..., Spec]] = {}


def plain_rules(table: Any) -> dict[str, Any]:
    """Returns the rules of a spec in plain data, by the paths of their fields.

    Raises:
        InvalidSpec: It is not a mapping with a list of rules, and nothing else.
    """
    if not isinstance(table, Mapping):
        raise InvalidSpec(f"{shown(table)} is not a mapping with a list of `rules`")
    if near := _misspelled(table, "rules"):
        raise InvalidSpec(near)
    for name in table.keys() - {"rules", "$schema"}:  # editors read `$schema`
        raise InvalidSpec(f"{shown(name)} is not a field of a spec; there is `rules` alone")
    rules = table.get("rules")
    if not isinstance(rules, Sequence) or isinstance(rules, str) or not rules:
        raise InvalidSpec(f"rules: {shown(rules)} is not a list of rules, at least one")
    return {f"rules[{index}]": rule for index, rule in enumerate(rules)}


def from_plain(rule: Any, path: str) -> Spec:
    """Makes the spec of a rule in plain data; `path` is that of its field, for errors."""
    if not isinstance(rule, Mapping):
        raise InvalidSpec(f"{path}: {shown(rule)} is not a mapping")
    arguments = dict(rule)
    name = arguments.pop("method", None)
    with _rule_in_errors(path):
        if "method" not in rule:
            raise InvalidSpec(_misspelled(rule, "method") or "method: is missing")
        method = one_of("method", name, METHODS)
        if "n_m" in arguments:  # in place of an amount
            arguments = {"amount": None, **arguments}
        if problem := mismatch(method, arguments):
            raise InvalidSpec(f"{name}: {problem}")
        return method(**arguments)


def spec_of(value: Any) -> Spec:
    """Returns a spec that a caller gives.

    Raises:
        InvalidSpec: It is something else.
    """
    if not isinstance(value, Spec):
        raise InvalidSpec(
            f"spec: {shown(value)} is not a Spec; make one, as with "
            "secateur.l1_unstructured('*.weight', 0.5), or with secateur.read_spec of a file"
        )
    return value


def _misspelled(table: Mapping[Any, Any], key: str) -> str | None:
    """The error for a table that lacks a key, but has one with a similar name."""
    names = () if key in table else [name for name in table if isinstance(name, str)]
    near = get_close_matches(key, names, 1)
    return f"{near[0]}: is unknown; the nearest is {key}" if near else None


@contextmanager
def _rule_in_errors(path: str) -> Iterator[None]:
    try:
        yield
    except InvalidSpec as error:
        raise InvalidSpec(f"{path}.{error}") from None
    except InvalidStatistics as error:
        raise InvalidStatistics(f"{path}.statistics: {error}") from None
