"""The work on files of a model gives the bits of one server, whatever the files are."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import secateur as s
from secateur_server.cut.drivers.ray import Ray
from tests.cluster.divided import InProcess, outcome, split, write_files
from tests.conftest import PATIENCE, examples, inner_server
from tests.contract.test_golden import check

EVERY = "*.weight"

SPECS = {
    "global": s.global_unstructured(EVERY, 0.5),
    "global count": s.global_unstructured(EVERY, 7),
    "global random": s.global_unstructured(EVERY, 0.3, "random", seed=3),
    "isomorphic": s.select(EVERY, 0.4, scope="isomorphic"),
    "of all": s.select(EVERY, 0.6, scope="global", of_all=True),
    "all": s.global_unstructured(EVERY, 1.0),
    "none": s.global_unstructured(EVERY, 0.0),
    "tensor": s.l1_unstructured(EVERY, 0.4),
    "rails": s.select(EVERY, 0.4, guard_rails={"max_sparsity": 0.3, "keep_first": True}),
    "rows": s.ln_structured("m*.weight", 0.3, 2, 0),
    "global rows": s.select("m*.weight", 0.3, s.magnitude(2), s.slices(0), "global"),
    "2:4": s.n_m_structured("m*.weight"),
    "global 2:4": s.select("m*.weight", 1.0, s.magnitude(1), s.n_m(), "global"),
    "row": s.select("m*.weight", 0.3, scope="row"),
    "threshold": s.select(EVERY, s.threshold(0.5)),
    "twice": s.l1_unstructured(EVERY, 0.2) + s.global_unstructured(EVERY, 0.3),
    "global twice": s.global_unstructured("m*.weight", 0.2) + s.global_unstructured(EVERY, 0.3),
}
# What needs more of the other files than summaries is left to the server.
UNDIVIDED = {
    "lamp": s.lamp(EVERY, 0.4),
    "erk": s.erk(EVERY, 0.4),
    "global threshold": s.select(EVERY, s.threshold(0.5), scope="global"),
    "normalized": s.select(EVERY, 0.4, scope="global", normalization="norm"),
    "global rails": s.select(EVERY, 0.4, scope="global", guard_rails={"max_sparsity": 0.5}),
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
    """A client of a server with a cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ray, "at", lambda *_: cluster)
        with (
            inner_server("--allow-path", str(folder), "--ray-address", "auto") as server,
            s.Client(server.address, timeout=PATIENCE) as client,
        ):
            yield client


def model(seed: int, has_ties: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    tensors = {
        f"{'m' if len(shape) > 1 else 'v'}{i}.weight": torch.randn(shape, generator=numbers)
        for i, shape in enumerate([(16, 24), (8,), (5, 8), (16, 24), (0, 4), (12, 40), (300,)])
    }
    if has_ties:
        tensors = {name: of.mul(2).round() for name, of in tensors.items()}
    made = {name: of.to(dtype) for name, of in tensors.items()}
    made["m9.weight_orig"] = torch.randn(9, 16, generator=numbers).to(dtype)
    made["m9.weight_mask"] = (torch.rand(9, 16, generator=numbers) > 0.4).to(dtype)
    made["steps"] = torch.arange(3)
    return made


def files_of(tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Files, with the pair in one of them."""
    pair = {name: tensors.pop(name) for name in list(tensors) if name.startswith("m9")}
    files = split(tensors, count)
    files[-1] |= pair
    return files


cases = st.tuples(
    st.integers(0, 1000),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(1, 6),
    st.sampled_from(["none", "masks", "dense", "reparametrized", "packed"]),
    st.sampled_from(["masks", "zeros"]),
)


@pytest.mark.parametrize("method", SPECS)
@examples(25)
@given(cases)
def test_files_give_the_bits_of_one_server(
    folder: Path, local: s.Client, divided: s.Client, method: str, case: tuple[object, ...]
) -> None:
    seed, has_ties, dtype, count, output, prior = case
    with TemporaryDirectory(dir=folder) as made:
        files = files_of(model(seed, has_ties, dtype), count)  # type: ignore[arg-type]
        uri = write_files(Path(made) / "in", files)
        expected, found = (
            outcome(client, uri, SPECS[method], output, Path(made) / name, prior=prior)
            for name, client in (("local", local), ("divided", divided))
        )
    assert found == expected


@pytest.mark.parametrize("method", [*SPECS, *UNDIVIDED])
def test_what_needs_other_files_is_left_to_the_server(
    folder: Path, local: s.Client, divided: s.Client, cluster: InProcess, method: str
) -> None:
    cluster.tasks.clear()
    with TemporaryDirectory(dir=folder) as made:
        uri = write_files(Path(made) / "in", files_of(model(0, False, torch.float32), 3))
        spec = {**SPECS, **UNDIVIDED}[method]
        expected, found = (
            outcome(client, uri, spec, "dense", Path(made) / name)
            for name, client in (("local", local), ("divided", divided))
        )
    assert found == expected
    assert ("prune_file" in cluster.tasks) == (method in SPECS)


def test_results_of_files_are_golden(divided: s.Client, folder: Path, cluster: InProcess) -> None:
    cluster.tasks.clear()
    check("uris", divided, folder)
    assert {"measure_file", "prune_file", "_count_digits"} <= set(cluster.tasks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_bytes_cross_for_a_pass(
    divided: s.Client, folder: Path, cluster: InProcess, dtype: torch.dtype
) -> None:
    numbers = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(1 << 20, generator=numbers).to(dtype) for i in range(4)}
    cluster.crossed.clear()
    with TemporaryDirectory(dir=folder) as made:
        uri = write_files(Path(made) / "in", split(tensors, 4))
        outcome(divided, uri, s.global_unstructured("*", 0.5), "dense", Path(made) / "out")
    passes = {torch.float32: 2, torch.bfloat16: 1}[dtype]
    assert [task for task, _ in cluster.crossed].count("_count_digits") == passes * 4
    assert max(size for _, size in cluster.crossed) <= 2 << 20
