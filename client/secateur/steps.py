"""The part of an amount that is due at a step of iterative pruning."""

from collections.abc import Callable
from dataclasses import dataclass

from secateur.checks import fraction, integer, one_of
from secateur.errors import InvalidSpec
from secateur.schedules import SCHEDULES, Share, exponential
from secateur_proto import spec_pb2 as pb

Schedule = str | Callable[[float], float]


@dataclass(frozen=True)
class Step:
    """A step.

    Attributes:
        schedule: The share of the amount at a time.
        t: The part of all steps that is done with this one, in (0, 1].
    """

    schedule: Share
    t: float

    def share(self, final: float) -> float:
        """Returns the share of an amount that is due."""
        return 1.0 if self.t == 1.0 else self.schedule(self.t, final)


def step_of(step: int, steps: int, schedule: Schedule) -> Step:
    """Returns a step in [1, steps].

    Raises:
        InvalidSpec: An argument is wrong.
    """
    steps = integer("steps", steps, 1, 1 << 53)
    t = integer("step", step, 1, steps + 1) / steps
    if not callable(schedule):
        return Step(one_of("schedule", schedule, SCHEDULES), t)
    share = fraction("schedule", schedule(t))
    return Step(lambda t, final: share, t)


def scale(selection: pb.Selection, step: Step) -> None:
    """Replaces a selection's amount by the part that is due, of all units.

    Raises:
        InvalidSpec: The amount has no parts, or the schedule needs a fraction.
    """
    amount = selection.WhichOneof("amount")
    if amount == "fraction":
        selection.fraction *= step.share(selection.fraction)
    elif amount == "count":
        if step.schedule is exponential and selection.count:
            raise InvalidSpec("amount: a count has no exponential schedule; give a fraction")
        selection.count = round(selection.count * step.share(1.0))
    elif amount == "table":
        for entry in selection.table.entries:
            entry.fraction *= step.share(entry.fraction)
    else:
        raise InvalidSpec(f"amount: {amount} has no steps; give a fraction, a count or a table")
    selection.of_all = True
