"""ONNX files as sources and results; the packages onnx and onnxruntime are the oracles."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file
from torch.nn.utils import prune

import secateur
from secateur.source import read_source
from secateur.tensors import LocalTensor, from_value
from tests.client.test_cli import failure, run

HALF = secateur.global_unstructured("*.weight", 0.5)
RANDOM = np.random.default_rng(0)
INPUT = RANDOM.standard_normal((3, 1, 8, 8), np.float32)

Array = npt.NDArray[Any]

# Types that numpy, with ml_dtypes, and safetensors have.
TYPES = [
    *(TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16),
    *(TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16),
    *(TensorProto.INT32, TensorProto.UINT32, TensorProto.INT64, TensorProto.UINT64),
    *(TensorProto.BOOL, TensorProto.COMPLEX64, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2),
]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(1, 4, 3)
        self.fc1 = torch.nn.Linear(4 * 36, 16)
        self.fc2 = torch.nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).relu().flatten(1)
        out: torch.Tensor = self.fc2(self.fc1(x).relu())
        return out


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torch.onnx."""
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    secateur.export(Net(), torch.from_numpy(INPUT), path)
    return path


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(exported, tmp_path / "model.onnx"))


@pytest.fixture
def external(exported: Path, tmp_path: Path) -> Path:
    """The same model with its weights in a file beside it."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "model.onnx"
    onnx.save(
        onnx.load(exported),
        path,
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=60,  # onnxruntime reads shapes inside the model alone
    )
    return path


def arrays(path: Path) -> dict[str, Array]:
    return {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


def outputs(path: Path) -> Array:
    session = onnxruntime.InferenceSession(path)
    found: list[Array] = session.run(None, {session.get_inputs()[0].name: INPUT})
    return found[0]


def pruned_by_torch(tmp_path: Path) -> Path:
    net, path = Net(), tmp_path / "by_torch.onnx"
    layers = [(layer, "weight") for layer in (net.conv, net.fc1, net.fc2)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.5)
    for layer, name in layers:
        prune.remove(layer, name)  # type: ignore[no-untyped-call]
    secateur.export(net, torch.from_numpy(INPUT), path)
    return path


def test_it_is_the_model_that_torch_prunes_and_exports(
    model: Path, client: secateur.Client
) -> None:
    out = model.with_name("out.onnx")
    result = client.prune(model, HALF)
    result.save(out)
    onnx.checker.check_model(out, full_check=True)
    by_torch = pruned_by_torch(model.parent)
    assert (outputs(out) == outputs(by_torch)).all()
    assert {n: a.tobytes() for n, a in arrays(out).items()} == {
        n: a.tobytes() for n, a in arrays(by_torch).items()
    }
    zeros = sum(int((a == 0).sum()) for n, a in arrays(out).items() if n.endswith("weight"))
    assert zeros == result.report.zeros == round(0.5 * (36 + 16 * 144 + 80))


def test_only_bytes_of_pruned_initializers_change(model: Path, client: secateur.Client) -> None:
    out = model.with_name("out.onnx")
    client.prune(model, secateur.l1_unstructured("fc1.weight", 0.5)).save(out)
    before, after = model.read_bytes(), out.read_bytes()
    assert len(before) == len(after)
    weight = arrays(model)["fc1.weight"].tobytes()
    begin = before.index(weight)
    end = begin + len(weight)
    assert before[:begin] + before[end:] == after[:begin] + after[end:]
    assert before[begin:end] != after[begin:end]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_other_formats_get_the_tensors_and_a_warning(
    model: Path, client: secateur.Client, suffix: str
) -> None:
    out = model.with_name(f"out{suffix}")
    with pytest.warns(secateur.NotSaved, match=r"without the graph; an \.onnx file keeps"):
        client.prune(model, HALF).save(out)
    found = load_file(out) if suffix == ".safetensors" else torch.load(out)
    assert found.keys() == arrays(model).keys()
    assert (np.asarray(found["fc1.weight"]) == 0).any()


def test_masks_by_the_names_of_initializers(model: Path, client: secateur.Client) -> None:
    mask = RANDOM.random((16, 144)) < 0.5
    out = model.with_name("out.onnx")
    client.prune(model, secateur.custom_from_mask({"fc1.weight": mask})).save(out)
    assert (arrays(out)["fc1.weight"] == arrays(model)["fc1.weight"] * mask).all()


def test_a_result_of_the_server_and_a_finalized_one(model: Path, client: secateur.Client) -> None:
    out, final = model.with_name("out.onnx"), model.with_name("final.onnx")
    client.prune(model, HALF, output="dense").save(out)
    assert client.report(out).zeros == client.prune(model, HALF).report.zeros
    client.finalize(out).save(final)
    assert final.read_bytes() == out.read_bytes()


# Kinds of initializers.


def proto(name: str, kind: int, array: Array, is_raw: bool) -> TensorProto:
    """A tensor in the field of numbers of its type, or as raw bytes."""
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape)
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    if is_raw:
        tensor.raw_data = array.tobytes()
    elif kind in (TensorProto.FLOAT, TensorProto.COMPLEX64):
        tensor.float_data.extend(array.reshape(-1).view(np.float32))
    elif kind == TensorProto.DOUBLE:
        tensor.double_data.extend(array.reshape(-1))
    elif kind == TensorProto.INT64:
        tensor.int64_data.extend(array.reshape(-1).tolist())
    elif kind in (TensorProto.UINT32, TensorProto.UINT64):
        tensor.uint64_data.extend(array.reshape(-1).tolist())
    else:
        is_signed = array.dtype.kind == "i"
        tensor.int32_data.extend((array.reshape(-1) if is_signed else bits).tolist())
    return tensor


def value_of(kind: int, shape: tuple[int, ...], seed: int) -> Array:
    """Any bits, but for bools."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    random = np.random.default_rng(seed)
    if kind == TensorProto.BOOL:
        return random.random(shape) < 0.5
    if kind in (TensorProto.FLOAT, TensorProto.COMPLEX64, TensorProto.DOUBLE):
        return random.standard_normal(shape).astype(dtype)  # NaNs may lose bits in fields of floats
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(random.bytes(size), dtype).reshape(shape)


