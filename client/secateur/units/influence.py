"""Block influence: layers that change their inputs little (ShortGPT, Men et al. 2024)."""

import numpy as np

from secateur.calibration.statistics import Statistics
from secateur.checks import integer, shown, text
from secateur.errors import InvalidSpec, InvalidStatistics
from secateur.units.flap import check_statistics


def least_influential(statistics: Statistics, count: int, stack: str | None = None) -> list[int]:
    """Finds the layers that change their inputs least, as ShortGPT does: `layers` of `depth`.

    The influence of a layer is 1 - the mean cosine of a token's hidden state before and after it.

    Args:
        statistics: What `calibrate` returns.
        count: How many layers.
        stack: The list of layers, such as "model.layers". None if the statistics have one only.

    Returns:
        The numbers of the layers, in order. Of layers with the same influence the first.

    Raises:
        InvalidSpec: The count or the stack is wrong.
        InvalidStatistics: They have no stack, or no token reached a layer.
    """
    check_statistics(statistics)
    name = _stack(statistics, stack)
    blocks = statistics.blocks[name]
    if (blocks.counts == 0).any():
        layer = int((blocks.counts == 0).argmax())
        raise InvalidStatistics(f"{name}.{layer}: no token reached this layer; calibrate it")
    removed = integer("count", count, 0, blocks.units)
    order = np.argsort(blocks.means, kind="stable")
    return sorted(int(layer) for layer in order[:removed])


def _stack(statistics: Statistics, stack: str | None) -> str:
    known = ", ".join(statistics.blocks)
    if not known:
        raise InvalidStatistics("statistics: have no block influence; see blocks= of calibrate")
    if stack is None:
        if len(statistics.blocks) > 1:
            raise InvalidSpec(f"stack: the statistics have {known}; name one")
        return known
    if text("stack", stack) not in statistics.blocks:
        raise InvalidSpec(f"stack: {shown(stack)} is none of {known}")
    return stack
