"""Importance matrices of llama.cpp, written as its programs write them."""

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

import secateur
from secateur import Statistics
from tests.calibration.naive import needed
from tests.conftest import examples

RANDOM = np.random.default_rng(0)
BLOCK = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def write_gguf(path: Path, tensors: dict[str, Any]) -> Path:
    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_array("imatrix.datasets", ["text.txt"])
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sums(name: str, count: Any, squares: Any, total: Any = None) -> dict[str, Any]:
    """The tensors of one entry: [matrices, inputs] and [matrices, 1]."""
    made = {f"{name}.in_sum2": np.atleast_2d(np.float32(squares))}
    made[f"{name}.counts"] = np.float32(count).reshape(-1, 1)
    if total is not None:
        made[f"{name}.in_sum"] = np.atleast_2d(np.float32(total))
    return made


def old_bytes(entries: dict[str, tuple[int, Any]]) -> bytes:
    data = struct.pack("<i", len(entries))
    for name, (chunks, values) in entries.items():
        data += struct.pack("<i", len(name.encode())) + name.encode()
        data += struct.pack("<ii", chunks, len(values)) + np.float32(values).tobytes()
    return data


def write_old(path: Path, entries: dict[str, tuple[int, Any]], dataset: bytes = b"text") -> Path:
    path.write_bytes(old_bytes(entries) + struct.pack("<ii", 2, len(dataset)) + dataset)
    return path


def test_gguf(tmp_path: Path) -> None:
    squares = {part: RANDOM.random(4, np.float32) for part in BLOCK}
    tensors: dict[str, Any] = {}
    for part in BLOCK:
        tensors |= sums(f"blk.0.{part}.weight", 1024, squares[part], -squares[part])
    tensors |= sums("output.weight", 512, [1, 2, 3, 4])
    found = Statistics.from_imatrix(write_gguf(tmp_path / "imatrix.gguf", tensors))
    places = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    assert set(found) == {*(f"model.layers.0.{place}.weight" for place in places), "lm_head.weight"}
    for place, part in places.items():
        layer = found[f"model.layers.0.{place}.weight"]
        assert layer.count == 1024
        assert layer.sum_squares.tolist() == squares[part].tolist()
        assert needed(layer.sum).tolist() == (-squares[part]).tolist()
        assert layer.sum_abs is None
        assert layer.gram is None
        assert layer.input_dim == 1
    assert found["lm_head.weight"].sum is None
    assert found["lm_head.weight"].rms.tolist() == [(x / 512) ** 0.5 for x in (1, 2, 3, 4)]
    found.save(tmp_path / "statistics")
    assert Statistics.load(tmp_path / "statistics") == found


def test_the_old_form(tmp_path: Path) -> None:
    """Its values are the means of squares times the number of chunks."""
    path = write_old(
        tmp_path / "imatrix.dat",
        {"blk.3.attn_q.weight": (2, [2.0, 8.0]), "output.weight": (0, [4.0])},
    )
    found = Statistics.from_imatrix(path)
    assert list(found) == ["model.layers.3.self_attn.q_proj.weight", "lm_head.weight"]
    assert found["model.layers.3.self_attn.q_proj.weight"].rms.tolist() == [1, 2]
    assert found["lm_head.weight"].rms.tolist() == [2]
    path.write_bytes(old_bytes({"output.weight": (2, [2.0, 8.0])}))  # the oldest end here
    assert Statistics.from_imatrix(path)["lm_head.weight"].rms.tolist() == [1, 2]


EXPERTS = {
    part: RANDOM.random((3, size)).astype(np.float32)
    for part, size in (("gate", 4), ("up", 4), ("down", 2))
}


