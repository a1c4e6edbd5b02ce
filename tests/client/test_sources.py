"""Sources that are read as a model, and sources that are refused."""

import argparse
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune

import secateur
from tests.contract.raw import entry, file

# A warning of torch.load about pickles that torch.save does not write.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

WEIGHT = torch.arange(1.0, 13).reshape(4, 3)
MODEL = {"fc.weight": WEIGHT, "fc.bias": torch.ones(4), "steps": torch.arange(4)}


def path_of(kind: str, path: Path) -> Path:
    """A file of that kind with a good model in it."""
    path = path / f"model.{kind}"
    if kind == "safetensors":
        safetensors.torch.save_file(MODEL, path)
    else:
        torch.save(MODEL, path)
    return path


class Touch:
    """Pickled, it is a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))]
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_code_in_a_pickle_never_runs(
    client: secateur.Client, tmp_path: Path, write: Callable[[Any, Path], Any], suffix: str
) -> None:
    path, touched = tmp_path / f"model{suffix}", tmp_path / "touched"
    write({"w": Touch(touched)}, path)
    with pytest.raises(secateur.InvalidStateDict, match=re.escape(str(path))):
        client.report(path)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (WEIGHT, "Tensor"),
        ([WEIGHT], "list"),
        (torch.nn.Linear(2, 2), "state_dict"),
        ({"epoch": 3, "w": WEIGHT}, "epoch"),
        ({1: WEIGHT}, "text"),
    ],
)
def test_a_file_of_torch_that_holds_no_state_dict_is_refused(
    client: secateur.Client, tmp_path: Path, value: Any, said: str
) -> None:
    torch.save(value, tmp_path / "model.pt")
    with pytest.raises(secateur.InvalidStateDict, match=said):
        client.report(tmp_path / "model.pt")


BYTES = {}
for zipped in (True, False):
    written = BytesIO()
    torch.save(MODEL, written, _use_new_zipfile_serialization=zipped)
    BYTES[zipped] = written.getvalue()


@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.data(), st.booleans())
def test_a_damaged_torch_file_is_read_or_refused(
    tmp_path: Path, data: st.DataObject, zipped: bool
) -> None:
    content = bytearray(BYTES[zipped])
    for place in data.draw(st.lists(st.integers(0, min(len(content), 1500) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    length = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    (tmp_path / "model.pt").write_bytes(content[:length])
    refused = None
    try:
        secateur.is_pruned(tmp_path / "model.pt")
    except secateur.InvalidStateDict as error:
        refused = str(error)
    assert refused is None or ": " in refused


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pth"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    client: secateur.Client, tmp_path: Path, kind: str, share: float
) -> None:
    path = path_of(kind, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(secateur.InvalidStateDict, match=re.escape(str(path))):
        client.report(path)


ENTRY = entry("F32", [1], 0, 4)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(file({"w": ENTRY}, bytes(5)), id="padded"),
        pytest.param(file({"w": {**ENTRY, "more": 1}}, bytes(4)), id="a key too many"),
        pytest.param(file({"w": {**ENTRY, "dtype": "F31"}}, bytes(4)), id="unknown dtype"),
        pytest.param(
            file(b'{"w":%b,"w":%b}' % ((str(ENTRY).replace("'", '"').encode(),) * 2), bytes(4)),
            id="a name twice",
        ),
    ],
)
def test_a_bad_safetensors_file_is_refused(
    client: secateur.Client, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(secateur.InvalidStateDict, match=re.escape(str(path))):
        client.report(path)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pth.tar", "index.json", "5"])
def test_missing_files_and_folders_are_refused(
    client: secateur.Client, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"model.{kind}"
    with pytest.raises(secateur.InvalidStateDict, match=f"{re.escape(str(path))}: .*No such file"):
        client.report(path)
    path.mkdir()
    with pytest.raises(secateur.InvalidStateDict, match=re.escape(str(path))):
        client.report(str(path))


@pytest.mark.parametrize("name", ["model", "model.h5", "model.safetensors.gz", "model.PT"])
def test_a_file_of_another_kind_is_refused(
    client: secateur.Client, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(safetensors.torch.save(MODEL))
    with pytest.raises(
        secateur.InvalidStateDict, match=r"unknown suffix .*known are \.safetensors, \.pt, .*\.tar"
    ):
        client.report(tmp_path / name)


TORCH_FILE = "is a file of torch.save, not of safetensors; rename it to .pt"
SAFETENSORS_FILE = "is a safetensors file; rename it to .safetensors"
SAFETENSORS = safetensors.torch.save(MODEL)


@pytest.mark.parametrize(
    ("content", "suffix", "said"),
    [
        pytest.param(BYTES[True], ".safetensors", TORCH_FILE, id="torch file"),
        pytest.param(BYTES[False], ".safetensors", TORCH_FILE, id="torch file before 1.6"),
        pytest.param(SAFETENSORS, ".pt", SAFETENSORS_FILE, id="safetensors file"),
        pytest.param(BYTES[True][:-30], ".pt", "is damaged or cut short", id="cut torch file"),
        pytest.param(SAFETENSORS[:-1], ".safetensors", "is damaged or cut short", id="cut"),
        *(
            pytest.param(content, suffix, said, id=f"{said} {suffix}")
            for suffix in (".safetensors", ".pt", ".bin")
            for content, said in {
                b"": "is empty; copy, download or save it again",
                b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
                b"<!DOCTYPE html><html>": "is a web page",
                b"hello world": "is text; give weights",
                bytes(range(200)): "or is damaged; give weights",
            }.items()
        ),
    ],
)
def test_a_file_of_the_wrong_format_says_what_it_is(
    tmp_path: Path, content: bytes, suffix: str, said: str
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(secateur.InvalidStateDict, match=f"{re.escape(str(path))}: .*{said}") as it:
        secateur.is_pruned(path)
    assert "header too" not in str(it.value)


def test_the_first_part_of_a_torch_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(100, 100)}, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(secateur.InvalidStateDict, match=r"model\.pt: is damaged or cut short"):
        secateur.is_pruned(path)


def test_an_object_of_another_class_is_named_with_what_to_do(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(), "w": WEIGHT}, tmp_path / "model.pt")
    said = r"class argparse\.Namespace, .*add_safe_globals\(\[argparse\.Namespace\]\)"
    with pytest.raises(secateur.InvalidStateDict, match=said):
        secateur.is_pruned(tmp_path / "model.pt")


@contextmanager
def without_permission(path: Path) -> Iterator[None]:
    """Nobody may read the path; root is another user meanwhile."""
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(0o700)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "m.safetensors.index.json", "folder"])
def test_files_without_permission_are_refused(name: str) -> None:
    with tempfile.TemporaryDirectory() as place:  # which any user may enter
        Path(place).chmod(0o755)
        path = Path(place) / name
        path.mkdir() if name == "folder" else path.write_bytes(b"")
        said = f"{re.escape(str(path))}: Permission denied"
        with without_permission(path), pytest.raises(secateur.InvalidStateDict, match=said):
            secateur.is_pruned(path)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        pytest.param([WEIGHT], "list", id="list"),
        pytest.param(WEIGHT, "Tensor", id="tensor"),
        pytest.param(None, "NoneType", id="None"),
        pytest.param({1: WEIGHT}, "text", id="a number as a name"),
        pytest.param({"w": [1.0, 2.0]}, "w: list", id="list as a tensor"),
        pytest.param({"w": 1.0}, "w: float", id="number as a tensor"),
        pytest.param({"w": None}, "w: NoneType", id="None as a tensor"),
        pytest.param({"w": np.array(["a"])}, "w: dtype str", id="array of text"),
        pytest.param({"w": np.array([None])}, "w: dtype object", id="array of objects"),
        pytest.param({"w": WEIGHT.to("meta")}, "w: is on the device meta", id="meta"),
        pytest.param(
            {"w": WEIGHT.to("meta", torch.complex128)},
            "w: is on the device meta",
            id="meta of complex128",
        ),
        pytest.param({"\ud800": WEIGHT}, r"\\ud800", id="a name that is not text"),
        pytest.param({"__metadata__": WEIGHT}, "__metadata__", id="a name that is taken"),
    ],
)
def test_wrong_sources_are_refused(client: secateur.Client, source: Any, said: str) -> None:
    with pytest.raises(secateur.InvalidStateDict, match=said):
        client.report(source)


def test_a_module_with_two_hooks_for_one_parameter_is_refused(client: secateur.Client) -> None:
    module = torch.nn.Linear(3, 2)
    prune.identity(module, "weight")  # type: ignore[no-untyped-call]
    second = prune.L1Unstructured(1)
    second._tensor_name = "weight"
    module.register_forward_pre_hook(second)
    spec = secateur.l1_unstructured("weight", 1)
    calls: list[Callable[[], object]] = [
        lambda: client.prune(module, spec),
        lambda: client.report(module),
        lambda: client.finalize(module),
    ]
    for call in calls:
        with pytest.raises(secateur.InvalidStateDict, match="weight: has 2 pruning hooks"):
            call()


def test_lazily_negated_tensors_are_read(client: secateur.Client) -> None:
    """torch keeps the imaginary part of a conjugate as a view with its sign to be turned."""
    negated = torch.tensor([1 + 2j, 3 - 0j]).conj().imag
    assert negated.is_neg()
    assert client.report({"w": negated}).zeros == 1


STATE_DICT = torch.nn.Linear(3, 4).state_dict()


@pytest.mark.parametrize(
    ("state", "keys"),
    [
        pytest.param({"model": STATE_DICT, "epoch": 3}, ["model"], id="a checkpoint"),
        pytest.param({"loss": torch.tensor(0.5), "net": STATE_DICT}, ["net"], id="a metric"),
        pytest.param({"epoch": 3, "run": {"ema": MODEL}}, ["run.ema"], id="nested"),
        pytest.param({"g": STATE_DICT, "d": MODEL}, ["g", "d"], id="several"),
    ],
)
def test_the_error_for_a_mapping_of_mappings_names_the_state_dict(
    tmp_path: Path, state: dict[str, Any], keys: list[str]
) -> None:
    """The advice works: of the part itself, and of the key of the file."""
    optimizer = torch.optim.Adam(torch.nn.Linear(3, 4).parameters())
    state = {**state, "optimizer": optimizer.state_dict()}
    with pytest.raises(secateur.InvalidStateDict, match="is not a tensor or an array") as raised:
        secateur.is_pruned(state)
    advised = re.findall(r"state((?:\['\w+'\])+)", str(raised.value))
    assert [".".join(re.findall(r"\w+", place)) for place in advised] == keys
    assert f"; or the file's path with key={keys[0]!r}" in str(raised.value)
    torch.save(state, tmp_path / "state.pt")
    for key in keys:
        assert not secateur.is_pruned(reduce(dict.__getitem__, key.split("."), state))
        assert not secateur.is_pruned(tmp_path / "state.pt", key)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": WEIGHT, "lr": 0.1}, "lr: float is"),
        ({"a": WEIGHT, "more": MODEL}, "more: dict is"),
        ({"a": WEIGHT.numpy(), "more": {"b": WEIGHT.numpy()}}, "more: dict is"),
        ({"a": [1.0, 2.0]}, "a: list is"),
        ({"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}, "state: dict is"),
    ],
)
def test_the_error_for_a_mapping_of_more_than_tensors_has_advice(
    state: dict[str, Any], said: str
) -> None:
    advice = "not a tensor or an array; pass a mapping of tensors or arrays alone, such as module"
    with pytest.raises(secateur.InvalidStateDict, match=f"^{said} {advice}"):
        secateur.is_pruned(state)
