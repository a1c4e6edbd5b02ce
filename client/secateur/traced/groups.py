"""Finds the groups of a module by tracing it."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from secateur.errors import SecateurError
from secateur.grouping import Group, GroupList


class TracedGroups(GroupList):
    """The groups of a module: a list, with what is not in it.

    Attributes:
        kept: From the name of each tensor whose layer makes slices that stay whole to the reason.
        example_inputs: Those with which the module was traced. `PruneResult.shrink` compares the
            smaller module with the masked one on them.
    """

    kept: Mapping[str, str]
    example_inputs: Any

    def __init__(
        self, groups: Iterable[Group], kept: Mapping[str, str], example_inputs: Any
    ) -> None:
        super().__init__(groups)
        self.kept = MappingProxyType(dict(kept))
        self.example_inputs = example_inputs

    def __str__(self) -> str:
        whole = [f"{name}: whole: {reason}" for name, reason in self.kept.items()]
        return "\n".join([*map(repr, self), *whole])


def groups(module: Any, example_inputs: Any) -> TracedGroups:
    """Finds which slices of a module's tensors must be pruned together, by tracing it.

    Give the result to `secateur.grouped`. A model that is cut along these groups computes what the
    masked model computes. Needs secateur[trace].

    Args:
        module: A torch.nn.Module, which torch.export can trace. It is traced as in evaluation, and
            it is not changed.
        example_inputs: What forward takes: a tensor, a tuple of arguments, or a mapping of
            keywords. Their values do not matter, unless forward looks at them.

    Returns:
        A list of groups. Its `kept` says what stays whole, and why: what makes the model's output,
        what a layer norm mixes, all that meets an operation that secateur does not know, and
        layers without whose units forward fails.

    Raises:
        InvalidSpec: torch.export cannot trace the module.
        SecateurError: torch is not installed.
    """
    try:
        from secateur.traced.exporting import trace
    except ImportError as error:
        raise SecateurError(
            f"secateur.groups needs torch ({error}): pip install 'secateur[trace]'"
        ) from None
    return TracedGroups(*trace(module, example_inputs), example_inputs)
