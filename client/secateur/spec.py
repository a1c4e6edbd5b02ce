"""What to prune: torch.nn.utils.prune's methods, and their sums."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

from secateur.errors import InvalidSpec, InvalidStateDict
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

    def __add__(self, other: "Spec") -> "Spec":
        return Spec(self.rules + other.rules)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "Spec":
        """A spec from plain data: {"rules": [{"method": NAME, **arguments of that function}]}.

        Errors: InvalidSpec, naming the rule.
        """
        rules = table.get("rules") if isinstance(table, Mapping) else None
        if not isinstance(rules, Sequence) or isinstance(rules, str) or not rules:
            raise InvalidSpec("a spec is a map with a list of `rules`, at least one")
        specs = [_from_plain(rule, f"rules[{index}]") for index, rule in enumerate(rules)]
        return cls(tuple(rule for spec in specs for rule in spec.rules))

    def among(self, names: Collection[str]) -> "Spec":
        """The spec with its globs replaced by those of `names` that they match.

        A glob that matches none stays, for the server to say so.
        """
        rules = []
        for rule in self.rules:
            message = pb.Rule()
            message.CopyFrom(rule.message)
            if message.HasField("selection"):
                tensors = message.selection.tensors
                found = [_matching(pattern, names) or [pattern] for pattern in tensors]
                tensors[:] = dict.fromkeys(name for matched in found for name in matched)
            rules.append(Rule(message, rule.arrays))
        return Spec(tuple(rules))

    def encode(self, taken: Iterable[str]) -> tuple[pb.PruningSpec, dict[str, LocalTensor]]:
        """The spec for the wire, and the arrays to send beside the model under their new names.

        taken: names of the model's tensors, which no array may get.  Errors: InvalidSpec.
        """
        message = pb.PruningSpec()
        arrays: dict[str, LocalTensor] = {}
        free = _free_names(set(taken))
        for rule in self.rules:
            encoded = message.rules.add()
            encoded.CopyFrom(rule.message)
            for name, array in rule.arrays.items():
                holder = next(free)
                arrays[holder] = _array(name, array)
                if encoded.HasField("custom_masks"):
                    encoded.custom_masks.masks[name] = holder
                else:
                    encoded.selection.importance_scores[name] = holder
        return message, arrays


def identity(tensors: Names) -> Spec:
    """Prunes nothing, but gives the tensors a mask: torch.nn.utils.prune.identity."""
    return l1_unstructured(tensors, 0)


def l1_unstructured(tensors: Names, amount: float, importance_scores: Arrays | None = None) -> Spec:
    """Prunes the elements with the lowest |w| in each tensor.

    tensors: a name, a glob or a list of them.  amount: an int is a number of elements, a float the
    fraction, in [0, 1], of those that are still unpruned.  importance_scores: arrays by tensor
    name, of the tensors' shapes, that rank in the weights' place.
    Errors: InvalidSpec.  As torch.nn.utils.prune.l1_unstructured.
    """
    return _by_magnitude(tensors, amount, importance_scores, pb.Magnitude())


def random_unstructured(tensors: Names, amount: float, seed: int = 0) -> Spec:
    """Prunes elements of each tensor at random: torch.nn.utils.prune.random_unstructured.

    seed: in [0, 2^64). The same seed prunes the same elements on every machine.
    """
    return _selection(tensors, amount, random=_random(seed))


def ln_structured(
    tensors: Names,
    amount: float,
    n: float | str,
    dim: int,
    importance_scores: Arrays | None = None,
) -> Spec:
    """Prunes the slices along `dim` with the lowest Ln norm in each tensor.

    n: a number, inf or -inf; "fro"; or "nuc" for tensors of 3 dimensions.
    dim: negative counts from the end.  As torch.nn.utils.prune.ln_structured.
    """
    return _by_magnitude(tensors, amount, importance_scores, _norm(n), **_slices(dim))


def random_structured(tensors: Names, amount: float, dim: int, seed: int = 0) -> Spec:
    """Prunes slices along `dim` at random: torch.nn.utils.prune.random_structured."""
    return _selection(tensors, amount, random=_random(seed), **_slices(dim))


def global_unstructured(
    tensors: Names,
    amount: float,
    importance: str = "l1",
    seed: int = 0,
    importance_scores: Arrays | None = None,
) -> Spec:
    """Prunes elements ranked over all tensors together.

    importance: "l1", or "random" with a seed.  As torch.nn.utils.prune.global_unstructured.
    """
    if importance == "random":
        if importance_scores:
            raise InvalidSpec("importance_scores: random importance takes none")
        return _selection(tensors, amount, random=_random(seed), scope=pb.SCOPE_GLOBAL)
    if importance != "l1":
        raise InvalidSpec(f"importance: {importance!r} is neither 'l1' nor 'random'")
    return _by_magnitude(tensors, amount, importance_scores, pb.Magnitude(), scope=pb.SCOPE_GLOBAL)


def custom_from_mask(masks: Arrays) -> Spec:
    """Prunes by the caller's masks: torch.nn.utils.prune.custom_from_mask.

    masks: arrays by tensor name, of the tensors' shapes, 0 is pruned and 1 is kept.
    """
    if not isinstance(masks, Mapping) or not masks:
        raise InvalidSpec("masks: a map from names to masks is needed, with at least one")
    return Spec((Rule(pb.Rule(custom_masks=pb.CustomMasks()), dict(masks)),))


METHODS = {
    method.__name__: method
    for method in (
        identity,
        l1_unstructured,
        random_unstructured,
        ln_structured,
        random_structured,
        global_unstructured,
        custom_from_mask,
    )
}


def _from_plain(rule: Any, path: str) -> Spec:
    if not isinstance(rule, Mapping):
        raise InvalidSpec(f"{path}: {rule!r} is no map")
    arguments = dict(rule)
    method = METHODS.get(arguments.pop("method", ""))
    if method is None or method is custom_from_mask:
        names = ", ".join(name for name in METHODS if name != "custom_from_mask")
        raise InvalidSpec(f"{path}.method: {rule.get('method')!r} is none of {names}")
    try:
        return method(**arguments)
    except TypeError as error:
        raise InvalidSpec(f"{path}: {error}") from None
    except InvalidSpec as error:
        raise InvalidSpec(f"{path}.{error}") from None


def _array(name: str, array: Any) -> LocalTensor:
    try:
        return from_value(name, array)
    except InvalidStateDict as error:
        raise InvalidSpec(f"scores or mask of {error}") from None


def _selection(tensors: Names, amount: float, scores: Arrays | None = None, **choices: Any) -> Spec:
    if not isinstance(scores, Mapping | None):
        raise InvalidSpec(f"importance_scores: {scores!r} is no map from names to arrays")
    choices = {
        "granularity": pb.GRANULARITY_ELEMENT,
        "scope": pb.SCOPE_PER_TENSOR,
        **choices,
        **_amount(amount),
    }
    selection = pb.Selection(tensors=patterns(tensors), **choices)
    return Spec((Rule(pb.Rule(selection=selection), dict(scores or {})),))


def _by_magnitude(
    tensors: Names, amount: float, scores: Arrays | None, magnitude: pb.Magnitude, **choices: Any
) -> Spec:
    return _selection(tensors, amount, scores, magnitude=magnitude, **choices)


def patterns(tensors: Names) -> list[str]:
    """`tensors` as the wire has it.  Errors: InvalidSpec."""
    names = [tensors] if isinstance(tensors, str) else tensors
    if not isinstance(names, Sequence) or not names or not all(map(is_text, names)):
        raise InvalidSpec(f"tensors: {tensors!r} is no name, glob, or list of them")
    return list(names)


def _amount(amount: Any) -> dict[str, Any]:
    if isinstance(amount, bool) or not isinstance(amount, Real):
        raise InvalidSpec(f"amount: {amount!r} is neither an int nor a float")
    if isinstance(amount, Integral):
        return {"count": _integer("amount", amount, 0, 1 << 64)}
    if not 0.0 <= float(amount) <= 1.0:
        raise InvalidSpec(f"amount: {amount} is no fraction in [0, 1]")
    return {"fraction": float(amount)}


def _integer(field: str, value: Any, low: int, end: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) < end:
        raise InvalidSpec(f"{field}: {value!r} is no int in [{low}, {end})")
    return int(value)


def _random(seed: Any) -> pb.Random:
    return pb.Random(seed=_integer("seed", seed, 0, 1 << 64))


def _norm(n: Any) -> pb.Magnitude:
    if n == "fro":
        return pb.Magnitude(matrix_norm=pb.MATRIX_NORM_FROBENIUS)
    if n == "nuc":
        return pb.Magnitude(matrix_norm=pb.MATRIX_NORM_NUCLEAR)
    if isinstance(n, Real) and not isinstance(n, bool):
        return pb.Magnitude(p=float(n))
    raise InvalidSpec(f"n: {n!r} is no number, 'fro' or 'nuc'")


def _slices(dim: Any) -> dict[str, Any]:
    dim = _integer("dim", dim, -(1 << 31), 1 << 31)
    return {"granularity": pb.GRANULARITY_SLICE, "dim": dim}


def _matching(pattern: str, names: Collection[str]) -> list[str]:
    if pattern in names:
        return [pattern]
    return [name for name in names if fnmatchcase(name, pattern)]


def _free_names(taken: set[str]) -> Iterator[str]:
    number = 0
    while True:
        name = f"secateur.{number}"
        if name not in taken:
            yield name
        number += 1
