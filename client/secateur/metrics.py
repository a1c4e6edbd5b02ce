"""Numbers that a caller's function returns of a module."""

from collections.abc import Mapping
from typing import Any

from secateur.checks import shown
from secateur.errors import SecateurError
from secateur.tensors import is_text

# What `evaluate` returns: a number, or numbers by their names.
Metrics = float | Mapping[str, float]

# A table of metrics has these columns too.
COLUMNS = ("amount", "zeros", "total", "sparsity")
_ADVICE = "return a number, or a mapping from names to numbers"


def named_metrics(found: Any) -> dict[str, float]:
    """Returns numbers of Python, numpy or torch as floats by their names; one alone is "metric".

    Raises:
        SecateurError: They are something else.
    """
    named = found if isinstance(found, Mapping) else {"metric": found}
    if not named:
        raise SecateurError(f"evaluate: returned no metric; {_ADVICE}")
    return {_name(name): _number(name, value) for name, value in named.items()}


def _name(name: Any) -> str:
    if not is_text(name) or name in COLUMNS:
        raise SecateurError(
            f"evaluate: returned {shown(name)} as the name of a metric; give it text that is not "
            f"the name of another column: {', '.join(COLUMNS)}"
        )
    return str(name)


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text is not a number")
        return float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        said = f"evaluate: returned {shown(value)} as {shown(name)}; {_ADVICE}"
        raise SecateurError(said) from None


def check_same(first: Mapping[str, float], later: Mapping[str, float]) -> None:
    """Checks that two calls returned metrics of the same names.

    Raises:
        SecateurError: They did not.
    """
    if first.keys() != later.keys():
        names = f"{shown(list(first))}, and later {shown(list(later))}"
        raise SecateurError(f"evaluate: returned the metrics {names}; return the same each time")
