"""OUTPUT_PACKED: small files of the same tensors, from every source."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

import secateur
from tests.client.sharded import INDEX, SHARDS, TIED, read_shards, real_weights, write_shards
from tests.conftest import examples, inner_server
from tests.contract.raw import send_file, spec
from tests.outputs.test_outputs import sources
from tests.packed import packed_names, read_packed
from tests.reference import BITS, assert_same_tensors, same_bits

HALF = secateur.global_unstructured("*.weight", 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def files_client(folder: Path) -> Iterator[secateur.Client]:
    """A client of a server that reads and writes the folder."""
    with (
        inner_server("--allow-path", str(folder)) as server,
        secateur.Client(server.address, timeout=300) as client,
    ):
        yield client


def zeroed(weights: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with 0, and no sign, where they are pruned; other bits as they are."""
    made = dict(weights)
    for name, mask in masks.items():
        bits = weights[name].view(BITS[weights[name].element_size()])
        made[name] = torch.where(mask, bits, torch.zeros_like(bits)).view(weights[name].dtype)
    return made


@examples(100)
@given(source=sources(), amount=st.floats(0, 1))
def test_the_tensors_are_the_dense_ones_without_signs_of_zeros(
    client: secateur.Client, source: dict[str, Tensor], amount: float
) -> None:
    names = [name for name in source if not name.endswith(("_mask", "_orig")) and name != "count"]
    spec = secateur.l1_unstructured(names or "*", amount)
    packed = client.prune(source, spec, "packed")
    dense = client.prune(source, spec, "dense").state_dict()
    found = packed.state_dict()
    assert list(found) == list(dense)
    for name, tensor in dense.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name])
    for name, mask in client.prune(source, spec).masks.items():
        weight = source.get(f"{name}_orig", source.get(name))
        assert weight is not None
        assert same_bits(found[name], zeroed({name: weight}, {name: mask})[name])


def test_real_weights_reach_their_size(
    client: secateur.Client, crepe: Path, tmp_path: Path
) -> None:
    weights = {name: t for name, t in real_weights(crepe).items() if t.dim() > 1}
    for dtype, limits in (
        (torch.float32, (0.46, 0.20, 0.11)),
        (torch.bfloat16, (0.40, 0.18, 0.10)),
    ):
        model = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
        dense = len(save(model))
        for amount, most in zip((0.5, 0.8, 0.9), limits, strict=True):
            result = client.prune(model, secateur.global_unstructured("*", amount), "packed")
            result.save(tmp_path / "m.safetensors", "packed")
            assert (tmp_path / "m.safetensors").stat().st_size <= most * dense, (dtype, amount)


def test_every_source_gives_the_same_file(
    files_client: secateur.Client, folder: Path, crepe: Path
) -> None:
    """In the call, a checkpoint, a URI, and masks that the client applies."""
    weights = real_weights(crepe)
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt", "made": "here"})
    files_client.prune(
        path.as_uri(), HALF, "packed", destination=(folder / "a.safetensors").as_uri()
    )
    files_client.prune(path, HALF).save(folder / "b.safetensors", "packed")
    files_client.prune(path, HALF, "packed").save(folder / "c.safetensors", "packed")
    kept = files_client.prune(path, HALF, "none", keep=True).checkpoint
    assert kept is not None
    files_client.download(kept, folder / "d.safetensors", "packed")
    sent = files_client.prune(path, HALF, "packed").report.output_blake3
    assert sent == files_client.prune(path.as_uri(), HALF, "packed").report.output_blake3
    first = (folder / "a.safetensors").read_bytes()
    for name in "bcd":
        assert (folder / f"{name}.safetensors").read_bytes() == first, name
    found, metadata = read_packed(folder / "a.safetensors")
    assert metadata == {"format": "pt", "made": "here"}
    masks = files_client.prune(path, HALF).masks
    expected = zeroed(weights, masks)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name][1:] == (list(tensor.shape), tensor.numpy().tobytes()), name


