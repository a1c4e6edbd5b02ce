"""Finds an order of channels in which N:M masks keep more (Zhang et al., ICLR 2024).

First the heuristic channel allocation of that paper: channels are dealt out by their sums, so that
each block has some of every rank. Then channels of one place in their blocks are assigned anew, as
its linear sum assignment does, but within some blocks at a time and by swaps. That is faster, needs
no scipy, and gains nearly as much.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Order = npt.NDArray[np.intp]

_BLOCKS = 128  # blocks among which channels are swapped at once
_ROUNDS = 4
_ELEMENTS = 1 << 18  # of a temporary array that fits a CPU's cache
_LEAST = 1e-6  # a swap gains more than this share of the largest sum: more than float32 rounds


def kept_importance(scores: npt.NDArray[np.floating], order: Order, n: int) -> float:
    """Returns what N:M masks keep: the sum of the n highest of each block of each row.

    Args:
        scores: [channels, rows].
        order: [blocks, m], the channels of each block.
        n: How many of a block are kept.
    """
    total = 0.0
    step = max(1, _ELEMENTS // max(1, order.shape[1] * scores.shape[1]))
    for begin in range(0, len(order), step):
        places = _sorted([scores[channels] for channels in order[begin : begin + step].T], n)
        total += sum(float(place.sum(dtype=np.float64)) for place in places[:n])
    return total


def found_order(scores: Floats, n: int, m: int, seed: int) -> Order:
    """Finds a better order.

    Args:
        scores: [channels, rows]; m divides the channels.
        n: How many of a block are kept.
        m: The size of a block.
        seed: For which blocks are looked at together.

    Returns:
        [channels // m, m], the channels of each block.
    """
    generator = np.random.default_rng(seed)
    order = _dealt(scores, m)
    for _ in range(_ROUNDS):
        order = generator.permuted(order, axis=1)
        shuffled = generator.permutation(len(order))
        for begin in range(0, len(order), _BLOCKS):
            some = shuffled[begin : begin + _BLOCKS]
            for place in range(m):
                sums = _sums(scores, order[some], place, n)
                order[some, place] = order[some, place][_swapped(sums)]
    return order


def _dealt(scores: Floats, m: int) -> Order:
    """The heuristic channel allocation."""
    ranked = np.argsort(-scores.sum(1, dtype=np.float64), kind="stable").reshape(m, -1)
    ranked[1::2] = ranked[1::2, ::-1]
    return ranked.T.copy()


def _sorted(values: list[Floats], count: int) -> list[Floats]:
    """The values with the `count` highest first, place by place."""
    for first in range(min(count, len(values) - 1)):
        for other in range(first + 1, len(values)):
            low = np.minimum(values[first], values[other])
            values[first] = np.maximum(values[first], values[other])
            values[other] = low
    return values


def _sums(scores: Floats, blocks: Order, place: int, n: int) -> Floats:
    """What blocks keep with the channel of another block at a place, but for a constant.

    Of a block with the channels r and a channel x, a row keeps the n - 1 highest of r, and the
    higher one of x and the n-th highest of r.
    """
    rest = np.delete(blocks, place, axis=1)
    limits = _sorted([scores[channels] for channels in rest.T], n)[n - 1].T.copy()
    channels = scores[blocks[:, place]].T.copy()
    found = np.zeros((len(blocks), len(blocks)), np.float32)
    step = max(1, _ELEMENTS // found.size)
    for begin in range(0, len(channels), step):
        part = slice(begin, begin + step)
        found += np.maximum(limits[part, :, None], channels[part, None, :]).sum(0)
    return found


def _swapped(sums: Floats) -> Order:
    """Which block's channel each block gets, after swaps of pairs as long as these gain."""
    blocks = np.arange(len(sums))
    chosen, least = blocks.copy(), _LEAST * float(sums.max(initial=0))
    while True:
        own = np.diag(sums)
        gains = sums + sums.T - own[:, None] - own
        np.fill_diagonal(gains, -np.inf)
        best = gains.argmax(1)
        pairs = (best[best] == blocks) & (blocks < best) & (gains[blocks, best] > least)
        one, other = blocks[pairs], best[pairs]
        if not len(one):
            return chosen
        moved = blocks.copy()
        moved[one], moved[other] = other, one
        chosen, sums = chosen[moved], sums[:, moved]
