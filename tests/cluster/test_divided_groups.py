"""Groups whose members are in several files give the bits of one server."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import secateur as s
from secateur_server.cut.drivers.ray import Ray
from tests.cluster.divided import InProcess, finalized, outcome, split, write_files
from tests.conftest import PATIENCE, examples, inner_server

LAYERS, UNITS, SIZE = 3, 12, 8
GROUPS = [
    s.group(
        f"layer{i}",
        s.member(f"{i}.up.weight"),
        s.member(f"{i}.up.bias"),
        s.member(f"{i}.norm.steps", masked=False),
        s.member(f"{i}.down.weight", dim=1),
    )
    for i in range(LAYERS)
]
EVERY = "*.weight"
SPECS = {
    "global": s.grouped(GROUPS, 0.4),
    "isomorphic": s.grouped(GROUPS, 0.3, scope="isomorphic"),
    "each": s.grouped(GROUPS, 0.3, scope="tensor"),
    "count": s.grouped(GROUPS, 7),
    "aligned": s.grouped(GROUPS, 0.4, align=4),
    "rails": s.grouped(GROUPS, 0.5, guard_rails={"max_sparsity": 0.6, "exclude": "layer1"}),
    "normalized": s.grouped(GROUPS, 0.4, normalization="norm"),
    "maximum": s.grouped(GROUPS, 0.4, combination="max"),
    "random": s.grouped(GROUPS, 0.4, importance=s.random(3)),
    "all": s.grouped(GROUPS, 1.0),
    "none": s.grouped(GROUPS, 0.0),
    "too many": s.grouped(GROUPS, 10_000),
    "after elements": s.global_unstructured(EVERY, 0.5) + s.grouped(GROUPS, 0.3),
    "before elements": s.grouped(GROUPS, 0.3) + s.global_unstructured(EVERY, 0.5),
    "twice": s.grouped(GROUPS, 0.2) + s.grouped(GROUPS, 0.2),
}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as made:
        yield Path(made)


@pytest.fixture(scope="module")
def local(folder: Path) -> Iterator[s.Client]:
    with (
        inner_server("--allow-path", str(folder)) as server,
        s.Client(server.address, timeout=PATIENCE) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def cluster() -> InProcess:
    return InProcess()


@pytest.fixture(scope="module")
def divided(folder: Path, cluster: InProcess) -> Iterator[s.Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ray, "at", lambda *_: cluster)
        options = ("--allow-path", str(folder), "--ray-address", "auto")
        with (
            inner_server(*options) as server,
            s.Client(server.address, timeout=PATIENCE) as client,
        ):
            yield client


def model(seed: int, has_ties: bool, dtype: torch.dtype, has_masks: bool) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    tensors = {"head.weight": torch.randn(4, SIZE, generator=numbers)}
    for i in range(LAYERS):
        tensors[f"{i}.up.weight"] = torch.randn(UNITS, SIZE, generator=numbers)
        tensors[f"{i}.up.bias"] = torch.randn(UNITS, generator=numbers)
        tensors[f"{i}.norm.steps"] = torch.randn(UNITS, generator=numbers)
        tensors[f"{i}.down.weight"] = torch.randn(SIZE, UNITS, generator=numbers)
    if has_ties:
        tensors = {name: of.mul(2).round() for name, of in tensors.items()}
    if has_masks:
        for name in [f"0.{of}" for of in ("up.weight", "up.bias", "down.weight")]:
            along = 1 if "down" in name else 0
            zeros = torch.arange(UNITS) % 3 == seed % 3
            tensors[name] = tensors[name].masked_fill(
                zeros.view([-1 if dim == along else 1 for dim in range(tensors[name].dim())]), 0
            )
    return {name: of.to(dtype) for name, of in tensors.items()}


cases = st.tuples(
    st.integers(0, 1000),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.booleans(),
)


@pytest.mark.parametrize("method", SPECS)
@examples(12)
@given(
    cases,
    st.integers(1, 7),
    st.sampled_from(["shrunk", "shrunk", "dense", "masks", "none"]),
    st.sampled_from(["masks", "zeros"]),
)
def test_groups_across_files_have_the_bits_of_one_server(
    folder: Path,
    local: s.Client,
    divided: s.Client,
    cluster: InProcess,
    method: str,
    case: Any,
    count: int,
    output: str,
    prior: str,
) -> None:
    cluster.tasks.clear()
    with TemporaryDirectory(dir=folder) as made:
        uri = write_files(Path(made) / "in", split(model(*case), count))
        expected, found = (
            outcome(client, uri, SPECS[method], output, Path(made) / name, prior=prior)
            for name, client in (("local", local), ("divided", divided))
        )
    assert found == expected
    assert ("error" in found) == (method == "too many")
    assert "read_members" in cluster.tasks
    assert ("prune_file" in cluster.tasks) == ("error" not in found)


@examples(60)
@given(cases, st.integers(1, 7), st.sampled_from(["masks", "zeros"]), st.booleans())
def test_a_finalized_model_shrinks_to_the_bits_of_one_server(
    folder: Path,
    local: s.Client,
    divided: s.Client,
    cluster: InProcess,
    case: Any,
    count: int,
    prior: str,
    has_pairs: bool,
) -> None:
    cluster.tasks.clear()
    tensors = model(*case)
    with TemporaryDirectory(dir=folder) as made:
        files = split(tensors, count)
        if has_pairs:
            for file in files:
                for name in [name for name in file if name.startswith("0.")]:
                    weight = file.pop(name)
                    file |= {f"{name}_orig": weight, f"{name}_mask": (weight != 0).to(weight)}
        uri = write_files(Path(made) / "in", files)
        expected, found = (
            finalized(client, uri, "shrunk", Path(made) / name, groups=GROUPS, prior=prior)
            for name, client in (("local", local), ("divided", divided))
        )
    assert found == expected
    assert "error" not in found
    assert "finalize_file" in cluster.tasks


def test_nan_in_a_member_is_the_error_of_one_server(
    folder: Path, local: s.Client, divided: s.Client
) -> None:
    tensors = model(0, False, torch.float32, False)
    tensors["1.down.weight"][2, 3] = torch.nan
    with TemporaryDirectory(dir=folder) as made:
        uri = write_files(Path(made) / "in", split(tensors, 5))
        expected, found = (
            outcome(client, uri, SPECS["global"], "shrunk", Path(made) / name)
            for name, client in (("local", local), ("divided", divided))
        )
    assert found == expected
    assert "1.down.weight" in found["error"]
