"""Folders of Hugging Face: the weights are pruned in the files they came in, the rest is copied."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import prune

import secateur
from tests.client.sharded import INDEX, metadata_of
from tests.client.test_cli import failure, run
from tests.client.test_sources import without_permission

pytestmark = pytest.mark.usefixtures("at_server")

TENSORS = {
    "encoder.weight": torch.arange(24.0).reshape(4, 6) - 12,
    "encoder.bias": torch.ones(4),
    "head.weight": torch.arange(12.0).reshape(3, 4) + 0.5,
}
WEIGHTS = ["encoder.weight", "head.weight"]
HALF = ("--method", "global_unstructured", "--amount", "0.5")
BIN_INDEX = "pytorch_model.bin.index.json"

# The files beside the weights: each is copied unchanged.
REST = {
    "config.json": '{"model_type": "tiny"}',
    "tokenizer.json": "{}",
    ".gitattributes": "*.safetensors filter=lfs",
    "1_Pooling/config.json": '{"word_embedding_dimension": 4}',
    "2_Dense/model.safetensors": "the weights of another part",
    "runs/first/events.out": "x",
}


def expected() -> dict[str, Tensor]:
    """TENSORS as torch.nn.utils.prune prunes half of all weights."""
    module = torch.nn.ParameterDict({n.replace(".", "_"): t.clone() for n, t in TENSORS.items()})
    pairs = [(module, name.replace(".", "_")) for name in WEIGHTS]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.5)
    return {name: getattr(module, name.replace(".", "_")).detach() for name in TENSORS}


def write_single(path: Path, name: str = "model.safetensors") -> None:
    save_file(TENSORS, path / name, metadata={"format": "pt"})


def write_bin(path: Path) -> None:
    torch.save(TENSORS, path / "pytorch_model.bin")


def parts(suffix: str) -> dict[str, dict[str, Tensor]]:
    files = [f"model-{i}-of-2.{suffix}" for i in (1, 2)]
    first = {name: t for name, t in TENSORS.items() if name.startswith("encoder")}
    return {files[0]: first, files[1]: {"head.weight": TENSORS["head.weight"]}}


def write_index(path: Path, index: str, suffix: str) -> None:
    weight_map = {name: file for file, part in parts(suffix).items() for name in part}
    size = sum(tensor.nbytes for tensor in TENSORS.values())
    table = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / index).write_text(json.dumps(table))


def write_shards(path: Path) -> None:
    for file, part in parts("safetensors").items():
        save_file(part, path / file, metadata={"format": "pt"})
    write_index(path, INDEX, "safetensors")


def write_bin_shards(path: Path) -> None:
    for file, part in parts("bin").items():
        torch.save(part, path / file)
    write_index(path, BIN_INDEX, "bin")


KINDS: dict[str, Callable[[Path], None]] = {
    "single": write_single,
    "shards": write_shards,
    "bin": write_bin,
    "bin shards": write_bin_shards,
    "another name": lambda path: write_single(path, "diffusion_pytorch_model.safetensors"),
}


def make(path: Path, kind: str) -> Path:
    path.mkdir()
    KINDS[kind](path)
    for name, text in REST.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def names_in(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The weights of a folder, by the libraries' own loaders."""
    tensors: dict[str, Tensor] = {}
    for file in path.iterdir():
        if file.suffix == ".safetensors":
            assert metadata_of(file) == {"format": "pt"}
            tensors |= load_file(file)
        elif file.suffix == ".bin":
            tensors |= torch.load(file, weights_only=True)
        elif file.name.endswith(".index.json"):
            weight_map = json.loads(file.read_text())["weight_map"]
            of_parts = parts(file.name.split(".")[1])
            assert weight_map == {name: shard for shard, part in of_parts.items() for name in part}
    return tensors


