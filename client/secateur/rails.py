"""Guard rails: bounds on how much of a tensor, or of a group, is pruned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secateur.checks import flag, fraction, integer, made, patterns, text_keys
from secateur.choices import Plain
from secateur_proto import spec_pb2 as pb


@dataclass(frozen=True)
class Rail:
    """Bounds for a tensor.

    Attributes:
        message: Without the names of the tensors.
    """

    message: pb.Rail


@dataclass(frozen=True)
class GuardRails:
    """The guard rails of a rule."""

    message: pb.GuardRails


AnyGuardRails = GuardRails | Plain


def rail(
    max_sparsity: float | None = None, min_sparsity: float | None = None, keep_at_least: int = 0
) -> Rail:
    """Bounds how much of a tensor, or group, is pruned in the end, prior pruning included.

    Args:
        max_sparsity: The largest fraction of its units, in [0, 1].
        min_sparsity: The smallest fraction of its units, in [0, 1].
        keep_at_least: Units that are kept.
    """
    message = pb.Rail(keep_at_least=integer("keep_at_least", keep_at_least))
    if max_sparsity is not None:
        message.max_sparsity = fraction("max_sparsity", max_sparsity)
    if min_sparsity is not None:
        message.min_sparsity = fraction("min_sparsity", min_sparsity)
    return Rail(message)


def guard_rails(
    max_sparsity: float | None = None,
    min_sparsity: float | None = None,
    keep_at_least: int = 0,
    keep_first: bool = False,
    keep_last: bool = False,
    exclude: str | Sequence[str] = (),
    per_tensor: Mapping[str, Rail | Plain] | None = None,
) -> GuardRails:
    """Bounds what a rule prunes: within all of them it meets its amount exactly, or fails.

    Args:
        max_sparsity: For each tensor; see `rail`.
        min_sparsity: For each tensor; see `rail`.
        keep_at_least: For each tensor; see `rail`.
        keep_first: Whether the first tensor of the rule is kept as it is.
        keep_last: Whether the last tensor of the rule is kept as it is.
        exclude: Names and globs of tensors that are kept as they are.
        per_tensor: A rail, or its arguments, by name or glob; the first that matches a tensor
            holds in place of the bounds above.
    """
    general = rail(max_sparsity, min_sparsity, keep_at_least).message
    named = {} if per_tensor is None else text_keys("per_tensor", per_tensor, "names to rails")
    rails = []
    for name, bounds in named.items():
        rails.append(pb.Rail(tensors=[name]))
        rails[-1].MergeFrom(made(f"per_tensor[{name!r}]", bounds, Rail, rail).message)
    message = pb.GuardRails(
        rails=rails if general == pb.Rail() else [*rails, general],
        keep_first=flag("keep_first", keep_first),
        keep_last=flag("keep_last", keep_last),
        exclude=() if isinstance(exclude, tuple) and not exclude else patterns(exclude, "exclude"),
    )
    return GuardRails(message)
