"""Calls on a checkpoint give the same bits as calls with its data."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.literals import Output
from tests.conftest import examples
from tests.contract.raw import entry, file
from tests.reference import (
    assert_same_masks,
    assert_same_tensors,
    by_torch,
    custom,
    distinct,
    l1,
    ln,
    masks_of,
    module_of,
    prune,
)
from tests.storage.stored import downloaded, file_of

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OTHERS = (torch.int64, torch.uint8, torch.bool)
FORMS: tuple[Output, ...] = ("dense", "reparametrized", "masks", "none")


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 4).to(dtype)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Tensor]:
    """Draws tensors of any dtype and shape, also empty ones and scalars, and pairs."""
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    tensors = {}
    for index in range(draw(st.integers(1, 5))):
        dtype, shape = draw(st.sampled_from(FLOATS + OTHERS)), draw(shapes)
        tensor = values(shape, dtype, draw(st.integers(0, 9)))
        if dtype in FLOATS and draw(st.booleans()):
            tensors[f"t{index}_orig"] = tensor
            tensors[f"t{index}_mask"] = (values(shape, torch.float32, index) > 0).to(dtype)
        else:
            tensors[f"t{index}"] = tensor
    return {**tensors, "floats": values((7, 3), draw(st.sampled_from(FLOATS)), 0)}


def shape_of(tensors: Mapping[str, Tensor], name: str) -> torch.Size:
    return tensors[name if name in tensors else f"{name}_orig"].shape


@st.composite
def specs(draw: st.DrawFn, tensors: Mapping[str, Tensor]) -> secateur.Spec:
    """Draws one to three rules, some of them with scores or masks."""
    scores = values(shape_of(tensors, "floats"), torch.float32, draw(st.integers(0, 9)))
    fraction = draw(st.floats(0, 1))
    rules: list[Callable[[], secateur.Spec]] = [
        lambda: secateur.l1_unstructured("*", fraction),
        lambda: secateur.global_unstructured("*", fraction),
        lambda: secateur.random_unstructured("*", fraction, seed=3),
        lambda: secateur.ln_structured("floats", fraction, n=2, dim=draw(st.integers(-2, 1))),
        lambda: secateur.l1_unstructured("floats", fraction, {"floats": scores}),
        lambda: secateur.custom_from_mask({"floats": scores > 0}),
    ]
    whole = draw(st.sampled_from(rules))()
    for _ in range(draw(st.integers(0, 2))):
        whole = whole + draw(st.sampled_from(rules))()
    return whole


def assert_same_reports(ours: secateur.Report, theirs: secateur.Report) -> None:
    """Compares reports without the digest of the input, which a checkpoint does not send."""
    one, other = ours.to_dict(), theirs.to_dict()
    one.pop("input_blake3"), other.pop("input_blake3")
    assert one == other


def assert_same_results(ours: secateur.PruneResult, theirs: secateur.PruneResult, of: Any) -> None:
    assert_same_reports(ours.report, theirs.report)
    if of == "masks":
        assert_same_masks(ours.masks, theirs.masks)
    elif of != "none":
        assert_same_tensors(ours.state_dict(of), theirs.state_dict(of))


property_based = settings(
    examples(40),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@property_based
@given(data=st.data())
def test_prune_of_a_checkpoint_equals_that_of_its_data(
    client: secateur.Client, tmp_path: Path, data: st.DataObject
) -> None:
    tensors = data.draw(models())
    spec, output = data.draw(specs(tensors)), data.draw(st.sampled_from(FORMS))
    uploaded = client.upload(tensors)
    theirs = client.prune(tensors, spec, output=output)
    result = client.prune(uploaded, spec, output=output, keep=True)
    assert_same_results(result, theirs, output)
    assert result.checkpoint is not None
    assert_same_tensors(downloaded(client, uploaded, tmp_path, "reparametrized"), tensors)
    pair = client.prune(tensors, spec, output="reparametrized").state_dict("reparametrized")
    check_is(client, result.checkpoint, pair, tmp_path)
    client.delete(uploaded)  # the kept checkpoint has the same weights
    check_is(client, result.checkpoint, pair, tmp_path)
    client.delete(result.checkpoint)


def check_is(
    client: secateur.Client,
    checkpoint: secateur.Checkpoint,
    pair: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Checks that every call on a checkpoint equals that on the state_dict with pairs."""
    assert_same_reports(client.report(checkpoint), client.report(pair))
    ours, theirs = client.finalize(checkpoint), client.finalize(pair)
    assert_same_reports(ours.report, theirs.report)
    assert_same_tensors(ours.state_dict(), theirs.state_dict())
    assert_same_tensors(downloaded(client, checkpoint, folder), theirs.state_dict())
    assert_same_tensors(downloaded(client, checkpoint, folder, "reparametrized"), pair)
    bits = downloaded(client, checkpoint, folder, "masks")
    masks = {n.removesuffix("_mask"): t == 1 for n, t in pair.items() if n.endswith("_mask")}
    assert bits.keys() == masks.keys()
    for name, mask in masks.items():
        packed = np.packbits(mask.flatten().numpy(), bitorder="little")
        assert bits[name].numpy().tobytes() == packed.tobytes(), name


