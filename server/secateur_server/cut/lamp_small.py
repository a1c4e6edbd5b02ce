"""LAMP among small tensors whose units are their elements."""

from collections.abc import Mapping, Sequence

from secateur_server.backends.batches import cut_each
from secateur_server.cut.choice import Choice
from secateur_server.cut.elements import score_tensor
from secateur_server.cut.plan_small import cut_jointly
from secateur_server.cut.runs import runs_of
from secateur_server.cut.score import score_dtype
from secateur_server.cut.scored import Masks
from secateur_server.cut.small import batch_of, masks_of
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter


def prune_by_lamp(
    context: RequestContext,
    rule: Selection,
    names: Sequence[str],
    state: Mapping[str, Parameter],
) -> tuple[Masks, Choice]:
    """Prunes small tensors, compared by LAMP scores of their weights.

    Raises:
        NanScores: A score is NaN.
        AmountOutOfRange: The tensors have too few units.
    """
    with context.stage("score"):
        rankings = [score_tensor(context, rule, name, state, {}) for name in context.each(names)]
    with context.stage("select"):
        batch = batch_of(rankings, score_dtype(rankings))
        (counts, _, _), (choice,) = cut_jointly(context, [rule], rankings, runs_of(batch))
        kept, _ = cut_each(context, batch, counts[0])
    return masks_of(rankings, kept), choice
