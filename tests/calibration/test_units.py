"""Influence of layers and outputs of experts, against loops over tokens."""

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

import secateur
from secateur import Statistics, UnitStatistics
from tests.shrinking.tiny_transformers import inputs, tiny


class Block(nn.Module):
    """A layer that adds to the hidden states, in place if asked."""

    def __init__(self, size: int, is_in_place: bool = False) -> None:
        super().__init__()
        self.linear, self.is_in_place = nn.Linear(size, size), is_in_place

    def forward(self, states: Tensor, scale: float = 1.0) -> Any:
        added = scale * self.linear(states)
        return states.add_(added) if self.is_in_place else (states + added, "more")


class Net(nn.Module):
    def __init__(self, layers: list[nn.Module], calls: int = 1) -> None:
        super().__init__()
        self.first, self.layers, self.calls = nn.Linear(3, 4), nn.ModuleList(layers), calls

    def forward(self, values: Tensor, attention_mask: Tensor | None = None) -> Any:
        states = self.first(values)
        for layer in [*self.layers] * self.calls:
            output = layer(states=states)
            states = output[0] if isinstance(output, tuple) else output
        return states


def net(*flags: bool, calls: int = 1) -> Any:
    torch.manual_seed(0)
    return Net([Block(4, flag) for flag in flags], calls).double()


