"""`secateur shrink`: the command for Hugging Face folders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Linear

import secateur
from secateur import cli
from tests.client.test_cli import failure
from tests.shrinking.folders import Capsys, Folder, config_in, half, marked
from tests.shrinking.tiny_transformers import loaded, outputs, saved

pytestmark = pytest.mark.usefixtures("at_server")

MACS = "multiply-accumulates of the layers for each token: "


def active_macs(path: Path) -> int:
    """Counts the weights of a mixture's layers that compute one token."""
    config, total = config_in(path), 0.0
    for name, tensor in load_file(path / "model.safetensors").items():
        if ".layers." in name and tensor.dim() > 1:
            part = config["num_experts_per_tok"] / config["num_local_experts"]
            total += tensor.numel() * (part if ".experts." in name else 1)
    return round(total)


def shrink(path: Path, out: Path, *options: str) -> None:
    assert cli.main(["shrink", str(path), "-o", str(out), *options]) == 0


def test_a_folder_of_shards(tmp_path: Path) -> None:
    kind = type(saved("qwen3_moe", tmp_path / "in", max_shard_size="60KB"))
    out = tmp_path / "out"
    shrink(tmp_path / "in", out, "--intermediate", "0.5", "--layers", "1")
    model = loaded(out, kind)
    assert model.config.num_hidden_layers == 2
    assert model.config.moe_intermediate_size == 12
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {
        n: t for f in set(index["weight_map"].values()) for n, t in load_file(out / f).items()
    }
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"] == {
        "total_parameters": sum(t.numel() for t in tensors.values()),
        "total_size": sum(t.nbytes for t in tensors.values()),
    }
    assert len(set(index["weight_map"].values())) > 1


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("qwen2", "model.layers"),
        ("qwen3_moe", "model.layers"),
        ("gemma3_text", "model.layers"),
        ("gpt2", "transformer.h"),
        ("vit", "vit.layers"),
    ],
)
def test_dropped_layers(name: str, stack: str, folder: Folder, tmp_path: Path) -> None:
    path, kind = folder(name)
    shrink(path, tmp_path / "out", "--drop-layers", "0", "--quiet")
    model = loaded(path, kind)
    at, _, leaf = stack.rpartition(".")
    layers = getattr(model.get_submodule(at), leaf)
    setattr(model.get_submodule(at), leaf, layers[1:])
    for number, layer in enumerate(layers[1:]):  # each has a place in the cache of keys
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = number
    types = getattr(model.config, "layer_types", None)
    if types:
        model.config.layer_types = types[1:]
    model.config.num_hidden_layers = 2
    shorter = outputs(loaded(tmp_path / "out", kind))
    assert (shorter - outputs(model)).abs().max() < 1e-12


def test_layers_before_the_last_are_dropped_by_count(
    folder: Folder, tmp_path: Path, capsys: Capsys
) -> None:
    path, kind = folder("llama")
    shrink(path, tmp_path / "out", "--layers", "2")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 of 3 layers removed: 0, 1"
    assert lines[1].startswith("parameters: ")
    linear = [part for part in loaded(path, kind).model.layers.modules() if type(part) is Linear]
    macs = sum(part.weight.numel() for part in linear)
    assert lines[2] == f"{MACS}{macs:,} -> {macs // 3:,}"
    before, after = (load_file(f / "model.safetensors") for f in (path, tmp_path / "out"))
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(after[name.format(0)], before[name.format(2)])
    assert name.format(1) not in after


@pytest.mark.parametrize("name", marked(["qwen3_moe", "mixtral"]))
def test_experts_with_the_smallest_weights_are_removed(
    name: str, folder: Folder, tmp_path: Path
) -> None:
    path, kind = folder(name)
    shrink(path, tmp_path / "out", "--experts", "0.5", "--quiet")
    model = loaded(path, kind)
    tensors = dict(model.state_dict())
    for gate in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        names = [
            gate,
            *(n for n in tensors if n.startswith(gate.removesuffix("gate.weight") + "e")),
        ]
        means = [tensors[n].abs().flatten(1).mean(1) for n in names]
        # The projections to channels are two tensors in the file.
        fused = next(n for n in names if n.endswith("gate_up_proj"))
        score = sum(means) + tensors[fused].abs().flatten(1).mean(1)
        kept = score.argsort(descending=True)[:2].sort().values
        tensors |= {name: tensors[name][kept] for name in names}
    config = model.config
    config.num_local_experts = 2
    config._attn_implementation = config._experts_implementation = "eager"
    expected = kind(config).double().eval()
    expected.load_state_dict(tensors)
    assert torch.equal(outputs(loaded(tmp_path / "out", kind)), outputs(expected))


