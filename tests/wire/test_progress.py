"""Calls on checkpoints and URIs report their progress, and end when they are cancelled."""

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur_proto import pruner_pb2 as pb
from secateur_proto.checkpoint_pb2 import PHASE_PRUNE, PHASE_READ, PHASE_WRITE, Progress
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_proto.spec_pb2 import PruningSpec
from tests.conftest import RunningServer, caught, eventually
from tests.contract.raw import check_serves, failure, header, message, series, spec
from tests.uris.served import Served, saved, serving

ELEMENTS = 40 << 20  # 160 MiB
RULES = 16  # a second of pruning and more, on what is left each time


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("progress")
    halves = torch.randn(ELEMENTS).chunk(2)
    saved(folder / "model.safetensors", {f"w{i}": part.clone() for i, part in enumerate(halves)})
    pairs = {"w0_orig": halves[0].clone(), "w0_mask": (halves[0] > 0).float()}
    saved(folder / "pairs.safetensors", pairs)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def served(root: Path, store: Path) -> Iterator[Served]:
    with serving("--allow-path", str(root), "--store-dir", str(store)) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_is_left(served: Served, root: Path, store: Path) -> Iterator[None]:
    yield
    assert sorted(os.listdir(root)) == ["model.safetensors", "pairs.safetensors"]
    assert not os.listdir(store / "parts")
    check_serves(served.server, served.channel)


def slow_spec() -> PruningSpec:
    rule = spec("*", scope=2, fraction=0.05).rules
    return PruningSpec(rules=[*rule] * RULES)


def begin(served: Served, root: Path, rpc: str, timeout: float = 300, **fields: Any) -> Any:
    """A call from a file to a file that takes some seconds."""
    name = "pairs" if rpc == "Finalize" else "model"
    fields.setdefault("uri", (root / f"{name}.safetensors").as_uri())
    if rpc != "Report":
        fields.setdefault("destination_uri", (root / "out.safetensors").as_uri())
    if rpc == "Prune":
        fields = {"spec": slow_spec(), "output": pb.OUTPUT_DENSE, **fields}
    first = message(rpc, header=header(rpc, 0, **fields))
    stub = PrunerStub(served.channel)
    if rpc == "Report":
        return stub.Report.future(iter([first]), timeout=timeout)
    return getattr(stub, rpc)(iter([first]), timeout=timeout)


def check_progress(progress: list[Progress], size: int) -> None:
    """What a caller may rely on."""
    shares = [found.share for found in progress]
    read = [found.read_bytes for found in progress]
    phases = [found.phase for found in progress]
    assert shares == sorted(shares)
    assert read == sorted(read)
    assert phases == sorted(phases)
    assert set(phases) <= {PHASE_READ, PHASE_PRUNE, PHASE_WRITE}
    assert 0 <= shares[0] <= shares[-1] <= 1
    assert read[-1] <= size


@pytest.mark.parametrize("source", ["uri", "checkpoint"])
def test_prune_reports_its_progress(served: Served, root: Path, source: str) -> None:
    path = root / "model.safetensors"
    fields: dict[str, Any] = {}
    if source == "checkpoint":
        fields = {"uri": None, "checkpoint": served.client.upload(path.as_uri()).name}
    *progress, result = begin(served, root, "Prune", **fields)
    assert result.HasField("result")
    assert not any(found.data or found.HasField("result") for found in progress)
    told = [found.progress for found in progress]
    check_progress(told, path.stat().st_size)
    after_reading = [found for found in told if found.phase > PHASE_READ]
    assert after_reading, "it was too fast to be seen"
    assert {found.read_bytes for found in after_reading} == {path.stat().st_size}
    (root / "out.safetensors").unlink()


def test_call_with_its_model_reports_no_progress(served: Served) -> None:
    data = {"w": torch.randn(4 << 20)}
    seen: list[tuple[int, int]] = []
    served.client.prune(data, secateur.l1_unstructured("w", 0.5), progress=_into(seen))
    assert {total for _, total in seen} != {1000}


def _into(seen: list[tuple[int, int]]) -> Any:
    return lambda done, total: seen.append((done, total))