def graph_of(tensors: list[TensorProto]) -> onnx.ModelProto:
    node = helper.make_node("Identity", ["x"], ["y"])
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    return helper.make_model(helper.make_graph([node], "g", [value], [result], tensors))


def kinds() -> st.SearchStrategy[tuple[int, tuple[int, ...], int, str]]:
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    storages = st.sampled_from(["raw", "typed", "external"])
    return st.tuples(st.sampled_from(TYPES), shapes, st.integers(0, 99), storages)


@given(st.lists(kinds(), max_size=5))
def test_every_kind_is_read_and_written(
    tmp_path_factory: pytest.TempPathFactory, given_kinds: list[tuple[int, Any, int, str]]
) -> None:
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "in").mkdir()
    path, out = folder / "in" / "m.onnx", folder / "m.onnx"
    values = {f"t{n}": value_of(*kind[:3]) for n, kind in enumerate(given_kinds)}
    protos = []
    for (name, array), (kind, _, _, storage) in zip(values.items(), given_kinds, strict=True):
        protos.append(proto(name, kind, array, storage != "typed"))
        if storage == "external":
            onnx.external_data_helper.set_external_data(protos[-1], "m.data")
    onnx.save(graph_of(protos), path)
    source = read_source(path)
    assert {n: t.read().tobytes() for n, t in source.tensors.items()} == {
        n: a.tobytes() for n, a in values.items()
    }
    assert [t.shape for t in source.tensors.values()] == [a.shape for a in values.values()]
    assert source.onnx_file is not None
    source.onnx_file.save(out, source.tensors)
    assert out.read_bytes() == path.read_bytes()
    changed = {
        n: value_of(*kind[:2], kind[2] + 1) for n, kind in zip(values, given_kinds, strict=True)
    }
    source.onnx_file.save(out, {n: like(source.tensors[n], a) for n, a in changed.items()})
    assert {n: a.tobytes() for n, a in arrays(out).items()} == {
        n: a.tobytes() for n, a in changed.items()
    }


def like(tensor: LocalTensor, array: Array) -> LocalTensor:
    made = from_value("", array)
    assert made[:2] == tensor[:2]
    return made


def test_zeros_in_fields_of_numbers(tmp_path: Path, client: secateur.Client) -> None:
    weight = RANDOM.standard_normal((4, 8)).astype(np.float16)
    wide = RANDOM.standard_normal((4, 8)).astype(np.float32)
    protos = [proto("half", 10, weight, False), proto("single", 1, wide, False)]
    path, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(graph_of(protos), path)
    client.prune(path, secateur.l1_unstructured("*", 0.5)).save(out)
    onnx.checker.check_model(out)
    for name, array in (("half", weight), ("single", wide)):
        small = np.argsort(abs(array.astype(np.float64)).reshape(-1), kind="stable")[:16]
        expected = array.copy().reshape(-1)
        expected[small] = 0
        assert (arrays(out)[name] == expected.reshape(4, 8)).all()
    assert "float_data" not in str(onnx.load(out))  # a changed tensor gets raw data


