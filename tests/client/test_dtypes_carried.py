"""Tensors that are not pruned come back from every source, through every output, bit for bit."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import secateur
from secateur import cli
from tests.conftest import RunningServer
from tests.contract.test_dtypes import DTYPES_OF_TORCH, any_bytes, as_safetensors_writes
from tests.reference import assert_same_tensors

HALF = secateur.l1_unstructured("w", 0.5)
WRITABLE = [dtype for dtype in DTYPES_OF_TORCH if as_safetensors_writes(any_bytes(dtype))]
NOT_WRITABLE = [dtype for dtype in DTYPES_OF_TORCH if dtype not in WRITABLE]


def writable() -> dict[str, Tensor]:
    """Two tensors of every dtype that safetensors can write, between weights."""
    tensors = {f"of.{str(t)[6:]}_{which}": any_bytes(t) for t in WRITABLE for which in "ab"}
    return {"w": torch.arange(1.0, 7), **tensors, "b": torch.ones(2)}


def as_module(entries: Mapping[str, Tensor]) -> nn.Module:
    """Every second tensor as a parameter, the others as buffers: one of each dtype."""
    module = nn.Module()
    module.add_module("of", nn.Module())
    for index, (name, tensor) in enumerate(entries.items()):
        part = module.get_submodule(name.rpartition(".")[0])
        if index % 2:
            part.register_buffer(name.rpartition(".")[2], tensor)
        else:
            parameter = nn.Parameter(tensor, requires_grad=False)
            part.register_parameter(name.rpartition(".")[2], parameter)
    return module


def source_of(kind: str, folder: Path) -> Any:
    path = folder / f"model.{kind}"
    if kind == "module":
        return as_module(writable())
    if kind == "mapping":
        return writable()
    if kind == "pt":
        torch.save(writable(), path)
    else:
        safetensors.torch.save_file(writable(), path)
    return path


every_source = pytest.mark.parametrize("kind", ["module", "mapping", "pt", "safetensors"])
every_output = pytest.mark.parametrize("output", ["masks", "dense", "reparametrized", "none"])


def without_w(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in entries.items() if name[0] != "w"}


def assert_saved(result: Any, folder: Path, *form: Any) -> None:
    """Files of both kinds hold every tensor, as their libraries read them."""
    result.save(folder / "out.safetensors", *form)
    result.save(folder / "out.pt", *form)
    for found in (
        safetensors.torch.load_file(folder / "out.safetensors"),
        torch.load(folder / "out.pt", weights_only=True),
    ):
        assert_same_tensors(without_w(found), without_w(writable()))


@every_source
@every_output
def test_every_dtype_passes_through_a_prune(
    client: secateur.Client, tmp_path: Path, kind: str, output: Any
) -> None:
    result = client.prune(source_of(kind, tmp_path), HALF, output=output)
    assert result.report.zeros == 3
    for form in {"masks": ["dense", "reparametrized"], "none": []}.get(output, [output]):
        assert_same_tensors(without_w(result.state_dict(form)), without_w(writable()))
        assert_saved(result, tmp_path, form)


@every_source
def test_every_dtype_passes_through_report_finalize_and_a_checkpoint(
    client: secateur.Client, tmp_path: Path, kind: str
) -> None:
    source = source_of(kind, tmp_path)
    assert {"w", "b"} <= client.report(source).tensors.keys()
    final = client.finalize(source)
    assert_same_tensors(final.state_dict(), writable())
    assert_saved(final, tmp_path)
    checkpoint = client.upload(source)
    client.download(checkpoint, tmp_path / "down.safetensors")
    found = safetensors.torch.load_file(tmp_path / "down.safetensors")
    assert_same_tensors(found, writable())
    assert_same_tensors(client.finalize(checkpoint).state_dict(), writable())
    kept = client.prune(source, HALF, output="dense", keep=True)
    assert_same_tensors(without_w(kept.state_dict()), without_w(writable()))


class Scaled(nn.Linear):
    """A layer with an extra state, and buffers that safetensors has no dtype for."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.calls: Any = {"steps": 7, "note": ("a", [1.5])}
        self.register_buffer("spectrum", torch.tensor([1 + 2j, -0.0], dtype=torch.complex128))
        self.register_buffer("graph", torch.eye(3).to_sparse())
        self.register_buffer("after", torch.arange(3.0))

    def get_extra_state(self) -> Any:
        return self.calls

    def set_extra_state(self, state: Any) -> None:
        self.calls = state


