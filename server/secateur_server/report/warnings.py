"""Warns the caller of a Prune about results that may not be meant.

Checks read the request and the report. No check reads a weight.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from secateur_proto import report_pb2 as pb
from secateur_server.errors import quote
from secateur_server.report.listing import listed
from secateur_server.report.measure import MOST_NAMED
from secateur_server.report.missed import missed_weights
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Rule, Selection
from secateur_server.spec.solve import Solve
from secateur_server.state_dict.catalog import Catalog, Shape
from secateur_server.state_dict.parameter import Parameter

# The code of the note that most results have.
NOT_SMALLER = "NOT_SMALLER"

_LEAVE_OUT = "name the tensors to prune, or use `select` with guard_rails(exclude=...)"

# From this share of the candidates on, zeros are likely those of an earlier pruning.
_MANY_ZEROS = 0.2

# The last parts of names. GPTQ and AWQ have scales, bitsandbytes absmax and quant_map, fp8 models
# weight_scale_inv or weight_scale, ModelOpt weight_scale_2 and weights_scaling_factor.
_SCALES = re.compile(r"(.*_)?(scales?|scale_inv|absmax|quant_map|scaling_factor|SCB)(_\d+)?")
_NORM_TENSORS = ("weight", "gamma", "running_mean", "running_var")
_NORM_MODULES = re.compile(r"norm|(^|[._])(ln|bn)\d*([._]|$)", re.IGNORECASE)


class Change(NamedTuple):
    """The change that a Prune made to a tensor.

    Attributes:
        name: The name of the tensor.
        shape: The shape of the tensor.
        pruned: Elements that no mask pruned before.
        is_wholly_zero: Whether every element is zero, and was not before.
        has_pruned: Whether a mask prunes any element, of this Prune or before.
    """

    name: str
    shape: Shape
    pruned: int
    is_wholly_zero: bool
    has_pruned: bool

    @property
    def is_weight(self) -> bool:
        """Whether it has 2 or more dimensions, unlike biases and norms."""
        return len(self.shape) >= 2


@dataclass
class Remarks:
    """The names of tensors with data that may not be meant, as it was found while pruning.

    Attributes:
        without_inputs: With a Gram matrix of zeros.
        without_factors: Tensors of activation-aware rules whose factors are all zero.
    """

    without_inputs: list[str] = field(default_factory=list)
    without_factors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pruning:
    """A Prune and its report.

    Attributes:
        context: The request.
        asked: The rules of the request.
        rules: The same rules, resolved.
        catalog: The catalog of the whole state_dict.
        choices: The choices of each rule.
        changes: The change of each tensor of the report, by all rules.
        shrinkage: What was removed; None if the output removes nothing.
        remarks: What was found while pruning.
    """

    context: RequestContext
    asked: Sequence[Rule]
    rules: Sequence[Rule]
    catalog: Catalog
    choices: Sequence[Sequence[pb.Choice]]
    changes: Sequence[Change]
    shrinkage: pb.Shrinkage | None
    remarks: Remarks

    def selections(self) -> Iterator[tuple[Selection, Sequence[pb.Choice]]]:
        """Yields the resolved rules that score units, with their choices."""
        for rule, choices in zip(self.rules, self.choices, strict=True):
            if isinstance(rule, Selection):
                yield rule, choices

    def pruned_names(self, is_wanted: Callable[[Change], object]) -> list[str]:
        """The wanted ones of the tensors that this Prune has changed."""
        changes = self.context.each(self.changes)
        return [change.name for change in changes if change.pruned and is_wanted(change)]

    def has_weight(self, choice: pb.Choice) -> bool:
        """Whether a choice is among the units of a weight or a group."""
        return any(len(self.catalog.prunable.get(n, (0, 0))) >= 2 for n in choice.tensors)


def warnings_of(
    context: RequestContext,
    report: pb.SparsityReport,
    asked: Sequence[Rule],
    rules: Sequence[Rule],
    catalog: Catalog,
    changes: Sequence[Change],
    remarks: Remarks | None = None,
) -> list[pb.Warning]:
    """Finds the warnings of a Prune. The arguments are attributes of Pruning."""
    choices = [rule.choices for rule in report.rules]
    shrinkage = report.shrinkage if report.HasField("shrinkage") else None
    remarks = remarks or Remarks()
    pruning = Pruning(context, asked, rules, catalog, choices, changes, shrinkage, remarks)
    return [warning for check in CHECKS if (warning := check(pruning))]


def changes_of(
    context: RequestContext,
    report: pb.SparsityReport,
    catalog: Catalog,
    before: Mapping[str, Parameter],
    after: Mapping[str, Parameter],
) -> list[Change]:
    """Compares each tensor of a report with the parameters before the Prune and after it.

    A tensor that loses slices is wholly zero if what is sent of it is: what is removed was pruned.
    """
    changes = []
    for tensor in context.each(report.tensors):
        name, seen = tensor.name, before[tensor.name].scan
        in_all = after[name].count_pruned(context)
        pruned = in_all - before[name].count_pruned(context)
        was_zero = pruned == 0 or (seen is not None and seen.largest == 0)
        is_wholly_zero = not was_zero and tensor.zeros == tensor.total
        changes.append(Change(name, catalog.prunable[name], pruned, is_wholly_zero, in_all > 0))
    return changes


def _small_coverage(pruning: Pruning) -> pb.Warning | None:
    covered = {change.name for change in pruning.changes}
    missed = missed_weights(pruning.context, pruning.asked, pruning.catalog, covered)
    if missed is None:
        return None
    whole = missed.covered + missed.elements
    advice = f"the glob {quote(missed.glob)} matches" if missed.glob else "to prune them, name"
    text = (
        f"the spec covers {missed.covered:,} of {whole:,} weights (of tensors of 2 or more "
        f"dimensions): its globs miss {listed(missed.names)}; {advice} them too"
    )
    return _warning("SMALL_COVERAGE", missed.names, text)


def _wholly_zero(pruning: Pruning) -> pb.Warning | None:
    zero = [
        change
        for change in pruning.context.each(pruning.changes)
        if change.is_wholly_zero and (change.is_weight or _is_norm(change))
    ]
    meant = {
        name
        for rule in (pruning.rules if zero else ())
        for name in pruning.context.each(rule.names())
        if rule.is_meant_whole(name)
    }
    found = [change for change in zero if change.name not in meant]
    if not found:
        return None
    names, length = [change.name for change in found], found[0].shape[0]
    text = (
        f"every element of {listed(names)} is zero now ({length:,} of {length:,} slices of "
        f"dimension 0{' of the first' if len(found) > 1 else ''}); keep some with a guard rail: "
        "keep_at_least or max_sparsity"
    )
    return _warning("WHOLLY_ZERO", names, text)


def _zero_before(pruning: Pruning) -> pb.Warning | None:
    found = [
        name
        for rule, choices in pruning.selections()
        if _ranks_zeros_lowest(rule)
        for choice in pruning.context.each(choices)
        if choice.HasField("threshold") and choice.threshold == 0
        if choice.ties >= _MANY_ZEROS * choice.candidates  # the ties at 0 are units of zeros
        if pruning.has_weight(choice)
        for name in choice.tensors
    ]
    text = (
        f"all pruned units of {listed(found)} were zero before; if the zeros are from an "
        'earlier pruning, count them as pruned: prior="zeros" (--prior zeros, PRIOR_ZEROS)'
    )
    return _warning("ZERO_BEFORE", found, text)


def _ranks_zeros_lowest(rule: Selection) -> bool:
    """Whether units have the score 0 if all of their weights are 0, and only then."""
    return (
        rule.importance.ranks_zeros_lowest
        and not rule.scores
        and not rule.scales
        and rule.normalization != "z_score"
    )


def _scales_pruned(pruning: Pruning) -> pb.Warning | None:
    found = pruning.pruned_names(lambda change: _SCALES.fullmatch(change.name.rpartition(".")[2]))
    text = f"the call pruned scales, which multiply other tensors: {listed(found)}; {_LEAVE_OUT}"
    return _warning("SCALES_PRUNED", found, text)


def _norms_pruned(pruning: Pruning) -> pb.Warning | None:
    taken: set[str] = set()
    for given, rule in zip(pruning.asked, pruning.rules, strict=True):
        if isinstance(given, Selection) and not given.groups:
            named = given.tensors if given.scope == "tensor" else ()
            taken |= set(pruning.context.each(rule.names())).difference(named)
    found = pruning.pruned_names(lambda change: change.name in taken and _is_norm(change))
    text = f"the call pruned weights or statistics of norms: {listed(found)}; {_LEAVE_OUT}"
    return _warning("NORMS_PRUNED", found, text)


def _is_norm(change: Change) -> bool:
    """Whether it is a vector of a batch norm or a layer norm, and not a bias."""
    if len(change.shape) != 1:
        return False
    module, _, leaf = change.name.rpartition(".")
    is_of_norm = leaf in _NORM_TENSORS or bool(_NORM_MODULES.search(module))
    return is_of_norm and not leaf.endswith(("bias", "beta"))


def _rounded_to_none(pruning: Pruning) -> pb.Warning | None:
    return _rounded(pruning, "ROUNDED_TO_NONE", "0", lambda choice: not choice.requested)


def _rounded_to_all(pruning: Pruning) -> pb.Warning | None:
    return _rounded(
        pruning, "ROUNDED_TO_ALL", "all", lambda choice: choice.requested == choice.candidates
    )


def _rounded(
    pruning: Pruning, code: str, to: str, is_rounded: Callable[[pb.Choice], bool]
) -> pb.Warning | None:
    found = [
        choice
        for rule, choices in pruning.selections()
        for choice in pruning.context.each(choices)
        if is_rounded(choice) and choice.candidates and _is_of_part(rule, choice.tensors[0])
        if pruning.has_weight(choice)
    ]
    if not found:
        return None
    names = [name for choice in found for name in choice.tensors]
    units, first = found[0].candidates, " of the first" if len(found) > 1 else ""
    text = (
        f"the fraction rounds to {to} of the units of {listed(names)}, as there are so few "
        f"({units:,}{first}); give a number of units (an int) instead"
    )
    return _warning(code, names, text)


def _is_of_part(rule: Selection, name: str) -> bool:
    """Whether the amount is a fraction, above 0 and below 1, of a tensor's unpruned units."""
    share = rule.amount.share(name)
    fraction = None if share is None or rule.of_all else share.fraction
    return fraction is not None and 0 < fraction < 1


