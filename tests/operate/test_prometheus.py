"""A real Prometheus, with the rules of the compose file, scrapes a real server under load."""

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import secateur
from tests.conftest import RunningServer, eventually, start_server, stop_server
from tests.deploy.promql import (
    ask,
    get,
    metrics_of,
    needs_prometheus,
    needs_promtool,
    prometheus,
    records,
)

MODEL = {"w": np.arange(1, 9, dtype=np.float32).reshape(2, 4)}
HALF = secateur.l1_unstructured("w", 0.5)
PRUNED_OK = (
    'grpc_server_handled_total{job="secateur",instance="%s",grpc_method="Prune",grpc_code="OK"}'
)


@pytest.fixture(scope="module")
def loaded() -> Iterator[RunningServer]:
    """A server under a load of good and bad calls."""
    running = start_server()
    with secateur.Client(running.address) as client, load(client):
        yield running
    stop_server(running)


@contextmanager
def load(client: secateur.Client) -> Iterator[None]:
    ended = threading.Event()
    failed: list[Exception] = []

    def call() -> None:
        while not ended.wait(0.02):
            try:
                client.delete(client.upload(MODEL))
                client.report(client.prune(MODEL, HALF).state_dict("dense"))
                with pytest.raises(secateur.InvalidSpec):
                    client.prune(MODEL, secateur.l1_unstructured("v", 0.5))
            except Exception as error:
                failed.append(error)
                return

    caller = threading.Thread(target=call)
    caller.start()
    try:
        yield
    finally:
        ended.set()
        caller.join()
    assert not failed, failed


@pytest.fixture(scope="module")
def asked(loaded: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus with the configuration that compose mounts, but the address of this server."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = Path("deploy/prometheus/prometheus.yml").read_text()
    config = config.replace("secateur:9464", loaded.metrics_address).replace("15s", "1s")
    (folder / "prometheus.yml").write_text(config)
    shutil.copytree("deploy/prometheus/rules", folder / "rules")
    with prometheus(folder) as address:
        query = PRUNED_OK % loaded.metrics_address
        eventually(lambda: len(ask(address, query) or []), 1)
        yield address


@needs_promtool
def test_promtool_accepts_the_metrics(loaded: RunningServer) -> None:
    text = metrics_of(loaded).encode()
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


@needs_prometheus
def test_prometheus_sees_the_servers_counts(asked: str, loaded: RunningServer) -> None:
    eventually(lambda: ask(asked, f"{PRUNED_OK % loaded.metrics_address} > 1") != [], True)
    (wrong,) = ask(asked, 'secateur_rejected_requests_total{reason="INVALID_SPEC"}') or []
    assert wrong > 0
    assert ask(asked, 'count(up{job="secateur"} == 1)') == [1]


@needs_prometheus
@pytest.mark.parametrize("name", sorted(records()))
def test_a_recording_rule_has_a_value(asked: str, name: str) -> None:
    eventually(lambda: len(ask(asked, f'{name}{{job="secateur"}}') or []), 1)


@needs_prometheus
def test_errors_of_callers_do_not_count_as_failures(asked: str) -> None:
    eventually(lambda: ask(asked, "secateur:calls_failed:ratio_rate5m"), [0.0])
    eventually(lambda: ask(asked, "secateur:reports_slow:ratio_rate5m"), [0.0])


@needs_prometheus
def test_no_alert_fires_under_ordinary_load(asked: str) -> None:
    eventually(lambda: len(ask(asked, "secateur:store:ratio") or []), 1)
    found = get(asked, "rules")
    assert found is not None
    rules = [rule for group in found["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    firing = [rule["name"] for rule in rules if rule.get("state") == "firing"]
    assert firing == []
