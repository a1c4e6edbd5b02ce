"""file:// URIs: allowed folders only, and the same bits as with the data itself."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from safetensors.torch import load_file, save

import secateur
from secateur_server.errors import UriFailed
from secateur_server.uris.local import LocalFile
from tests.contract.raw import check_serves, spec
from tests.reference import assert_same_tensors
from tests.uris.served import (
    FORMS,
    HALF,
    MODEL,
    Served,
    check,
    check_refused,
    saved,
    serving_here,
    weights,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "root"
    folder.mkdir()
    saved(folder / "model.safetensors", MODEL)
    saved(folder.parent / "outside.safetensors", MODEL)
    (folder / "sub").mkdir()
    return folder


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    with serving_here("--allow-path", str(root)) as running:
        yield running


@pytest.fixture(autouse=True)
def _the_server_goes_on(served: Served, root: Path) -> Iterator[None]:
    yield
    check_serves(served.server, served.channel)
    assert not list(root.rglob("*.unfinished"))


@pytest.fixture
def source(root: Path) -> str:
    return (root / "model.safetensors").as_uri()


# The same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("output", FORMS)
def test_result_of_a_source_equals_that_of_its_data(
    served: Served, root: Path, source: str, output: Any
) -> None:
    data = root / "model.safetensors"
    of_uri, of_data = (served.client.prune(s, HALF, output) for s in (source, data))
    assert of_uri.report == replace(of_data.report, input_blake3="")
    if output == "masks":
        assert_same_tensors(of_uri.masks, of_data.masks)
    else:
        assert_same_tensors(of_uri.state_dict(output), of_data.state_dict(output))
    of_data_alone = replace(served.client.report(data), input_blake3="")
    assert served.client.report(source) == of_data_alone


def test_zeros_of_a_source_count_as_pruned(served: Served, root: Path) -> None:
    dense = saved(root / "dense.safetensors", served.client.prune(MODEL, HALF).state_dict())
    of_uri, of_data = (served.client.prune(s, HALF, prior="zeros") for s in (dense.as_uri(), dense))
    assert_same_tensors(of_uri.masks, of_data.masks)
    assert of_uri.report.sparsity == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("output", FORMS)
def test_destination_has_the_bytes_that_would_be_sent(
    served: Served, source: str, root: Path, tmp_path: Path, output: Any
) -> None:
    written, sent = root / f"{output}.safetensors", tmp_path / "sent.safetensors"
    result = served.client.prune(source, HALF, output, destination=written.as_uri())
    served.client.prune(source, HALF, output).save(sent, output)
    assert_same_tensors(load_file(written), load_file(sent))
    assert result.report == served.client.prune(source, HALF, output).report
    assert os.stat(written).st_mode & 0o777 == 0o666 & ~_umask()


def test_data_and_checkpoints_are_written_to_a_destination_too(served: Served, root: Path) -> None:
    written = root / "of data.safetensors"
    assert "%20" in written.as_uri()
    expected = served.client.prune(MODEL, HALF, "dense").state_dict()
    for model in (MODEL, served.client.upload(MODEL)):
        served.client.prune(model, HALF, "dense", destination=written.as_uri())
        assert_same_tensors(load_file(written), expected)
        written.unlink()


def test_finalize_reads_and_writes(served: Served, source: str, root: Path) -> None:
    pairs, final = root / "pairs.safetensors", root / "final.safetensors"
    served.client.prune(source, HALF, "reparametrized", destination=pairs.as_uri())
    expected = served.client.finalize(served.client.prune(MODEL, HALF).state_dict("reparametrized"))
    assert_same_tensors(served.client.finalize(pairs.as_uri()).state_dict(), expected.state_dict())
    served.client.finalize(pairs.as_uri(), destination=final.as_uri())
    assert_same_tensors(load_file(final), expected.state_dict())


def test_upload_and_keep_create_checkpoints_of_a_source(served: Served, source: str) -> None:
    uploaded = served.client.upload(source)
    assert [file.filename for file in uploaded.files] == ["model.safetensors"]
    kept = served.client.prune(source, HALF, keep=True).checkpoint
    assert kept is not None
    assert kept.files == uploaded.files
    of_kept = served.client.report(kept)
    assert of_kept.sparsity == pytest.approx(0.5, abs=1e-3)
    assert of_kept.zeros == served.client.prune(MODEL, HALF).report.zeros


def test_a_source_can_be_its_own_destination(served: Served, root: Path) -> None:
    model = saved(root / "own.safetensors", MODEL)
    served.client.prune(model.as_uri(), HALF, "dense", destination=model.as_uri())
    assert_same_tensors(load_file(model), served.client.prune(MODEL, HALF).state_dict())


def test_scores_are_sent_beside_a_source(served: Served, source: str) -> None:
    scores = {"w0": torch.rand(64, 32)}
    ranked = secateur.l1_unstructured("w0", 0.3, importance_scores=scores)
    masks = served.client.prune(source, ranked).masks
    assert_same_tensors(masks, served.client.prune(MODEL, ranked).masks)


def test_links_inside_the_root_work(served: Served, root: Path, source: str) -> None:
    (root / "link.safetensors").symlink_to("model.safetensors")
    (root / "folder").symlink_to(root / "sub")
    written = f"{root.as_uri()}/folder/out.safetensors"
    served.client.prune(f"{root.as_uri()}/link.safetensors", HALF, "dense", destination=written)
    expected = served.client.prune(MODEL, HALF).state_dict()
    assert_same_tensors(load_file(root / "sub" / "out.safetensors"), expected)


# Refused -------------------------------------------------------------------------------------


def places_outside(root: Path) -> list[str]:
    """URIs of a file that is there, and not under the root."""
    (root / "out").symlink_to(root.parent)
    (root / "out.safetensors").symlink_to(root.parent / "outside.safetensors")
    inside, name = root.as_uri(), "outside.safetensors"
    return [
        f"{root.parent.as_uri()}/{name}",
        f"{inside}/../{name}",
        f"{inside}/%2e%2e/{name}",
        f"{inside}/%2E%2E%2F{name}",
        f"{inside}/sub/../../{name}",
        f"{inside}/out/{name}",
        f"{inside}-beside/{name}",
        f"{inside}/model.safetensors".replace("file://", "file://elsewhere"),
        f"{inside}/model.safetensors?x",
        f"{inside}/model.safetensors#x",
        f"{inside}/model.safetensors%00",
        f"{inside}/sub%2f../model.safetensors",
        f"{inside}/model.safetensors".replace("file:///", "file://[/"),
        f"{inside}/model.safetensors".replace("file:///", "file:/"),
        f"{inside}/model.safetensors".replace("file://", "FILE://"),
        f"{inside}/model.safetensors".replace("file://", "local://"),
        f"{inside}/model.safetensors".replace("file://", "simplecache::file://"),
        "file://model.safetensors",
        "file://",
        "",
    ]


def test_uris_that_are_not_allowed_are_neither_read_nor_written(
    served: Served, root: Path, source: str
) -> None:
    before = (root.parent / "outside.safetensors").read_bytes()
    for uri in places_outside(root):
        for rpc in ("Prune", "Report", "Plan", "Finalize"):
            check_refused(served.read(uri, rpc))
        if uri:
            check_refused(served.write(source, uri))
    check_refused(served.read((root / "out.safetensors").as_uri()))
    assert (root.parent / "outside.safetensors").read_bytes() == before
    assert sorted(p.name for p in root.parent.iterdir()) == ["outside.safetensors", root.name]


def test_error_does_not_tell_whether_an_outside_path_exists(served: Served, root: Path) -> None:
    (root / "up").symlink_to(root.parent)
    for name in ("up/there is none", "up/there/is/none", "up/outside.safetensors"):
        check_refused(served.read(f"{root.as_uri()}/{quote(name)}"))


def test_a_destination_that_links_outside_is_replaced_itself(
    served: Served, root: Path, source: str
) -> None:
    (root / "ends-outside").symlink_to(root.parent / "outside.safetensors")
    before = (root.parent / "outside.safetensors").read_bytes()
    assert served.write(source, (root / "ends-outside").as_uri()) is None
    assert (root.parent / "outside.safetensors").read_bytes() == before
    assert not (root / "ends-outside").is_symlink()


def test_server_without_allow_path_opens_no_file(client: secateur.Client, source: str) -> None:
    with pytest.raises(secateur.PermissionDenied, match="--allow-path"):
        client.report(source)
    with pytest.raises(secateur.PermissionDenied, match="--allow-path"):
        client.prune(MODEL, HALF, destination=source)


# What is no model ----------------------------------------------------------------------------


def test_non_regular_file_is_an_error_at_once(
    served: Served, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(root)  # the path of a socket is short
        listening.bind("socket")
        for name in ("pipe", "sub", "loop", "socket", "model.safetensors/x", "n" * 300):
            check(served.read(f"{root.as_uri()}/{name}"), "FAILED_PRECONDITION", "URI_FAILED")


def test_missing_file_is_not_found(served: Served, root: Path, source: str) -> None:
    missing = f"{root.as_uri()}/none.safetensors"
    check(served.read(missing), "NOT_FOUND", "URI_NOT_FOUND", missing)
    in_missing = f"{root.as_uri()}/none/out.safetensors"
    check(served.write(source, in_missing), "NOT_FOUND", "URI_NOT_FOUND", in_missing)
    with pytest.raises(secateur.UriError, match=r"none\.safetensors"):
        served.client.report(missing)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\0" * 9, b"no model" * 9, b"\xff" * 99, b"\2" + b"\0" * 9, b"GGUF\3" + bytes(99)),
        b"version https://git-lfs.github.com/spec/v1",
        pytest.param(save(MODEL)[:99], id="truncated"),
    ],
)
def test_files_that_are_not_models_are_invalid(served: Served, root: Path, data: bytes) -> None:
    (root / "broken.safetensors").write_bytes(data)
    found = served.read((root / "broken.safetensors").as_uri())
    said = "'broken.safetensors': is not a safetensors file"
    check(found, "INVALID_ARGUMENT", "INVALID_STATE_DICT", said)
    with pytest.raises(secateur.InvalidStateDict, match=r"broken\.safetensors"):
        served.client.upload((root / "broken.safetensors").as_uri())


@pytest.mark.parametrize("is_zip", [True, False])
def test_error_of_a_torch_file_names_the_client(served: Served, root: Path, is_zip: bool) -> None:
    file = root / "net.pt"
    torch.save(MODEL, file, _use_new_zipfile_serialization=is_zip)
    said = r"'net\.pt': is not a safetensors file: .* torch\.save; .* local path of a torch file"
    for call in (served.client.report, served.client.upload):
        with pytest.raises(secateur.InvalidStateDict, match=said):
            call(file.as_uri())
    assert served.client.report(file).total == sum(map(torch.numel, MODEL.values()))


def test_long_index_takes_no_memory(served: Served, root: Path) -> None:
    with (root / "model.safetensors.index.json").open("wb") as index:
        index.truncate(1 << 40)
    found = served.read((root / "model.safetensors.index.json").as_uri())
    check(found, "INVALID_ARGUMENT", "INVALID_STATE_DICT", "is larger than the limit")
    (root / "model.safetensors.index.json").unlink()


def test_unreadable_file_fails(root: Path, source: str) -> None:
    (root / "closed.safetensors").touch(mode=0)
    with _nobody(root), pytest.raises(UriFailed, match="Permission denied"):
        LocalFile("uri", (root / "closed.safetensors").as_uri(), [root])


# Whole or not at all -------------------------------------------------------------------------


def test_failed_write_leaves_the_old_file(served: Served, root: Path, source: str) -> None:
    target = root / "kept"
    target.write_bytes(b"before")
    invalid = "INVALID_ARGUMENT"
    check(served.write(source, target.as_uri(), spec=spec("none")), invalid, "INVALID_SPEC")
    check(served.write(source, target.as_uri(), output=99), invalid, "INVALID_REQUEST")
    check(served.write(source, f"{target.as_uri()}.index.json"), invalid, "INVALID_REQUEST")
    assert target.read_bytes() == b"before"
    assert not (root / "kept.index.json").exists()


def test_failed_write_keeps_no_checkpoint(served: Served, root: Path, source: str) -> None:
    """The caller would not learn its name."""
    before = list(served.client.checkpoints())
    for place in ("none/out.safetensors", "sub", "out.index.json"):
        assert served.write(source, f"{root.as_uri()}/{place}", keep=True) is not None
    assert list(served.client.checkpoints()) == before
    assert served.write(source, f"{root.as_uri()}/out.safetensors", keep=True) is None
    (kept,) = set(served.client.checkpoints()) - set(before)
    served.client.delete(kept)


def test_folder_is_refused_as_a_destination(served: Served, root: Path, source: str) -> None:
    found = served.write(source, (root / "sub").as_uri())
    check(found, "FAILED_PRECONDITION", "URI_FAILED", "is a folder")


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk_leaves_the_old_file(served: Served, root: Path) -> None:
    large = saved(root / "large.safetensors", weights((3 << 20,)))
    with _small_disk(root / "disk") as disk:
        (disk / "out.safetensors").write_bytes(b"before")
        found = served.write(large.as_uri(), (disk / "out.safetensors").as_uri())
        check(found, "FAILED_PRECONDITION", "URI_FAILED", "No space left")
        assert (disk / "out.safetensors").read_bytes() == b"before"
        assert os.listdir(disk) == ["out.safetensors"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _nobody(root: Path) -> Iterator[None]:
    """As a user who may read nothing but what all may; elsewhere than as root we are one."""
    if os.getuid() == 0:
        for folder in (root, *root.parents):
            with suppress(PermissionError):
                folder.chmod(folder.stat().st_mode | 0o111)
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