def _nothing_to_refit(pruning: Pruning) -> pb.Warning | None:
    pruned = {change.name for change in pruning.context.each(pruning.changes) if change.has_pruned}
    solving = (rule for rule in pruning.rules if isinstance(rule, Solve))
    found = [
        name
        for rule in solving
        if not rule.solver.is_pruning and pruned.isdisjoint(rule.names())
        for name in rule.names()
    ]
    text = (
        f"the refit changed nothing: no element of {listed(found)} is pruned; put a rule that "
        "prunes them before the refit, or count the zeros of an earlier pruning as pruned: "
        'prior="zeros" (--prior zeros, PRIOR_ZEROS)'
    )
    return _warning("NOTHING_TO_REFIT", found, text)


def _zero_gram(pruning: Pruning) -> pb.Warning | None:
    found = pruning.remarks.without_inputs
    text = (
        f"the Gram matrix of {listed(found)} is zero: no weight has an effect, so a solver prunes "
        "the lowest indices; calibrate with inputs that reach these layers"
    )
    return _warning("ZERO_GRAM", found, text)


def _zero_factors(pruning: Pruning) -> pb.Warning | None:
    found = pruning.remarks.without_factors
    text = (
        f"all factors of {listed(found)} are zero: all weights are as important, so the lowest "
        "indices are pruned; calibrate with inputs that reach these layers"
    )
    return _warning("ZERO_FACTORS", found, text)