@property_based
@given(data=st.data())
def test_second_prune_of_a_checkpoint_equals_that_of_the_pairs(
    client: secateur.Client, data: st.DataObject
) -> None:
    tensors = data.draw(models())
    first, second = data.draw(specs(tensors)), data.draw(specs(tensors))
    pair = client.prune(tensors, first, output="reparametrized").state_dict("reparametrized")
    kept = client.prune(tensors, first, keep=True).checkpoint
    assert kept is not None
    output = data.draw(st.sampled_from(FORMS))
    ours, theirs = (client.prune(source, second, output=output) for source in (kept, pair))
    assert_same_results(ours, theirs, output)
    client.delete(kept)


STEPS = [
    l1(["a.weight", "b"], 0.2),
    ln(["b"], 0.1, 2, 0),
    custom({"a.weight": distinct((30, 20), seed=3) > -0.9}),
]


def test_ten_prunes_of_a_checkpoint_equal_torchs_ten_prunes(
    client: secateur.Client, tmp_path: Path
) -> None:
    """Compares torch's functions on one module with prunes of one checkpoint after another."""
    whole = distinct((600 + 400,))
    tensors = {"a.weight": whole[:600].view(30, 20), "b": whole[600:].view(20, 20)}
    module, checkpoint = module_of(tensors), client.upload(tensors)
    for index in range(10):
        step = STEPS[index % len(STEPS)]
        step.on(module)
        result = client.prune(checkpoint, step.spec, keep=True)
        assert result.checkpoint is not None
        checkpoint = result.checkpoint
        expected = {name: masks_of(module)[name] for name in result.masks}
        assert_same_masks(result.masks, expected)
    folded = {name: tensor * masks_of(module)[name] for name, tensor in tensors.items()}
    assert_same_tensors(downloaded(client, checkpoint, tmp_path), folded)


def test_kept_prune_of_a_module_equals_apply_to(client: secateur.Client, tmp_path: Path) -> None:
    """Its buffers are not sent; a second call on the module starts from its masks."""
    module = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
    spec = secateur.l1_unstructured("0.weight", 0.5)
    first = client.prune(module, spec, keep=True)
    first.apply_to(module)
    second = client.prune(module, spec, keep=True)
    weights = {name: values.detach() for name, values in module.named_parameters()}
    plain = {name.removesuffix("_orig"): tensor for name, tensor in weights.items()}
    expected = by_torch(plain, l1(["0.weight"], 0.5), l1(["0.weight"], 0.5))
    assert_same_masks(second.masks, masks_of(expected))
    assert second.checkpoint is not None
    tensors = downloaded(client, second.checkpoint, tmp_path)
    prune.remove(expected.get_submodule("0"), "weight")
    assert_same_tensors(tensors, expected.state_dict())


