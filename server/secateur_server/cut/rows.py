"""Units compared within each output row: SCOPE_PER_ROW.

Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models: pruning the same
share of each row harms a model less than pruning that share of the whole tensor.
"""

import torch
from torch import Tensor

from secateur_server.backends import allocate, backend_for, spans
from secateur_server.backends.masks import Mask, mask_of_flags
from secateur_server.cut.score import Ranking
from secateur_server.errors import AmountOutOfRange, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection


def select_in_rows(
    context: RequestContext, rule: Selection, ranking: Ranking, rows: int
) -> tuple[Mask, int]:
    """Prunes the least important units of each row; ties by the lowest index.

    Args:
        context: The request.
        rule: Its amount is a fraction or a count of each row.
        ranking: Of one tensor, row-major.
        rows: Of the grid of units.

    Returns:
        The candidates that are kept, and how many are pruned.

    Raises:
        AmountOutOfRange: A row has fewer candidates than the count.
    """
    backend, width = backend_for(ranking.device), ranking.units // rows
    flags = allocate(context, ranking.units, backend).view(torch.bool).view(rows, width)

    def select(span: tuple[int, int]) -> int:
        keys = _keys(ranking, span[0] * width, span[1] * width).view(-1, width)
        candidates = (keys >= 0).sum(1)
        pruned = _numbers(rule, ranking.name, candidates, width, span[0])
        flags[slice(*span)] = _largest(keys, candidates - pruned)
        return int(pruned.sum())

    parts = spans(rows, max(1, backend.piece // width))
    pruned = sum(backend.map(context, select, parts))
    return mask_of_flags(context, flags.view(-1)), pruned


def _keys(ranking: Ranking, begin: int, end: int) -> Tensor:
    """The keys of the units [begin, end); -1 for pruned units."""
    piece = ranking._replace(candidates=None).piece(ranking.dtype, begin, end)
    keys = backend_for(ranking.device).keys(piece)
    return (
        keys
        if ranking.candidates is None
        else keys.masked_fill(~ranking.candidates.flags(begin, end), -1)
    )


def _numbers(rule: Selection, name: str, candidates: Tensor, width: int, first: int) -> Tensor:
    """How many units of each row are pruned. `first` is the index of the first row, for errors."""
    share = rule.amount.share(name)
    assert share is not None, "rows have a fraction or a count"
    base = torch.full_like(candidates, width) if rule.of_all else candidates
    counts = torch.from_numpy(share.units_of_each(base.cpu().numpy())).to(base.device)
    if bool((short := counts > base).any()):
        row, kind = int(short.nonzero()[0]), "units" if rule.of_all else "unpruned units"
        raise AmountOutOfRange(
            f"{rule.path}.count",
            f"{int(counts[row])} is more than the {int(base[row])} {kind} of row {first + row} of "
            f"{quote(name)}; prune fewer",
        )
    return (counts - (base - candidates)).clamp(min=0)


def _largest(keys: Tensor, counts: Tensor) -> Tensor:
    """Bool: the `counts[i]` largest keys of each row i. Of equal keys, the last ones are kept."""
    backend = backend_for(keys.device)
    kept = torch.empty(keys.shape, dtype=torch.bool, device=keys.device)
    for count in sorted(set(counts.tolist())):
        rows = counts == count
        kept[rows] = backend.largest(keys[rows].unsqueeze(2), count).squeeze(2)
    return kept
