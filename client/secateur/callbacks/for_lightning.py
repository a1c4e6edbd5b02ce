"""The callback for Lightning."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from secateur.callbacks.loop import Pruning, finish, start, step
from secateur.client import Client
from secateur.errors import InvalidSpec
from secateur.spec import Spec
from secateur.steps import Schedule


class LightningPruning(Callback):
    """Prunes a LightningModule by a schedule, and keeps pruned weights at zero.

    Attributes:
        pruning: Since the training began; see `Pruning`.
    """

    def __init__(
        self,
        client: Client,
        spec: Spec,
        end_step: int | None = None,
        start_step: int = 0,
        prunings: int = 10,
        schedule: Schedule = "cubic",
    ) -> None:
        """Keeps what `start` needs when the training begins.

        Args:
            client: See `start`.
            spec: See `start`.
            end_step: See `start`; None is half of the training's steps.
            start_step: See `start`.
            prunings: See `start`.
            schedule: See `start`.
        """
        self._client, self._spec, self._end_step = client, spec, end_step
        self._start_step, self._prunings, self._schedule = start_step, prunings, schedule
        self._state: Mapping[str, Any] | None = None
        self.pruning: Pruning | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts; in a training that is resumed, with the masks of the checkpoint."""
        self.pruning = start(
            self._client,
            pl_module,
            self._spec,
            _half(trainer) if self._end_step is None else self._end_step,
            self._start_step,
            self._prunings,
            self._schedule,
            trainer.optimizers,
            self._state,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *batch: Any, **named: Any
    ) -> None:
        """Keeps zeros, and prunes if it is time."""
        assert self.pruning is not None, "the training has begun"
        step(self.pruning, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finishes."""
        assert self.pruning is not None, "the training has begun"
        finish(self.pruning)

    def state_dict(self) -> dict[str, Any]:
        """Returns what Lightning saves in its checkpoint."""
        return {} if self.pruning is None else self.pruning.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what Lightning read from its checkpoint, until the training begins."""
        self._state = state_dict or None


def _half(trainer: Trainer) -> int:
    steps = trainer.estimated_stepping_batches
    if steps == float("inf"):
        raise InvalidSpec("end_step: the training has no end; name the step of the last pruning")
    return int(steps) // 2