def test_integers_texts_and_constants_are_kept(tmp_path: Path, client: secateur.Client) -> None:
    """As in a quantized model: int8 weights, and int4, for which safetensors has no dtype."""
    small = helper.make_tensor("int4", TensorProto.INT4, [4], [1, -2, 3, 7])
    text = TensorProto(name="text", data_type=TensorProto.STRING, dims=[1], string_data=[b"a"])
    quantized = proto("quantized", TensorProto.INT8, np.arange(-4, 4, dtype=np.int8), True)
    weight = proto("weight", TensorProto.FLOAT, np.arange(1, 5, dtype=np.float32), True)
    made = graph_of([small, text, quantized, weight])
    constant = helper.make_tensor("c", TensorProto.FLOAT, [2], [0.5, 1])
    made.graph.node.append(helper.make_node("Constant", [], ["c"], value=constant))
    path, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(made, path)
    result = client.prune(path, secateur.l1_unstructured("*", 0.5))
    assert list(result.report.tensors) == ["weight"]
    result.save(out)
    made.graph.initializer[3].raw_data = np.array([0, 0, 3, 4], np.float32).tobytes()
    assert onnx.load(out) == made
    with pytest.warns(secateur.NotSaved, match="without the graph, int4, text; an .onnx"):
        result.save(tmp_path / "out.safetensors")
    integers = secateur.l1_unstructured("quantized", 3)  # by their exact name
    client.prune(path, integers).save(out)
    assert arrays(out)["quantized"].tolist() == [-4, -3, -2, 0, 0, 0, 2, 3]


# External data.


def test_external_data_is_written_beside_the_result(
    external: Path, tmp_path: Path, client: secateur.Client, model: Path
) -> None:
    client.prune(model, HALF).save(tmp_path / "inline.onnx")
    expected, result = outputs(tmp_path / "inline.onnx"), client.prune(external, HALF)
    before = external.read_bytes(), external.with_name("model.onnx.data").read_bytes()
    (tmp_path / "out").mkdir()
    for out in (external.with_name("pruned.onnx"), tmp_path / "out" / external.name):
        result.save(out)
        onnx.checker.check_model(out)
        assert (outputs(out) == expected).all()
        assert out.with_name(f"{out.name}.data").stat().st_size == len(before[1])
    assert before == (external.read_bytes(), external.with_name("model.onnx.data").read_bytes())
    assert (tmp_path / "out" / "model.onnx").read_bytes() == before[0]
    result.save(external)  # in its own place
    assert external.read_bytes() == before[0]
    assert (outputs(external) == expected).all()


def test_a_data_file_with_another_name(external: Path, client: secateur.Client) -> None:
    made, out = onnx.load(external), external.with_name("out.onnx")
    place = external.with_name("b.onnx")
    onnx.save(made, place, save_as_external_data=True, location="weights.bin", size_threshold=60)
    client.prune(place, HALF).save(out)
    assert sorted(p.name for p in external.parent.glob("*.bin")) == [
        "out.onnx.weights.bin",
        "weights.bin",
    ]
    onnx.checker.check_model(out)


def entry_of(path: Path, **entries: str) -> None:
    """Changes where the first initializer is."""
    made = onnx.load(path, load_external_data=False)
    for entry in made.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(made.SerializeToString())


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"location": "../model.onnx.data"}, "is not beside the model"),
        ({"location": "/etc/passwd"}, "is not beside the model"),
        ({"location": "none"}, "No such file"),
        ({"offset": "1000000"}, "external data ends at byte"),
        ({"offset": "-4"}, "are not numbers"),
        ({"length": "7"}, "it has 7 bytes of values; its shape needs 144"),
    ],
)
def test_wrong_external_data(
    external: Path, client: secateur.Client, entries: dict[str, str], reason: str
) -> None:
    entry_of(external, **entries)
    with pytest.raises(secateur.InvalidStateDict, match=reason):
        client.report(external)


