"""The choices of a rule that say how much is pruned. In plain data they are as in `choices`."""

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any

from secateur.checks import chosen, fraction, integer, number, pair, shown, size, text_keys
from secateur.choices import Chosen, Plain
from secateur.errors import InvalidSpec
from secateur_proto import plan_pb2
from secateur_proto import spec_pb2 as pb


class Amount(Chosen):
    """How much is pruned."""


AnyAmount = Amount | float | str | Plain


def threshold(value: float) -> Amount:
    """Prunes the units whose importance is below a number.

    Args:
        value: The number.
    """
    return Amount({"threshold": number("value", value)})


def target_bytes(n: int | str) -> Amount:
    """Prunes as few units as leave at most `n` bytes; a unit with any element left counts whole.

    Args:
        n: A number, or text such as "5GB" or "512MiB".
    """
    return Amount({"bytes": size("n", n)})


def target_macs(target: float, per_unit: Mapping[str, float]) -> Amount:
    """Prunes as few units as leave at most `target` operations.

    Args:
        target: Multiply-accumulate operations.
        per_unit: Operations of one unit, above 0, by the name of each tensor, or group, of the
            rule.
    """
    costs = {
        name: number(f"per_unit[{name!r}]", cost)
        for name, cost in text_keys("per_unit", per_unit, "names to numbers").items()
    }
    return Amount({"macs": pb.Macs(target=number("target", target), per_unit=costs)})


def table(fractions: Mapping[str, float | str]) -> Amount:
    """Prunes a fraction of its own of each tensor.

    Args:
        fractions: By name or glob; the first that matches a tensor counts. Tensors that no entry
            matches are kept as they are.
    """
    entries = [
        pb.TableEntry(tensors=name, fraction=fraction(f"fractions[{name!r}]", share))
        for name, share in text_keys("fractions", fractions, "names or globs to fractions").items()
    ]
    return Amount({"table": pb.Table(entries=entries)})


AMOUNTS: dict[str, Callable[..., Amount]] = {
    make.__name__: make for make in (threshold, target_bytes, target_macs, table)
}


def amount_of(value: Any) -> Amount:
    """Returns an amount: itself, plain data, an int of units, or a float or "50%" of them."""
    if isinstance(value, Amount | Mapping):
        return chosen("amount", value, Amount, AMOUNTS)
    return Amount(units_of("amount", value))


def pattern_of(amount: AnyAmount | None, n_m: Any) -> tuple[int, int] | None:
    """Returns the pattern that is given in place of an amount, or None.

    Raises:
        InvalidSpec: Both are given, or none.
    """
    if amount is None and n_m is None:
        raise InvalidSpec("amount: None is for n_m only; give a fraction or a count")
    if amount is not None and n_m is not None:
        raise InvalidSpec(
            f"amount: {shown(amount)} is given beside n_m={shown(n_m)}; give amount=None or no n_m"
        )
    return None if n_m is None else pair("n_m", n_m)


def units_of(field: str, value: Any) -> dict[str, Any]:
    """Returns the field of an int of units, or of a fraction of them."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return {"count": integer(field, value)}
    return {"fraction": fraction(field, value)}


def encode_amounts(amounts: Any) -> list[plan_pb2.Amount]:
    """Returns ints and fractions as the amounts of a plan, where an empty list means the spec's."""
    if isinstance(amounts, str) or not isinstance(amounts, Iterable):
        raise InvalidSpec(f"amounts: {shown(amounts)} is not a list of ints and floats")
    found = [
        plan_pb2.Amount(**units_of(f"amounts[{index}]", amount))
        for index, amount in enumerate(amounts)
    ]
    if not found:
        raise InvalidSpec("amounts: at least one is needed")
    return found