def assert_pruned(out: Path, source: Path) -> None:
    """Whether `out` is `source` with half of its weights 0, and nothing else changed."""
    assert names_in(out) == names_in(source)
    for name, text in REST.items():
        assert (out / name).read_text() == text
    found, want = tensors_in(out), expected()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_pruned_into_a_new_one(tmp_path: Path, kind: str) -> None:
    source, out = make(tmp_path / "in", kind), tmp_path / "out-0.5"
    assert run("prune", source, "-o", out, *HALF) == 0
    assert_pruned(out, source)
    assert sorted(os.listdir(tmp_path)) == ["in", "out-0.5"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_takes_a_folder(client: secateur.Client, tmp_path: Path, kind: str) -> None:
    source, pairs, final = make(tmp_path / "in", kind), tmp_path / "pairs", tmp_path / "final"
    half = secateur.global_unstructured(WEIGHTS, 0.5)
    result = client.prune(source, half, keep=True)
    result.save(pairs, "reparametrized")
    client.finalize(pairs).save(final)
    want = expected()
    assert all(torch.equal(tensor, want[name]) for name, tensor in tensors_in(final).items())
    assert names_in(final) == names_in(source)
    assert client.report(client.upload(source)).total == client.report(source).total == 40
    assert client.plan(source, half).amounts[0].pruned == 18
    assert client.sensitivity(source).norm_removed.keys() == set(WEIGHTS)


def test_a_folder_is_reported_planned_and_put_by_commands(tmp_path: Path) -> None:
    source = make(tmp_path / "in", "single")
    for command in (["report"], ["plan"], ["sensitivity"], ["checkpoints", "put"]):
        assert run(*command, source) == 0


def test_the_weights_that_transformers_prefers_are_read_and_others_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make(tmp_path / "in", "single"), tmp_path / "out"
    others = ["flax_model.msgpack", "model.gguf", "pytorch_model.bin", "tf_model.h5"]
    others += [INDEX, "model-1-of-2.safetensors", "onnx/model.onnx"]
    (source / "onnx").mkdir()
    for name in others:
        (source / name).write_text("not to be read")
    (source / ".git").mkdir()
    (source / ".git/HEAD").write_text("of the unpruned model")
    assert run("prune", source, "-o", out, *HALF) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"secateur: warning: {out}: without ")
    assert not [name for name in others if name not in said]
    for name in [*others, ".git/HEAD"]:
        (source / name).unlink()
    assert_pruned(out, source)


@pytest.mark.parametrize(
    "names", [["a.safetensors", "b.safetensors"], [INDEX, f"other.{INDEX}"], []]
)
def test_a_folder_that_holds_no_single_model_is_refused(
    client: secateur.Client, tmp_path: Path, names: list[str]
) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    said = ", ".join(names) if names else "holds no model"
    with pytest.raises(secateur.InvalidStateDict) as error:
        client.report(tmp_path)
    assert f"{tmp_path}: " in str(error.value)
    assert said in str(error.value)


def test_a_folder_that_exists_is_filled_and_loses_nothing(tmp_path: Path) -> None:
    source, out = make(tmp_path / "in", "shards"), tmp_path / "out"
    out.mkdir()
    assert run("prune", source, "-o", out, *HALF) == 0
    assert_pruned(out, source)
    (out / "config.json").write_text("changed by its user")
    (out / "notes.txt").write_text("written by its user")
    (out / "tokenizer.json").unlink()
    shard = out / "model-1-of-2.safetensors"
    shard.write_bytes(b"old")
    shard.chmod(0o640)
    assert run("prune", source, "-o", out, *HALF) == 0
    assert shard.stat().st_mode & 0o777 == 0o640
    assert (out / "config.json").read_text() == "changed by its user"
    (out / "config.json").write_text(REST["config.json"])
    (out / "notes.txt").unlink()
    assert_pruned(out, source)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_pruned_in_place_and_into_itself(tmp_path: Path, kind: str) -> None:
    source = make(tmp_path / "in", kind)
    before = names_in(source)
    assert run("prune", source, "-o", source / "out", *HALF) == 0
    assert names_in(source / "out") == before
    assert run("prune", source, "-o", source, *HALF) == 0
    assert names_in(source) == before | {f"out/{name}" for name in before}
    found, want = tensors_in(source), expected()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_a_new_folder_has_the_mode_that_the_umask_allows(tmp_path: Path) -> None:
    source, out = make(tmp_path / "in", "single"), tmp_path / "out"
    before = os.umask(0o027)
    try:
        assert run("finalize", source, "-o", out) == 0
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (out, *out.rglob("*"))}
    assert modes == {path: 0o750 if path.is_dir() else 0o640 for path in modes}