def scaled() -> nn.Module:
    return nn.Sequential(Scaled(), nn.BatchNorm1d(3), Scaled())


def assert_loads(entries: Mapping[str, Any]) -> None:
    """A strict load gives a module whose extra states and buffers are those of `scaled`."""
    module, like = scaled(), scaled()
    for layer in module[::2]:  # type: ignore[index]
        layer.calls, layer.spectrum, layer.graph = None, layer.spectrum * 2, layer.graph * 2
    module.load_state_dict(dict(entries), strict=True)
    for name, expected in like.state_dict().items():
        found = module.state_dict()[name]
        if isinstance(expected, Tensor) and name.endswith(("spectrum", "graph", "after")):
            assert torch.equal(found.to_dense(), expected.to_dense()), name
        elif not isinstance(expected, Tensor):
            assert found == expected


EVERY = secateur.l1_unstructured("?.weight", 0.5)


@pytest.mark.parametrize("as_source", [lambda m: m, lambda m: m.state_dict()])
@every_output
def test_a_module_loads_strictly_from_a_result(
    client: secateur.Client, as_source: Callable[[nn.Module], Any], output: Any
) -> None:
    module = scaled()
    result = client.prune(as_source(module), EVERY, output=output)
    if output in ("masks", "dense"):
        dense = result.state_dict("dense")
        assert list(dense) == list(module.state_dict())
        assert_loads(dense)
    if output in ("masks", "reparametrized"):
        pairs = result.state_dict("reparametrized")
        expected = [
            half
            for name in module.state_dict()
            for half in ((f"{name}_orig", f"{name}_mask") if name[1:] == ".weight" else (name,))
        ]
        assert list(pairs) == expected
        final = client.finalize(pairs)
        assert list(final.state_dict()) == list(module.state_dict())
        assert_loads(final.state_dict())


def test_a_pruned_module_keeps_the_order_of_its_state_dict(client: secateur.Client) -> None:
    module = scaled()
    client.prune(module, EVERY).apply_to(module)
    more = client.prune(module, EVERY, output="reparametrized").state_dict("reparametrized")
    assert list(more) == list(module.state_dict())
    module.load_state_dict(more, strict=True)


def test_a_torch_file_keeps_every_entry(client: secateur.Client, tmp_path: Path) -> None:
    torch.save(scaled().state_dict(), tmp_path / "in.pt")
    client.prune(tmp_path / "in.pt", EVERY).save(tmp_path / "out.pt")
    client.finalize(tmp_path / "out.pt").save(tmp_path / "final.pth")
    for name in ("out.pt", "final.pth"):
        found = torch.load(tmp_path / name, weights_only=True)
        assert list(found) == list(scaled().state_dict())
        assert_loads(found)


with warnings.catch_warnings(action="ignore"):  # torch deprecates the one, and calls the other new
    ROWS = torch.eye(3).to_sparse_csr()
    QUANTIZED = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
OTHERS: dict[str, Any] = {
    **{f"x.{str(dtype)[6:]}": any_bytes(dtype) for dtype in NOT_WRITABLE},
    "x.packed scalar": any_bytes(torch.float4_e2m1fn_x2)[0, 0],
    "x.quantized": QUANTIZED,
    "x.rows": ROWS,
    "x._extra_state": object(),
    "_extra_state": np.array(["a text"]),
    "x.array": np.ones(2, np.clongdouble),
}


@every_output
def test_entries_without_a_safetensors_dtype_are_kept_by_the_client(
    client: secateur.Client, output: Any
) -> None:
    source = {"a": torch.ones(2), **OTHERS, "w": torch.arange(1.0, 7)}
    result = client.prune(source, HALF, output=output)
    assert client.report(source).tensors.keys() == {"a", "w"}
    found = [client.finalize(source).state_dict()]
    found += [result.state_dict()] if output in ("masks", "dense") else []
    for entries in found:
        assert list(entries) == list(source)
        assert all(entries[name] is value for name, value in OTHERS.items())