def test_experts(tmp_path: Path) -> None:
    tensors = sums("blk.1.ffn_gate_inp.weight", 9, [1, 2, 3, 4])
    for part, values in EXPERTS.items():
        tensors |= sums(f"blk.1.ffn_{part}_exps.weight", [5, 0, 7], values)
    path = write_gguf(tmp_path / "imatrix.gguf", tensors)
    with pytest.warns(
        secateur.NotCalibrated, match=r"no input reached .*\.experts\.1\.gate_proj"
    ) as caught:
        found = Statistics.from_imatrix(path)
    assert caught[0].filename == __file__
    assert "model.layers.1.mlp.gate.weight" in found
    assert len(found) == 1 + 3 * 2
    for part, values in EXPERTS.items():
        for expert, count in ((0, 5), (2, 7)):
            layer = found[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"]
            assert layer.count == count
            assert layer.sum_squares.tolist() == values[expert].tolist()


def test_experts_of_the_old_form(tmp_path: Path) -> None:
    """It does not say how many there are: the inputs of another tensor of the layer do."""
    entries = {
        f"blk.1.ffn_{part}_exps.weight": (2, values.flatten()) for part, values in EXPERTS.items()
    }
    path = tmp_path / "imatrix.dat"
    for known in ("ffn_gate_inp", "attn_q", "attn_qkv"):
        other = {f"blk.1.{known}.weight": (2, [1, 2, 3, 4])}
        found = Statistics.from_imatrix(write_old(path, entries | other))
        assert len(found) == 10
        for part, values in EXPERTS.items():
            for expert in range(3):
                layer = found[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"]
                assert layer.sum_squares.tolist() == values[expert].tolist()
    for other in ({}, {"blk.1.attn_q.weight": (2, [1] * 5)}):
        write_old(path, entries | other)
        with pytest.raises(
            secateur.InvalidStatistics, match=r"cannot tell how many experts its 12 val"
        ):
            Statistics.from_imatrix(path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ["attn_qkv", "ffn_up", "ffn_down"],
            ["self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
        ),
        (["ffn_gate", "ffn_up"], ["mlp.gate_proj", "mlp.up_proj"]),
        (
            ["ffn_gate_inp_shexp", "ffn_up_shexp"],
            ["mlp.shared_expert_gate", "mlp.shared_expert.up_proj"],
        ),
    ],
)
def test_names(tmp_path: Path, given: list[str], expected: list[str]) -> None:
    path = write_old(tmp_path / "file", {f"blk.12.{part}.weight": (1, [1.0]) for part in given})
    assert list(Statistics.from_imatrix(path)) == [
        f"model.layers.12.{part}.weight" for part in expected
    ]


def test_own_names(tmp_path: Path) -> None:
    entries = {"blk.0.attn_q.weight": (1, [1.0]), "enc.fc.weight": (1, [1.0]), "x": (1, [2.0])}
    path = write_old(tmp_path / "file", entries)
    with pytest.raises(
        secateur.InvalidStatistics, match=r"the names enc.fc.weight, x are unknown; give names"
    ):
        Statistics.from_imatrix(path)
    by_mapping = Statistics.from_imatrix(path, {"enc.fc.weight": "fc.weight", "x": None})
    assert list(by_mapping) == ["model.layers.0.self_attn.q_proj.weight", "fc.weight"]
    by_function = Statistics.from_imatrix(path, lambda name: name.upper() if name != "x" else None)
    assert list(by_function) == ["BLK.0.ATTN_Q.WEIGHT", "ENC.FC.WEIGHT"]
    tensors = sums("blk.1.ffn_up_exps.weight", [5, 7], [[1.0], [2.0]])
    experts = write_gguf(tmp_path / "experts", tensors)
    assert list(Statistics.from_imatrix(experts, lambda name: "e.{expert}.w3")) == [
        "e.0.w3",
        "e.1.w3",
    ]
    for names, message in (
        (3, "names: 3 is not a mapping, a function or None"),
        ({"x": 3, "enc.fc.weight": None}, "names: 'x' is mapped to 3, which is not a name"),
    ):
        with pytest.raises(secateur.InvalidSpec, match=f"^{message}"):
            Statistics.from_imatrix(path, names)  # type: ignore[arg-type]
    for place in (path, experts):
        with pytest.raises(secateur.InvalidStatistics, match="another tensor is named same too"):
            Statistics.from_imatrix(place, lambda name: "same")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "is not an importance matrix: it has no sums of squares"),
        ({"blk.0.attn_q.weight": np.ones((2, 2), np.float32)}, "is not an importance matrix"),
        ({"a.in_sum2": np.ones(2, np.float32)}, "a.counts: is missing"),
        ({"a.counts": np.ones(2, np.float32)}, "a.in_sum2: is missing"),
        (sums("a", [1, 2], [1.0, 2, 3]), "a: 3 sums of squares do not fit 2 counts"),
        (sums("a", 1, [1.0, 2], [1.0]), "a: has 1 sums, and 2 sums of squares"),
        (sums("a", 1, [1.0, -2]), "a: sum of squares 1 is -2.0"),
        (sums("a", 1, [np.nan, 2]), "a: sum of squares 0 is nan"),
        (sums("a", -1, [1.0]), "a: count 0 is -1.0"),
        (sums("a", 1, [1.0], [np.inf]), "a: sum 0 is inf"),
        (
            {"a.in_sum2": np.ones(2, np.float16), "a.counts": np.ones(1, np.float32)},
            "a.in_sum2: is F16, not F32",
        ),
    ],
)
def test_damaged_gguf(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "file", tensors)
    with pytest.raises(secateur.InvalidStatistics, match=f"^{path}: {message}"):
        Statistics.from_imatrix(path)


@pytest.mark.parametrize("is_gguf", [True, False])
def test_a_file_that_was_cut(tmp_path: Path, is_gguf: bool) -> None:
    if is_gguf:
        padded = write_gguf(tmp_path / "whole", sums("output.weight", 1, [1.0, 2])).read_bytes()
        whole = padded[:-28]  # the last tensor has 4 bytes, and is padded to 32
    else:
        whole = old_bytes({"output.weight": (1, [1.0, 2])})
    path = tmp_path / "file"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(secateur.InvalidStatistics, match=f"^{path}: .*damaged"):
            Statistics.from_imatrix(path)


@examples(100)
@given(data=st.binary(max_size=200), magic=st.sampled_from([b"", b"GGUF\3\0\0\0", b"\1\0\0\0"]))
def test_other_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, magic: bytes) -> None:
    path = tmp_path_factory.mktemp("files") / "file"
    path.write_bytes(magic + data)
    with pytest.raises(secateur.InvalidStatistics):
        Statistics.from_imatrix(path, lambda name: name)


def test_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_old(tmp_path / "file", {"output.weight": (-1, [1.0])})
    with pytest.raises(secateur.InvalidStatistics, match=r"output.weight: count 0 is -1.0"):
        Statistics.from_imatrix(path)
    one = old_bytes({"output.weight": (1, [1.0])})
    path.write_bytes(struct.pack("<i", 2) + 2 * one[4:])
    with pytest.raises(secateur.InvalidStatistics, match=r"output.weight: is in the file twice"):
        Statistics.from_imatrix(path)
    with pytest.raises(secateur.InvalidStatistics, match="No such file"):
        Statistics.from_imatrix(tmp_path / "none")
    gguf = write_gguf(tmp_path / "gguf", sums("output.weight", 1, [1.0]))
    with pytest.raises(
        secateur.InvalidStatistics, match=r"is a GGUF file; read it with Statistics"
    ):
        Statistics.load(gguf)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(secateur.SecateurError, match=r"needs gguf: pip install 'secateur\[gguf\]'"):
        Statistics.from_imatrix(gguf)
