"""Scores the units of a tensor from its elements: weights, uploaded scores, scales, or products."""

from collections.abc import Mapping

from torch import Tensor

from secateur_server.backends.keys import INFINITY
from secateur_server.backends.pieces import Stored
from secateur_server.backends.scan import Scan
from secateur_server.cut.score import Ranking, refuse_nan, score_units
from secateur_server.errors import quote
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter


def score_tensor(
    context: RequestContext,
    rule: Selection,
    name: str,
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> Ranking:
    """Scores the units of one tensor.

    Args:
        context: The request.
        rule: Resolved, and without groups.
        name: Of the tensor.
        parameters: All that the rule reads.
        extras: Uploaded scores.

    Returns:
        The units with their scores.

    Raises:
        NanScores: A score is NaN.
    """
    parameter = with_products(context, rule, name, parameters, extras)
    return score_parameter(context, rule, name, parameter, parameters, extras)


def with_products(
    context: RequestContext,
    rule: Selection,
    name: str,
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> Parameter:
    """Returns the parameter, with scores of its elements in place of its weight.

    Only if the importance computes products; else it is unchanged. The arguments are those of
    score_tensor.
    """
    parameter = parameters[name]
    products = rule.importance.products(context, name, parameter, extras)
    if products is None:
        return parameter
    weight, mask, seen = parameter
    is_number = seen is not None and seen.largest <= INFINITY.get(weight.dtype, 0)
    without_nan = Scan(0, (), None) if is_number else None
    return Parameter(products.store(context).view(weight.shape), mask, without_nan)


def score_rows(
    context: RequestContext,
    rule: Selection,
    name: str,
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> Ranking | None:
    """Scores elements by products that are computed row by row, of dimension 0.

    The arguments are as above.

    Returns:
        The elements with their scores; None if the scores must be stored.
    """
    is_of_rows = rule.scope == "row" and rule.has_element_units and name not in rule.row_dims
    if not is_of_rows or rule.normalization is not None:
        return None
    weight, mask, seen = parameters[name]
    products = rule.importance.products(context, name, parameters[name], extras)
    if products is None:
        return None
    refuse_nan(context, weight, mask, f"data[{quote(name)}]", seen)
    return Ranking(name, weight.numel(), products, mask, weight.device)


def score_parameter(
    context: RequestContext,
    rule: Selection,
    name: str,
    parameter: Parameter,
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> Ranking:
    """Does what score_tensor does, given the parameter that `with_products` returns."""
    granularity = rule.granularity
    assert granularity is not None, "the rule has no groups"
    if rule.has_element_units and rule.importance.is_value and not (rule.scores or rule.scales):
        return _score_elements(context, name, parameter)
    scores, field = replacement(rule, name, parameters, extras)
    # Slices of one tensor are compared by their norms, with the bits of torch.
    is_mean = rule.scope != "tensor" or not granularity.is_normed
    # Scoring N:M groups takes longer than all else. It is not needed if all groups are pruned.
    is_whole = rule.amount.is_everything and not rule.guard_rails.rails
    is_all = is_whole and granularity.is_part and rule.allocation != "lamp"
    return score_units(
        context, name, parameter, scores, rule.importance, granularity, is_mean, is_all, field
    )


def _score_elements(context: RequestContext, name: str, parameter: Parameter) -> Ranking:
    """The elements of a weight, scored by their values. Fast, for thousands of small tensors."""
    weight, mask, seen = parameter
    if seen is None or seen.largest > INFINITY.get(weight.dtype, 0):
        refuse_nan(context, weight, mask, f"data[{quote(name)}]", seen)
    sample = seen.sample if seen else None
    return Ranking(name, weight.numel(), Stored(weight.reshape(-1)), mask, weight.device, sample)


def replacement(
    rule: Selection,
    name: str,
    parameters: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> tuple[Tensor | None, str]:
    """Returns scores that replace a weight, and the path in errors of the tensor that is scored."""
    if name in rule.scores:
        return extras[rule.scores[name]], f"data[{quote(rule.scores[name])}]"
    if name in rule.scales:
        return parameters[rule.scales[name]].weight, f"data[{quote(rule.scales[name])}]"
    return None, f"data[{quote(name)}]"
