"""`secateur pack` and `secateur.load`: exact in every bit, and clear about damage."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

import secateur
from secateur import cli
from secateur.literals import Output
from secateur_proto.framing import file_header
from tests.client.sharded import INDEX, TIED, read_shards, real_weights, write_shards
from tests.client.test_cli import failure
from tests.conftest import RunningServer, examples
from tests.packed import BITS, BLOCK, packed_names, read_packed
from tests.reference import assert_same_tensors, same_bits

HALF = ["--method", "global_unstructured", "--amount", "0.5"]

Raw = dict[str, tuple[str, list[int], bytes]]


def write_raw(path: Path, tensors: Raw, metadata: dict[str, str] | None = None) -> Path:
    """Writes a dense file of tensors in any dtype."""
    described = ((name, dtype, shape) for name, (dtype, shape, _) in tensors.items())
    data = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(file_header(described, metadata) + data)
    return path


def pack(source: Path, out: Path, *options: str) -> Path:
    assert cli.main(["pack", str(source), "-o", str(out), *options]) == 0
    return out


@st.composite
def raw_tensors(draw: st.DrawFn) -> Raw:
    """Draws tensors of all dtypes, with zeros, and values of which only the highest bit is set."""
    tensors = {}
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True)):
        dtype = draw(st.sampled_from(list(BITS)))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 40, 300]), max_size=3))
        width, elements = BITS[dtype] // 8, int(np.prod(shape))
        random = np.random.default_rng(draw(st.integers(0, 999)))
        elements = min(elements, 20_000)
        shape = shape if int(np.prod(shape)) == elements else [elements]
        bits = random.integers(0, 256, (elements, width), np.uint8)
        bits[random.random(elements) < draw(st.floats(0, 1))] = 0
        signs = random.random(elements) < draw(st.sampled_from([0, 0, 0.2, 0.9]))
        bits[signs] = [0] * (width - 1) + [0x80]
        tensors[name] = dtype, shape, bits.tobytes()
    return tensors


@examples(100)
@given(tensors=raw_tensors())
def test_a_packed_file_holds_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, tensors: Raw
) -> None:
    folder = tmp_path_factory.mktemp("pack")
    dense = write_raw(folder / "dense.safetensors", tensors, {"format": "pt", "é": "ü"})
    packed = pack(dense, folder / "packed.safetensors")
    found, metadata = read_packed(packed)
    assert found == tensors
    assert list(found) == list(tensors)
    assert metadata == {"format": "pt", "é": "ü"}
    assert packed.stat().st_size <= dense.stat().st_size + 100
    again = pack(packed, folder / "again.safetensors")
    assert again.read_bytes() == packed.read_bytes()


@pytest.mark.parametrize("elements", [BLOCK - 1, BLOCK, BLOCK + 1])
def test_blocks_begin_and_end_anywhere(tmp_path: Path, elements: int) -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal(elements).astype(np.float32)
    values[random.random(elements) < 0.5] *= 0.0
    tensors: Raw = {"w": ("F32", [elements], values.tobytes())}
    packed = pack(write_raw(tmp_path / "d.safetensors", tensors), tmp_path / "p.safetensors")
    assert read_packed(packed)[0] == tensors
    loaded = secateur.load(packed)["w"]
    assert loaded.numpy().tobytes() == values.tobytes()


def test_load_reads_every_form(client: secateur.Client, tmp_path: Path, crepe: Path) -> None:
    weights = real_weights(crepe)
    result = client.prune(weights, secateur.global_unstructured("*.weight", 0.8))
    for form in ("dense", "reparametrized", "packed"):
        for name in ("m.safetensors", "m.pt"):
            if (form, name) != ("packed", "m.pt"):
                result.save(tmp_path / name, form)
                assert_same_tensors(secateur.load(tmp_path / name), result.state_dict(form))
    assert_same_tensors(secateur.load(str(crepe)), weights)


def test_a_valid_safetensors_file_is_written(tmp_path: Path, crepe: Path) -> None:
    """Other programs can list it; a tensor that gains nothing is stored as it is."""
    weights = {name: t for name, t in real_weights(crepe).items() if t.dim() > 1}
    noise = torch.randint(0, 255, (5000,), dtype=torch.uint8)
    save_file({**weights, "noise": noise, "step": torch.tensor(7)}, tmp_path / "d.safetensors")
    packed = pack(tmp_path / "d.safetensors", tmp_path / "p.safetensors")
    with safe_open(packed, framework="pt") as file:
        assert torch.equal(file.get_tensor("noise"), noise)
        assert file.get_tensor("step") == 7
        assert packed_names(packed) == set(file.keys()) - {"noise", "step"}


def test_a_torch_file_and_a_folder_are_packed(
    tmp_path: Path, crepe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = pack(crepe, tmp_path / "p.safetensors")
    assert "from_pretrained" not in capsys.readouterr().err
    assert_same_tensors(secateur.load(packed), real_weights(crepe))
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(real_weights(crepe), folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "crepe"}')
    out = pack(folder, tmp_path / "out")
    assert (out / "config.json").read_text() == '{"model_type": "crepe"}'
    assert packed_names(out / "model.safetensors")
    assert_same_tensors(secateur.load(out), real_weights(crepe))
    said = (
        f"from_pretrained cannot load the packed folder {out}: `secateur finalize {out} -o DENSE`"
    )
    assert said in capsys.readouterr().err
    half = ["--method", "l1_unstructured", "--amount", "0.5", "--output", "packed"]
    assert cli.main(["prune", str(folder), "-o", str(out), *half]) == 0
    assert said in capsys.readouterr().err


def test_shards_are_packed_one_by_one(
    tmp_path: Path, crepe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = write_shards(tmp_path / "in", real_weights(crepe))
    out = pack(tmp_path / "in", tmp_path / "out")
    shown = capsys.readouterr().out
    sizes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    dense = sum(tensor.nbytes for tensor in real_weights(crepe).values())
    assert shown == f"{out}: {sizes:,} bytes, {sizes / dense:.2f} of the dense {dense:,}\n"
    loaded = secateur.load(out / INDEX)
    assert loaded["decoder.weight"] is loaded[TIED["decoder.weight"]]
    assert_same_tensors(loaded, secateur.load(index))


def test_every_call_takes_a_packed_file(
    client: secateur.Client, tmp_path: Path, crepe: Path
) -> None:
    weights, half = real_weights(crepe), secateur.global_unstructured("*.weight", 0.5)
    save_file(weights, tmp_path / "d.safetensors")
    packed = pack(tmp_path / "d.safetensors", tmp_path / "p.safetensors")
    of_dense = client.prune(tmp_path / "d.safetensors", half)
    of_packed = client.prune(packed, half)
    assert of_packed.report == of_dense.report
    assert_same_tensors(of_packed.state_dict(), of_dense.state_dict())
    assert client.report(packed) == client.report(tmp_path / "d.safetensors")
    uploaded = client.upload(packed)
    assert client.report(uploaded).zeros == client.report(weights).zeros
    client.delete(uploaded)


@pytest.mark.parametrize("is_embedded", [True, False])
def test_the_commands_take_a_packed_file(
    is_embedded: bool,
    server: RunningServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not is_embedded:
        monkeypatch.setenv("SECATEUR_SERVER", server.address)
    model = {"w": torch.arange(1.0, 1001).reshape(10, 100)}
    save_file(model, tmp_path / "d.safetensors")
    packed = pack(tmp_path / "d.safetensors", tmp_path / "p.safetensors")
    capsys.readouterr()
    assert cli.main(["report", str(packed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"]["w"]["shape"] == [10, 100]
    out = tmp_path / "out.safetensors"
    command = ["prune", str(packed), "-o", str(out), *HALF, "--quiet"]
    assert cli.main([*command, "--output", "packed"]) == 0
    assert packed_names(out) == {"w"}
    assert cli.main(["finalize", str(out), "-o", str(tmp_path / "f.safetensors"), "--quiet"]) == 0
    assert int((load_file(tmp_path / "f.safetensors")["w"] == 0).sum()) == 500


# What a result that is not smaller says ----------------------------------------------------------

NOTE = "`secateur pack OUT -o SMALL`"


def test_a_result_says_that_it_is_not_smaller(client: secateur.Client) -> None:
    model, half = {"w": np.arange(1, 9, dtype=np.float32)}, secateur.l1_unstructured("w", 0.5)
    notes: dict[Output, int] = {
        "masks": 1,
        "dense": 1,
        "reparametrized": 1,
        "packed": 0,
        "none": 0,
    }
    for output, says in notes.items():
        shown = str(client.prune(model, half, output)).splitlines()
        assert [NOTE in line for line in shown] == [False] + [True] * says, output
    assert NOTE not in str(client.prune(model, secateur.identity("w")))
    pairs = client.prune(model, half).state_dict("reparametrized")
    assert NOTE in str(client.finalize(pairs))
    assert NOTE not in str(client.finalize(pairs, output="packed"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_commands_say_that_a_file_is_not_smaller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    model, out = tmp_path / f"m{suffix}", tmp_path / "o.safetensors"
    weights = {"w": torch.arange(1.0, 1001).reshape(10, 100)}
    torch.save(weights, model)
    if suffix == ".safetensors":
        save_file(weights, model)
    note = f"`secateur pack {out} -o {tmp_path}/o-small.safetensors`"
    for output, count in {"dense": 1, "reparametrized": 1, "packed": 0}.items():
        command = ["prune", str(model), "-o", str(out), *HALF, "--output", output]
        assert cli.main(command) == 0
        assert capsys.readouterr().out.count(note) == count, output
    assert cli.main(["finalize", str(out), "-o", str(out)]) == 0
    assert capsys.readouterr().out.count(note) == 1
    assert cli.main(["finalize", str(out), "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["zeros"] == 500


# Errors ------------------------------------------------------------------------------------------


def test_wrong_arguments_of_load() -> None:
    for wrong in (3, {"w": 1}, b"x", None, "", "file:///x", "nowhere.safetensors"):
        with pytest.raises(secateur.InvalidStateDict):
            secateur.load(wrong)  # type: ignore[arg-type]


def test_wrong_arguments_of_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "m.safetensors"
    save_file({"w": torch.zeros(100)}, model)
    for name in ("o.pt", "o.onnx"):
        for layout in ("packed", "sparse-bitmask"):
            says = failure(capsys, "pack", model, "-o", tmp_path / name, "--layout", layout)
            assert "a packed file is .safetensors; name one, such as out.safetensors" in says
    assert "pack reads and writes local files" in failure(
        capsys, "pack", "s3://x/y.safetensors", "-o", tmp_path / "o.safetensors"
    )
    assert "No such file" in failure(
        capsys, "pack", tmp_path / "no.safetensors", "-o", tmp_path / "o.safetensors"
    )


def test_without_zstandard_the_error_names_the_extra(
    client: secateur.Client,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_file({"w": torch.zeros(1000)}, tmp_path / "d.safetensors")
    packed = pack(tmp_path / "d.safetensors", tmp_path / "p.safetensors")
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "zstandard", None)
    advice = r"needs zstandard: pip install 'secateur\[pack\]'"
    with pytest.raises(secateur.SecateurError, match=advice):
        secateur.load(packed)
    model = {"w": np.ones(4, np.float32)}
    result = client.prune(model, secateur.identity("w"))
    with pytest.raises(secateur.SecateurError, match=advice):
        client.prune(model, secateur.identity("w"), "packed")
    with pytest.raises(secateur.SecateurError, match=advice):
        result.save(tmp_path / "r.safetensors", "packed")
    assert not (tmp_path / "r.safetensors").exists()
    said = failure(capsys, "pack", tmp_path / "d.safetensors", "-o", tmp_path / "q.safetensors")
    assert "pip install 'secateur[pack]'" in said
    assert load_arrays(tmp_path / "d.safetensors").keys() == {"w"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed file of one tensor, in three blocks."""
    folder = tmp_path_factory.mktemp("small")
    values = torch.randn(2 * BLOCK + 5, generator=torch.Generator().manual_seed(0))
    values[values.abs() < 2.5] = 0
    save_file({"w": values}, folder / "d.safetensors")
    return pack(folder / "d.safetensors", folder / "p.safetensors")