@pytest.mark.parametrize("to_file", [True, False])
def test_a_function_is_called_with_parts_of_1000(served: Served, root: Path, to_file: bool) -> None:
    seen: list[tuple[int, int]] = []
    source, target = ((root / f"{name}.safetensors").as_uri() for name in ("model", "out"))
    rules = secateur.Spec(secateur.global_unstructured("*", 0.05).rules * RULES)
    served.client.prune(
        source, rules, progress=_into(seen), destination=target if to_file else None
    )
    done = [done for done, _ in seen]
    assert done == sorted(set(done))
    assert done[-1] == 1000
    assert len(done) > 1
    assert {total for _, total in seen} == {1000}
    (root / "out.safetensors").unlink(missing_ok=not to_file)


# Leaving -------------------------------------------------------------------------------------


def cpu_ticks(server: RunningServer) -> int:
    """What a server's threads have used of CPUs."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def started(served: Served, rpc: str) -> float:
    return series(served.server, "grpc_server_started_total", grpc_method=rpc)


def check_idle(served: Served) -> None:
    """A call is over soon after its caller left, and nobody works on."""
    in_flight = "secateur_requests_in_flight"
    eventually(lambda: series(served.server, in_flight), 0.0)
    before = cpu_ticks(served.server)
    threading.Event().wait(0.5)
    assert cpu_ticks(served.server) - before <= 5, "in hundredths of a second"


@pytest.mark.parametrize("rpc", ["Prune", "Report", "Finalize"])
@pytest.mark.parametrize("moment", range(3))
def test_cancellation_ends_the_work(served: Served, root: Path, rpc: str, moment: int) -> None:
    after = random.Random(f"{rpc}{moment}").uniform(0, 0.3 if rpc != "Prune" else 1.0)
    before = started(served, rpc)
    call = begin(served, root, rpc)
    eventually(lambda: started(served, rpc), before + 1)
    threading.Event().wait(after)
    call.cancel()
    check_idle(served)
    (root / "out.safetensors").unlink(missing_ok=True)  # a Finalize may have been faster


@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.8])
def test_a_deadline_ends_the_work(served: Served, root: Path, seconds: float) -> None:
    found = failure(list, begin(served, root, "Prune", timeout=seconds))
    assert found is not None
    assert found.code == grpc.StatusCode.DEADLINE_EXCEEDED
    check_idle(served)


def test_cancellation_ends_the_matching_of_globs(served: Served) -> None:
    uploaded = served.client.upload({f"w{i}": torch.ones(1) for i in range(20_000)})
    (rule,) = spec("*").rules
    rule.selection.tensors[:] = [f"w{i}*" for i in range(2000)]
    first = header("Prune", 0, spec=PruningSpec(rules=[rule]), checkpoint=uploaded.name)
    call = PrunerStub(served.channel).Prune(iter([message("Prune", header=first)]), timeout=300)
    assert next(call).HasField("progress")
    call.cancel()
    check_idle(served)
    served.client.delete(uploaded)


def test_disconnection_ends_the_work(served: Served, root: Path) -> None:
    own = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(served.server.address, own) as channel:
        call = begin(Served(served.server, channel, served.client), root, "Prune")
        assert next(call).HasField("progress")
    check_idle(served)


def test_cancelled_write_leaves_the_old_file(served: Served, root: Path) -> None:
    target = root / "out.safetensors"

    def begun() -> Any:
        target.write_bytes(b"before")
        return begin(served, root, "Prune", spec=spec("w0", fraction=0.5))

    call = caught(begun, lambda: len(list(root.glob(".*.unfinished"))) == 1)
    call.cancel()
    check_idle(served)
    assert target.read_bytes() == b"before"
    target.unlink()


def test_cancelled_kept_prune_leaves_no_checkpoint(served: Served, root: Path, store: Path) -> None:
    before = list(served.client.checkpoints())

    def begun() -> Any:
        for made in set(served.client.checkpoints()) - set(before):
            served.client.delete(made)
        fields: dict[str, Any] = {"destination_uri": "", "output": pb.OUTPUT_MASKS}
        return begin(served, root, "Prune", keep=True, **fields)

    call = caught(begun, lambda: len(os.listdir(store / "parts")) == 1)
    call.cancel()
    check_idle(served)
    assert list(served.client.checkpoints()) == before


def test_cancellation_does_not_affect_other_calls(served: Served, root: Path) -> None:
    calls = [
        begin(served, root, "Prune", destination_uri=place)
        for place in ((root / "out.safetensors").as_uri(), (root / "other.safetensors").as_uri())
    ]
    assert next(calls[0]).HasField("progress")
    calls[0].cancel()
    *_, result = calls[1]
    assert result.HasField("result")
    assert load_file(root / "other.safetensors").keys() == {"w0", "w1"}
    (root / "other.safetensors").unlink()
