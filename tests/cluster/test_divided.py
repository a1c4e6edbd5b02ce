"""The work on files of a model gives the bits of one server, whatever the files are."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import secateur as s
from secateur.amounts import encode_amounts
from secateur_proto import pruner_pb2 as pb
from secateur_server.backends import batches
from secateur_server.cut.allocation import lamp, lamp_windows
from secateur_server.cut.drivers.ray import Ray
from tests.cluster.divided import InProcess, finalized, outcome, split, write_files
from tests.conftest import PATIENCE, RunningServer, examples, inner_server
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
    "rails": s.select("m*.weight", 0.2, guard_rails={"max_sparsity": 0.8}),
    "rows": s.ln_structured("m*.weight", 0.3, 2, 0),
    "global rows": s.select("m*.weight", 0.3, s.magnitude(2), s.slices(0), "global"),
    "2:4": s.n_m_structured("m*.weight"),
    "global 2:4": s.select("m*.weight", 1.0, s.magnitude(1), s.n_m(), "global"),
    "row": s.select("m*.weight", 0.3, scope="row"),
    "threshold": s.select(EVERY, s.threshold(0.5)),
    "twice": s.l1_unstructured(EVERY, 0.2) + s.global_unstructured(EVERY, 0.3),
    "global twice": s.global_unstructured("m*.weight", 0.2) + s.global_unstructured(EVERY, 0.3),
}
RAILS: dict[str, Any] = {
    "max_sparsity": 0.5,
    "keep_first": True,
    "exclude": "m2*",
    "per_tensor": {
        "m5*": s.rail(min_sparsity=0.3, max_sparsity=0.35),
        "m*": s.rail(keep_at_least=3, min_sparsity=0.1),
    },
}
OPERATIONS = {f"m{i}.weight": 0.1 + i for i in (0, 2, 3, 4, 5, 9)}
# Every other tensor is in another file than the one before.
ACROSS = {
    "rails": s.select(EVERY, 0.4, scope="global", guard_rails=RAILS),
    "isomorphic rails": s.select("m*.weight", 0.3, scope="isomorphic", guard_rails=RAILS),
    "rails and rows": s.select(
        "m*.weight", 0.4, s.magnitude(2), s.slices(0), "global", guard_rails={"max_sparsity": 0.5}
    ),
    "rails and 2:4": s.select(
        "m*.weight", 0.4, s.magnitude(1), s.n_m(), "global", guard_rails={"max_sparsity": 0.5}
    ),
    "too much for rails": s.select(EVERY, 0.9, scope="global", guard_rails=RAILS),
    "too little for rails": s.select(EVERY, 0.1, scope="global", guard_rails={"min_sparsity": 0.2}),
    "too many": s.global_unstructured(EVERY, 10_000),
    "threshold": s.select(EVERY, s.threshold(0.7), scope="global"),
    "threshold between rails": s.select(EVERY, s.threshold(0.7), scope="global", guard_rails=RAILS),
    "bytes": s.select(EVERY, s.target_bytes(2000), scope="global"),
    "bytes of rows": s.select(
        "m*.weight", s.target_bytes(1500), s.magnitude(2), s.slices(0), "global"
    ),
    "operations": s.select("m*.weight", s.target_macs(1234.5, OPERATIONS), scope="global"),
    "uniform": s.select(EVERY, 0.4, scope="global", allocation="uniform", guard_rails=RAILS),
    "erk": s.erk(EVERY, 0.4),
    "erk of all": s.select(EVERY, 0.6, scope="global", allocation="erk", of_all=True),
    "lamp": s.lamp(EVERY, 0.4),
    "lamp between rails": s.select(
        EVERY, 0.4, scope="global", allocation="lamp", guard_rails=RAILS
    ),
    "lamp of rows": s.select(
        "m*.weight", 0.4, s.magnitude(2), s.slices(0), "isomorphic", "norm", "lamp"
    ),
    "mean": s.select(EVERY, 0.4, scope="global", normalization="mean"),
    "norm": s.select(
        "m*.weight", 0.4, s.magnitude(1), s.slices(0), "isomorphic", normalization="norm"
    ),
    "z-scores": s.select(EVERY, 0.4, scope="global", normalization="z_score"),
    "z-scores below": s.select(
        EVERY, s.threshold(-0.3), scope="global", normalization="z_score", guard_rails=RAILS
    ),
    "random between rails": s.select(EVERY, 0.4, s.random(2), scope="global", guard_rails=RAILS),
    "twice": s.select(EVERY, 0.2, scope="global", guard_rails=RAILS) + s.erk("m*.weight", 0.3),
}
FAILING = {f"across: too {what}" for what in ("much for rails", "little for rails", "many")}
# What needs more of the other files than summaries is left to the server.
UNDIVIDED = {"owl": s.select("m*.weight", 0.4, allocation="owl")}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as made:
        yield Path(made)


@pytest.fixture(scope="module")
def local_server(folder: Path) -> Iterator[RunningServer]:
    with inner_server("--allow-path", str(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def local(local_server: RunningServer) -> Iterator[s.Client]:
    with s.Client(local_server.address, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def cluster() -> InProcess:
    return InProcess()


@pytest.fixture(scope="module")
def divided_server(folder: Path, cluster: InProcess) -> Iterator[RunningServer]:
    """A server with a cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ray, "at", lambda *_: cluster)
        with inner_server("--allow-path", str(folder), "--ray-address", "auto") as server:
            yield server


