"""A step of iterative pruning: how much of an amount is due at it."""

from collections.abc import Callable
from dataclasses import dataclass

from secateur.checks import fraction, integer, one_of
from secateur.errors import InvalidSpec
from secateur.schedules import SCHEDULES, Share, exponential
from secateur_proto import spec_pb2 as pb

Schedule = str | Callable[[float], float]


@dataclass(frozen=True)
class Step:
    """One of several.  t: the part of them that is done with it, in (0, 1]."""

    schedule: Share
    t: float

    def of_fraction(self, amount: float) -> float:
        """What is due of a fraction."""
        return amount * self._share(amount)

    def of_count(self, amount: int) -> int:
        """What is due of a number of units.  Errors: InvalidSpec."""
        if self.schedule is exponential and amount:
            raise InvalidSpec("amount: a count has no exponential schedule; give a fraction")
        return round(amount * self._share(1.0))

    def _share(self, final: float) -> float:
        """At the last step all is due, whatever the schedule says."""
        return 1.0 if self.t == 1.0 else self.schedule(self.t, final)


def step_of(step: int, steps: int, schedule: Schedule) -> Step:
    """A step in [1, steps].  Errors: InvalidSpec."""
    steps = integer("steps", steps, 1, 1 << 53)
    t = integer("step", step, 1, steps + 1) / steps
    if not callable(schedule):
        return Step(one_of("schedule", schedule, SCHEDULES), t)
    share = fraction("schedule", schedule(t))
    return Step(lambda t, final: share, t)


def scale(selection: pb.Selection, step: Step) -> None:
    """Makes a selection's amount what is due of it, of all units.  Errors: InvalidSpec."""
    amount = selection.WhichOneof("amount")
    if amount == "fraction":
        selection.fraction = step.of_fraction(selection.fraction)
    elif amount == "count":
        selection.count = step.of_count(selection.count)
    elif amount == "table":
        for entry in selection.table.entries:
            entry.fraction = step.of_fraction(entry.fraction)
    else:
        raise InvalidSpec(f"amount: {amount} has no steps; a fraction, a count and a table have")
    selection.of_all = True
