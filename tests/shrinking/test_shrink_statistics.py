"""`secateur shrink --statistics`: units are chosen by what calibrate collected."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur import LayerStatistics, Statistics, UnitStatistics, cli
from tests.client.test_cli import failure
from tests.shrinking.folders import Capsys, Folder
from tests.shrinking.tiny_transformers import inputs, loaded

pytestmark = pytest.mark.usefixtures("at_server")


def shrink(path: Path, out: Path, *options: str) -> None:
    assert cli.main(["shrink", str(path), "-o", str(out), *options]) == 0


def calibrated(model: Any, tmp_path: Path) -> tuple[Statistics, str]:
    statistics = secateur.calibrate(model, [inputs(model)])
    file = tmp_path / "s.safetensors"
    statistics.save(file)
    return statistics, str(file)


def columns(layer: LayerStatistics, weight: torch.Tensor) -> Any:
    """FLAP's score of each column of a matrix [out, in]."""
    assert layer.variance is not None
    return layer.variance * weight.double().square().sum(0).numpy()


@pytest.mark.parametrize(
    ("name", "in_module", "in_file"),
    [
        ("llama", "model.layers.{}.mlp.down_proj.weight", "model.layers.{}.mlp.down_proj.weight"),
        ("vit", "vit.layers.{}.mlp.fc2.weight", "vit.encoder.layer.{}.output.dense.weight"),
        ("gpt2", "transformer.h.{}.mlp.c_proj.weight", "transformer.h.{}.mlp.c_proj.weight"),
    ],
)
def test_channels_and_layers(
    name: str, in_module: str, in_file: str, folder: Folder, tmp_path: Path, capsys: Capsys
) -> None:
    """The names of a ViT in files are not those of the module."""
    path, kind = folder(name)
    statistics, file = calibrated(loaded(path, kind), tmp_path)
    options = ("--layers", "1", "--intermediate", "0.5", "--align", "1", "--statistics", file)
    shrink(path, tmp_path / "out", *options)
    printed = capsys.readouterr().out
    assert "layers chosen by their influence in s.safetensors" in printed
    assert "channels chosen by s.safetensors" in printed
    assert "channels chosen by s.safetensors" in (tmp_path / "out/README.md").read_text()
    before, after = (load_file(f / "model.safetensors") for f in (path, tmp_path / "out"))
    (removed,) = secateur.least_influential(statistics, 1)
    for new, old in enumerate(layer for layer in range(3) if layer != removed):
        whole, cut = before[in_file.format(old)], after[in_file.format(new)]
        if name == "gpt2":
            whole, cut = whole.T, cut.T
        scores = columns(statistics[in_module.format(old)], whole)
        kept = np.sort(np.argsort(scores)[len(scores) // 2 :])
        assert torch.equal(cut, whole[:, kept])
    loaded(tmp_path / "out", kind)


def test_heads_of_a_kv_head(folder: Folder, tmp_path: Path) -> None:
    path, kind = folder("mistral")
    statistics, file = calibrated(loaded(path, kind), tmp_path)
    shrink(path, tmp_path / "out", "--heads", "0.5", "--statistics", file, "--quiet")
    before, after = (load_file(f / "model.safetensors") for f in (path, tmp_path / "out"))
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        heads = columns(statistics[name], before[name]).reshape(2, 2, 8).sum(2)
        kept = [2 * kv_head + int(np.argmax(heads[kv_head])) for kv_head in range(2)]
        slices = [head * 8 + step for head in kept for step in range(8)]
        assert torch.equal(after[name], before[name][:, slices])


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts(name: str, folder: Folder, tmp_path: Path, capsys: Capsys) -> None:
    path, kind = folder(name)
    statistics, file = calibrated(loaded(path, kind), tmp_path)
    options = ("--drop-layers", "0", "--experts", "2", "--intermediate", "0.5")
    shrink(path, tmp_path / "out", *options, "--statistics", file)
    lines = capsys.readouterr().out.splitlines()
    assert "experts chosen by their outputs in s.safetensors" in lines
    groups = 3 if name == "qwen3_moe" else 4
    note = f"channels of {groups - groups % 2} of {groups} groups chosen by weights, as their"
    assert any(line.startswith(note) for line in lines)
    before, after = (load_file(f / "model.safetensors") for f in (path, tmp_path / "out"))
    for gate in [name for name in after if name.endswith("gate.weight")]:
        old = int(gate.split(".")[2]) + 1
        means = statistics.experts[f"model.layers.{old}.mlp.experts"].means
        kept = np.sort(np.argsort(means)[2:])
        whole = before[gate.replace(f".{old - 1}.", f".{old}.", 1)]
        assert torch.equal(after[gate], whole[kept])
    loaded(tmp_path / "out", kind)


def test_channels_of_experts_by_the_names_of_files(folder: Folder, tmp_path: Path) -> None:
    """As Statistics.from_imatrix has them; experts are numbered anew."""
    path, _ = folder("mixtral")
    before = load_file(path / "model.safetensors")
    rng = np.random.default_rng(0)
    name = "model.layers.{}.block_sparse_moe.experts.{}.w2.weight"
    layers = {
        name.format(layer, expert): LayerStatistics(1, rng.random(48), np.zeros(48))
        for layer in range(3)
        for expert in range(4)
    }
    experts = {
        f"model.layers.{layer}.mlp.experts": UnitStatistics(np.arange(4.0), np.ones(4, np.int64))
        for layer in range(3)
    }
    Statistics(layers, experts=experts).save(tmp_path / "s.safetensors")
    options = ("--experts", "2", "--intermediate", "0.5", "--align", "1")
    file = str(tmp_path / "s.safetensors")
    shrink(path, tmp_path / "out", *options, "--statistics", file, "--quiet")
    after = load_file(tmp_path / "out/model.safetensors")
    for layer in range(3):
        for new, old in enumerate([2, 3]):
            whole = before[name.format(layer, old)]
            scores = columns(layers[name.format(layer, old)], whole)
            kept = np.sort(np.argsort(scores)[24:])
            assert torch.equal(after[name.format(layer, new)], whole[:, kept])


def test_statistics_that_lack_something(folder: Folder, tmp_path: Path, capsys: Capsys) -> None:
    path, _ = folder("qwen3_moe")
    name = "model.layers.0.self_attn.o_proj.weight"
    layer = LayerStatistics(3, np.ones(32), np.ones(32))
    file, out = tmp_path / "s.safetensors", tmp_path / "out"
    Statistics({name: layer}).save(file)
    options = ("--layers", "1", "--experts", "2", "--kv-heads", "1", "--statistics", str(file))
    shrink(path, out, *options)
    lines = capsys.readouterr().out.splitlines()
    assert "1 of 3 layers removed: 1" in lines
    assert "layers chosen by their place, as no influence is in s.safetensors" in lines
    assert "experts chosen by weights, as no outputs are in s.safetensors" in lines
    note = "heads of 1 of 2 groups chosen by weights, as their inputs are not in s.safetensors"
    assert note in lines


def test_statistics_of_another_model(folder: Folder, tmp_path: Path, capsys: Capsys) -> None:
    path, _ = folder("qwen3_moe")
    layer = LayerStatistics(1, np.ones(32), np.ones(32))
    wrong = {
        "has no statistics of this model": Statistics({"a": layer}),
        "has the influence of 2 layers, and the model has 3": Statistics(
            {}, {"model.layers": UnitStatistics(np.ones(2), np.ones(2, np.int64))}
        ),
        "has 4 experts, and its statistics have 2": Statistics(
            {},
            experts={
                "model.layers.0.mlp.experts": UnitStatistics(np.ones(2), np.ones(2, np.int64))
            },
        ),
    }
    for message, statistics in wrong.items():
        statistics.save(tmp_path / "s.safetensors")
        options = ("--experts", "2", "--statistics", str(tmp_path / "s.safetensors"))
        assert message in failure(
            capsys, "shrink", str(path), "-o", str(tmp_path / "out"), *options
        )
    options = ("--layers", "1", "--statistics", str(tmp_path / "none"))
    assert "none" in failure(capsys, "shrink", str(path), "-o", str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()
