"""Tied weights: one parameter under several names is pruned, counted and kept as one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

import secateur
from secateur.literals import Form
from secateur_proto.ties import read_ties, write_ties
from tests.reference import assert_same_tensors, distinct, prune
from tests.uris.served import Served, serving

EMBED, HEAD, MIDDLE = "embed.weight", "head.weight", "middle.weight"
TOTAL = 40 * 8 + 8 * 8


class Language(nn.Module):
    """The ties of a small language model: its head is its embedding."""

    embed: Any
    middle: Any
    head: Any

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        weight = distinct((48, 8), seed=seed)
        self.embed = nn.Embedding(40, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 40, bias=False)
        self.middle.bias.data.fill_(1.0 + seed)
        self.embed.weight.data.copy_(weight[:40])
        self.middle.weight.data.copy_(weight[40:])
        self.head.weight = self.embed.weight


def pruned_by_torch(amount: float, *names: str) -> Language:
    """The weights of some names pruned globally by torch, each as the one parameter that it is."""
    model = Language()
    places = [(model.get_submodule(name.rpartition(".")[0]), "weight") for name in names]
    prune.global_unstructured(places, prune.L1Unstructured, amount=amount)
    for part, leaf in places:
        prune.remove(part, leaf)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ties")


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    with serving("--allow-path", str(root)) as running:
        yield running


def numpy_state_dict() -> dict[str, Any]:
    arrays: dict[str, Any] = {n: t.numpy() for n, t in Language().state_dict().items()}
    return {**arrays, HEAD: arrays[EMBED][:]}  # another object, the same memory


def torch_file(root: Path) -> Path:
    torch.save(Language().state_dict(), root / "model.pt")
    return root / "model.pt"


def one_file(root: Path) -> Path:
    save_model(Language(), str(root / "model.safetensors"))
    return root / "model.safetensors"


def shards(root: Path) -> Path:
    """As huggingface_hub writes them: a tie is in the metadata of its shard."""
    folder = root / "shards"
    folder.mkdir(exist_ok=True)
    tensors = Language().state_dict()
    save_file({EMBED: tensors[EMBED]}, folder / "a.safetensors", metadata={HEAD: EMBED})
    rest = {name: tensors[name] for name in (MIDDLE, "middle.bias")}
    save_file(rest, folder / "b.safetensors", metadata={"format": "pt"})
    weight_map = {EMBED: "a.safetensors"} | dict.fromkeys(rest, "b.safetensors")
    index = f'{{"weight_map": {weight_map}}}'.replace("'", '"')
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


SOURCES: dict[str, Callable[[Served, Path], Any]] = {
    "module": lambda served, root: Language(),
    "state_dict": lambda served, root: Language().state_dict(),
    "arrays": lambda served, root: numpy_state_dict(),
    "pt": lambda served, root: torch_file(root),
    "safetensors": lambda served, root: one_file(root),
    "shards": lambda served, root: shards(root),
    "checkpoint": lambda served, root: served.client.upload(Language()),
    "checkpoint of a file": lambda served, root: served.client.upload(one_file(root)),
    "checkpoint of shards": lambda served, root: served.client.upload(shards(root)),
    "uri": lambda served, root: one_file(root).as_uri(),
    "uri of shards": lambda served, root: (shards(root) / "model.safetensors.index.json").as_uri(),
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, served: Served, root: Path) -> Any:
    return SOURCES[request.param](served, root)


def loaded(state_dict: dict[str, Any]) -> Language:
    """A model with a state_dict's values, which must be whole."""
    model = Language(seed=1)
    model.load_state_dict({name: torch.as_tensor(value) for name, value in state_dict.items()})
    return model


def assert_same_models(ours: nn.Module, theirs: nn.Module) -> None:
    assert_same_tensors(ours.state_dict(), theirs.state_dict())


