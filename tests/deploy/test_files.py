"""The files of a deployment, read by the programs that will read them."""

import re
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest

from tests.conftest import RunningServer

needs_compose = pytest.mark.skipif(
    shutil.which("docker-compose") is None, reason="no docker-compose: make system"
)
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool: make system"
)


@needs_compose
@pytest.mark.parametrize(("profile", "server"), [("cpu", "server"), ("gpu", "server-gpu")])
def test_compose_takes_the_file(profile: str, server: str) -> None:
    command = ["docker-compose", "--profile", profile, "config", "--services"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert {server, "prometheus"} <= set(ended.stdout.split())


@needs_promtool
def test_promtool_takes_the_configuration() -> None:
    command = ["promtool", "check", "config", "deploy/prometheus/prometheus.yml"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_image_runs_as_nobody_in_particular() -> None:
    dockerfile = Path("deploy/Dockerfile").read_text()
    final = dockerfile.rpartition("\nFROM ")[2]
    users = re.findall(r"^USER (\w+)$", final, re.MULTILINE)
    assert users == ["secateur"]
    assert final.index("USER secateur") < final.index("ENTRYPOINT")


def test_the_healthcheck_tells_a_server_from_none(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = Path("deploy/healthcheck.py").read_text()
    monkeypatch.setenv("SECATEUR_ADDRESS", server.address)
    with pytest.raises(SystemExit) as ended:
        exec(code, {})
    assert not ended.value.code
    monkeypatch.setenv("SECATEUR_ADDRESS", "0.0.0.0:1")
    with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
        exec(code, {})
