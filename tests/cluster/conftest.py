"""A Ray cluster of two nodes on this machine."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from secateur_server.cut.drivers.ray import Ray
from tests.cluster.divided import WORK_MEMORY

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20, "memory": 1 << 30}


class Counts(dict[str, Any]):
    """What a driver counts."""

    def __init__(self) -> None:
        self.found = dict.fromkeys(
            ("finished", "failed", "cancelled", "repeated", "sent", "received"), 0.0
        )
        super().__init__({name: self._adder(name) for name in self.found})

    def _adder(self, name: str) -> Any:
        def add(amount: float) -> None:
            self.found[name] += amount

        return add


@dataclass(frozen=True)
class Joined:
    """A cluster, and a driver of it."""

    cluster: Any
    driver: Ray
    counts: Counts


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray", reason="pip install 'secateur[ray]'")
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    made: Any = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    made.add_node(**NODE)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def joined(cluster: Any) -> Iterator[Joined]:
    counts = Counts()
    driver = Ray.at(cluster.address, WORK_MEMORY, counts)
    yield Joined(cluster, driver, counts)
    driver.close()