def test_every_option_together(folder: Folder, tmp_path: Path, capsys: Capsys) -> None:
    path, kind = folder("qwen3_moe")
    given = "--drop-layers 1 --experts 1 --intermediate 0.25 --align 6 --kv-heads 0.5 --json"
    shrink(path, tmp_path / "out", *given.split())
    answer = json.loads(capsys.readouterr().out)
    *removed, macs = answer["removed"]
    assert removed == ["1 of 3 layers removed: 1", "num_local_experts: 4 -> 3"]
    assert macs == f"{MACS}{active_macs(path):,} -> {active_macs(tmp_path / 'out'):,}"
    config = loaded(tmp_path / "out", kind).config
    sizes = (config.num_hidden_layers, config.num_local_experts, config.moe_intermediate_size)
    assert sizes == (2, 3, 18)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)


WRONG = {
    ("--heads", "0.1"): "--heads: 0.1 of 2 is none; give at least 1",
    ("--drop-layers", "3"): "layers: 3 is outside [0, 3)",
    ("--layers", "3"): "layers: 3 is outside [1, 2]",
    ("--experts", "3"): "num_experts_per_tok: 2 experts compute each token",
    ("--intermediate", "0.5", "--server", "127.0.0.1:1", "--timeout", "0.1"): "127.0.0.1:1",
}


@pytest.mark.parametrize("given", WRONG)
def test_a_command_that_fails_writes_nothing(
    given: tuple[str, ...], folder: Folder, tmp_path: Path, capsys: Capsys
) -> None:
    path, _ = folder("qwen3_moe")
    message = failure(capsys, "shrink", str(path), "-o", str(tmp_path / "out"), *given)
    assert WRONG[given] in message
    assert not list(tmp_path.iterdir())


def test_places_that_are_refused(folder: Folder, tmp_path: Path, capsys: Capsys) -> None:
    path, _ = folder("bert")
    save_file({"a.0.w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    cut = ("--intermediate", "0.5")
    assert "exists" in failure(capsys, "shrink", str(path), "-o", str(path), *cut)
    assert "names a file" in failure(
        capsys, "shrink", str(path), "-o", str(tmp_path / "a.pt"), *cut
    )
    new = str(tmp_path / "new")
    assert "holds no config.json" in failure(capsys, "shrink", str(tmp_path), "-o", new, *cut)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    message = failure(capsys, "shrink", str(tmp_path), "-o", new, *cut)
    assert "model_type: 't5' is not a known architecture; known are bert, " in message
    file = str(tmp_path / "model.safetensors")
    assert "is not a folder" in failure(capsys, "shrink", file, "-o", new, *cut)
    for options in ((), ("--heads", "1", "--align", "4"), ("--heads", "1", "--kv-heads", "1")):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["shrink", str(path), "-o", new, *options])


def test_a_folder_of_a_torch_file_with_pairs(
    folder: Folder, client: secateur.Client, tmp_path: Path
) -> None:
    path, kind = folder("llama")
    spec = half(path, "intermediate")
    pairs = client.prune(path, spec, output="reparametrized").state_dict("reparametrized")
    (tmp_path / "in").mkdir()
    torch.save(pairs, tmp_path / "in/pytorch_model.bin")
    (tmp_path / "in/config.json").write_text((path / "config.json").read_text())
    shrink(tmp_path / "in", tmp_path / "layers", "--layers", "1")
    assert "- parameters: " in (tmp_path / "layers/README.md").read_text()
    groups = secateur.transformer_groups(tmp_path / "layers", ["intermediate"])
    final = client.finalize(tmp_path / "layers", output="shrunk", groups=groups)
    final.save(tmp_path / "out")
    model = loaded(tmp_path / "out", kind)
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (2, 24)
    shrink(path, tmp_path / "other", "--layers", "1", "--intermediate", "0.5", "--align", "1")
    assert torch.equal(outputs(loaded(tmp_path / "other", kind)), outputs(model))


@pytest.mark.parametrize(
    ("key", "wrong", "right"), [("intermediate_size", 8, 48), ("num_hidden_layers", 2, 3)]
)
def test_the_config_of_another_model_is_refused(
    key: str, wrong: int, right: int, tmp_path: Path, capsys: Capsys
) -> None:
    saved("bert", tmp_path / "in")
    config = config_in(tmp_path / "in")
    assert config[key] == right
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, key: wrong}))
    out = str(tmp_path / "out")
    message = failure(capsys, "shrink", str(tmp_path / "in"), "-o", out, "--intermediate", "0.5")
    assert f"is not the config of these tensors: {key}: {wrong} -> {right}" in message


def test_an_amount_of_nothing_is_refused(tmp_path: Path, capsys: Capsys) -> None:
    with pytest.raises(SystemExit):
        shrink(tmp_path, tmp_path / "out", "--heads", "0")
    assert "--heads 0 removes nothing: leave it out" in capsys.readouterr().err
