"""LightningPruning in a real Lightning Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
from secateur import callbacks
from tests.callbacks.training import SPEC, batches, count, cubic, loss_of, network, zeros

pytestmark = [
    pytest.mark.slow,  # Lightning takes seconds to import
    pytest.mark.filterwarnings("ignore"),  # it warns of few workers, and more
]


def lightning() -> Any:
    import lightning.pytorch

    return lightning.pytorch


def module_of(optimizers: int = 1) -> Any:
    class Net(lightning().LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.sums: list[int] = []
            self.automatic_optimization = optimizers == 1

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            self.sums.append(count(zeros(self.net)))
            loss = loss_of(self.net, batch)
            if optimizers > 1:
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()
            return loss

        def configure_optimizers(self) -> Any:
            if optimizers == 1:
                return torch.optim.AdamW(self.net.parameters(), lr=0.01)
            return [
                torch.optim.SGD(part.parameters(), 0.1, 0.9) for part in (self.net[0], self.net[4])
            ]

    return Net()


def trainer_of(path: Path, *callbacks: Any, **arguments: Any) -> Any:
    return lightning().Trainer(
        callbacks=list(callbacks),
        default_root_dir=path,
        **{
            "max_steps": 8,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **arguments,
        },
    )


def data(number: int = 8) -> Any:
    images, labels = map(torch.cat, zip(*batches(number), strict=True))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 8)


def test_a_trainer_prunes_by_the_schedule(client: secateur.Client, tmp_path: Path) -> None:
    pruning = callbacks.LightningPruning(client, SPEC, end_step=6, start_step=2, prunings=2)
    module = module_of()
    trainer_of(tmp_path, pruning).fit(module, data())
    assert module.sums == [0] * 4 + [cubic(1, 2)] * 2 + [cubic(2, 2)] * 2
    assert count(zeros(module.net)) == cubic(2, 2)


def test_accumulated_gradients_bf16_and_half_of_the_training(
    client: secateur.Client, tmp_path: Path
) -> None:
    module = module_of()
    settings = {"accumulate_grad_batches": 2, "precision": "bf16-mixed", "gradient_clip_val": 0.5}
    trainer_of(tmp_path, callbacks.LightningPruning(client, SPEC), max_steps=4, **settings).fit(
        module, data()
    )
    # Two batches a step; the last of two prunings is at step 2.
    assert module.sums == [0] * 2 + [cubic(1, 2)] * 2 + [cubic(2, 2)] * 4


def test_several_optimizers(client: secateur.Client, tmp_path: Path) -> None:
    module = module_of(optimizers=2)
    pruning = callbacks.LightningPruning(client, SPEC, end_step=8, prunings=2)
    trainer_of(tmp_path, pruning, max_steps=16).fit(module, data())
    # Each batch is two optimizer steps.
    assert module.sums == [0] * 2 + [cubic(1, 2)] * 2 + [cubic(2, 2)] * 4
    for optimizer in module.trainer.optimizers:
        for parameter, state in optimizer.state.items():
            if parameter.dim() > 1:
                assert not state["momentum_buffer"][parameter == 0].any()


def test_a_checkpoint_has_the_masks(client: secateur.Client, tmp_path: Path) -> None:
    """A training that is resumed ends with the weights of one that was not interrupted."""

    def fitted(path: Path | None = None) -> Any:
        module = module_of()
        pruning = callbacks.LightningPruning(client, SPEC, end_step=6, prunings=3)
        saving = lightning().callbacks.ModelCheckpoint(
            tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1
        )
        trainer = trainer_of(tmp_path, pruning, saving, enable_checkpointing=True)
        trainer.fit(module, data(4), ckpt_path=path)  # 4 steps an epoch
        return module

    whole = fitted()
    resumed = fitted(tmp_path / "step=4.ckpt")
    assert resumed.sums == whole.sums[4:]
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_endless_training_needs_the_last_step(client: secateur.Client, tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, callbacks.LightningPruning(client, SPEC), max_steps=-1, max_epochs=-1
    )
    with pytest.raises(secateur.InvalidSpec, match=r"^end_step: the training has no end"):
        trainer.fit(module_of(), data())