def test_shards_stay_shards_with_their_index_and_ties(
    files_client: secateur.Client, folder: Path, crepe: Path, tmp_path: Path
) -> None:
    index = write_shards(folder / "shards", real_weights(crepe))
    (folder / "out").mkdir()
    to = f"{(folder / 'out').as_uri()}/{INDEX}"
    result = files_client.prune(index.as_uri(), HALF, "packed", destination=to)
    assert result.report.zeros
    local = files_client.prune(index, HALF, "packed")
    local.save(tmp_path / "out", "packed")
    for name in SHARDS:
        packed = (folder / "out" / name).read_bytes()
        assert packed == (tmp_path / "out" / name).read_bytes()
    loaded = secateur.load(folder / "out")
    assert loaded["decoder.weight"] is loaded[TIED["decoder.weight"]]
    assert_same_tensors(loaded, local.state_dict())
    files_client.finalize(folder / "out").save(tmp_path / "dense")
    dense = read_shards(tmp_path / "dense")
    assert_same_tensors(dense, {name: t for name, t in loaded.items() if name not in TIED})


def test_a_large_result_is_made_on_disk(
    files_client: secateur.Client,
) -> None:
    weights = {"w": torch.randn(5 << 20, generator=torch.Generator().manual_seed(0))}  # 20 MiB
    spec = secateur.l1_unstructured("w", 0.9)
    found = files_client.prune(weights, spec, "packed")
    assert torch.equal(found.state_dict()["w"], files_client.prune(weights, spec).state_dict()["w"])


def test_finalize_packs_pairs_or_folds_them(client: secateur.Client) -> None:
    weights = {"a": torch.arange(-500.0, 500), "b": torch.arange(-500.0, 500)}
    pairs = client.prune(weights, secateur.l1_unstructured("*", 0.5)).state_dict("reparametrized")
    folded = client.finalize(pairs, output="packed").state_dict()
    mask = pairs["a_mask"] != 0
    assert_same_tensors(folded, zeroed(weights, {"a": mask, "b": mask}))
    one = client.finalize(pairs, ["a"], output="packed").state_dict()
    rest = {name: pairs[name] for name in ("b_orig", "b_mask")}
    assert_same_tensors(one, {**rest, "a": folded["a"]})


def test_a_finalized_model_is_saved_packed(client: secateur.Client, tmp_path: Path) -> None:
    pairs = client.prune({"w": torch.randn(4000)}, secateur.l1_unstructured("w", 0.5)).state_dict(
        "reparametrized"
    )
    client.finalize(pairs, output="packed").save(tmp_path / "m.safetensors")
    assert packed_names(tmp_path / "m.safetensors") == {"w"}


def test_a_packed_result_has_no_note_that_it_is_not_smaller(client: secateur.Client) -> None:
    model = {"w": torch.arange(1.0, 1000)}
    spec = secateur.l1_unstructured("w", 0.5)
    assert "NOT_SMALLER" not in [
        w.code for w in client.prune(model, spec, "packed").report.warnings
    ]
    assert "NOT_SMALLER" in [w.code for w in client.prune(model, spec, "dense").report.warnings]


def test_the_server_refuses_a_packed_file(
    files_client: secateur.Client,
    client: secateur.Client,
    channel: grpc.Channel,
    folder: Path,
) -> None:
    path = folder / "refused.safetensors"
    model = {"w": np.arange(1, 1000, dtype=np.float32)}
    client.prune(model, secateur.l1_unstructured("w", 0.5)).save(path, "packed")
    for call in (files_client.report, files_client.upload):
        with pytest.raises(secateur.InvalidStateDict, match="is packed; unpack it first: secateur"):
            call(path.as_uri())
    found = send_file(channel, "Prune", path.read_bytes(), spec=spec("w"))
    assert found is not None
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_STATE_DICT")
    assert "is packed" in found.message


def test_finalize_refuses_an_output_that_is_not_a_model(client: secateur.Client) -> None:
    for output in ("masks", "reparametrized", "none"):
        with pytest.raises(secateur.InvalidRequest, match="is not an output of Finalize"):
            client.finalize({"w": torch.ones(3)}, output=output)  # type: ignore[arg-type]
