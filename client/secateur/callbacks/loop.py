"""Pruning in a training loop: start, step after each optimizer step, finish."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.callbacks.schedule import Steps, steps_of
from secateur.checks import integer, shown
from secateur.client import Client
from secateur.errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    InvalidSpec,
    NotPruned,
    ServerBusy,
    ServerError,
    Unavailable,
)
from secateur.report import Report
from secateur.spec import Spec, spec_of
from secateur.steps import Schedule
from secateur.tensors import torch_for

if TYPE_CHECKING:
    from secateur.callbacks.masks import Masks

# Errors that may be gone at the next pruning.
_PASSING = (Aborted, Cancelled, DeadlineExceeded, ServerBusy, ServerError, Unavailable)


@dataclass
class Pruning:
    """A pruning in a training.

    Attributes:
        client: Of the server that prunes.
        spec: What is pruned in the end.
        schedule: See `Spec.at`.
        steps: When the model is pruned.
        masks: The pruned weights.
        step: The optimizer steps that are done.
        tried: The prunings that were due so far.
        done: The last pruning that succeeded; `steps.prunings` is the whole amount.
        report: Of the last pruning; None before the first one.
    """

    client: Client
    spec: Spec
    schedule: Schedule
    steps: Steps
    masks: "Masks"
    step: int = 0
    tried: int = 0
    done: int = 0
    report: Report | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns plain data to save beside the weights, for `start(state=...)`.

        The masks are the zeros of the saved weights. The data has the names of pruned tensors, and
        how many weights of each are pruned.
        """
        return {"step": self.step, "done": self.done, "pruned": dict(self.masks.counts)}


def start(
    client: Client,
    module: Any,
    spec: Spec,
    end_step: int,
    start_step: int = 0,
    prunings: int = 10,
    schedule: Schedule = "cubic",
    optimizer: Any = None,
    state: Mapping[str, Any] | None = None,
) -> Pruning:
    """Begins to prune a torch.nn.Module by a schedule while it trains.

    A first call to the server checks the spec. With `end_step=0` the model is pruned at once.

    Args:
        client: Asked at each pruning, for masks only.
        module: On the device on which it trains. It may be wrapped by torch.compile, DataParallel
            and DistributedDataParallel. Masks of torch.nn.utils.prune are taken over: its pairs
            become plain parameters again.
        spec: What is pruned in the end; amounts are as in `Spec.at`.
        end_step: The optimizer step at which the whole amount is pruned.
        start_step: The optimizer step from which the schedule counts.
        prunings: In how many parts the amount is pruned, the last at `end_step`.
        schedule: See `Spec.at`.
        optimizer: The one that trains the module, or a list of several: their momentum of pruned
            weights is zeroed.
        state: What `Pruning.state_dict` returned, to resume; load the weights first.

    Raises:
        SecateurError: An argument is wrong, or the server cannot prune the module by the spec.
    """
    torch_for("callbacks")
    from secateur.callbacks.masks import Masks
    from secateur.in_place import check_module

    steps = steps_of(start_step, end_step, prunings)
    if not isinstance(client, Client):
        raise InvalidSpec(f"client: {shown(client)} is not a secateur.Client")
    optimizers = _optimizers(optimizer)
    check_module(module)
    _ask(client, module, spec_of(spec).at(1, steps.prunings, schedule))  # before the module changes
    pruning = Pruning(client, spec, schedule, steps, Masks(module, optimizers))
    try:
        _restore(pruning, state)
        _prune_if_due(pruning)
    except BaseException:
        pruning.masks.release()
        raise
    return pruning


def step(pruning: Pruning, at: int | None = None) -> bool:
    """Keeps pruned weights at zero, and prunes more if it is time. Call it after optimizer.step().

    If the server is away, a NotPruned warning says so and the training goes on with the masks so
    far. The next pruning then prunes what is missing.

    Args:
        pruning: What `start` returned.
        at: The optimizer steps that are done; None counts one more.

    Returns:
        Whether weights were pruned.

    Raises:
        SecateurError: The server refuses the model, for example for a NaN in it.
    """
    pruning.step = pruning.step + 1 if at is None else integer("at", at)
    pruning.masks.apply()
    return _prune_if_due(pruning)


def finish(pruning: Pruning) -> Report | None:
    """Ends a pruning. The module is a plain one, whose pruned weights are zero.

    A NotPruned warning says that the training ended before the whole amount was pruned.

    Args:
        pruning: What `start` returned.

    Returns:
        The report of the last pruning; None if there was none.
    """
    pruning.masks.apply()
    pruning.masks.release()
    if (done := pruning.done) < (prunings := pruning.steps.prunings):
        warnings.warn(
            f"the training ended after {done} of {prunings} prunings, at step {pruning.step} "
            f"(end_step is {pruning.steps.end}): the model is less sparse than asked",
            NotPruned,
            stacklevel=2,
        )
    return pruning.report


def _optimizers(given: Any) -> Sequence[Any]:
    optimizers = given if isinstance(given, Sequence) else [] if given is None else [given]
    for optimizer in optimizers:
        if not isinstance(getattr(optimizer, "state", None), Mapping):
            raise InvalidSpec(f"optimizer: {shown(optimizer)} is not an optimizer of torch")
    return optimizers


def _restore(pruning: Pruning, state: Mapping[str, Any] | None) -> None:
    """Continues where a state was saved."""
    if state is None:
        return
    try:
        pruning.step = integer("state['step']", state["step"])
        pruning.done = integer("state['done']", state["done"])
        counts = {name: integer(f"state: {name}", n) for name, n in dict(state["pruned"]).items()}
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidSpec(
            f"state: {shown(state)} is not a Pruning's state_dict(): {error}"
        ) from None
    pruning.tried = pruning.done
    pruning.masks.restore(counts)


def _prune_if_due(pruning: Pruning) -> bool:
    due = pruning.steps.due(pruning.step)
    if due <= pruning.tried or pruning.done == pruning.steps.prunings:
        return False
    pruning.tried = due
    number = min(due, pruning.steps.prunings)
    spec = pruning.spec.at(number, pruning.steps.prunings, pruning.schedule)
    try:
        pruning.report, masks = _ask(pruning.client, pruning.masks.source(), spec)
    except _PASSING as error:
        warnings.warn(
            f"pruning {number} of {pruning.steps.prunings} failed at step {pruning.step}, and the "
            f"training goes on with the masks so far: {error}",
            NotPruned,
            stacklevel=3,
        )
        return False
    pruning.done = number
    pruning.masks.add(masks)
    return True


def _ask(client: Client, source: Any, spec: Spec) -> tuple[Report, dict[str, Any]]:
    """The report and the masks of a pruning."""
    from secateur.callbacks.ranks import from_first_rank

    def ask() -> tuple[Report, dict[str, Any]]:
        result = client.prune(source, spec, progress=False)
        return result.report, result.masks

    found: tuple[Report, dict[str, Any]] = from_first_rank(ask)
    return found
