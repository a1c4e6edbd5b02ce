"""TransformersPruning in a real transformers.Trainer, with a tiny BERT made from its config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur import callbacks

SPEC = secateur.global_unstructured("bert.encoder.*.weight", 0.8)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory:UserWarning", "ignore:.*torch.jit:DeprecationWarning"
)


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random tokens, with labels that depend on them."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(5, 40, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens[0] % 2}


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    config.hidden_size, config.intermediate_size = 16, 32
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return BertForSequenceClassification(config)


def trainer_of(path: Path, *callbacks: Any, **arguments: Any) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watching(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.sums: list[int] = []

        def on_step_end(self, *_: Any, **parts: Any) -> None:
            self.sums.append(zeros_of(parts["model"]))

    settings = TrainingArguments(
        output_dir=str(path),
        **{
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **arguments,
        },
    )
    watching = Watching()
    trainer: Any = Trainer(
        bert(),
        settings,
        train_dataset=Texts(),
        eval_dataset=Texts(),
        callbacks=[*callbacks, watching],
    )
    trainer.watched = watching
    return trainer


def zeros_of(model: nn.Module) -> int:
    return sum(
        int((parameter == 0).sum())
        for name, parameter in model.named_parameters()
        if name.startswith("bert.encoder") and name.endswith("weight")
    )


def total() -> int:
    return sum(
        parameter.numel()
        for name, parameter in bert().named_parameters()
        if name.startswith("bert.encoder") and name.endswith("weight")
    )


def due(number: int, prunings: int) -> int:
    return round(0.8 * (1 - (1 - number / prunings) ** 3) * total())


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"torch_compile": True}, marks=pytest.mark.slow),
    ],
    ids=["bf16", "plain", "compiled"],
)
def test_a_trainer_prunes_by_the_schedule(
    client: secateur.Client, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    pruning = callbacks.TransformersPruning(client, SPEC, end_step=6, start_step=2, prunings=2)
    trainer = trainer_of(tmp_path, pruning, **arguments)
    trainer.train()
    expected = [0] * 3 + [due(1, 2)] * 2 + [due(2, 2)] * 3
    assert trainer.watched.sums == expected
    assert pruning.pruning is not None
    assert pruning.pruning.report is not None
    assert pruning.pruning.report.zeros == due(2, 2)
    trainer.save_model(str(tmp_path / "out"))
    loaded = type(trainer.model).from_pretrained(tmp_path / "out")
    assert zeros_of(loaded) == due(2, 2)


@pytest.mark.slow
def test_the_last_pruning_is_by_default_at_half_of_the_training(
    client: secateur.Client, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, callbacks.TransformersPruning(client, SPEC))
    trainer.train()
    assert trainer.watched.sums == [due(n, 4) for n in (1, 2, 3, 4, 4, 4, 4, 4)]


def test_a_checkpoint_has_the_masks(client: secateur.Client, tmp_path: Path) -> None:
    """A training that is resumed ends with the weights of one that was not interrupted."""

    def trainer() -> Any:
        pruning = callbacks.TransformersPruning(client, SPEC, end_step=6, prunings=3)
        return trainer_of(tmp_path, pruning, save_strategy="steps", save_steps=4)

    whole = trainer()
    whole.train()
    checkpoint = tmp_path / "checkpoint-4"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["secateur.pruning"]
    assert (saved["step"], saved["done"]) == (4, 2)
    assert sum(saved["pruned"].values()) == due(2, 3)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.watched.sums == whole.watched.sums[4:] == [due(2, 3)] + [due(3, 3)] * 3
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_the_best_model_may_be_less_sparse(client: secateur.Client, tmp_path: Path) -> None:
    pruning = callbacks.TransformersPruning(client, SPEC, end_step=6, prunings=1)
    trainer = trainer_of(
        tmp_path,
        pruning,
        **{"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 4},
        **{"load_best_model_at_end": True, "metric_for_best_model": "step"},
    )
    trainer.compute_metrics = lambda prediction: {"step": -trainer.state.global_step}
    with pytest.warns(secateur.NotPruned, match=r"checkpoint-4 is from before the last pruning"):
        trainer.train()
    assert zeros_of(trainer.model) == 0
