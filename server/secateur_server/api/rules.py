"""The rules of Prune and Plan, and the parameters that they begin with."""

from collections.abc import Iterable, Sequence

from secateur_proto import pruner_pb2 as pb
from secateur_server.cut.prior import prune_zeros
from secateur_server.errors import InvalidRequest
from secateur_server.granularity.group import Group
from secateur_server.granularity.kept_units import distinct_groups
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Rule
from secateur_server.spec.solve import Solve
from secateur_server.state_dict.catalog import Catalog
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.state_dict import StateDict


def check_prior(header: pb.PruneHeader | pb.PlanHeader | pb.FinalizeHeader) -> None:
    """Raises InvalidRequest for an unknown value."""
    if header.prior not in pb.Prior.values():
        raise InvalidRequest("header.prior", f"{header.prior} is not a value of Prior")


def is_solving(rules: Iterable[Rule]) -> bool:
    """Returns whether a rule updates weights."""
    return any(isinstance(rule, Solve) for rule in rules)


def divided(rules: Sequence[Rule]) -> tuple[list[Rule], list[Solve]]:
    """Divides rules into those that make masks, and those behind them that update weights."""
    solving = [rule for rule in rules if isinstance(rule, Solve)]
    return list(rules[: len(rules) - len(solving)]), solving


def extras_of(rules: Iterable[Rule]) -> set[str]:
    """Returns the names of the tensors that hold scores and masks."""
    return {name for rule in rules for name in rule.extras()}


def streamed_of(rules: Iterable[Rule]) -> set[str]:
    """Returns the names of the tensors that are used as they arrive."""
    return {name for rule in rules for name in rule.streamed()}


def reads_of(rules: Iterable[Rule]) -> set[str]:
    """Returns the names of the parameters that resolved rules read."""
    return {name for rule in rules for name in rule.reads()}


def groups_of(context: RequestContext, rules: Iterable[Rule], catalog: Catalog) -> list[Group]:
    """Returns the groups of resolved rules, each once.

    Raises:
        InvalidSpec: Two members name one slice of a tensor.
    """
    groups = [group for rule in rules for group in rule.units_together()]
    return distinct_groups(context, groups, catalog)


def before(
    context: RequestContext,
    header: pb.PruneHeader | pb.PlanHeader,
    state_dict: StateDict,
    rules: Sequence[Rule],
) -> dict[str, Parameter]:
    """Returns the parameters before the first of the resolved rules."""
    parameters = dict(state_dict.parameters)
    if header.prior != pb.PRIOR_ZEROS:
        return parameters
    return prune_zeros(context, parameters, {name for rule in rules for name in rule.names()})
