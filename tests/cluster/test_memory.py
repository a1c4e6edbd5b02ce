"""Nodes that run out of memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cluster.conftest import NODE
from tests.cluster.divided import INDEX, split, write_files
from tests.conftest import inner_server
from tests.uris.served import check, connected

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]


@pytest.fixture
def full() -> Iterator[str]:
    """The address of a cluster whose node ends each task, as its memory is full by its account."""
    pytest.importorskip("ray", reason="pip install 'secateur[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_memory_usage_threshold", "0.01")
        patch.setenv("RAY_memory_monitor_refresh_ms", "20")
        node = {**NODE, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=node)
        yield str(made.address)
        made.shutdown()


def test_tasks_that_ray_ends_for_their_memory_end_the_call(full: str, tmp_path: Path) -> None:
    numbers = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(2048, 4096, generator=numbers) for i in range(2)}
    model = write_files(tmp_path / "model", split(tensors, 2))
    target = tmp_path / "out"
    target.mkdir()
    options = ("--allow-path", str(tmp_path), "--ray-address", full)
    with inner_server(*options) as server, connected(server) as served:
        found = served.write(model, f"{target.as_uri()}/{INDEX}")
    check(found, "RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ran out of memory each of 4 times")
    assert not list(target.iterdir())