@examples(300)
@given(data=st.data())
def test_damage_is_an_error_that_names_the_file(
    tmp_path_factory: pytest.TempPathFactory, small: Path, data: st.DataObject
) -> None:
    """Any byte of the packed data may be another one, or be missing."""
    damaged = bytearray(small.read_bytes())
    begin = 8 + struct.unpack_from("<Q", damaged)[0]
    at = data.draw(st.integers(begin, len(damaged) - 1) | st.integers(begin, begin + 40))
    damaged[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / "p.safetensors"
    path.write_bytes(damaged)
    try:
        loaded = secateur.load(path)["w"]
    except secateur.InvalidStateDict as error:
        assert "p.safetensors: w: " in str(error)  # noqa: PT017
        assert "damaged" in str(error)  # noqa: PT017
    else:  # zstd ignores some bits of a frame's head
        assert same_bits(loaded, secateur.load(small)["w"])


def described(path: Path, data: bytes, description: Any, dtype: str = "U8") -> Path:
    """Writes a file of one tensor `w`, with any description of packed tensors."""
    text = description if isinstance(description, str) else json.dumps(description)
    return write_raw(path, {"w": (dtype, [len(data)], data)}, {"secateur.packed": text})


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ("not JSON", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ([], "is damaged"),
        ({"tensors": {}}, "is damaged"),
        ({"version": 2, "tensors": {}}, "has the version 2, not 1; update secateur"),
        ({"version": 1, "tensors": []}, "is damaged"),
        ({"version": 1, "tensors": {"w": 3}}, "is damaged"),
        ({"version": 1, "tensors": {"w": ["F32"]}}, "is damaged"),
        ({"version": 1, "tensors": {"w": [["F32"], [1]]}}, "is damaged"),
        ({"version": 1, "tensors": {"w": ["F99", [1]]}}, "is damaged"),
        ({"version": 1, "tensors": {"w": ["F32", 1]}}, "is damaged"),
        ({"version": 1, "tensors": {"w": ["F32", [-1]]}}, "is damaged"),
        ({"version": 1, "tensors": {"w": ["F32", [True]]}}, "is damaged"),
        ({"version": 1, "tensors": {"w": ["F32", [1.5]]}}, "is damaged"),
        ({"version": 1, "tensors": {"w": ["F32", [2**40, 2**40]]}}, "is damaged"),
        ({"version": 1, "tensors": {"v": ["F32", [4]]}}, "v: .* does not fit the tensors"),
    ],
)
def test_a_wrong_description(tmp_path: Path, description: Any, says: str) -> None:
    path = described(tmp_path / "p.safetensors", bytes(64), description)
    with pytest.raises(secateur.InvalidStateDict, match=rf"p\.safetensors: .*{says}"):
        secateur.load(path)


