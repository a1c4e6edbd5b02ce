"""The layouts of compressed-tensors, read by their definition and by its last release for them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import secateur
from secateur import cli
from tests.client.sharded import INDEX, write_shards
from tests.client.test_cli import failure
from tests.conftest import examples
from tests.reference import BITS, distinct, same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["sparse-bitmask", "sparse-24-bitmask"]


def pack(source: Path, out: Path, layout: str) -> Path:
    assert cli.main(["pack", str(source), "-o", str(out), "--layout", layout]) == 0
    return out


def decompressed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reads both layouts by their definition, in plain loops."""
    found = {}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        if part == "compressed":
            parts = (tensors.get(f"{base}.{part}") for part in ("shape", "bitmask", "row_offsets"))
            found[f"{base}.weight"] = _weight(tensor, *(p.tolist() for p in parts if p is not None))
        elif f"{base}.bitmask" not in tensors or part == "bias":
            found[name] = tensor
    return found


def _weight(
    values: Tensor, shape: list[Any], bitmask: list[list[int]], offsets: list[int] | None = None
) -> Tensor:
    rows, columns = np.ravel(shape)
    bits = values.view(BITS[values.element_size()])
    left, dense = bits.reshape(-1).tolist(), []
    for row in range(rows):
        assert offsets is None or offsets[row] == values.numel() - len(left)
        flags = [bitmask[row][column // 8] >> column % 8 & 1 for column in range(columns)]
        dense.append([left.pop(0) if flag else 0 for flag in flags])
    assert left == []
    return torch.tensor(dense, dtype=bits.dtype).view(values.dtype)


def without_signs(weight: Tensor) -> Tensor:
    """-0.0 becomes 0.0; other bits are kept."""
    bits = weight.view(BITS[weight.element_size()])
    return torch.where(weight == 0, torch.zeros_like(bits), bits).view(weight.dtype)


@examples(50)
@given(
    rows=st.integers(1, 9),
    fours=st.integers(6, 12),
    dtype=st.sampled_from(DTYPES),
    share=st.floats(0.5, 1),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_is_what_the_layout_defines(
    tmp_path_factory: pytest.TempPathFactory,
    layout: str,
    rows: int,
    fours: int,
    dtype: torch.dtype,
    share: float,
    seed: int,
) -> None:
    weight = distinct((12 * rows, 4 * fours), dtype, seed)
    of_four = distinct((12 * rows * fours, 4), seed=seed).argsort(1).argsort(1)
    weight *= (of_four < 2).view(weight.shape) & (distinct(weight.shape, seed=seed + 1) < 3 * share)
    folder = tmp_path_factory.mktemp("bitmask")
    rest = {"fc.bias": torch.ones(3), "embed.weight": torch.zeros(40, 40)}
    save_file({"fc.weight": weight, **rest}, folder / "d.safetensors")
    stored = load_file(pack(folder / "d.safetensors", folder / "p.safetensors", layout))
    assert "fc.weight" not in stored
    found = decompressed(stored)
    assert found.keys() == {"fc.weight", *rest}
    expected = {"fc.weight": weight if "24" in layout else without_signs(weight), **rest}
    if "24" in layout:  # signs of zeros that fill a group of four are kept, of others not
        assert torch.equal(found.pop("fc.weight"), expected.pop("fc.weight"))
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())


def test_dense_weights_stay_and_a_config_lists_them(tmp_path: Path) -> None:
    folder, weight = tmp_path / "in", distinct((32, 32))
    folder.mkdir()
    sparse = weight * (torch.arange(32) % 4 < 2)
    tensors = {"a.weight": sparse, "b.weight": weight, "embed.weight": weight, "b.bias": weight[0]}
    save_file({name: t.clone() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    for layout, structure in zip(LAYOUTS, ("unstructured", "2:4"), strict=True):
        out = pack(folder, tmp_path / layout, layout)
        assert json.loads((out / "config.json").read_text()) == {
            "model_type": "bert",
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "sparsity_config": {
                    "format": layout,
                    "sparsity_structure": structure,
                    "targets": ["Linear"],
                    "ignore": ["b"],
                },
            },
        }
        stored = load_file(out / "model.safetensors")
        assert {"b.weight", "embed.weight", "b.bias", "a.compressed"} <= stored.keys()
    assert (folder / "config.json").read_text() == '{"model_type": "bert"}'


def test_shards_name_the_parts_in_their_index(tmp_path: Path) -> None:
    weights = {f"{n}.weight": distinct((32, 32), seed=n) for n in range(6)}
    sparse = {name: weight * (torch.arange(32) % 4 < 2) for name, weight in weights.items()}
    sparse["classifier.weight"] = distinct((8, 8))
    write_shards(tmp_path / "in", sparse)
    out = pack(tmp_path / "in", tmp_path / "out", "sparse-bitmask")
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    stored = {file: load_file(out / file) for file in set(weight_map.values())}
    tied = {"decoder.weight"}
    assert {(n, f) for f, tensors in stored.items() for n in tensors} == {
        item for item in weight_map.items() if item[0] not in tied
    }
    found = decompressed({n: t for tensors in stored.values() for n, t in tensors.items()})
    assert all(torch.equal(found[name], weight) for name, weight in sparse.items())


def test_a_model_without_zeros_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "m.safetensors"
    save_file({"fc.weight": distinct((16, 16))}, model)
    for layout in LAYOUTS:
        said = failure(capsys, "pack", model, "-o", tmp_path / "o.safetensors", "--layout", layout)
        assert f"is smaller as {layout}" in said
        assert "prune the model first" in said


def test_a_name_that_a_part_needs_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "m.safetensors"
    save_file({"fc.weight": torch.zeros(64, 64), "fc.bitmask": torch.ones(2)}, model)
    layout = ["--layout", "sparse-bitmask"]
    said = failure(capsys, "pack", model, "-o", tmp_path / "o.safetensors", *layout)
    assert "fc.bitmask: fc.weight needs this name" in said


READER = """
import sys, torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import SparsityCompressionConfig
from safetensors.torch import load_file, save_file
folder, layout = sys.argv[1:]
config = SparsityCompressionConfig.load_from_registry(layout)
compressor = BaseCompressor.load_from_registry(layout, config=config)
save_file(dict(compressor.decompress(f"{folder}/packed")), f"{folder}/read.safetensors")
dense = load_file(f"{folder}/dense/model.safetensors")
ours = load_file(f"{folder}/packed/model.safetensors")
names = {n.removesuffix("compressed") + "weight" for n in ours if n.endswith(".compressed")}
save_file(compressor.compress({n: dense[n] for n in names}), f"{folder}/theirs.safetensors")
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with compressed-tensors 0.14.0.1, the last release that reads the layouts."""
    folder = tmp_path_factory.mktemp("release")
    packages = ["compressed-tensors==0.14.0.1", "transformers==4.57.6", "tokenizers==0.22.2"]
    packages += ["huggingface_hub<1", "loguru", "psutil", "pydantic", "regex", "tqdm"]
    packages += ["requests", "hf-xet", "annotated-types", "pydantic-core", "typing-inspection"]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    ended = subprocess.run([*command, *packages], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_release_reads_ours_bit_for_bit(
    client: secateur.Client, release: Path, tmp_path: Path, crepe: Path, layout: str
) -> None:
    """What they read has our bits but for signs of zeros, and they write what we wrote."""
    convolutions = torch.load(crepe, weights_only=True)
    weights = {n: t.flatten(1).contiguous() for n, t in convolutions.items() if t.dim() > 1}
    spec = secateur.n_m_structured("*") if "24" in layout else secateur.l1_unstructured("*", 0.6)
    for name, dtype in (("dense", torch.float32), ("half", torch.bfloat16)):
        folder = tmp_path / name
        (folder / "dense").mkdir(parents=True)
        model = {name: weight.to(dtype) for name, weight in weights.items()}
        client.prune(model, spec).save(folder / "dense/model.safetensors")
        pack(folder / "dense", folder / "packed", layout)
        command = [sys.executable, "-c", READER, str(folder), layout]
        environment = {**os.environ, "PYTHONPATH": str(release), "HF_HUB_OFFLINE": "1"}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        read, dense = load_file(folder / "read.safetensors"), secateur.load(folder / "dense")
        assert read.keys() == dense.keys()
        for key, tensor in dense.items():
            assert same_bits(without_signs(read[key]), without_signs(tensor)), key
        theirs, ours = (
            load_file(folder / "theirs.safetensors"),
            load_file(folder / "packed/model.safetensors"),
        )
        assert theirs.keys() <= ours.keys()
        assert len(theirs) >= 3 * len(weights) - 3
        if "24" not in layout:  # theirs fills groups of four in any order
            assert all(same_bits(ours[name], tensor) for name, tensor in theirs.items())
        assert np.all([ours[name].shape == tensor.shape for name, tensor in theirs.items()])
