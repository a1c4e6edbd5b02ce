"""Rules that update weights, through a server: what they compute, for every kind of source."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import secateur
from secateur.calibration.layer import LayerStatistics
from secateur.calibration.statistics import Statistics
from secateur.calibration.triangle import Triangle
from tests.conftest import start_server, stop_server
from tests.processes import memory

Tensors = dict[str, Tensor]


def random_gram(inputs: int, seed: int = 0, rows: int = 400) -> Tensor:
    """A Gram matrix of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    return x.T @ x


def statistics_of(grams: Mapping[str, Tensor], *transposed: str) -> Statistics:
    """Statistics as a caller's own program makes them."""
    layers, triangles = {}, {}
    for name, gram in grams.items():
        if id(gram) not in triangles:
            triangles[id(gram)] = Triangle.of(gram.numpy())
        squares = gram.diagonal().numpy().copy()
        count, input_dim = max(400, len(gram)), 0 if name in transposed else 1
        triangle = triangles[id(gram)]
        layers[name] = LayerStatistics(count, squares, input_dim=input_dim, triangle=triangle)
    return Statistics(layers)


def best_kept(weight: Tensor, kept: Tensor, gram: Tensor, damping: float = 1e-4) -> Tensor:
    """The least squares solution of each row by itself, in float64."""
    matrix = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    root = np.linalg.cholesky(matrix.numpy()).T
    found = torch.zeros_like(weight, dtype=torch.float64)
    for row, (values, flags) in enumerate(zip(weight.double().numpy(), kept.numpy(), strict=True)):
        solution = np.linalg.lstsq(root[:, flags], root @ values, rcond=None)[0]
        found[row, torch.from_numpy(flags)] = torch.from_numpy(solution)
    return found


def layer_error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    difference = (weight.double() - other.double()).flatten(1)
    return float(((difference @ gram) * difference).sum())


def pruned(client: secateur.Client, source: object, spec: secateur.Spec) -> Tensors:
    found = client.prune(source, spec, output="dense", progress=False).state_dict("dense")
    return {name: torch.as_tensor(values) for name, values in found.items()}


@pytest.fixture
def weights() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {
        "a.weight": torch.randn(24, 32, generator=generator),
        "a.bias": torch.randn(24, generator=generator),
        "b.weight": torch.randn(16, 24, generator=generator),
    }


@pytest.fixture
def grams() -> Tensors:
    return {"a.weight": random_gram(32), "b.weight": random_gram(24, 1)}


def test_refit_gives_the_least_squares_weights(
    client: secateur.Client, weights: Tensors, grams: Tensors
) -> None:
    spec = secateur.l1_unstructured("*.weight", 0.5)
    masks = client.prune(weights, spec, progress=False).masks
    found = pruned(client, weights, spec + secateur.refit("*", statistics_of(grams)))
    assert torch.equal(found["a.bias"], weights["a.bias"])
    for name, gram in grams.items():
        assert torch.equal(found[name] != 0, masks[name])
        best = best_kept(weights[name], masks[name], gram)
        least = layer_error(best, weights[name], gram)
        assert layer_error(found[name], weights[name], gram) <= 1.01 * least
        plain = layer_error(weights[name] * masks[name], weights[name], gram)
        assert least < 0.7 * plain, "the problem is a real one"


