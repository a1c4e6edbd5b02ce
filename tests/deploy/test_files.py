"""The files of a deployment, checked by the programs that use them."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import RunningServer, start_server, stop_server
from tests.deploy.options import variables
from tests.deploy.promql import needs_promtool

DOCKERFILE = Path("deploy/Dockerfile").read_text()

needs_compose = pytest.mark.skipif(
    shutil.which("docker-compose") is None, reason="no docker-compose: make system"
)


def compose(profile: str) -> dict[str, Any]:
    """Returns the services of a profile, parsed by compose."""
    command = ["docker-compose", "--profile", profile, "config"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    services = yaml.safe_load(ended.stdout)["services"]
    of_profile = {name: each for name, each in services.items() if profile in each["profiles"]}
    assert of_profile
    return of_profile


@needs_compose
@pytest.mark.parametrize(("profile", "server"), [("cpu", "server"), ("gpu", "server-gpu")])
def test_compose_accepts_the_file(profile: str, server: str) -> None:
    assert set(compose(profile)) == {server, "prometheus", "grafana"}


@needs_compose
@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_containers_are_restricted_and_listen_only_on_this_machine(profile: str) -> None:
    for name, service in compose(profile).items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(str(port).startswith("127.0.0.1:") for port in service["ports"])


@needs_compose
@pytest.mark.parametrize(("profile", "name"), [("cpu", "server"), ("gpu", "server-gpu")])
def test_a_server_has_a_memory_limit_a_probe_and_a_grace_period(profile: str, name: str) -> None:
    server = compose(profile)[name]
    assert server["user"] == "10001:10001"
    assert server["mem_limit"] == "8g"
    assert server["healthcheck"]["test"] == ["CMD", "python3", "/opt/secateur/healthcheck.py"]
    assert server["stop_grace_period"] == "40s"
    assert {key for key in server["environment"] if "SECATEUR" in key} <= variables()


@needs_compose
def test_the_image_of_each_profile_has_torch_for_its_device() -> None:
    cpu, gpu = compose("cpu")["server"], compose("gpu")["server-gpu"]
    assert cpu["build"]["args"] == {"TORCH_INDEX_URL": "https://download.pytorch.org/whl/cpu"}
    assert gpu["build"]["args"] == {"TORCH_INDEX_URL": ""}  # only PyPI
    assert cpu["image"] != gpu["image"]
    assert "ARG TORCH_INDEX_URL" in DOCKERFILE


@needs_promtool
def test_promtool_accepts_the_configuration() -> None:
    command = ["promtool", "check", "config", "deploy/prometheus/prometheus.yml"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_alerts_do_not_have_the_label_of_the_runbook() -> None:
    text = Path("deploy/prometheus/prometheus.yml").read_text()
    config = yaml.safe_load(
        text.replace("# external_labels:", "external_labels:").replace("#   r", "  r")
    )
    (label,) = config["global"]["external_labels"]
    assert label == "runbook"
    (relabel,) = config["alerting"]["alert_relabel_configs"]
    assert relabel == {"action": "labeldrop", "regex": label}


def test_hadolint_finds_no_problem() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    ended = subprocess.run([hadolint, "deploy/Dockerfile"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_the_image_runs_as_an_unprivileged_user() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.+)$", final, re.MULTILINE) == ["10001:10001"]
    assert final.index("USER 10001") < final.index("ENTRYPOINT")


def test_the_image_does_not_set_insecure() -> None:
    instructions = re.sub(r"^#.*$", "", DOCKERFILE, flags=re.MULTILINE)
    baked = set(re.findall(r"SECATEUR_\w+(?==)", instructions))
    assert baked <= variables() - {"SECATEUR_INSECURE"}


def probe(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "deploy/healthcheck.py", *arguments]
    variables = {**os.environ, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("service", [(), ("liveness",)], ids=str)
def test_the_healthcheck_fails_without_a_server(
    server: RunningServer, service: tuple[str, ...]
) -> None:
    ended = probe(*service, SECATEUR_ADDRESS=server.address)
    assert ended.returncode == 0, ended.stderr
    ended = probe(*service, SECATEUR_ADDRESS="0.0.0.0:1")
    assert ended.returncode != 0
    assert "UNAVAILABLE" in ended.stderr


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for a name that no probe uses; its CA and its key are in the same folder."""
    folder = tmp_path_factory.mktemp("tls")
    (folder / "ext").write_text("subjectAltName=DNS:*.pruning.example\n")
    make = ["openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=ca"]
    make += ["openssl req -newkey rsa:2048 -nodes -keyout key.pem -out csr.pem -subj /CN=server"]
    make += ["openssl x509 -req -in csr.pem -CA ca.pem -CAkey ca.key -extfile ext -out cert.pem"]
    for command in make:
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem"


@pytest.fixture(params=[False, True], ids=["tls", "mutual tls"])
def with_tls(certificate: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The environment variables of a server with TLS that needs tokens."""
    files = {"TLS_CERT": certificate, "TLS_KEY": certificate.with_name("key.pem")}
    if request.param:
        files["TLS_CLIENT_CA"] = certificate.with_name("ca.pem")
    tokens = certificate.with_name("tokens.toml")
    tokens.write_text('[tenants.somebody]\ntokens = ["of somebody else"]\n')
    options = [f"--{name.lower().replace('_', '-')}={path}" for name, path in files.items()]
    running = start_server(*options, f"--tokens-file={tokens}")
    variables = {f"SECATEUR_{name}": str(path) for name, path in files.items()}
    yield {"SECATEUR_ADDRESS": running.address, **variables}
    stop_server(running)


def test_the_healthcheck_works_with_tls(with_tls: dict[str, str]) -> None:
    ended = probe(**with_tls)
    assert ended.returncode == 0, ended.stderr
