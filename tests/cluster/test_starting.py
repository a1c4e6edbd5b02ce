"""How a server joins a cluster, and how it does not start without one."""

import sys
from typing import Any

import pytest

from secateur_server.cut.drivers.link import NoCluster
from secateur_server.cut.drivers.ray import Ray
from tests.conftest import run_command, start_command, stop_server


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
