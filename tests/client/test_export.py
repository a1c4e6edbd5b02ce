"""Modules exported to ONNX. That of a Hugging Face folder imports transformers, which is slow."""

import importlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import secateur
from tests.client.test_cli import failure, run


class Two(nn.Module):
    """Two inputs by keyword, dropout, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: Tensor) -> Mapping[str, Tensor]:
        y = self.drop(self.fc(x)) * scale
        return {"sum": y.sum(), "all": y}


def outputs(path: Path, *inputs: Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    return list(session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True))))


def test_keywords_and_dimensions_of_any_length(tmp_path: Path) -> None:
    module, path = Two().train(), tmp_path / "two.onnx"
    inputs = {"x": torch.randn(2, 4), "scale": torch.randn(3)}
    dynamic = {"x": {0: "batch"}, "scale": {}}
    secateur.export(module, inputs, path, dynamic)
    assert module.training
    onnx.checker.check_model(path, full_check=True)
    other = torch.randn(5, 4)
    expected = module.eval()(other, inputs["scale"])
    for found, name in zip(outputs(path, other, inputs["scale"]), ("sum", "all"), strict=True):
        torch.testing.assert_close(torch.from_numpy(np.asarray(found)), expected[name].detach())
    assert list(tmp_path.iterdir()) == [path]


CALLS = itertools.count()


class Counting(nn.Module):
    """Computes something else each time: the export is not what it computes next."""

    def forward(self, x: Tensor) -> Tensor:
        return x + next(CALLS)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Counting(), r"output 0 differs by \d\S* between onnxruntime and torch"),
        (Branching(), "torch.onnx cannot export the module"),
    ],
)
def test_an_export_that_fails_writes_nothing(
    tmp_path: Path, module: nn.Module, reason: str
) -> None:
    with pytest.raises(secateur.SecateurError, match=reason) as caught:
        secateur.export(module, torch.ones(2, 3), tmp_path / "m.onnx")
    assert str(caught.value).startswith(f"{tmp_path / 'm.onnx'}: ")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("m.gguf", "convert_hf_to_gguf.py"),
        ("m.pt", "is not the name of an .onnx file"),
        ("none/m.onnx", "no such folder"),
    ],
)
def test_wrong_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    with pytest.raises(secateur.SecateurError, match=reason):
        secateur.export(nn.Linear(2, 2), torch.ones(1, 2), tmp_path / name)
    assert reason in failure(capsys, "export", tmp_path, "-o", tmp_path / name)


@pytest.mark.parametrize("wrong", ["module", "example_inputs", "path", "dynamic_shapes"])
def test_wrong_arguments(tmp_path: Path, wrong: str) -> None:
    right = {"module": nn.Linear(2, 2), "example_inputs": torch.ones(1, 2)}
    right |= {"path": tmp_path / "m.onnx", "dynamic_shapes": None}
    with pytest.raises(secateur.SecateurError) as caught:
        secateur.export(**{**right, wrong: {"x" * 5000: object()}})  # type: ignore[arg-type]
    assert "x" * 1000 not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = secateur.onnx.exporting.importlib.util.find_spec  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n: None if n == "onnxscript" else find(n)
    )
    with pytest.raises(secateur.SecateurError, match=r"needs onnxscript: .*secateur\[onnx\]"):
        secateur.export(nn.Linear(2, 2), torch.ones(1, 2), tmp_path / "m.onnx")


def test_a_folder_that_is_not_of_hugging_face(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no config.json" in failure(capsys, "export", tmp_path, "-o", tmp_path / "m.onnx")


@pytest.mark.slow  # transformers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["llama", "vit", "mixtral", "bert"])
def test_a_hugging_face_folder(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers: Any = importlib.import_module("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4}
    text = {**sizes, "vocab_size": 50, "num_key_value_heads": 2}
    torch.manual_seed(0)
    made = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**text)),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**text, num_local_experts=4)
        ),
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(**sizes, vocab_size=50)
        ),
        "vit": lambda: transformers.ViTModel(
            transformers.ViTConfig(**sizes, image_size=16, patch_size=4)
        ),
    }[kind]().eval()
    folder, path = tmp_path / "in", tmp_path / "out.onnx"
    made.save_pretrained(folder)
    assert run("export", folder, "-o", path, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["out"] == str(path)
    assert answer["checked"].startswith("onnxruntime computes what torch does on random")
    if kind == "vit":
        inputs = [torch.rand(4, 3, 16, 16)]
    else:
        inputs = [torch.randint(50, (4, 9)), torch.ones(4, 9, dtype=torch.int64)]
    with torch.no_grad():
        expected = made(*inputs)[0]
    found = torch.from_numpy(outputs(path, *inputs)[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