# Prune -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["dense", "reparametrized", "masks"])
def test_a_total_counts_the_weight_once(served: Served, source: Any, output: Any) -> None:
    is_here = not isinstance(source, str | secateur.Checkpoint)
    output = output if is_here or output != "masks" else "dense"  # of the weights
    result = served.client.prune(source, secateur.global_unstructured("*.weight", 0.5), output)
    assert (result.report.total, result.report.zeros) == (TOTAL, TOTAL // 2)
    assert result.report.tensors[EMBED].aliases == (HEAD,)
    form: Form = "reparametrized" if output == "reparametrized" else "dense"
    values = result.state_dict(form)
    if form == "reparametrized":
        assert values[f"{EMBED}_orig"] is values[f"{HEAD}_orig"]
        assert values[f"{EMBED}_mask"] is values[f"{HEAD}_mask"]
        values = served.client.finalize(values).state_dict()
    assert values[EMBED] is values[HEAD]
    assert_same_models(loaded(values), pruned_by_torch(0.5, EMBED, MIDDLE))


@pytest.mark.parametrize("pattern", [EMBED, HEAD, "head*", "*e[am][bd].weight"])
def test_a_rule_by_any_name_means_the_one_tensor(served: Served, source: Any, pattern: str) -> None:
    result = served.client.prune(source, secateur.l1_unstructured(pattern, 0.5), "dense")
    assert list(result.report.tensors) == [EMBED]
    assert_same_models(loaded(result.state_dict()), pruned_by_torch(0.5, EMBED))


RAILS: dict[str, Any] = {
    "exclude": {"exclude": ["head*"]},
    "exclude by the stored name": {"exclude": ["embed*"]},
    "rail": {"per_tensor": {HEAD: {"max_sparsity": 0.0}}},
    "rail by glob": {"per_tensor": {"h*": {"max_sparsity": 0.0}}},
}


@pytest.mark.parametrize("rails", RAILS.values(), ids=RAILS)
def test_a_guard_rail_holds_through_every_name(served: Served, source: Any, rails: Any) -> None:
    guard_rails = secateur.guard_rails(**rails)
    spec = secateur.select("*.weight", 32, scope="global", guard_rails=guard_rails)
    values = served.client.prune(source, spec, "dense").state_dict()
    assert_same_models(loaded(values), pruned_by_torch(32, MIDDLE))


@pytest.mark.parametrize("source", ["module", "state_dict", "arrays", "pt"])
@pytest.mark.parametrize(
    ("rails", "spared"),
    [({"keep_first": True}, EMBED), ({"keep_last": True}, EMBED), ({}, "nothing")],
)
@pytest.mark.parametrize("keep", [False, True])
def test_the_last_layer_is_kept_under_the_name_of_the_first(
    served: Served, root: Path, source: str, rails: Any, spared: str, keep: bool
) -> None:
    guard_rails = secateur.guard_rails(**rails)
    spec = secateur.select("*.weight", 32, scope="global", guard_rails=guard_rails)
    model = SOURCES[source](served, root)
    result = served.client.prune(model, spec, keep=keep)
    names = [name for name in (EMBED, MIDDLE) if name != spared]
    assert_same_models(loaded(result.state_dict()), pruned_by_torch(32, *names))
    plan = served.client.plan(model, spec)
    assert [*plan.amounts[0].tensors] == names


def test_results_have_the_order_of_the_source(served: Served, root: Path) -> None:
    for name in ("module", "state_dict", "arrays", "pt"):
        result = served.client.prune(SOURCES[name](served, root), secateur.l1_unstructured(HEAD, 1))
        assert list(result.state_dict()) == list(Language().state_dict())
        model = Language()
        result.apply_to(model)
        ours, theirs = result.state_dict("reparametrized"), model.state_dict()
        halves = [f"{name}{half}" for name in (EMBED, HEAD) for half in ("_orig", "_mask")]
        assert [n for n in ours if n in halves] == halves
        assert ours.keys() == theirs.keys()


def test_every_field_that_names_a_tensor_takes_any_name(served: Served, source: Any) -> None:
    scores = torch.rand(40, 8, generator=torch.Generator().manual_seed(3))
    mask = scores > 0.25
    by_scores = Language()
    prune.l1_unstructured(by_scores.embed, "weight", 0.5, importance_scores=scores)
    prune.remove(by_scores.embed, "weight")
    by_mask = Language()
    prune.custom_from_mask(by_mask.embed, "weight", mask)
    prune.remove(by_mask.embed, "weight")
    by_table = pruned_by_torch(0.25, EMBED)
    by_rows = Language()
    prune.ln_structured(by_rows.embed, "weight", 0.5, n=1, dim=0)
    prune.remove(by_rows.embed, "weight")
    group = secateur.group("words", secateur.member(HEAD), secateur.member(EMBED))
    specs: list[tuple[secateur.Spec, Language]] = [
        (secateur.l1_unstructured("*.weight", 0.5, importance_scores={HEAD: scores}), by_scores),
        (secateur.custom_from_mask({HEAD: mask}), by_mask),
        (secateur.custom_from_mask({HEAD: mask, EMBED: mask}), by_mask),
        (secateur.custom_from_mask({HEAD: mask, EMBED: mask.clone()}), by_mask),
        (secateur.select("*.weight", secateur.table({"h*": 0.25, "*": 0.0})), by_table),
        (secateur.select(HEAD, secateur.target_macs(240.0, {HEAD: 1.0})), by_table),
        (secateur.grouped([group], 0.5), by_rows),
    ]
    for spec, want in specs:
        spec = secateur.select(HEAD, 0) + spec
        found = served.client.prune(source, spec, "dense").state_dict()
        assert np.array_equal(np.asarray(found[EMBED]), want.embed.weight.detach().numpy()), spec


def test_two_values_for_one_tensor_are_refused(served: Served, source: Any) -> None:
    scores = {HEAD: np.ones((40, 8), np.float32), EMBED: np.zeros((40, 8), np.float32)}
    spec = secateur.l1_unstructured(EMBED, 0.5, importance_scores=scores)
    with pytest.raises(
        secateur.InvalidSpec, match=r"another name of '(embed|head)\.weight'"
    ) as caught:
        served.client.prune(source, spec, "none")
    assert (caught.value.field or "").startswith("spec.rules[0].selection.importance_scores")


def test_equal_arrays_under_all_names_are_one(client: secateur.Client) -> None:
    """As a comprehension over the state_dict makes them: each in memory of its own."""
    scores = {name: tensor.exp() for name, tensor in Language().state_dict().items()}
    given = {name: scores[name] for name in (EMBED, MIDDLE, HEAD)}
    assert given[EMBED].data_ptr() != given[HEAD].data_ptr()
    spec = secateur.global_unstructured("*.weight", 0.5, importance_scores=given)
    want = secateur.global_unstructured(
        "*.weight", 0.5, importance_scores={EMBED: scores[EMBED], MIDDLE: scores[MIDDLE]}
    )
    result = client.prune(Language(), spec, keep=True)
    assert_same_tensors(result.masks, client.prune(Language(), want).masks)
    plan = client.plan(Language(), spec)
    assert plan.amounts[0].pruned == TOTAL // 2


def test_scales_are_found_by_any_name(client: secateur.Client) -> None:
    scale = torch.arange(6.0)
    model = {"w": WEIGHT, "scale": scale, "other": scale}
    for holder in ("scale", "other"):
        spec = secateur.select("w", 2, granularity=secateur.slices(0), scales={"w": holder})
        kept = client.prune(model, spec).masks["w"].any(1)
        assert kept.tolist() == [False, False, True, True, True, True]


def test_a_plan_and_a_sensitivity_count_it_once(served: Served, source: Any) -> None:
    plan = served.client.plan(source, secateur.global_unstructured("*.weight", 0.5), [0.5, 7])
    assert [amount.pruned for amount in plan.amounts] == [TOTAL // 2, 7]
    assert {amount.total for amount in plan.amounts} == {TOTAL}
    by_name = served.client.plan(source, secateur.l1_unstructured(HEAD, 0.5))
    assert list(by_name.amounts[0].tensors) == [EMBED]
    assert {*served.client.sensitivity(source).norm_removed} == {EMBED, MIDDLE}


def test_a_report_counts_it_once(served: Served, source: Any) -> None:
    report = served.client.report(source)
    assert report.total == TOTAL + 8
    assert HEAD not in report.tensors
    assert f"{EMBED} = {HEAD}" in str(report)
    assert list(served.client.report(source, "head*").tensors) == [EMBED]


# Modules ---------------------------------------------------------------------------------------


def test_apply_to_prunes_the_parameter_under_all_its_names(served: Served, source: Any) -> None:
    result = served.client.prune(source, secateur.global_unstructured("*.weight", 7))
    model = Language()
    result.apply_to(model)
    assert model.head.weight_orig is model.embed.weight_orig
    assert torch.equal(model.head.weight_mask, model.embed.weight_mask)
    pruned = [int((part.weight_mask == 0).sum()) for part in (model.embed, model.middle)]
    assert sum(pruned) == 7 == result.report.rules[0][0].pruned
    for part in (model.embed, model.middle, model.head):
        prune.remove(part, "weight")
    assert_same_models(model, pruned_by_torch(7, EMBED, MIDDLE))


@pytest.mark.parametrize("names", [(EMBED,), (HEAD,), (EMBED, HEAD), (HEAD, EMBED)])
def test_finalize_is_as_prune_remove(served: Served, root: Path, names: tuple[str, ...]) -> None:
    """However many of the names torch pruned, and differently under each."""

    def pruned() -> Language:
        model = Language()
        for seed, name in enumerate(names):
            part = model.get_submodule(name.removesuffix(".weight"))
            torch.manual_seed(seed)
            prune.random_unstructured(part, "weight", 0.3)
        return model

    want = pruned()
    for name in names:
        prune.remove(want.get_submodule(name.removesuffix(".weight")), "weight")
    torch.save(pruned().state_dict(), root / "pruned.pt")
    save_model(pruned(), str(root / "pruned.safetensors"))
    path = root / "pruned.safetensors"
    sources = (pruned(), pruned().state_dict(), root / "pruned.pt", path, path.as_uri())
    for source in (*sources, served.client.upload(path), served.client.upload(pruned())):
        final = served.client.finalize(source)
        assert final.report.total == TOTAL + 8
        assert final.report.zeros == sum(int((p == 0).sum()) for p in want.parameters())
        assert_same_models(loaded(final.state_dict()), want)


def test_a_tied_tensor_that_torch_pruned_is_pruned_further_as_one(served: Served) -> None:
    model = Language()
    served.client.prune(model, secateur.l1_unstructured(HEAD, 0.5)).apply_to(model)
    result = served.client.prune(model, secateur.l1_unstructured(EMBED, 0.5))
    want = Language()
    for _ in range(2):
        prune.l1_unstructured(want.embed, "weight", 0.5)
    assert torch.equal(result.masks[HEAD], want.embed.weight_mask == 1)
    result.apply_to(model)
    assert torch.equal(model.head.weight_mask, want.embed.weight_mask)


def test_a_layer_that_is_used_twice_is_one(served: Served) -> None:
    layer: Any = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    result = served.client.prune(model, secateur.random_unstructured("*.weight", 0.5, seed=4))
    result.apply_to(model)
    assert int((layer.weight_mask == 0).sum()) == 128
    assert list(result.report.tensors) == ["0.weight"]
    assert result.masks["0.weight"] is result.masks["2.weight"]


# Files -----------------------------------------------------------------------------------------


def test_a_torch_file_keeps_the_tie(served: Served, source: Any, root: Path) -> None:
    result = served.client.prune(source, secateur.global_unstructured("*.weight", 0.5), "dense")
    result.save(root / "out.pt")
    found = torch.load(root / "out.pt", weights_only=True)
    assert found[HEAD].data_ptr() == found[EMBED].data_ptr()
    assert_same_models(loaded(found), pruned_by_torch(0.5, EMBED, MIDDLE))
    once = {name: tensor for name, tensor in found.items() if name != HEAD}
    torch.save(once, root / "once.pt")
    assert (root / "out.pt").stat().st_size - (root / "once.pt").stat().st_size < 512


def test_a_safetensors_file_has_one_copy_as_save_model_writes_it(
    served: Served, source: Any, root: Path
) -> None:
    want = pruned_by_torch(0.5, EMBED, MIDDLE)
    save_model(want, str(root / "want.safetensors"))
    result = served.client.prune(source, secateur.global_unstructured("*.weight", 0.5), "dense")
    path = root / "out.safetensors"
    result.save(path)
    assert_same_tensors(load_file(path), load_file(root / "want.safetensors"))
    with safe_open(path, "pt") as file:
        assert file.metadata()[HEAD] == EMBED
    model = Language(seed=1)
    missing, unexpected = load_model(model, path)
    assert not missing
    assert not unexpected
    assert_same_models(model, want)


def test_an_upload_and_a_download_have_one_copy(served: Served, root: Path) -> None:
    checkpoint = served.client.upload(Language())
    assert checkpoint.size_bytes < 4 * (TOTAL + 8) + 1024
    served.client.download(checkpoint, root / "down.safetensors")
    model = Language(seed=1)
    load_model(model, root / "down.safetensors")
    assert_same_models(model, Language())
    kept = served.client.prune(Language(), secateur.l1_unstructured(HEAD, 0.5), keep=True)
    assert kept.checkpoint is not None
    served.client.download(kept.checkpoint, root / "kept.safetensors")
    load_model(model, root / "kept.safetensors")
    assert_same_models(model, pruned_by_torch(0.5, EMBED))


def test_the_pair_of_a_tied_tensor_is_read_again(served: Served, source: Any, root: Path) -> None:
    half = secateur.l1_unstructured(HEAD, 0.5)
    served.client.prune(source, half, "reparametrized").save(
        root / "pair.safetensors", "reparametrized"
    )
    with safe_open(root / "pair.safetensors", "pt") as file:
        assert file.metadata()[HEAD] == EMBED
    final = served.client.finalize(root / "pair.safetensors")
    assert_same_models(loaded(final.state_dict()), pruned_by_torch(0.5, EMBED))


def test_a_name_that_an_index_lacks_is_not_added(served: Served, root: Path) -> None:
    folder = root / "untied"
    folder.mkdir()
    save_file({EMBED: distinct((40, 8))}, folder / "a.safetensors", metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{"{EMBED}": "a.safetensors"}}}}')
    result = served.client.prune(folder, secateur.l1_unstructured("*", 0.5))
    assert list(result.state_dict()) == [EMBED]
    out = root / "untied-out"
    out.mkdir()
    result.save(out)
    assert HEAD not in (out / "model.safetensors.index.json").read_text()
    with safe_open(out / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


# Ties, and tensors that look tied -----------------------------------------------------------------

WEIGHT = distinct((6, 8))
OVERLAPS: dict[str, tuple[Any, Any]] = {
    "a part": (WEIGHT, WEIGHT[:3]),
    "transposed": (WEIGHT, WEIGHT.t()),
    "another shape": (WEIGHT, WEIGHT.view(8, 6)),
    "another dtype": (WEIGHT, WEIGHT.view(torch.int32)),
    "parts that meet": (WEIGHT[:4], WEIGHT[3:]),
    "arrays": (WEIGHT.numpy(), WEIGHT.numpy()[::-1]),
    "expanded": (WEIGHT[0], WEIGHT[0].expand(6, 8)),
}


@pytest.mark.parametrize("views", OVERLAPS.values(), ids=OVERLAPS)
def test_views_that_overlap_are_refused_by_name(client: secateur.Client, views: Any) -> None:
    model = {"first": views[0], "between": torch.ones(3), "second": views[1]}
    calls: list[Callable[[], Any]] = [
        lambda: client.report(model),
        lambda: client.finalize(model),
        lambda: client.upload(model),
        lambda: client.plan(model, secateur.global_unstructured("*", 0.5)),
        lambda: client.prune(model, secateur.global_unstructured("*", 0.5)),
    ]
    for call in calls:
        with pytest.raises(secateur.InvalidStateDict, match=r"(first and second|second and first)"):
            call()


APART: dict[str, tuple[Any, Any]] = {
    "rows": (WEIGHT[:3], WEIGHT[3:]),
    "columns": (WEIGHT[:, :4], WEIGHT[:, 4:]),
    "every other": (WEIGHT[::2], WEIGHT[1::2]),
    "empty": (WEIGHT[:0], WEIGHT[:0]),
    "equal values": (WEIGHT, WEIGHT.clone()),
    "arrays": (WEIGHT.numpy()[:, ::2], WEIGHT.numpy()[:, 1::2]),
}


@pytest.mark.parametrize("views", APART.values(), ids=APART)
def test_views_of_one_storage_that_share_no_element_are_two(
    client: secateur.Client, views: Any
) -> None:
    report = client.report({"a": views[0], "b": views[1]})
    assert list(report.tensors) == ["a", "b"]
    assert not any(tensor.aliases for tensor in report.tensors.values())


def test_a_conjugate_is_not_the_same_tensor(client: secateur.Client) -> None:
    value = torch.view_as_complex(distinct((4, 2)))
    found = client.finalize({"a": value, "b": value.conj(), "w": WEIGHT}).state_dict()
    assert torch.equal(found["a"], value)
    assert torch.equal(found["b"], value.conj())


def test_an_array_on_the_memory_of_a_tensor_is_the_same_tensor(client: secateur.Client) -> None:
    for tensor in (WEIGHT, WEIGHT.half(), torch.arange(6)):
        found = client.finalize({"a": tensor, "b": tensor.numpy(), "w": torch.ones(2)}).state_dict()
        assert found["a"] is found["b"]
        assert torch.equal(found["b"], tensor)


def test_tied_buffers_are_one_object_in_the_result(client: secateur.Client) -> None:
    positions = torch.arange(4)
    found = client.finalize({"a": positions, "w": WEIGHT, "b": positions}).state_dict()
    assert found["a"] is found["b"]
    assert torch.equal(found["b"], positions)


def test_one_mask_of_two_weights_is_not_a_tie(client: secateur.Client) -> None:
    mask = (distinct((6, 8)) > 0).float()
    weights = {"a": distinct((6, 8), seed=1), "b": distinct((6, 8), seed=2)}
    pairs = {f"{n}_orig": w for n, w in weights.items()} | {f"{n}_mask": mask for n in weights}
    found = client.finalize(pairs).state_dict()
    assert_same_tensors(found, {name: weight * mask for name, weight in weights.items()})


def test_a_weight_that_is_its_own_mask_is_a_pair(client: secateur.Client) -> None:
    ones = torch.ones(6, 8)
    final = client.finalize({"w_orig": ones, "w_mask": ones})
    assert_same_tensors(final.state_dict(), {"w": ones})
    both = client.finalize({"v_orig": WEIGHT, "v_mask": ones, "w_orig": WEIGHT, "w_mask": ones})
    assert both.report.tensors["v"].aliases == ("w",)
    assert both.report.total == 48


MASK, OTHER_MASK = (distinct((6, 8), seed=5) > 0).float(), (distinct((6, 8), seed=6) > 0).float()
PLAIN = distinct((6, 8), seed=1)
BESIDE_PAIRS: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {
    "a buffer that is a mask": (
        {"y_orig": WEIGHT, "y_mask": MASK, "extra": MASK},
        {"y": WEIGHT * MASK, "extra": MASK},
    ),
    "a mask that is a buffer": (
        {"extra": MASK, "y_orig": WEIGHT, "y_mask": MASK},
        {"extra": MASK, "y": WEIGHT * MASK},
    ),
    "a buffer that is a mask, and named as one": (
        {"y_orig": WEIGHT, "y_mask": MASK, "a": PLAIN, "b": PLAIN, "b_mask": MASK},
        {"y": WEIGHT * MASK, "a": PLAIN, "b": PLAIN, "b_mask": MASK},
    ),
    "a mask of a tied weight that is another weight's": (
        {
            **{"y_orig": WEIGHT, "y_mask": MASK, "z_orig": PLAIN, "z_mask": OTHER_MASK},
            **{"x_orig": WEIGHT, "x_mask": OTHER_MASK},
        },
        {
            **{"y": WEIGHT * MASK * OTHER_MASK, "z": PLAIN * OTHER_MASK},
            "x": WEIGHT * MASK * OTHER_MASK,
        },
    ),
}


@pytest.mark.parametrize(("model", "want"), BESIDE_PAIRS.values(), ids=BESIDE_PAIRS)
def test_tensors_that_share_memory_with_a_pair_are_not_lost(
    client: secateur.Client, model: dict[str, Tensor], want: dict[str, Tensor]
) -> None:
    found = client.finalize(model).state_dict()
    assert_same_tensors(found, want)


@pytest.mark.parametrize("names", [("w", "w_orig"), ("w_orig", "w"), ("v", "w", "w_orig")])
def test_a_weight_that_is_tied_to_its_own_pair_is_refused(
    client: secateur.Client, names: tuple[str, ...]
) -> None:
    model = {**dict.fromkeys(names, WEIGHT), "w_mask": MASK}
    with pytest.raises(secateur.InvalidStateDict, match="also has its pair"):
        client.finalize(model)


@pytest.mark.parametrize("half", ["y_mask", "y_orig"])
def test_a_name_that_the_pair_of_a_tied_weight_needs_is_refused(
    client: secateur.Client, half: str
) -> None:
    model = {"y": WEIGHT, half: OTHER_MASK, "x_orig": WEIGHT, "x_mask": MASK}
    with pytest.raises(secateur.InvalidStateDict, match=f"^{half}: y is pruned under another name"):
        client.finalize(model)


def test_a_buffer_is_not_half_of_a_tied_pair(client: secateur.Client) -> None:
    model = nn.Module()
    model.register_parameter("attn", nn.Parameter(WEIGHT.clone()))
    model.register_parameter("again", model.get_parameter("attn"))
    model.register_buffer("attn_mask", torch.ones(6, 8))
    result = client.prune(model, secateur.l1_unstructured("*", 0.5), "dense")
    assert list(result.report.tensors) == ["attn"]
    assert torch.equal(result.state_dict()["attn_mask"], torch.ones(6, 8))


@pytest.mark.parametrize("pattern", [EMBED, "table", "*.weight"])
def test_a_mask_of_a_buffer_on_a_parameters_memory_is_the_parameters(
    client: secateur.Client, pattern: str
) -> None:
    model = Language()
    model.register_buffer("table", model.embed.weight.detach())
    result = client.prune(model, secateur.l1_unstructured(pattern, 0.5))
    result.apply_to(model)
    assert {*dict(model.named_buffers())} >= {"table", "embed.weight_mask", "head.weight_mask"}
    assert torch.equal(model.embed.weight == 0, ~result.masks["table"])


def test_a_mask_of_another_buffer_is_refused(client: secateur.Client) -> None:
    model = nn.BatchNorm1d(4)
    result = client.prune({"running_var": torch.ones(4)}, secateur.l1_unstructured("*", 0.5))
    with pytest.raises(secateur.InvalidStateDict, match="running_var: the module has no such"):
        result.apply_to(model)


def test_metadata_without_the_name_of_a_tensor_is_not_a_tie(
    client: secateur.Client, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    metadata = {"format": "pt", "w": "v", "note": "w2"}
    save_file({"w": WEIGHT, "v": distinct((3, 3))}, path, metadata=metadata)
    final = client.finalize(path)
    assert {*final.state_dict()} == {"w", "v"}
    final.save(path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata


@st.composite
def tied_models(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors under one to three names each, in any order."""
    tensors = [distinct((4, draw(st.integers(1, 5))), seed=seed) for seed in range(3)]
    which = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
    return {f"layer{i}.weight": tensors[k] for i, k in enumerate(which)}


@settings(deadline=None)
@given(model=tied_models(), amount=st.floats(0, 1), names=st.sets(st.integers(0, 5), min_size=1))
def test_ties_are_as_pruning_each_tensor_once(
    client: secateur.Client, model: dict[str, Tensor], amount: float, names: set[int]
) -> None:
    """Beside the same model with the other names left out, whose results are torch's."""
    listed = list(model)
    patterns = sorted({listed[i % len(listed)] for i in names})
    first = {id(tensor): name for name, tensor in reversed(model.items())}
    once = {name: tensor for name, tensor in model.items() if first[id(tensor)] == name}
    meant = [first[id(model[name])] for name in patterns]
    ours = client.prune(model, secateur.global_unstructured(patterns, amount), "dense")
    theirs = client.prune(once, secateur.global_unstructured(meant, amount), "dense")
    assert ours.report.total == theirs.report.total
    assert ours.report.zeros == theirs.report.zeros
    want = theirs.state_dict()
    assert_same_tensors(ours.state_dict(), {n: want[first[id(t)]] for n, t in model.items()})


@given(
    stored=st.sets(st.sampled_from([f"{n}{e}" for n in "abc" for e in ("", "_orig", "_mask")])),
    metadata=st.dictionaries(
        st.sampled_from([f"{n}{e}" for n in "abcd" for e in ("", "_orig", "_mask")]),
        st.sampled_from([f"{n}{e}" for n in "abcx" for e in ("", "_orig", "_mask")]),
    ),
)
def test_ties_that_are_written_are_read_again(stored: set[str], metadata: dict[str, str]) -> None:
    ties = read_ties(metadata, stored)
    assert not ties.names.keys() & stored
    written = write_ties(metadata, ties)
    assert read_ties(written, stored).names == ties.names
    assert write_ties(written, read_ties(written, stored)) == written
