"""Calls of a server that works in a real cluster, and what they leave when processes are lost."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur as s
from secateur_proto import pruner_pb2 as pb
from secateur_proto import spec_pb2
from secateur_proto.checkpoint_pb2 import PHASE_READ, PHASE_WAIT, PHASE_WRITE, Progress
from secateur_proto.pruner_pb2_grpc import PrunerStub
from tests.cluster.conftest import NODE
from tests.cluster.divided import INDEX, finalized, outcome, split, write_files
from tests.cluster.test_ray import in_thread
from tests.conftest import PATIENCE, RunningServer, eventually, inner_server
from tests.contract import raw
from tests.contract.raw import check_serves, series
from tests.contract.test_golden import check
from tests.uris.served import Served, connected
from tests.uris.served import check as check_failure

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

HALF = s.global_unstructured("*", 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def server(cluster: Any, folder: Path) -> Iterator[RunningServer]:
    options = ("--allow-path", str(folder), "--ray-address", cluster.address)
    with inner_server(*options, "--work-memory", "64MiB") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[s.Client]:
    with s.Client(server.address, timeout=PATIENCE) as connected:
        yield connected


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    """The URI of 8 files of 32 MB."""
    numbers = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(2048, 4096, generator=numbers) for i in range(8)}
    return write_files(folder / "model", split(tensors, 8))


@pytest.fixture(scope="module")
def local(folder: Path) -> Iterator[s.Client]:
    """A client of a server without a cluster."""
    with (
        inner_server("--allow-path", str(folder)) as server,
        s.Client(server.address, timeout=PATIENCE) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def expected(folder: Path, model: str, local: s.Client) -> dict[str, Any]:
    """What a server without a cluster makes of the model."""
    return outcome(local, model, HALF, "dense", folder / "expected")


def test_results_are_golden(client: s.Client, folder: Path) -> None:
    (folder / "golden").mkdir()
    check("uris", client, folder / "golden")


def test_a_report_and_a_prune_are_those_of_one_server(
    client: s.Client, folder: Path, model: str, expected: dict[str, Any]
) -> None:
    assert outcome(client, model, HALF, "dense", folder / "found") == expected


RAILS: dict[str, Any] = {"max_sparsity": 0.55, "keep_first": True, "exclude": "w3"}


@pytest.mark.parametrize("allocation", ["rank", "lamp"])
def test_rules_with_bounds_are_those_of_one_server(
    client: s.Client, folder: Path, model: str, local: s.Client, allocation: Any
) -> None:
    spec = s.select("*", 0.3, scope="global", allocation=allocation, guard_rails=RAILS)
    found, expected = (
        outcome(of, model, spec, "masks", folder / f"{allocation}-{name}")
        for name, of in (("found", client), ("expected", local))
    )
    assert found == expected
    spec += s.select("*", 0.2, scope="global", normalization="z_score")
    amounts = [0.1, 0.5, 1000]
    assert client.plan(model, spec, amounts) == local.plan(model, spec, amounts)


def test_shrunk_and_finalized_models_are_those_of_one_server(
    client: s.Client, folder: Path, model: str, local: s.Client
) -> None:
    groups = [
        s.group(f"rows{i}", s.member(f"w{i}"), s.member(f"w{i + 1}"), s.member(f"w{i + 2}"))
        for i in (0, 3)
    ]
    shrink = s.grouped(groups, 0.3)
    found, expected = (
        outcome(of, model, shrink, "shrunk", folder / f"shrunk-{name}")
        for name, of in (("found", client), ("expected", local))
    )
    assert found == expected
    pruned = folder / "finalize" / "reparametrized"
    outcome(local, model, HALF, "reparametrized", pruned.parent)
    found, expected = (
        finalized(of, f"{pruned.as_uri()}/{INDEX}", "packed", folder / f"final-{name}")
        for name, of in (("found", client), ("expected", local))
    )
    assert found == expected


def busy() -> list[int]:
    """The processes of the cluster that do a task."""
    found = []
    for path in Path("/proc").iterdir():
        with suppress(OSError):
            if path.name.isdigit() and (path / "cmdline").read_bytes().startswith(
                b"ray::_work_on_node"
            ):
                found.append(int(path.name))
    return found


@contextmanager
def killing(most: float) -> Iterator[Callable[[], int]]:
    """Kills processes that do tasks, up to so many. Yields a function that counts them."""
    ended, killed = threading.Event(), set[int]()

    def kill() -> None:
        while not ended.wait(0.005) and len(killed) < most:
            for process in set(busy()[:1]) - killed:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                    killed.add(process)

    thread = threading.Thread(target=kill)
    thread.start()
    yield lambda: len(killed)
    ended.set()
    thread.join()


def test_progress_never_falls(server: RunningServer, folder: Path, model: str) -> None:
    (folder / "progress").mkdir()
    first = asked(model, f"{(folder / 'progress').as_uri()}/{INDEX}")
    with connected(server) as served:
        answers = list(PrunerStub(served.channel).Prune(iter([first]), timeout=PATIENCE))
    *shown, result = answers
    assert result.HasField("result")
    shares = [answer.progress.share for answer in shown]
    assert shares == sorted(shares)
    phases = [answer.progress.phase for answer in shown]
    assert phases == sorted(phases, key=[PHASE_WAIT, PHASE_READ, PHASE_WRITE].index)


def asked(source: str, destination: str) -> Any:
    """The message of a Prune."""
    fields = {"uri": source, "destination_uri": destination, "output": pb.OUTPUT_DENSE}
    rule = raw.spec("*", scope=spec_pb2.SCOPE_GLOBAL)
    return raw.message("Prune", header=raw.header("Prune", 0, spec=rule, **fields))


@contextmanager
def cancelled(served: Served, first: Any, is_there: Callable[[Progress], bool]) -> Iterator[None]:
    """Cancels a call when a message of its progress is right. No task runs after the block."""
    call = PrunerStub(served.channel).Prune(iter([first]), timeout=PATIENCE)
    assert any(is_there(answer.progress) for answer in call), "the call ended before"
    eventually(lambda: bool(busy()), True)
    begin = time.monotonic()
    call.cancel()
    yield
    eventually(busy, [])
    print(f"no task {time.monotonic() - begin:.2f} s after the cancellation")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.8])
def test_cancelled_calls_end(server: RunningServer, folder: Path, model: str, share: float) -> None:
    target = folder / f"cancelled-{share}"
    target.mkdir()
    first = asked(model, f"{target.as_uri()}/{INDEX}")
    with connected(server) as served:
        with cancelled(served, first, lambda progress: progress.share >= share):
            eventually(lambda: list(target.iterdir()), [])
        check_serves(server, served.channel)


def test_a_killed_process_changes_no_bit(
    client: s.Client, folder: Path, model: str, expected: dict[str, Any]
) -> None:
    with killing(2) as count:
        for attempt in range(20):
            found = outcome(client, model, HALF, "dense", folder / f"killed-{attempt}")
            assert found == expected
            if count() == 2:
                return
    raise AssertionError("no process was caught at work")


def test_a_lost_node_changes_no_bit(
    cluster: Any,
    server: RunningServer,
    client: s.Client,
    folder: Path,
    model: str,
    expected: dict[str, Any],
) -> None:
    node = cluster.add_node(**NODE)
    eventually(lambda: series(server, "secateur_ray_cores"), 3.0)
    for attempt in range(20):
        target = folder / f"node-{attempt}"
        thread, ended = in_thread(partial(outcome, client, model, HALF, "dense", target))
        eventually(lambda thread=thread: len(busy()) == 3 or not thread.is_alive(), True)  # type: ignore[misc]
        is_caught = thread.is_alive()
        if is_caught:
            cluster.remove_node(node, allow_graceful=False)
        thread.join()
        assert ended == [expected]
        if is_caught:
            return
    raise AssertionError("the node was not caught at work")


def test_a_cluster_that_loses_all_work_leaves_nothing(
    server: RunningServer, folder: Path, model: str
) -> None:
    (folder / "lost").mkdir()
    with connected(server) as served, killing(float("inf")):
        # One file, since each loss takes the start of another process.
        file = "model-0.safetensors"
        found = served.write(model.replace(INDEX, file), f"{(folder / 'lost').as_uri()}/{file}")
    check_failure(found, "UNAVAILABLE", "CLUSTER_FAILED", "lost a task each of")
    assert not list((folder / "lost").iterdir())