ARRAYS = {
    "contiguous": np.arange(3, dtype=np.complex128),
    "big-endian": np.arange(3, dtype=">c16"),
    "backwards": np.arange(6, dtype=np.complex128)[::-2],
    "without dimensions": np.array(2 + 1j),
    "read-only": np.frombuffer(bytes(range(32)), np.complex128),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_without_a_dtype_are_carried_and_written(
    client: secateur.Client, tmp_path: Path, array: Any
) -> None:
    source = {"z": array, "again": array, "w": np.arange(1.0, 7)}
    result = client.prune(source, HALF)
    assert result.state_dict()["z"] is array
    result.save(tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["z"].dtype == torch.complex128
    assert np.array_equal(found["z"].numpy(), array)
    assert found["again"].data_ptr() == found["z"].data_ptr()


def test_an_array_that_torch_has_no_dtype_for_is_not_written(
    client: secateur.Client, tmp_path: Path
) -> None:
    result = client.prune({"z": np.ones(2, np.clongdouble), "w": np.arange(1.0, 7)}, HALF)
    with pytest.raises(secateur.SecateurError, match=r"out\.pt: z: torch has no \w+; leave"):
        result.save(tmp_path / "out.pt")
    assert not list(tmp_path.iterdir())


NAMING: dict[str, Callable[[secateur.Client, Any], Any]] = {
    "tensors": lambda c, m: c.prune(m, secateur.l1_unstructured(["w", "z"], 1)),
    "plan": lambda c, m: c.plan(m, secateur.l1_unstructured("z", 1)),
    "keep": lambda c, m: c.prune(m, secateur.l1_unstructured("z", 1), keep=True),
    "sensitivity": lambda c, m: c.sensitivity(m, "z"),
    "mask": lambda c, m: c.prune(m, HALF + secateur.custom_from_mask({"z": np.ones(2)})),
    "scores": lambda c, m: c.prune(
        m, secateur.l1_unstructured("*", 1, importance_scores={"z": np.ones(2)})
    ),
    "scales": lambda c, m: c.prune(m, secateur.select("w", 1, scales={"w": "z"})),
    "groups": lambda c, m: c.prune(
        m, secateur.grouped([secateur.group("g", secateur.member("z"))], 1)
    ),
    "report": lambda c, m: c.report(m, ["z"]),
    "finalize": lambda c, m: c.finalize(m, "z"),
}


@pytest.mark.parametrize("naming", NAMING)
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.ones(2, dtype=torch.complex128), "complex128"),
        (torch.eye(2).to_sparse(), "sparse_coo float32"),
        (QUANTIZED, "qint8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_rule_that_names_such_a_tensor_says_its_dtype(
    client: secateur.Client, naming: str, value: Tensor, dtype: str
) -> None:
    with pytest.raises(secateur.InvalidSpec, match=f": z cannot be pruned .*{dtype}, so"):
        NAMING[naming](client, {"z": value, "w": torch.arange(1.0, 7)})


STATE: dict[str, Any] = {
    "w": torch.arange(1.0, 7),
    "z": torch.ones(2, dtype=torch.complex128),
    "_extra_state": 3,
}
LEFT_OUT = r": a safetensors file cannot hold z \(complex128\), _extra_state \(int\); "


def test_a_safetensors_file_or_a_checkpoint_never_drops_an_entry(
    client: secateur.Client, tmp_path: Path
) -> None:
    path = tmp_path / "out.safetensors"
    uri = "file:///tmp/x"
    calls: dict[Callable[[], object], str] = {
        lambda: client.prune(STATE, HALF).save(path): r"write \.pt instead$",
        lambda: client.prune(STATE, HALF, output="dense").save(path): r"write \.pt instead$",
        lambda: client.finalize(STATE).save(path): r"write \.pt instead$",
        lambda: client.upload(STATE): "leave them out",
        lambda: client.prune(STATE, HALF, keep=True): "leave them out",
        lambda: client.prune(STATE, HALF, "dense", destination=uri): "leave them out",
        lambda: client.finalize(STATE, destination=uri): "leave them out",
    }
    for call, advice in calls.items():
        with pytest.raises(secateur.InvalidStateDict, match=LEFT_OUT + advice):
            call()
    client.prune(STATE, HALF).save(path, "masks")  # which are all that it has
    assert list(tmp_path.iterdir()) == [path]


def test_a_module_is_kept_without_its_buffers_and_extra_state(client: secateur.Client) -> None:
    module = scaled()
    result = client.prune(module, EVERY, keep=True)
    assert client.report(result.checkpoint).tensors.keys() == dict(module.named_parameters()).keys()
    assert_loads(result.state_dict())
    module.register_parameter("z", nn.Parameter(STATE["z"]))
    with pytest.raises(secateur.InvalidStateDict, match=r"cannot hold z \(complex128\);"):
        client.prune(module, EVERY, keep=True)


@pytest.mark.parametrize("command", ["prune", "finalize"])
def test_the_command_says_so_before_it_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], server: RunningServer, command: str
) -> None:
    torch.save(STATE, tmp_path / "in.pt")
    options = [] if command == "finalize" else ["--method", "lamp", "--amount", "0.5"]
    out = str(tmp_path / "out.safetensors")
    given = [command, str(tmp_path / "in.pt"), "-o", out, "--server", server.address, *options]
    assert cli.main(given) == 1
    assert "out.safetensors: a safetensors file cannot hold z" in capsys.readouterr().err


