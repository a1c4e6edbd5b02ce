"""A model in shards is one model, as a source and as a result."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import secateur
from secateur.literals import Form
from tests.client.sharded import (
    INDEX,
    SHARDS,
    TIED,
    read_shards,
    real_weights,
    with_ties,
    write_shards,
)
from tests.contract.raw import check_serves
from tests.reference import all_l1, assert_same_masks, assert_same_tensors, torch_masks
from tests.uris.served import Served, check, serving_here

FORMS: tuple[Form, ...] = ("dense", "reparametrized")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    with serving_here("--allow-path", str(root)) as running:
        yield running


@pytest.fixture(autouse=True)
def _the_server_goes_on(served: Served) -> Iterator[None]:
    yield
    check_serves(served.server, served.channel)


@pytest.fixture(scope="module")
def model(crepe: Path) -> dict[str, Tensor]:
    return real_weights(crepe)


@pytest.fixture(scope="module")
def folder(root: Path, model: dict[str, Tensor]) -> Path:
    return write_shards(root / "model", model).parent


@pytest.fixture
def out(root: Path, request: pytest.FixtureRequest) -> Path:
    made = root / f"out-{request.node.name}"
    made.mkdir()
    return made


NAMES = [f"conv{i}.weight" for i in range(1, 7)] + ["classifier.weight"]
HALF = secateur.global_unstructured(NAMES, 0.5)


def expected(client: secateur.Client, model: dict[str, Tensor], form: Form) -> dict[str, Tensor]:
    """The result for the same tensors in one file."""
    return client.prune(model, HALF).state_dict(form)


# Read ----------------------------------------------------------------------------------------


def sources(served: Served, folder: Path) -> list[Any]:
    index = folder / INDEX
    checkpoint = served.client.upload(folder)
    return [folder, str(index), index.as_uri(), checkpoint, served.client.upload(index.as_uri())]


def test_all_shards_are_pruned_as_one_as_torch_does(
    served: Served, folder: Path, model: dict[str, Tensor]
) -> None:
    theirs = torch_masks({name: model[name] for name in NAMES}, all_l1(NAMES, 0.5))
    for source in sources(served, folder):
        assert_same_masks(served.client.prune(source, HALF).masks, with_ties(theirs))


@pytest.mark.parametrize("form", FORMS)
def test_the_result_is_the_whole_model(
    served: Served, folder: Path, model: dict[str, Tensor], form: Form
) -> None:
    want = expected(served.client, model, form)
    for source in sources(served, folder):
        result = served.client.prune(source, HALF, form)
        assert_same_tensors(result.state_dict(form), with_ties(want))
        assert result.report.sparsity == pytest.approx(0.5, abs=1e-5)


def test_an_upload_has_the_files_as_they_are(served: Served, folder: Path) -> None:
    for checkpoint in (
        served.client.upload(folder),
        served.client.upload((folder / INDEX).as_uri()),
    ):
        assert [file.filename for file in checkpoint.files] == [*SHARDS, INDEX]
        assert [f.size_bytes for f in checkpoint.files] == [
            (folder / f.filename).stat().st_size for f in checkpoint.files
        ]


def test_a_tied_name_has_no_line_of_its_own(served: Served, folder: Path) -> None:
    assert not TIED.keys() & served.client.report(folder).tensors.keys()


# Written -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "form"),
    [
        ("masks", "dense"),
        ("masks", "reparametrized"),
        ("reparametrized", "dense"),
        ("dense", "dense"),
        ("reparametrized", "reparametrized"),
    ],
)
def test_a_result_is_saved_as_the_shards_that_came(
    served: Served, folder: Path, model: dict[str, Tensor], out: Path, output: Any, form: Form
) -> None:
    result = served.client.prune(folder, HALF, output)
    result.save(out, form)
    assert_same_tensors(read_shards(out), expected(served.client, model, form))
    assert sorted(os.listdir(out)) == sorted([*SHARDS, INDEX])


@pytest.mark.parametrize("form", FORMS)
def test_a_destination_has_the_same_shards(
    served: Served, folder: Path, model: dict[str, Tensor], out: Path, form: Form
) -> None:
    place = (out / INDEX).as_uri()
    for source in sources(served, folder)[2:]:
        served.client.prune(source, HALF, form, destination=place)
        assert_same_tensors(read_shards(out), expected(served.client, model, form))
        assert sorted(os.listdir(out)) == sorted([*SHARDS, INDEX])


@pytest.mark.parametrize("form", FORMS)
def test_a_pruned_checkpoint_is_downloaded_as_shards(
    served: Served, folder: Path, model: dict[str, Tensor], out: Path, form: Form
) -> None:
    kept = served.client.prune(folder, HALF, keep=True).checkpoint
    assert kept is not None
    served.client.download(kept, out, form)
    assert_same_tensors(read_shards(out), expected(served.client, model, form))
    received = served.client.prune(kept, secateur.identity(NAMES), form)
    received.save(out, form)
    assert_same_tensors(read_shards(out), expected(served.client, model, form))


def test_an_unpruned_checkpoint_is_downloaded_as_it_was_uploaded(
    served: Served, folder: Path, out: Path
) -> None:
    served.client.download(served.client.upload(folder), out)
    for name in (*SHARDS, INDEX):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_finalize_takes_pairs_in_shards(
    served: Served, folder: Path, model: dict[str, Tensor], out: Path
) -> None:
    """The tied tensor is a pair then, and keeps its other name."""
    served.client.prune(folder, HALF).save(out, "reparametrized")
    want = expected(served.client, model, "dense")
    final = out / "final"
    final.mkdir()
    for source in sources(served, out):
        result = served.client.finalize(source)
        assert_same_tensors(result.state_dict(), with_ties(want))
        result.save(final)
        assert_same_tensors(read_shards(final), want)
    served.client.finalize((out / INDEX).as_uri(), destination=(final / INDEX).as_uri())
    assert_same_tensors(read_shards(final), want)


def test_shards_are_pruned_again_and_in_place(
    served: Served, folder: Path, model: dict[str, Tensor], out: Path
) -> None:
    half_again = HALF + HALF
    served.client.prune(folder, HALF).save(out, "reparametrized")
    served.client.prune(out, HALF).save(out, "reparametrized")
    want = served.client.prune(model, half_again).state_dict("reparametrized")
    assert_same_tensors(read_shards(out), want)
    place = (out / INDEX).as_uri()
    served.client.prune(place, HALF, "dense", destination=place)
    want = served.client.prune(model, half_again + HALF).state_dict()
    assert_same_tensors(read_shards(out), want)


def test_an_index_of_another_name_keeps_it(
    served: Served, root: Path, model: dict[str, Tensor], out: Path
) -> None:
    name = "diffusion_pytorch_model.safetensors.index.json"
    folder = write_shards(root / "named", model, name).parent
    served.client.prune(folder, HALF).save(out)
    assert_same_tensors(read_shards(out, name), expected(served.client, model, "dense"))
    assert not (out / INDEX).exists()


def test_shards_to_one_file_and_one_file_to_shards_are_refused(
    served: Served, folder: Path, out: Path, root: Path
) -> None:
    single = root / "single.safetensors"
    save_file({"w": torch.arange(12.0)}, single)
    shards, invalid = (folder / INDEX).as_uri(), ("INVALID_ARGUMENT", "INVALID_REQUEST")
    for source, place in ((shards, "one.safetensors"), (single.as_uri(), INDEX)):
        check(served.write(source, (out / place).as_uri()), *invalid, "destination_uri", place)
    with pytest.raises(secateur.SecateurError, match="shards"):
        served.client.prune(single, secateur.l1_unstructured("*", 0.5)).save(out)
    assert not os.listdir(out)