def test_other_weights_in_out_are_refused_before_anything_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], client: secateur.Client
) -> None:
    source, out = make(tmp_path / "in", "shards"), tmp_path / "out"
    out.mkdir()
    write_single(out)
    away = ("--server", "127.0.0.1:1")
    said = failure(capsys, "prune", source, "-o", out, *HALF, *away)
    assert f"{out}: holds other weights, model.safetensors" in said
    result = client.prune(source, secateur.global_unstructured(WEIGHTS, 0.5))
    with pytest.raises(secateur.SecateurError, match="other weights"):
        result.save(out)
    assert names_in(out) == {"model.safetensors"}


def test_a_subfolder_that_may_not_be_read_is_not_left_out_silently(
    client: secateur.Client,
) -> None:
    with tempfile.TemporaryDirectory() as name:  # which any user may enter and write to
        place = Path(name)
        place.chmod(0o777)
        source = make(place / "in", "single")
        closed = source / "runs"
        result = client.prune(source, secateur.global_unstructured(WEIGHTS, 0.5))
        said = f"{closed}: Permission denied"
        with without_permission(closed), pytest.raises(secateur.SecateurError, match=said):
            result.save(place / "out")
        assert not (place / "out").exists()


def test_a_folder_that_cannot_be_written_whole_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make(tmp_path / "in", "single"), tmp_path / "out"
    (source / "unreadable").symlink_to("/proc/self/mem")  # for every user
    said = failure(capsys, "prune", source, "-o", out, *HALF)
    assert f"{out}: cannot write it: " in said
    out.mkdir()
    failure(capsys, "prune", source, "-o", out, *HALF)
    assert not os.listdir(out)


def test_wrong_paths_for_a_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, file = make(tmp_path / "in", "single"), tmp_path / "file"
    file.write_text("its user's")
    away = ("--server", "127.0.0.1:1")
    assert "unknown suffix" in failure(capsys, "prune", source, "-o", file, *HALF, *away)
    assert file.read_text() == "its user's"
    new = tmp_path / "new"
    assert "no such folder" in failure(capsys, "prune", source, "-o", new / "out", *HALF, *away)
    masks = ("--output", "masks")
    assert "unknown suffix" in failure(capsys, "prune", source, "-o", new, *HALF, *masks, *away)
    single = source / "model.safetensors"
    assert "unknown suffix" in failure(capsys, "prune", single, "-o", new, *HALF, *away)
    said = failure(capsys, "prune", single, "-o", new, *HALF, *away)
    assert "is made only for a model, not masks, read from a folder or an index" in said


def test_a_key_chooses_in_the_torch_file_of_a_folder(tmp_path: Path) -> None:
    source, out = make(tmp_path / "in", "bin"), tmp_path / "out"
    torch.save({"model": {}, "ema": TENSORS, "step": 5}, source / "pytorch_model.bin")
    assert run("prune", source, "-o", out, "--key", "ema", *HALF) == 0
    found = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert (found["model"], found["step"]) == ({}, 5)
    assert all(torch.equal(found["ema"][name], tensor) for name, tensor in expected().items())


def test_links_to_files_are_copied_and_links_to_folders_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache of Hugging Face has links in place of files."""
    blobs = make(tmp_path / "blobs", "single")
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("model.safetensors", "config.json", "1_Pooling"):
        (source / name).symlink_to(blobs / name)
    assert run("finalize", source, "-o", out) == 0
    said = f"{out}: without 1_Pooling (links to folders, or to nothing)"
    assert said in capsys.readouterr().err
    assert names_in(out) == {"model.safetensors", "config.json"}
    assert not any(path.is_symlink() for path in out.iterdir())
