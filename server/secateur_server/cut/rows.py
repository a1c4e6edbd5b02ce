"""Units compared within each output row: SCOPE_PER_ROW.

Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models: pruning the same
share of each row harms a model less than pruning that share of the whole tensor.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends import allocate, backend_for, spans
from secateur_server.backends.masks import Mask, mask_of_flags
from secateur_server.backends.pieces import Piece, Stored, around
from secateur_server.backends.protocol import Backend
from secateur_server.cut.drivers import driver_for
from secateur_server.cut.score import Ranking
from secateur_server.errors import AmountOutOfRange, quote
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Count, Fraction
from secateur_server.spec.rules import Selection

# A row, the units that are to be pruned of it, and those that there are.
Short = tuple[int, int, int]


def select_in_rows(
    context: RequestContext, rule: Selection, ranking: Ranking, grid: Sequence[int]
) -> tuple[Mask, int]:
    """Prunes the least important units of each row; ties by the lowest index.

    Args:
        context: The request.
        rule: Its amount is a fraction or a count of each row.
        ranking: Of one tensor, row-major.
        grid: The shape of its units.

    Returns:
        The candidates that are kept, and how many are pruned.

    Raises:
        AmountOutOfRange: A row has fewer candidates than the count.
    """
    outer, rows, inner = around(grid, rule.row_dims.get(ranking.name, 0))
    if outer == 1:
        return _select(context, rule, ranking, rows)
    moved = _with_rows_first(context, ranking, (outer, rows, inner))
    kept, pruned = _select(context, rule, moved, rows)
    flags = _swapped(context, kept.whole(context, (rows, outer, inner)))
    return mask_of_flags(context, flags), pruned


def _with_rows_first(
    context: RequestContext, ranking: Ranking, sizes: tuple[int, int, int]
) -> Ranking:
    """The units in the order of their rows.  sizes: of the units before, along and behind rows."""
    candidates, scores = ranking.candidates, ranking.scores.stored
    if candidates is not None:
        flags = _swapped(context, candidates.whole(context, sizes))
        candidates = mask_of_flags(context, flags)
    if scores is None:
        scores = _random_scores(context, ranking)
    moved = Stored(_swapped(context, scores.view(sizes)))
    return Ranking(ranking.name, ranking.units, moved, candidates, ranking.device)


def _random_scores(context: RequestContext, ranking: Ranking) -> Tensor:
    """The scores of a ranking that stores none, as numbers that compare as they do."""
    backend = backend_for(ranking.device)
    pieces = ranking._replace(candidates=None).pieces(ranking.dtype, backend.piece)
    return torch.cat(backend.map(context, backend.keys, pieces)).view(ranking.dtype)


def _swapped(context: RequestContext, values: Tensor) -> Tensor:
    """Copies values of 3 dimensions, with the first two swapped.  Returns: flat."""
    backend, swapped = backend_for(values.device), values.transpose(0, 1)
    size = values.numel() * values.element_size()
    found = allocate(context, size, backend).view(values.dtype)
    target = found.view(swapped.shape)

    def copy(span: tuple[int, int]) -> None:
        target[slice(*span)] = swapped[slice(*span)]

    width = math.prod(swapped.shape[1:])
    backend.map(context, copy, spans(len(swapped), max(1, backend.piece // width)))
    return found


def _select(
    context: RequestContext, rule: Selection, ranking: Ranking, rows: int
) -> tuple[Mask, int]:
    """Does select_in_rows for units whose first dimension has the rows."""
    driver, width = driver_for(context, ranking.device), ranking.units // rows
    share = rule.amount.share(ranking.name)
    assert share is not None, "rows have a fraction or a count"
    step = 8 // math.gcd(8, width)  # so that a piece begins with a new byte of the mask
    # Smaller pieces than elsewhere, so that computed scores stay in the second-level cache.
    parts = spans(rows, max(1, driver.backend.piece // 8 // width // step) * step)
    pieces = [ranking.piece(ranking.dtype, a * width, b * width) for a, b in context.each(parts)]
    kept = allocate(context, (ranking.units + 7) // 8, driver.backend)
    pruned = begin = 0
    task = partial(_prune_rows, share=share, of_all=rule.of_all, width=width)
    found = driver.map(context, task, pieces)
    for (first, _), (bits, count, short) in zip(parts, found, strict=True):
        if short is not None:
            raise _too_few(rule, ranking.name, first, short)
        kept[begin : begin + len(bits)] = bits
        begin, pruned = begin + len(bits), pruned + count
    return Mask(kept, ranking.units), pruned


def _prune_rows(
    context: RequestContext,
    backend: Backend,
    piece: Piece,
    share: Fraction | Count,
    of_all: bool,
    width: int,
) -> tuple[Tensor, int, Short | None]:
    """The bits of the kept units of whole rows, how many are pruned, and the first short row."""
    rows = piece.units // width
    candidates = np.full(rows, width)
    if piece.unpruned is not None:
        flags = backend.unpack(piece.unpruned, piece.units).view(rows, width)
        candidates = flags.sum(1).cpu().numpy()
    base = np.full_like(candidates, width) if of_all else candidates
    counts = share.units_of_each(base)
    if (short := counts > base).any():
        row = int(short.argmax())
        return torch.empty(0), 0, (row, int(counts[row]), int(base[row]))
    pruned = np.maximum(0, counts - (base - candidates))
    return backend.cut_rows(piece, pruned), int(pruned.sum()), None


def _too_few(rule: Selection, name: str, first: int, short: Short) -> AmountOutOfRange:
    """The error of a row with too few units. `first` is the index of the piece's first row."""
    row, count, base = short
    kind = "units" if rule.of_all else "unpruned units"
    return AmountOutOfRange(
        f"{rule.path}.count",
        f"{count} is more than the {base} {kind} of row {first + row} of {quote(name)}; prune "
        "fewer",
    )