@pytest.fixture(scope="module")
def divided(divided_server: RunningServer) -> Iterator[s.Client]:
    with s.Client(divided_server.address, timeout=PATIENCE) as client:
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
    st.sampled_from(["", "tensors", "units"]),  # of which there are many
)
FEW: dict[str, list[Any]] = {"": [], "tensors": [batches], "units": [lamp, lamp_windows]}


ALL = SPECS | {f"across: {name}": spec for name, spec in ACROSS.items()}


@pytest.mark.parametrize("method", ALL)
@examples(12)
@given(cases)
def test_files_give_the_bits_of_one_server(
    folder: Path, local: s.Client, divided: s.Client, method: str, case: tuple[object, ...]
) -> None:
    seed, has_ties, dtype, count, output, prior, few = case
    with TemporaryDirectory(dir=folder) as made, pytest.MonkeyPatch.context() as patch:
        for module in FEW[few]:  # type: ignore[index]
            patch.setattr(module, "FEW", 4)
        files = files_of(model(seed, has_ties, dtype), count)  # type: ignore[arg-type]
        uri = write_files(Path(made) / "in", files)
        expected, found = (
            outcome(client, uri, ALL[method], output, Path(made) / name, prior=prior)
            for name, client in (("local", local), ("divided", divided))
        )
    assert found == expected


@pytest.mark.parametrize("tensors", [None, "m2*", ["m9.weight", "v*"], "none"])
@examples(20)
@given(cases, st.sampled_from(["dense", "packed"]))
def test_finalized_files_have_the_bits_of_one_server(
    folder: Path,
    local: s.Client,
    divided: s.Client,
    cluster: InProcess,
    tensors: Any,
    case: tuple[object, ...],
    output: str,
) -> None:
    seed, has_ties, dtype, count, *_ = case
    cluster.tasks.clear()
    with TemporaryDirectory(dir=folder) as made:
        files = files_of(model(seed, has_ties, dtype), count)  # type: ignore[arg-type]
        uri = write_files(Path(made) / "in", files)
        expected, found = (
            finalized(client, uri, output, Path(made) / name, tensors=tensors)
            for name, client in (("local", local), ("divided", divided))
        )
    assert found == expected
    assert ("error" in found) == (tensors == "none")
    assert ("finalize_file" in cluster.tasks) == ("error" not in found)


AMOUNTS = {"": [], "many": [0.5, 0.0, 7, 0.05, 1.0, 0.3, 0.5], "too many": [0.3, 10_000]}


@pytest.mark.parametrize("method", [*ALL, *UNDIVIDED])
@examples(8)
@given(cases, st.sampled_from(list(AMOUNTS)))
def test_a_plan_of_files_has_the_bytes_of_one_server(
    folder: Path,
    local_server: RunningServer,
    divided_server: RunningServer,
    method: str,
    case: tuple[object, ...],
    amounts: str,
) -> None:
    seed, has_ties, dtype, count, _, prior, few = case
    spec = {**ALL, **UNDIVIDED}[method]
    with TemporaryDirectory(dir=folder) as made, pytest.MonkeyPatch.context() as patch:
        for module in FEW[few]:  # type: ignore[index]
            patch.setattr(module, "FEW", 4)
        files = files_of(model(seed, has_ties, dtype), count)  # type: ignore[arg-type]
        uri = write_files(Path(made) / "in", files)
        expected, found = (
            planned(server, uri, spec, AMOUNTS[amounts], prior == "zeros")
            for server in (local_server, divided_server)
        )
    assert found == expected