def test_shared_external_data(external: Path, client: secateur.Client) -> None:
    made = onnx.load(external, load_external_data=False)
    copy = made.graph.initializer.add()
    copy.CopyFrom(made.graph.initializer[0])
    copy.name = "copy"
    external.write_bytes(made.SerializeToString())
    result = client.prune(external, HALF)
    with pytest.raises(secateur.InvalidStateDict, match="shares external data"):
        result.save(external.with_name("out.onnx"))
    assert len(list(external.parent.iterdir())) == 2


# Errors.


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"weights, perhaps", "is not an ONNX model, or is damaged"),
        (b"\x08\x07", "it has no graph"),
        (graph_of([TensorProto(data_type=1)]).SerializeToString(), "has the name ''"),
        (
            graph_of([TensorProto(name="a", data_type=1, dims=[2])]).SerializeToString(),
            "a: it has 0 bytes of values; its shape needs 8",
        ),
        (graph_of([proto("a", 1, np.ones(2, "f"), True)] * 2).SerializeToString(), "two init"),
    ],
)
def test_files_that_are_not_onnx(
    tmp_path: Path, client: secateur.Client, content: bytes, reason: str
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(secateur.InvalidStateDict, match=reason):
        client.report(path)


def test_safetensors_and_missing_files(tmp_path: Path, client: secateur.Client) -> None:
    save_file({"a": np.ones(2)}, tmp_path / "m.onnx")
    with pytest.raises(secateur.InvalidStateDict, match="rename it to"):
        client.report(tmp_path / "m.onnx")
    with pytest.raises(secateur.InvalidStateDict, match="No such file"):
        client.report(tmp_path / "none.onnx")


@given(st.data())
def test_damaged_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Never another error, and never a file that cannot be written again."""
    folder = tmp_path_factory.mktemp("damaged")
    protos = [
        proto(f"t{n}", kind, value_of(kind, (3,), n), n % 2 > 0) for n, kind in enumerate(TYPES)
    ]
    content = bytearray(graph_of(protos).SerializeToString())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "m.onnx"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        source = read_source(path)
    except secateur.InvalidStateDict:
        return
    assert source.onnx_file is not None
    source.onnx_file.save(folder / "out.onnx", source.tensors)


@pytest.mark.parametrize("form", ["reparametrized", "masks", "packed"])
def test_forms_that_onnx_has_not(model: Path, client: secateur.Client, form: Any) -> None:
    before = set(model.parent.iterdir())
    with pytest.raises(secateur.SecateurError, match=r"(write|is) \.safetensors"):
        client.prune(model, HALF).save(model.with_name("out.onnx"), form)
    assert set(model.parent.iterdir()) == before


def test_a_shrunk_model_is_not_written_to_onnx(model: Path, client: secateur.Client) -> None:
    """Shapes are also in the graph, such as those of a Reshape."""
    members = secateur.member("fc1.weight"), secateur.member("fc2.weight", dim=1)
    group = secateur.group("hidden", *members, secateur.member("fc1.bias"))
    result = client.prune(model, secateur.grouped([group], 4, align=1), output="shrunk")
    with pytest.raises(secateur.InvalidStateDict, match=r"of shape \[\d+, 144\], not F32 of shape"):
        result.save(model.with_name("out.onnx"), "shrunk")
    with pytest.warns(secateur.NotSaved, match="without the graph"):
        result.save(model.with_name("out.safetensors"), "shrunk")
    assert load_file(model.with_name("out.safetensors"))["fc2.weight"].shape == (5, 12)


# The command.


@pytest.mark.usefixtures("at_server")
def test_the_commands(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.with_name("out.onnx")
    assert run("prune", model, "-o", out, "--method", "global_unstructured", "--amount", "0.5") == 0
    shown = capsys.readouterr()
    assert "1,210" in shown.out
    assert shown.err == ""
    assert run("report", out) == 0
    assert "fc1.weight" in capsys.readouterr().out
    assert run("plan", model) == 0
    assert run("finalize", out, "-o", model.with_name("final.onnx")) == 0
    assert run("finalize", out, "-o", model.with_name("final.safetensors")) == 0
    assert "warning: " in capsys.readouterr().err


@pytest.mark.usefixtures("at_server")
def test_commands_that_cannot_write_onnx(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "l1_unstructured", "--amount", "0.5"]
    out = model.with_name("out.onnx")
    error = failure(capsys, "prune", model, "-o", out, *options, "--output", "reparametrized")
    assert "cannot hold the output reparametrized" in error
    other = model.with_name("m.safetensors")
    save_file({"w": np.ones((2, 2), np.float32)}, other)
    assert "has no ONNX graph" in failure(capsys, "prune", other, "-o", out, *options)
