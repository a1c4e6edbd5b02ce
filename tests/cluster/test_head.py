"""The head of the cluster is lost, and starts again: the server goes on, and joins it again."""

import random
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from secateur_server.cut.drivers.ray import Ray
from secateur_server.errors import ClusterFailed
from secateur_server.runtime.context import RequestContext
from tests.cluster import tasks
from tests.cluster.conftest import NODE, Counts
from tests.cluster.divided import WORK_MEMORY, write_files
from tests.cluster.test_ray import in_thread
from tests.conftest import eventually
from tests.contract.raw import check_serves, series
from tests.uris.served import Served, check, serving

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]


class Head:
    """The only node of a cluster, which can be lost and started again."""

    def __init__(self) -> None:
        self.port = _free_port()
        self.start()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def start(self) -> None:
        from ray.cluster_utils import Cluster

        ours = {**NODE, "include_dashboard": False, "gcs_server_port": self.port}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=ours)

    def lose_node(self) -> None:
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)

    def lose_control(self) -> None:
        """Ends the process that controls the cluster. The node still runs for a while."""
        self._cluster.head_node.kill_gcs_server()

    def stop(self) -> None:
        self._cluster.shutdown()


def _free_port() -> int:
    """A port that stays free while the head is lost: no outgoing connection gets one of these."""
    while True:
        port = random.randrange(20_000, 30_000)
        with suppress(OSError), socket.create_server(("", port)):
            return port


@pytest.fixture
def head() -> Iterator[Head]:
    pytest.importorskip("ray", reason="pip install 'secateur[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        made = Head()
        yield made
        made.stop()


def fails(served: Served, uri: str) -> bool:
    """Whether a call fails as one that has no cluster."""
    found = served.read(uri)
    if found is not None:
        check(found, "UNAVAILABLE", "CLUSTER_FAILED", "Ray cluster")
    return found is not None


def is_healthy(served: Served) -> bool:
    probe = health_pb2_grpc.HealthStub(served.channel).Check(health_pb2.HealthCheckRequest())
    return bool(probe.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.parametrize("lose", [Head.lose_node, Head.lose_control])
def test_a_server_survives_its_cluster(
    head: Head, tmp_path: Path, lose: Callable[[Head], None]
) -> None:
    uri = write_files(tmp_path / "model", [{"a": torch.ones(8)}, {"b": torch.zeros(8)}])
    options = ("--allow-path", str(tmp_path), "--ray-address", head.address)
    with serving(*options) as served:
        assert served.read(uri) is None
        lose(head)
        eventually(lambda: series(served.server, "secateur_ray_cores"), 0.0)
        assert fails(served, uri)
        check_serves(served.server, served.channel)
        assert is_healthy(served)
        head.stop()
        head.start()
        eventually(lambda: series(served.server, "secateur_ray_cores"), 1.0)
        assert not fails(served, uri)
        check_serves(served.server, served.channel)


def test_a_call_ends_when_the_cluster_does(head: Head, tmp_path: Path) -> None:
    driver = Ray.at(head.address, WORK_MEMORY, Counts())
    try:
        thread, ended = in_thread(
            lambda: driver.map(RequestContext(), tasks.hang_deeply, [tmp_path])
        )
        eventually(lambda: len(list(tmp_path.iterdir())), 1)
        head.lose_control()
        thread.join()
        assert isinstance(ended[0], ClusterFailed), ended
        with pytest.raises(ClusterFailed, match="no Ray cluster answers"):
            driver.map(RequestContext(), tasks.square, [1])
    finally:
        driver.close()
