"""How a server joins a cluster, and how it does not start without one."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from secateur_server.cut.drivers.link import NoCluster
from secateur_server.cut.drivers.ray import Ray
from tests.conftest import eventually, run_command, start_command, start_server, stop_server


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(NoCluster, match=r"pip install 'secateur\[ray\]'"):
        Ray.at("auto", 1 << 20, {})


@pytest.mark.cluster
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "auto"])
def test_a_server_does_not_start_without_its_cluster(address: str) -> None:
    found = run_command("--address", "127.0.0.1:0", "--ray-address", address, RAY_ADDRESS="")
    assert found.returncode == 1
    assert f"(--ray-address): no Ray cluster answers at '{address}'" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.cluster
@pytest.mark.filterwarnings("default")
def test_a_server_in_a_cluster_drains_at_sigterm(cluster: Any) -> None:
    """Ray installs handlers of signals, which would abort the process."""
    logged = stop_server(start_command("--ray-address", cluster.address))
    assert "stopped" in logged


@pytest.mark.cluster
@pytest.mark.filterwarnings("default")
def test_no_process_outlives_a_killed_server(cluster: Any) -> None:
    server = start_server("--ray-address", cluster.address)
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    assert children
    server.process.kill()
    eventually(lambda: [child for child in children.split() if Path("/proc", child).exists()], [])
    server.process.wait()
    shutil.rmtree(server.log.parent)
