"""Masks in files: what was written is read back, and prunes the same."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import secateur
from secateur import cli
from tests.conftest import RunningServer

RNG = np.random.default_rng(5)
MODEL: dict[str, npt.NDArray[Any]] = {
    "conv": RNG.standard_normal((3, 2, 3, 3)).astype(np.float32),  # 54 elements: not whole bytes
    "fc": RNG.standard_normal((5, 8)).astype(np.float32),
    "scalar": np.array(2.0, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}
NAMES = list(MODEL)
SPEC = secateur.l1_unstructured(["conv", "fc"], 0.5) + secateur.identity(["scalar", "empty"])


def assert_same_masks(ours: secateur.PruneResult, theirs: secateur.PruneResult) -> None:
    assert ours.masks.keys() == theirs.masks.keys()
    for name, mask in ours.masks.items():
        assert mask.shape == MODEL[name].shape
        assert (np.asarray(mask) == np.asarray(theirs.masks[name])).all()


@pytest.mark.parametrize("as_what", [str, Path])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("output", ["masks", "reparametrized"])
def test_saved_masks_prune_the_same(
    client: secateur.Client,
    tmp_path: Path,
    suffix: str,
    output: Any,
    as_what: Callable[[Path], Any],
) -> None:
    result = client.prune(MODEL, SPEC, output)
    path = tmp_path / f"masks{suffix}"
    result.save(path, "masks")
    again = client.prune(MODEL, secateur.custom_from_mask(as_what(path)))
    assert_same_masks(again, result)


def test_a_file_of_safetensors_has_the_bits_of_the_wire_and_the_shapes(
    client: secateur.Client, tmp_path: Path
) -> None:
    result = client.prune(MODEL, SPEC)
    result.save(tmp_path / "masks.safetensors", "masks")
    bits = load_file(tmp_path / "masks.safetensors")
    for name, mask in result.masks.items():
        assert bits[name].dtype == np.uint8
        assert (bits[name] == np.packbits(mask, bitorder="little")).all()
    with safe_open(tmp_path / "masks.safetensors", "numpy") as file:
        shapes = json.loads(file.metadata()["secateur.mask_shapes"])
    assert shapes == {name: list(np.shape(array)) for name, array in MODEL.items()}


def test_a_torch_file_of_masks_has_bools(client: secateur.Client, tmp_path: Path) -> None:
    result = client.prune(MODEL, SPEC)
    result.save(tmp_path / "masks.pt", "masks")
    found = torch.load(tmp_path / "masks.pt", weights_only=True)
    for name, mask in result.masks.items():
        assert torch.equal(found[name], torch.from_numpy(np.asarray(mask)))


def test_the_command_writes_masks_that_are_read_back(
    client: secateur.Client,
    server: RunningServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    save_file({name: MODEL[name] for name in ("conv", "fc")}, tmp_path / "in.safetensors")
    out = tmp_path / "masks.safetensors"
    half = ["--method", "l1_unstructured", "--amount", "0.5", "--output", "masks"]
    assert cli.main(["prune", str(tmp_path / "in.safetensors"), "-o", str(out), *half]) == 0
    assert_same_masks(
        client.prune(MODEL, secateur.custom_from_mask(out)),
        client.prune(MODEL, secateur.l1_unstructured(["conv", "fc"], 0.5)),
    )


def test_a_spec_file_names_a_file_of_masks(client: secateur.Client, tmp_path: Path) -> None:
    result = client.prune(MODEL, SPEC)
    path = tmp_path / "masks.safetensors"
    result.save(path, "masks")
    rule = {"method": "custom_from_mask", "masks": str(path)}
    again = client.prune(MODEL, secateur.Spec.from_dict({"rules": [rule]}))
    assert_same_masks(again, result)
    with pytest.raises(secateur.InvalidSpec, match=r"^rules\[0\]\.masks: none\.npz: "):
        secateur.Spec.from_dict({"rules": [{**rule, "masks": "none.npz"}]})


def test_a_file_of_masks_is_not_a_model(
    client: secateur.Client,
    server: RunningServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    result = client.prune(MODEL, SPEC)
    result.save(tmp_path / "m.safetensors", "masks")
    result.save(tmp_path / "m.pt", "masks")
    for arguments in (["report"], ["finalize", "-o", str(tmp_path / "out.safetensors")]):
        assert cli.main([*arguments, str(tmp_path / "m.safetensors")]) == 1
        assert "this file holds masks, not a model" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "m.pt")]) == 0
    assert "m.pt has no floating-point tensors" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float32])
def test_masks_of_the_tensors_shapes_are_read_from_every_kind_of_file(
    client: secateur.Client, tmp_path: Path, dtype: type
) -> None:
    masks = {name: (np.abs(MODEL[name]) > 0.7).astype(dtype) for name in ("conv", "fc")}
    expected = client.prune(MODEL, secateur.custom_from_mask(masks))
    save_file(masks, tmp_path / "m.safetensors")
    torch.save({name: torch.from_numpy(mask) for name, mask in masks.items()}, tmp_path / "m.pt")
    np.savez(tmp_path / "m.npz", **masks)
    np.savez_compressed(tmp_path / "packed.npz", **masks)
    for name in ("m.safetensors", "m.pt", "m.npz", "packed.npz"):
        found = client.prune(MODEL, secateur.custom_from_mask(tmp_path / name))
        assert_same_masks(found, expected)


def test_one_mask_for_two_tensors_is_read_under_both_names(
    client: secateur.Client, tmp_path: Path
) -> None:
    """In a torch file they share memory, and the tensors do not."""
    model = {"a": MODEL["fc"], "b": MODEL["fc"] * 2}
    mask = torch.from_numpy(MODEL["fc"] > 0)
    torch.save({"a": mask, "b": mask}, tmp_path / "masks.pt")
    found = client.prune(model, secateur.custom_from_mask(tmp_path / "masks.pt")).masks
    assert (found["a"] == mask.numpy()).all()
    assert (found["b"] == mask.numpy()).all()


def test_masks_of_tied_weights_are_read_back(client: secateur.Client, tmp_path: Path) -> None:
    model = {"embed": MODEL["fc"], "head": MODEL["fc"]}
    result = client.prune(model, secateur.l1_unstructured("head", 0.5))
    result.save(tmp_path / "masks.safetensors", "masks")
    again = client.prune(model, secateur.custom_from_mask(tmp_path / "masks.safetensors"))
    assert again.report.zeros == result.report.zeros == 20
    assert (again.masks["head"] == result.masks["head"]).all()


def text(path: Path) -> None:
    path.write_text("no masks")


def nothing(path: Path) -> None:
    """No file is written."""


def folder(path: Path) -> None:
    path.mkdir()


def empty(path: Path) -> None:
    save_file({}, path)


def shapes_of(table: str, **tensors: Any) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path, metadata={"secateur.mask_shapes": table})


BITS = np.zeros(5, np.uint8)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        *((f"m{suffix}", text) for suffix in (".safetensors", ".pt", ".npz", ".txt", "")),
        *((f"m{suffix}", nothing) for suffix in (".safetensors", ".pt", ".npz", "")),
        *((f"m{suffix}", folder) for suffix in (".safetensors", ".pt", ".npz", "")),
        ("m.safetensors", empty),
        ("m.safetensors", shapes_of("{", fc=BITS)),
        ("m.safetensors", shapes_of("[]", fc=BITS)),
        ("m.safetensors", shapes_of("{}", fc=BITS)),
        ("m.safetensors", shapes_of('{"fc": 40}', fc=BITS)),
        ("m.safetensors", shapes_of('{"fc": ["a"]}', fc=BITS)),
        ("m.safetensors", shapes_of('{"fc": [5, 9]}', fc=BITS)),
        ("m.safetensors", shapes_of('{"fc": [-5, -8]}', fc=BITS)),
        ("m.safetensors", shapes_of('{"fc": [5.0, 8]}', fc=BITS)),
        ("m.safetensors", shapes_of('{"fc": [5, 8]}', fc=BITS.astype(np.int8))),
        ("m.npz", lambda path: np.savez(path, fc=np.array([None]))),
    ],
)
def test_a_file_without_masks_is_an_invalid_spec_that_names_it(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(secateur.InvalidSpec) as raised:
        secateur.custom_from_mask(path)
    assert str(raised.value).startswith(f"masks: {path}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (text, "is text; give"),
        (lambda path: path.write_bytes(b""), "is empty; "),
        (lambda path: path.write_bytes(b"PK\3\4 and no more"), "numpy cannot read it: "),
        (lambda path: save_file(MODEL, path), "rename it to .safetensors"),
    ],
)
def test_a_wrong_file_of_numpy_says_what_it_is(
    tmp_path: Path, write: Callable[[Path], None], said: str
) -> None:
    write(tmp_path / "m.npz")
    with pytest.raises(secateur.InvalidSpec, match=said):
        secateur.custom_from_mask(tmp_path / "m.npz")


def test_masks_of_other_shapes_are_refused(client: secateur.Client, tmp_path: Path) -> None:
    save_file({"fc": np.ones((8, 5), np.bool_)}, tmp_path / "m.safetensors")
    with pytest.raises(secateur.InvalidSpec, match=r"\[8, 5\].*\[5, 8\]"):
        client.prune(MODEL, secateur.custom_from_mask(tmp_path / "m.safetensors"))
    header = b'{"fc":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    data = struct.pack("<Q", len(header)) + header + b"\1\1"
    (tmp_path / "bits.safetensors").write_bytes(data)
    with pytest.raises(secateur.InvalidSpec, match=r"\[2\].*\[5, 8\]"):
        client.prune(MODEL, secateur.custom_from_mask(tmp_path / "bits.safetensors"))


def test_masks_that_a_server_wrote_are_read_back(tmp_path: Path) -> None:
    downloaded, written = tmp_path / "downloaded.safetensors", tmp_path / "written.safetensors"
    with secateur.embedded() as client:
        result = client.prune(MODEL, SPEC, keep=True)
        assert result.checkpoint is not None
        client.download(result.checkpoint, downloaded, "masks")
        client.prune(client.upload(MODEL), SPEC, destination=written.as_uri())
        for path in (downloaded, written):
            again = client.prune(MODEL, secateur.custom_from_mask(path))
            assert_same_masks(again, result)


@pytest.mark.parametrize("elements", [1, 7, 8, 9, 15, 16])
def test_bits_after_the_last_element_are_refused(client: secateur.Client, elements: int) -> None:
    model = {"w": np.arange(1.0, elements + 1, dtype=np.float32).reshape(1, elements)}
    kept = np.arange(elements) % 3 == 0
    bits = np.packbits(kept, bitorder="little")
    result = client.prune(model, secateur.custom_from_mask({"w": bits}))
    assert (np.asarray(result.masks["w"]) == kept).all()
    if elements % 8:
        bits[-1] |= 1 << elements % 8
        with pytest.raises(secateur.InvalidSpec, match=f"bits after the last of {elements} "):
            client.prune(model, secateur.custom_from_mask({"w": bits}))
    with pytest.raises(secateur.InvalidSpec, match="a mask must have shape"):
        client.prune(model, secateur.custom_from_mask({"w": np.append(bits, bits)}))