def test_an_object_that_torch_cannot_write_is_an_error(
    client: secateur.Client, tmp_path: Path
) -> None:
    result = client.prune({**STATE, "_extra_state": lambda: 1}, HALF)
    with pytest.raises(secateur.SecateurError, match=r"out\.pt: torch cannot write it: "):
        result.save(tmp_path / "out.pt")
    assert not list(tmp_path.iterdir())


def test_pairs_with_the_names_of_unsent_entries_are_refused(client: secateur.Client) -> None:
    """A buffer, or an entry without a dtype, is not replaced by half of a pair."""
    module = nn.Module()
    module.w = nn.Parameter(torch.arange(1.0, 7))
    module.register_buffer("w_mask", torch.ones(3))
    sources: list[Any] = [module, {"w": torch.arange(1.0, 7), "w_mask": STATE["z"]}]
    for source in sources:
        for output in ("masks", "reparametrized"):
            result = client.prune(source, HALF, output=output)
            with pytest.raises(secateur.InvalidStateDict, match="w_mask"):
                result.state_dict("reparametrized")


def test_a_mask_that_is_not_sent_is_not_half_of_a_pair(client: secateur.Client) -> None:
    pair = {"w_orig": torch.ones(2), "w_mask": torch.ones(2, dtype=torch.complex128)}
    with pytest.raises(secateur.InvalidStateDict, match="w_mask: has dtype complex128"):
        client.report(pair)


SHAPED = {"w": torch.ones(2, 3)}


@pytest.mark.parametrize("dtype", WRITABLE, ids=str)
def test_the_error_for_a_mask_or_scores_of_another_dtype_names_it(
    client: secateur.Client, dtype: torch.dtype
) -> None:
    if dtype == torch.float4_e2m1fn_x2:
        given = torch.zeros(2, 2, dtype=torch.uint8).view(dtype)  # of 2 x 4 elements
    else:
        given = torch.ones(2, 3).to(dtype)
    is_number = dtype.is_floating_point and dtype in PRUNED
    specs = {
        "a mask": (secateur.custom_from_mask({"w": given}), dtype in PRUNED and dtype not in FP8),
        "floating scores": (
            secateur.l1_unstructured("w", 1, importance_scores={"w": given}),
            is_number,
        ),
    }
    for what, (spec, is_allowed) in specs.items():
        if is_allowed:
            assert client.prune(SHAPED, spec).report.total == 6
            continue
        wire = as_safetensors_writes(given)
        assert wire is not None
        said = f"has dtype {wire['dtype']}; {what} may be .*F64"
        with pytest.raises(secateur.InvalidSpec, match=said):
            client.prune(SHAPED, spec)


FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
PRUNED = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, *FP8),
]


def test_bfloat16_where_ml_dtypes_was_imported_first() -> None:
    """As by onnx and jax: ml_dtypes then adds its dtypes to numpy's table."""
    code = """
import ml_dtypes, numpy, torch
from secateur.tensors import from_value
assert "bfloat16" in numpy.sctypeDict
print(from_value("", torch.ones(2, dtype=torch.bfloat16)).read().tobytes().hex())
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (ended.stdout, ended.stderr) == ("803f803f\n", "")