def data(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def distance(one: list[float], other: list[float]) -> float:
    """1 - the cosine of two vectors, in a loop."""
    product = sum(a * b for a, b in zip(one, other, strict=True))
    norms = [math.sqrt(sum(a * a for a in vector)) for vector in (one, other)]
    return 1 - product / (norms[0] * norms[1]) if all(norms) else 1.0


@torch.no_grad()
def naive(module: Any, batches: list[Tensor], masks: list[Tensor] | None = None) -> list[float]:
    """The mean distance of each layer of a Net."""
    distances: list[list[float]] = [[] for _ in module.layers]
    for number, batch in enumerate(batches):
        states = module.first(batch)
        for index, layer in [*enumerate(module.layers)] * module.calls:
            after = states + layer.linear(states)
            for place in np.ndindex(*states.shape[:-1]):
                if masks is None or masks[number][place]:
                    found = distance(states[place].tolist(), after[place].tolist())
                    distances[index].append(found)
            states = after
    return [sum(of) / len(of) for of in distances]


@pytest.mark.parametrize("calls", [1, 2])
def test_the_influence_of_layers(calls: int) -> None:
    module = net(False, True, False, calls=calls)
    batches = [data(seed, 2, 5, 3) for seed in range(3)]
    found = secateur.calibrate(module, batches).blocks["layers"]
    np.testing.assert_allclose(found.means, naive(module, batches), rtol=1e-12)
    assert found.counts.tolist() == [30 * calls] * 3
    split = [part for batch in batches for part in torch.split(batch, 1)]
    parts = [secateur.calibrate(module, [batch]) for batch in split]
    added = sum(parts[1:], parts[0]).blocks["layers"]
    np.testing.assert_allclose(added.sums, found.sums, rtol=1e-12)
    assert (added.counts == found.counts).all()


def test_padding_does_not_count() -> None:
    module, batch = net(False, False), data(0, 2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    found = secateur.calibrate(module, [{"values": batch, "attention_mask": mask}])
    expected = naive(module, [batch], [mask])
    np.testing.assert_allclose(found.blocks["layers"].means, expected, rtol=1e-12)
    assert found.blocks["layers"].counts.tolist() == [4, 4]


def test_a_vector_of_zeros_and_the_identity() -> None:
    module: Any = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(2))
        module[0].bias.zero_()
    assert not secateur.calibrate(net(False, False), [data(0, 2, 3)], blocks=False).blocks
    outer = nn.Sequential(module)
    found = secateur.calibrate(outer, [torch.tensor([[1.0, 2.0], [0, 0]])], blocks="0")
    np.testing.assert_allclose(found.blocks["0"].means, [0.5, 0.5], atol=1e-15)


def test_which_lists_are_stacks() -> None:
    """Outermost lists of layers that keep the shape of hidden states."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.changing = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)])
            self.images = nn.ModuleList([nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)])
            self.unused = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.inner = nn.ModuleList([nn.ModuleDict({"a": nn.ModuleList([Block(3), Block(3)])})])

        def forward(self, states: Tensor) -> Any:
            for layer in self.changing:
                states = layer(states)
            for image in self.images:
                image(states[None, None])
            return states

    with pytest.warns(secateur.NotCalibrated):
        found = secateur.calibrate(Other(), [torch.randn(2, 4)])
    assert not found.blocks
    with pytest.warns(secateur.NotCalibrated):
        assert not secateur.calibrate(Other(), [torch.randn(2, 4)], blocks="unused").blocks
    with pytest.raises(secateur.InvalidSpec, match=r"blocks: changing.1 does not map hidden"):
        secateur.calibrate(Other(), [torch.randn(2, 4)], blocks=["changing"])
    with pytest.raises(
        secateur.InvalidSpec, match=r"blocks: 'x' is not a ModuleList.*changing, im"
    ):
        secateur.calibrate(Other(), [torch.randn(2, 4)], blocks="x")
    with pytest.raises(secateur.InvalidSpec, match="blocks: 3 is not a name"):
        secateur.calibrate(Other(), [torch.randn(2, 4)], blocks=3)  # type: ignore[arg-type]


def test_nan_is_refused() -> None:
    class Broken(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return states / 0

    with pytest.raises(secateur.InvalidStatistics, match="layers: unit 1 has inputs or outputs"):
        secateur.calibrate(Net([Block(4), Broken()]), [torch.randn(2, 3)])


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_the_layers_of_transformers(name: str) -> None:
    model, stack = (
        tiny(name),
        {"llama": "model.layers", "gpt2": "transformer.h", "vit": "vit.layers"},
    )
    batch = inputs(model)
    states = model(**batch, output_hidden_states=True).hidden_states
    found = secateur.calibrate(model, [batch]).blocks[stack[name]]
    for layer in range(2):  # the last one's is normalized
        pairs = [state.detach().flatten(0, 1).tolist() for state in states[layer : layer + 2]]
        distances = [distance(*pair) for pair in zip(*pairs, strict=True)]
        assert found.means[layer] == pytest.approx(sum(distances) / len(distances), rel=1e-9)
    explicit = secateur.calibrate(model, [batch], blocks=stack[name])
    assert explicit.blocks[stack[name]] == found


@torch.no_grad()
def naive_experts(model: Any, path: str, batch: Any) -> tuple[list[float], list[int]]:
    """The sums and the counts of experts, with loops over tokens and experts."""
    seen: list[Tensor] = []
    block = model.get_submodule(path)
    handle = block.register_forward_pre_hook(lambda part, args: seen.append(args[0]))
    model(**batch)
    handle.remove()
    experts, gate = block.experts, block.gate
    sums, counts = [0.0] * experts.num_experts, [0] * experts.num_experts
    kept = batch.get("attention_mask", torch.ones(batch["input_ids"].shape)).flatten()
    for is_kept, token in zip(kept, seen[0].flatten(0, 1), strict=True):
        if not is_kept:
            continue
        chances = (gate.weight @ token).float().softmax(0)
        chosen = chances.argsort(descending=True)[: gate.top_k].tolist()
        total = sum(float(chances[expert]) for expert in chosen)
        for expert in chosen:
            rows = experts.gate_up_proj[expert]
            half = len(rows) // 2
            hidden = nn.functional.silu(rows[:half] @ token) * (rows[half:] @ token)
            output = (experts.down_proj[expert] @ hidden).tolist()
            norm = math.sqrt(sum(value * value for value in output))
            sums[expert] += float(chances[expert]) / total * norm
            counts[expert] += 1
    return sums, counts


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_the_outputs_of_experts(name: str) -> None:
    model = tiny(name)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    batch = inputs(model) | {"attention_mask": mask}
    found = secateur.calibrate(model, [batch])
    blocks = [0, 2] if name == "qwen3_moe" else [0, 1, 2]
    assert list(found.experts) == [f"model.layers.{layer}.mlp.experts" for layer in blocks]
    for path, units in found.experts.items():
        sums, counts = naive_experts(model, path.removesuffix(".experts"), batch)
        assert units.counts.tolist() == counts
        np.testing.assert_allclose(units.sums, sums, rtol=1e-6)  # chances are float32
    assert not secateur.calibrate(model, [batch], experts=False).experts


def test_experts_in_any_batches_and_implementations() -> None:
    model = tiny("qwen3_moe")
    batch = inputs(model)["input_ids"]
    whole = secateur.calibrate(model, [{"input_ids": batch}])
    parts = [secateur.calibrate(model, [{"input_ids": part}]) for part in torch.split(batch, 1)]
    model.config._experts_implementation = "batched_mm"
    other = secateur.calibrate(model, [{"input_ids": batch}])
    for name, units in whole.experts.items():
        for same in (parts[0] + parts[1], other):
            np.testing.assert_allclose(same.experts[name].sums, units.sums, rtol=1e-6)
            np.testing.assert_array_equal(same.experts[name].counts, units.counts)


def units(*sums: float) -> UnitStatistics:
    return UnitStatistics(np.array(sums), np.arange(len(sums)))


def test_a_file_of_units(tmp_path: Path) -> None:
    layer = secateur.LayerStatistics(3, np.ones(2))
    statistics = Statistics({"w": layer}, {"a.b": units(1, 2)}, {"e": units(3, 4, 5)})
    statistics.save(tmp_path / "s.safetensors")
    assert Statistics.load(tmp_path / "s.safetensors") == statistics
    assert pickle.loads(pickle.dumps(statistics)) == statistics
    assert statistics != Statistics({"w": layer}, {"a.b": units(1, 2)})
    assert statistics.experts["e"].means.tolist() == [3, 4, 2.5]
    assert "e    3 units, 2 tokens at most" in str(statistics)
    assert repr(statistics) == "Statistics(1 layers, 1 stacks, 1 mixtures)"


WRONG: dict[str, dict[str, Any]] = {
    "a.b.block_influence_sum: is missing": {"a.b.block_influence_sum": None},
    "a.b.block_influence_count: has 2 elements, not 1": {"a.b.block_influence_sum": np.ones(1)},
    r"a.b.block_influence_sum\[1\]: nan": {"a.b.block_influence_sum": np.array([1, np.nan])},
    r"e.expert_output_count\[0\]: -1 is": {"e.expert_output_count": np.array([-1, 1, 1])},
    "e.expert_output_count: is F64 of": {"e.expert_output_count": np.ones(3)},
    "e.expert_sum: is not NAME.count": {"e.expert_sum": np.ones(3)},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_damaged_file(message: str, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    Statistics({}, {"a.b": units(1, 2)}, {"e": units(3, 4, 5)}).save(path)
    tensors = {**load_file(path), **WRONG[message]}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, {"secateur.statistics": '{"version": 1}'})
    with pytest.raises(secateur.InvalidStatistics, match=message):
        Statistics.load(path)


def test_units_of_other_models_do_not_add() -> None:
    one, other = Statistics({}, {"a": units(1, 2)}), Statistics({}, {"a": units(1)})
    with pytest.raises(secateur.InvalidStatistics, match="a: cannot add units 2 and 1"):
        one + other