@pytest.mark.parametrize("shift", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64], ids=str)
def test_tensors_are_read_at_any_offset_of_the_file(
    client: secateur.Client, tmp_path: Path, shift: int, dtype: torch.dtype
) -> None:
    """The format does not demand a padded header."""
    weight = values((9, 5), dtype, 1)
    data = weight.view(torch.uint8).numpy().tobytes()
    names = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16"}
    kind = {**names, torch.bfloat16: "BF16", torch.int64: "I64"}[dtype]
    table: dict[str, Any] = {
        "__metadata__": {"format": "pt"},  # as the client sends tensors
        "odd": entry("U8", [shift], 0, shift),
        "w": entry(kind, [9, 5], shift, shift + len(data)),
        "last": entry("F32", [1], shift + len(data), shift + len(data) + 4),
    }
    text = json.dumps(table).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(file(text + b" " * (-len(text) % 8), bytes(shift) + data + b"\0\0\x80\x3f"))
    tensors = {"odd": torch.zeros(shift, dtype=torch.uint8), "w": weight, "last": torch.ones(1)}
    spec = secateur.global_unstructured("*", 0.4)
    uploaded = client.upload(path)
    for output in FORMS:
        ours, theirs = (client.prune(m, spec, output=output) for m in (uploaded, tensors))
        assert_same_results(ours, theirs, output)
    assert_same_reports(client.report(uploaded), client.report(tensors))
    client.download(uploaded, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == path.read_bytes()


def test_model_of_many_blocks_is_read_correctly(client: secateur.Client, tmp_path: Path) -> None:
    """Tensors begin and end within blocks of the store, and span several."""
    tensors = {f"w{i}": values((n,), torch.float32, i) for i, n in enumerate((300_001, 3, 777_777))}
    spec = secateur.global_unstructured("*", 0.7)
    result = client.prune(client.upload(tensors), spec, keep=True)
    assert_same_results(result, client.prune(tensors, spec), "masks")
    assert result.checkpoint is not None
    expected = {name: tensor * result.masks[name] for name, tensor in tensors.items()}
    assert_same_tensors(downloaded(client, result.checkpoint, tmp_path), expected)


def test_download_equals_the_upload_byte_for_byte(client: secateur.Client, tmp_path: Path) -> None:
    path, back = tmp_path / "model.safetensors", tmp_path / "back"
    back.mkdir()
    path.write_bytes(safetensors.torch.save({"w": torch.ones(3)}, {"by": "hand"}))
    uploaded = client.upload(path)
    client.download(uploaded, back)
    assert (back / "model.safetensors").read_bytes() == path.read_bytes()
    assert uploaded.size_bytes == path.stat().st_size
    assert (uploaded.mask_bytes, uploaded.expire_time) == (0, None)


def test_names_of_scores_do_not_collide_with_tensors_of_the_checkpoint(
    client: secateur.Client,
) -> None:
    """The client does not know the names of the tensors on the server."""
    tensors = {"secateur.0": values((6,), torch.float32, 0), "w": values((6,), torch.float32, 1)}
    scores = {"w": values((6,), torch.float32, 2)}
    spec = secateur.l1_unstructured("w", 0.5, scores)
    ours = client.prune(client.upload(tensors), spec, output="dense")
    assert_same_results(ours, client.prune(tensors, spec, output="dense"), "dense")


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda c, k: c.prune(k, secateur.l1_unstructured("x", 1)), secateur.InvalidSpec),
        (lambda c, k: c.prune(k, secateur.l1_unstructured("w", 4)), secateur.InvalidSpec),
        (lambda c, k: c.report(k, tensors="x"), secateur.InvalidSpec),
        (lambda c, k: c.upload(k), secateur.InvalidStateDict),
    ],
    ids=["name", "count", "report", "upload"],
)
def test_errors_of_data_are_errors_of_a_checkpoint_too(
    client: secateur.Client, call: Callable[[Any, Any], Any], error: type[Exception]
) -> None:
    uploaded = client.upload({"w": torch.ones(3)})
    before = [checkpoint.name for checkpoint in client.checkpoints()]
    with pytest.raises(error):
        call(client, uploaded)
    assert [checkpoint.name for checkpoint in client.checkpoints()] == before


def test_same_file_has_the_same_digest(client: secateur.Client) -> None:
    tensors = {"w": torch.arange(5.0)}
    first, second = client.upload(tensors), client.upload(tensors)
    assert first.name != second.name
    assert first.files == second.files
    assert client.checkpoint(first.name) == first
    assert len(file_of(tensors)) == first.size_bytes