def test_structured_masks_are_solved_directly(
    client: secateur.Client, weights: Tensors, grams: Tensors
) -> None:
    spec = secateur.ln_structured("a.weight", 0.5, n=2, dim=1)
    found = pruned(client, weights, spec + secateur.refit("a.weight", statistics_of(grams)))
    kept = client.prune(weights, spec, progress=False).masks["a.weight"]
    best = best_kept(weights["a.weight"], kept, grams["a.weight"])
    torch.testing.assert_close(found["a.weight"].double(), best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
@pytest.mark.parametrize("amount", [0.5, 100, (2, 4)])
def test_methods_prune_what_is_asked_and_lose_less_than_magnitude(
    client: secateur.Client,
    weights: Tensors,
    grams: Tensors,
    method: str,
    amount: float | tuple[int, int],
) -> None:
    n_m = amount if isinstance(amount, tuple) else None
    share = None if n_m else amount
    make = getattr(secateur, method)
    found = pruned(client, weights, make("a.weight", share, statistics_of(grams), n_m=n_m))
    weight, zeros = weights["a.weight"], found["a.weight"] == 0
    assert int(zeros.sum()) == (100 if amount == 100 else weight.numel() // 2)
    if n_m:
        assert bool((zeros.view(24, 8, 4).sum(2) == 2).all())
        plain = secateur.n_m_structured("a.weight")
    else:
        plain = secateur.l1_unstructured("a.weight", amount)  # type: ignore[arg-type]
    by_magnitude = pruned(client, weights, plain)["a.weight"]
    gram = grams["a.weight"]
    assert layer_error(found["a.weight"], weight, gram) < layer_error(by_magnitude, weight, gram)
    assert torch.equal(found["b.weight"], weights["b.weight"])


def test_rows_have_the_same_share(
    client: secateur.Client, weights: Tensors, grams: Tensors
) -> None:
    spec = secateur.alps("a.weight", 0.25, statistics_of(grams), scope="row")
    assert bool(((pruned(client, weights, spec)["a.weight"] == 0).sum(1) == 8).all())


def test_every_source_gives_the_same_bits(
    client: secateur.Client, weights: Tensors, grams: Tensors, tmp_path: Path
) -> None:
    statistics = statistics_of(grams)
    spec = secateur.l1_unstructured("*.weight", 0.5) + secateur.refit("*", statistics)
    expected = pruned(client, weights, spec)
    save_file(weights, tmp_path / "model.safetensors")
    with_pairs = {**weights, "a.weight_orig": weights["a.weight"]}
    with_pairs["a.weight_mask"] = torch.ones(24, 32)
    del with_pairs["a.weight"]
    for source in (tmp_path / "model.safetensors", client.upload(weights), with_pairs):
        found = pruned(client, source, spec)
        assert all(torch.equal(found[name], expected[name]) for name in expected), source


def test_pairs_keep_what_is_pruned_behind_the_mask(
    client: secateur.Client, weights: Tensors, grams: Tensors
) -> None:
    """Pruned elements stay pruned, and keep the values that they had."""
    weight, gram = weights["a.weight"], grams["a.weight"]
    mask = torch.rand(weight.shape) < 0.7
    pair = {"a.weight_orig": weight, "a.weight_mask": mask.float()}
    spec = secateur.sparsegpt("*", 0.5, statistics_of({"a.weight": gram}))
    result = client.prune(pair, spec, output="reparametrized", progress=False)
    found = result.state_dict("reparametrized")
    kept, orig = found["a.weight_mask"].bool(), found["a.weight_orig"]
    assert not bool((kept & ~mask).any())
    assert int((mask & ~kept).sum()) == round(0.5 * int(mask.sum()))
    assert torch.equal(orig[~kept], weight[~kept])
    assert not torch.equal(orig[kept], weight[kept])
    ((choice,),) = result.report.rules
    assert (choice.candidates, choice.pruned) == (
        int(mask.sum()),
        int((mask & ~kept).sum()),
    )


def test_solvers_compose_layer_by_layer(
    client: secateur.Client, weights: Tensors, grams: Tensors
) -> None:
    statistics, gram = statistics_of(grams), grams["a.weight"]
    gpt = secateur.sparsegpt("*", 0.5, statistics)
    one, both = (
        pruned(client, weights, spec)["a.weight"]
        for spec in (gpt, gpt + secateur.refit("*", statistics))
    )
    assert torch.equal(one == 0, both == 0)
    best = best_kept(weights["a.weight"], both != 0, gram)
    least = layer_error(best, weights["a.weight"], gram)
    found = [layer_error(values, weights["a.weight"], gram) for values in (one, both)]
    assert found[1] <= 1.01 * least < found[0]


def test_weights_share_a_gram_that_is_sent_once(client: secateur.Client) -> None:
    gram = random_gram(32)
    weights = {name: torch.randn(8, 32) for name in ("q", "k", "v")}
    spec = secateur.l1_unstructured("*", 0.5) + secateur.refit(
        "*", statistics_of(dict.fromkeys(weights, gram))
    )
    assert len(spec.encode(())[1]) == 1
    together = pruned(client, weights, spec)
    for name, weight in weights.items():
        one = secateur.l1_unstructured("*", 0.5) + secateur.refit("*", statistics_of({name: gram}))
        assert torch.equal(pruned(client, {name: weight}, one)[name], together[name])


@pytest.mark.parametrize("shape", [(32, 24), (32, 6, 2, 2)])
def test_transposed_weights(client: secateur.Client, shape: tuple[int, ...]) -> None:
    """As transformers' Conv1D has them: the same as the other layout's."""
    weight, gram = torch.randn(shape), random_gram(32)
    spec = secateur.n_m_structured("w", dim=0)
    masks = client.prune({"w": weight}, spec, progress=False).masks["w"]
    found = pruned(
        client, {"w": weight}, spec + secateur.refit("*", statistics_of({"w": gram}, "w"))
    )
    flat, kept = weight.flatten(1).T.contiguous(), masks.flatten(1).T.contiguous()
    best = best_kept(flat, kept, gram)
    error = layer_error(found["w"].flatten(1).T, flat, gram)
    assert error <= 1.01 * layer_error(best, flat, gram)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_solved_in_float32(client: secateur.Client, dtype: torch.dtype) -> None:
    weight, gram = torch.randn(16, 32).to(dtype), random_gram(32)
    spec = secateur.l1_unstructured("*", 0.5) + secateur.refit("*", statistics_of({"w": gram}))
    found = pruned(client, {"w": weight}, spec)["w"]
    assert found.dtype == dtype
    exact = pruned(client, {"w": weight.float()}, spec)["w"]
    assert torch.equal(found, exact.to(dtype))


def test_a_convolution_of_a_real_calibration(client: secateur.Client) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten()).eval()
    batch = torch.randn(6, 3, 12, 12)
    statistics = secateur.calibrate(net, [batch], gram=True, progress=False)
    magnitude = secateur.l1_unstructured("*.weight", 0.6)
    errors = []
    for spec in (magnitude, magnitude + secateur.refit("*", statistics)):
        other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten())
        other.load_state_dict(pruned(client, net, spec))
        with torch.no_grad():
            errors.append(float((net(batch) - other(batch)).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_grams_are_held_one_at_a_time() -> None:
    """Together they are larger than what the server takes."""
    gram = random_gram(512, rows=600)
    layers = {f"{i}.weight": torch.randn(64, 512) for i in range(24)}
    grams = {name: gram.clone() for name in layers}
    spec = secateur.l1_unstructured("*", 0.5) + secateur.refit("*", statistics_of(grams))
    running = start_server("--max-model-bytes", "8MiB")
    try:
        with secateur.Client(running.address) as client:
            sent = sum(weight.nbytes for weight in layers.values())
            assert sent + 24 * 512 * 513 * 2 > 8 << 20
            found = pruned(client, layers, spec)
            assert layer_error(found["9.weight"], layers["9.weight"], gram) > 0
            large = {"w": torch.randn(2, 2048)}
            wide = statistics_of({"w": torch.eye(2048, dtype=torch.float64)})
            with pytest.raises(secateur.SecateurError, match="more than this server takes"):
                pruned(client, large, secateur.refit("*", wide))
    finally:
        stop_server(running)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_grams() -> None:
    inputs, rows = 1536, 16
    gram = torch.eye(inputs, dtype=torch.float64) + 0.1

    def spec_and_model(layers: int) -> tuple[secateur.Spec, Tensors]:
        model = {f"{i}": torch.randn(rows, inputs) for i in range(layers)}
        statistics = statistics_of({name: gram.clone() for name in model})
        return secateur.l1_unstructured("*", 0.5) + secateur.refit("*", statistics), model

    running = start_server()
    try:
        with secateur.Client(running.address) as client:
            peaks = []
            for layers in (20, 150):
                spec, model = spec_and_model(layers)
                pruned(client, model, spec)
                peaks.append(memory(running.process.pid, "VmHWM"))
    finally:
        stop_server(running)
    of_grams = 130 * 4 * inputs * (inputs + 1) // 2
    # malloc keeps up to 64 MiB for each thread, so that busy threads take more than one does.
    assert peaks[1] - peaks[0] < 0.75 * of_grams


def test_a_call_that_fails_changes_nothing(
    client: secateur.Client, weights: Tensors, grams: Tensors
) -> None:
    before = {name: values.clone() for name, values in weights.items()}
    checkpoint = client.upload(weights)
    grams["b.weight"][3, 3] = float("nan")
    spec = secateur.l1_unstructured("*.weight", 0.5) + secateur.refit("*", statistics_of(grams))
    for source in (weights, checkpoint):
        with pytest.raises(secateur.InvalidSpec, match=r"b\.weight|secateur\."):
            pruned(client, source, spec)
    assert all(torch.equal(weights[name], before[name]) for name in before)
    again = pruned(client, checkpoint, secateur.l1_unstructured("a.weight", 0))
    assert all(torch.equal(again[name], before[name]) for name in before)