def test_a_described_tensor_must_be_flat_bytes(tmp_path: Path) -> None:
    table = {"version": 1, "tensors": {"w": ["F32", [4]]}}
    path = described(tmp_path / "p.safetensors", bytes(64), table, "I8")
    with pytest.raises(secateur.InvalidStateDict, match=r"w: .* does not fit the tensors"):
        secateur.load(path)


@pytest.mark.parametrize("elements", [5, BLOCK, 1 << 30, 1 << 45, 1 << 59])
@pytest.mark.parametrize("size", [0, 4, 1000])
def test_a_shape_that_is_not_in_the_data_is_refused_before_it_is_allocated(
    tmp_path: Path, elements: int, size: int
) -> None:
    table = {"version": 1, "tensors": {"w": ["F64", [elements]]}}
    path = described(tmp_path / "p.safetensors", bytes(size), table)
    with pytest.raises(secateur.InvalidStateDict, match="damaged"):
        secateur.load(path)


@pytest.mark.parametrize("size", [4, 10**6, 1 << 40, None])
def test_a_frame_that_is_larger_than_its_block_is_not_decompressed(
    tmp_path: Path, size: int | None
) -> None:
    """Only its header says how large it is."""
    stream = zstandard.ZstdCompressor().compressobj(**({} if size is None else {"size": size}))
    stream.compress(b"")
    frame = stream.flush() if size is None else frame_head(size)
    data = struct.pack("<I", len(frame)) + frame
    table = {"version": 1, "tensors": {"w": ["F32", [100]]}}
    path = described(tmp_path / "p.safetensors", data, table)
    with pytest.raises(secateur.InvalidStateDict, match="damaged"):
        secateur.load(path)


