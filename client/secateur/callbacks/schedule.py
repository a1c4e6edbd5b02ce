"""The optimizer steps at which a model is pruned."""

from dataclasses import dataclass

from secateur.checks import integer
from secateur.errors import InvalidSpec


@dataclass(frozen=True)
class Steps:
    """Prunings at equal distances: the last one, which prunes the whole amount, at `end`.

    Attributes:
        start: The optimizer step before the first distance.
        end: The optimizer step of the last pruning.
        prunings: How many there are.
    """

    start: int
    end: int
    prunings: int

    def due(self, step: int) -> int:
        """Returns how many prunings are due at a step; after `end` more, at the same distances."""
        length = max(1, self.end - self.start)
        if step < self.end:
            return max(0, step - self.start) * self.prunings // length
        return self.prunings + (step - self.end) * self.prunings // length


def steps_of(start: object, end: object, prunings: object) -> Steps:
    """Checks what a caller gives.

    Raises:
        InvalidSpec: An argument is wrong.
    """
    first, last = integer("start_step", start), integer("end_step", end)
    if last < first:
        raise InvalidSpec(f"end_step: {last} is before start_step, {first}; give a later step")
    return Steps(first, last, min(integer("prunings", prunings, 1), max(1, last - first)))
