"""The driver on a real cluster: its results, its errors, and what it does when tasks are lost."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from secateur_server.cut.drivers import Task
from secateur_server.cut.drivers.ray import RETRIES
from secateur_server.errors import Cancelled, ClusterFailed, NanScores, OutOfMemory, QueueFull
from secateur_server.runtime.context import RequestContext
from tests.cluster import tasks
from tests.cluster.conftest import NODE, Joined
from tests.conftest import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]


def test_results_are_in_order(joined: Joined) -> None:
    found = joined.driver.map(RequestContext(), tasks.square, range(20))
    assert found == [number * number for number in range(20)]


def test_the_first_piece_that_fails_counts(joined: Joined) -> None:
    with pytest.raises(NanScores, match="piece 1"):
        joined.driver.map(RequestContext(), tasks.fail, range(10))


def test_errors_arrive_whole(joined: Joined) -> None:
    with pytest.raises(QueueFull, match="full") as found:
        joined.driver.map(RequestContext(), tasks.refuse, [0])
    assert (found.value.field, found.value.retry_after) == ("call", 7.0)
    for number in (0, 1):
        with pytest.raises(OutOfMemory):
            joined.driver.map(RequestContext(), tasks.run_out, [number])


def test_a_task_whose_process_dies_is_repeated(joined: Joined, tmp_path: Path) -> None:
    before = joined.counts.found["repeated"]
    assert joined.driver.map(RequestContext(), tasks.die_first, [tmp_path]) == [1]
    assert joined.counts.found["repeated"] == before + 1


def test_a_task_that_always_dies_ends_the_call(joined: Joined, tmp_path: Path) -> None:
    with pytest.raises(ClusterFailed, match=f"lost a task each of {RETRIES + 1} times"):
        joined.driver.map(RequestContext(), tasks.die_always, [tmp_path])
    assert len(list(tmp_path.iterdir())) == RETRIES + 1


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Does work in a thread, which adds the result or the error to the list."""
    ended: list[object] = []

    def run() -> None:
        try:
            ended.append(work())
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended


@pytest.mark.parametrize("task", [tasks.hang, tasks.hang_deeply])
def test_tasks_of_a_cancelled_call_end(
    joined: Joined, tmp_path: Path, task: Task[Path, None]
) -> None:
    context = RequestContext()
    thread, ended = in_thread(lambda: joined.driver.map(context, task, [tmp_path] * 3))
    eventually(lambda: len(list(tmp_path.iterdir())), 2)
    processes = [Path("/proc", path.name) for path in tmp_path.iterdir()]
    context.cancel()
    thread.join()
    assert isinstance(ended[0], Cancelled)
    # The processes too: what an interruption left in one may be wrong, such as half of a module.
    eventually(lambda: [process for process in processes if process.exists()], [])


def test_tasks_know_the_deadline(joined: Joined, tmp_path: Path) -> None:
    context = RequestContext(deadline=time.monotonic() + 0.5)
    with pytest.raises(Cancelled):
        joined.driver.map(context, tasks.hang, [tmp_path])


def test_tasks_of_a_lost_node_are_repeated_on_another(joined: Joined, tmp_path: Path) -> None:
    node = joined.cluster.add_node(**NODE)
    # Each core has a task, so the new node has one of those that hang.
    thread, ended = in_thread(
        lambda: joined.driver.map(RequestContext(), tasks.hang_at, [(tmp_path, node.node_id)] * 6)
    )
    eventually(lambda: (tmp_path / node.node_id).exists(), True)
    joined.cluster.remove_node(node, allow_graceful=False)
    thread.join()
    assert isinstance(ended[0], list), ended
    assert node.node_id not in ended[0]