def frame_head(size: int) -> bytes:
    """The begin of a zstd frame of a size, and an empty last block."""
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", size) + b"\x01\0\0"


def test_bits_of_every_special_value_are_kept(tmp_path: Path) -> None:
    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-45])
    payload = torch.tensor([0x7F800001, -1, 0x7FC12345], dtype=torch.int32).view(torch.float32)
    whole = torch.cat([values, payload]).repeat(100)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        of_dtype = whole if dtype == torch.float32 else whole.to(dtype)
        save_file({"w": of_dtype}, tmp_path / "d.safetensors")
        packed = pack(tmp_path / "d.safetensors", tmp_path / "p.safetensors")
        assert packed_names(packed) == {"w"}
        assert same_bits(secateur.load(packed)["w"], of_dtype)


def test_a_pair_stays_a_pair(client: secateur.Client, tmp_path: Path) -> None:
    model = {"w": torch.randn(50, 50), "n": torch.arange(50)}
    result = client.prune(model, secateur.l1_unstructured("w", 0.5))
    result.save(tmp_path / "d.safetensors", "reparametrized")
    packed = pack(tmp_path / "d.safetensors", tmp_path / "p.safetensors")
    assert_same_tensors(secateur.load(packed), result.state_dict("reparametrized"))
    assert secateur.is_pruned(packed)
    assert client.report(packed).zeros == result.report.zeros


def test_unpacked_shards_are_written_dense(
    client: secateur.Client, tmp_path: Path, crepe: Path
) -> None:
    """The description of packed tensors is not copied to a dense file."""
    write_shards(tmp_path / "in", real_weights(crepe))
    packed = pack(tmp_path / "in", tmp_path / "packed")
    client.prune(packed, secateur.identity("*.weight")).save(tmp_path / "dense")
    dense = read_shards(tmp_path / "dense")
    assert_same_tensors(dense, real_weights(crepe))