def planned(
    server: RunningServer, uri: str, spec: s.Spec, amounts: list[float], has_zeros: bool
) -> bytes | str:
    """The bytes of a plan, or the error."""
    header = pb.PlanHeader(
        uri=uri,
        spec=spec.encode(())[0],
        amounts=encode_amounts(amounts) if amounts else [],
        prior=pb.PRIOR_ZEROS if has_zeros else pb.PRIOR_MASKS,
    )
    with grpc.insecure_channel(server.address) as channel:
        call: Any = channel.stream_unary(
            "/secateur.v1.Pruner/Plan", pb.PlanRequest.SerializeToString
        )
        try:
            return bytes(call(iter([pb.PlanRequest(header=header)]), timeout=PATIENCE))
        except grpc.RpcError as error:
            return str(error.details())


@pytest.mark.parametrize("method", [*ALL, *UNDIVIDED])
def test_what_needs_other_files_is_left_to_the_server(
    folder: Path, local: s.Client, divided: s.Client, cluster: InProcess, method: str
) -> None:
    cluster.tasks.clear()
    with TemporaryDirectory(dir=folder) as made:
        uri = write_files(Path(made) / "in", files_of(model(0, False, torch.float32), 3))
        spec = {**ALL, **UNDIVIDED}[method]
        expected, found = (
            outcome(client, uri, spec, "dense", Path(made) / name)
            for name, client in (("local", local), ("divided", divided))
        )
    assert found == expected
    worked = {"prune_file", "summarize"} & set(cluster.tasks)
    assert bool(worked) == (method not in UNDIVIDED)
    assert ("error" in found) == (method in FAILING)


@examples(20)
@given(
    st.sampled_from(["m0.weight", "m3.weight", "v6.weight"]),
    st.sampled_from([float("nan"), float("inf")]),
    st.sampled_from(["m0.weight", "v1.weight", "m5.weight"]),
    st.sampled_from([of for of in ACROSS if not of.startswith("too")]),
)
def test_bad_scores_are_the_errors_of_one_server(
    folder: Path,
    local_server: RunningServer,
    divided_server: RunningServer,
    nan: str,
    other: float,
    at: str,
    method: str,
) -> None:
    tensors = model(0, False, torch.float32)
    tensors[nan].view(-1)[5] = float("nan")
    tensors[at].view(-1)[3] = other
    with TemporaryDirectory(dir=folder) as made:
        uri = write_files(Path(made) / "in", files_of(tensors, 3))
        expected, found = (
            planned(server, uri, ACROSS[method], [], has_zeros=False)
            for server in (local_server, divided_server)
        )
    assert found == expected


@pytest.mark.parametrize("are_beside", [True, False])
def test_scales_are_read_where_their_tensors_are(
    folder: Path, local: s.Client, divided: s.Client, cluster: InProcess, are_beside: bool
) -> None:
    cluster.tasks.clear()
    numbers = torch.Generator().manual_seed(0)
    tensors = [
        {f"conv{i}": torch.randn(9, 4, generator=numbers), f"norm{i}": torch.randn(9)}
        for i in range(3)
    ]
    files = tensors if are_beside else split({k: v for of in tensors for k, v in of.items()}, 4)
    scales = {f"conv{i}": f"norm{i}" for i in range(3)}
    spec = s.select("conv*", 0.4, s.magnitude(1), s.slices(0), "global", scales=scales)
    with TemporaryDirectory(dir=folder) as made:
        uri = write_files(Path(made) / "in", files)
        expected, found = (
            outcome(client, uri, spec, "dense", Path(made) / name)
            for name, client in (("local", local), ("divided", divided))
        )
    assert found == expected
    assert "error" not in found
    assert ("prune_file" in cluster.tasks) == are_beside


def test_results_of_files_are_golden(divided: s.Client, folder: Path, cluster: InProcess) -> None:
    cluster.tasks.clear()
    check("uris", divided, folder)
    assert {"measure_file", "prune_file", "_each"} <= set(cluster.tasks)


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
    assert [task for task, _ in cluster.crossed].count("_each") == passes * 4
    assert max(size for _, size in cluster.crossed) <= 2 << 20


def test_few_bytes_cross_for_many_tensors(
    divided_server: RunningServer, folder: Path, cluster: InProcess
) -> None:
    numbers = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(1 << 12, generator=numbers) for i in range(600)}
    spec = s.select("*", 0.5, scope="global", guard_rails={"max_sparsity": 0.6})
    cluster.crossed.clear()
    with TemporaryDirectory(dir=folder) as made:
        uri = write_files(Path(made) / "in", split(tensors, 2))
        planned(divided_server, uri, spec, [0.1, 0.2, 0.3, 0.4, 0.5], has_zeros=False)
    assert len(cluster.crossed) < 40
    assert max(size for _, size in cluster.crossed) <= 2 << 20