def _not_shrunk(pruning: Pruning) -> pb.Warning | None:
    return None if pruning.shrinkage is None else not_shrunk(pruning.shrinkage)


def not_shrunk(shrinkage: pb.Shrinkage) -> pb.Warning | None:
    """Returns the warning that nothing was removed; None if something was."""
    if shrinkage.bytes < shrinkage.bytes_before:
        return None
    found = [group.name for group in shrinkage.groups]
    text = (
        f"nothing was removed: no unit of {listed(found)} is wholly pruned; prune more, or lower "
        "`align`"
    )
    return _warning("NOT_SHRUNK", found, text)


def _not_smaller(pruning: Pruning) -> pb.Warning | None:
    if pruning.shrinkage or not any(change.pruned for change in pruning.changes):
        return None
    text = (
        "zeros alone make a model neither smaller nor faster: `secateur shrink FOLDER -o SMALL` or "
        "output=shrunk with groups makes the model smaller, `secateur pack OUT -o SMALL` or "
        "output=packed makes its file smaller"
    )
    return pb.Warning(code=NOT_SMALLER, severity=pb.SEVERITY_NOTE, message=text)


def _warning(code: str, names: Sequence[str], text: str) -> pb.Warning | None:
    """The warning about some tensors; None if there are none."""
    if not names:
        return None
    severity = pb.SEVERITY_WARNING
    return pb.Warning(code=code, severity=severity, tensors=names[:MOST_NAMED], message=text)


CHECKS: tuple[Callable[[Pruning], pb.Warning | None], ...] = (
    _small_coverage,
    _wholly_zero,
    _zero_before,
    _scales_pruned,
    _norms_pruned,
    _rounded_to_none,
    _rounded_to_all,
    _nothing_to_refit,
    _zero_gram,
    _zero_factors,
    _not_shrunk,
    _not_smaller,
)
