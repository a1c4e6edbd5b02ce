"""The callback for transformers.Trainer."""

import warnings
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.callbacks.loop import Pruning, finish, start, step
from secateur.client import Client
from secateur.errors import NotPruned
from secateur.spec import Spec
from secateur.steps import Schedule

# In a Trainer's checkpoint: the entry of stateful_callbacks in trainer_state.json.
_STATE = "secateur.pruning"


class TransformersPruning(TrainerCallback):
    """Prunes the model of a transformers.Trainer by a schedule, and keeps pruned weights at zero.

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
        self.pruning: Pruning | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Starts; in a training that is resumed, with the masks of the checkpoint."""
        end_step = state.max_steps // 2 if self._end_step is None else self._end_step
        self.pruning = start(
            self._client,
            parts["model"],
            self._spec,
            end_step,
            self._start_step,
            self._prunings,
            self._schedule,
            parts["optimizer"],
            _entries(state).get(_STATE),
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Keeps zeros, and prunes if it is time, before the Trainer evaluates or saves."""
        assert self.pruning is not None, "the training has begun"
        step(self.pruning, state.global_step)
        _entries(state)[_STATE] = self.pruning.state_dict()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Finishes, unless the Trainer has loaded weights from before the last pruning."""
        assert self.pruning is not None, "the training has begun"
        if args.load_best_model_at_end and not self.pruning.masks.hold():
            self.pruning.masks.release()
            warnings.warn(
                f"load_best_model_at_end: {state.best_model_checkpoint} is from before the last "
                "pruning, and less sparse; load a later checkpoint",
                NotPruned,
                stacklevel=2,
            )
            return
        finish(self.pruning)


def _entries(state: TrainerState) -> dict[str, Any]:
    """What trainer_state.json has of callbacks; transformers annotates another type."""
    entries: Any = state.stateful_callbacks
    assert isinstance(entries, dict), "TrainerState makes one"
    return entries
