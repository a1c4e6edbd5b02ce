"""Grafana's dashboard: its file, its panels and their queries."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import RunningServer, eventually
from tests.deploy.promql import (
    OWN,
    get,
    names_in,
    needs_prometheus,
    prometheus,
    records,
    served_names,
)

PATH = Path("deploy/grafana/dashboards/secateur.json")
PROVISIONED = Path("deploy/grafana/provisioning")


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(PATH.read_text())
    return loaded


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    """Returns the queries as Grafana sends them, with its variables filled in."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    found += [annotation["expr"] for annotation in dashboard()["annotations"]["list"]]
    filled = {"$__rate_interval": "1m", "$job": "secateur", "$instance": ".+"}
    for name, value in filled.items():
        found = [query.replace(name, value) for query in found]
    assert not any("$" in query for query in found)
    return found


def test_the_file_is_formatted() -> None:
    text = json.dumps(dashboard(), indent=2, sort_keys=True, ensure_ascii=False)
    assert PATH.read_text() == text + "\n"


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_has_a_title_a_description_and_a_unit(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_panels_have_unique_ids_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        columns, rows = range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert max(columns) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_data_source_is_the_provisioned_one() -> None:
    (source,) = yaml.safe_load((PROVISIONED / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert set(re.findall(r'"uid": "(\w+)"', PATH.read_text())) == {source["uid"], "secateur"}
    (provider,) = yaml.safe_load((PROVISIONED / "dashboards/secateur.yml").read_text())["providers"]
    assert (
        f"{PATH.parent}:{provider['options']['path']}:ro" in Path("docker-compose.yml").read_text()
    )


def test_metrics_in_panels_exist(server: RunningServer) -> None:
    named = set().union(*map(names_in, queries()))
    assert "secateur_stage_seconds_bucket" in named
    assert named - served_names(server) - records() - OWN == set()


def test_every_metric_is_in_a_panel(server: RunningServer) -> None:
    named = set().union(*map(names_in, queries()))
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in named}
    alerted = {"grpc_server_started_total"}
    served = {re.sub(r"_(bucket|sum|count)$", "", name) for name in served_names(server)}
    ratios = "\n".join(path.read_text() for path in Path("deploy/prometheus/rules").iterdir())
    ours = {name for name in served if name.startswith(("secateur_", "grpc_"))}
    assert {name for name in ours - shown - alerted if name not in ratios} == set()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus without targets, which parses queries."""
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "prometheus.yml").write_text("global: {}\n")
    with prometheus(folder) as address:
        eventually(lambda: get(address, "query", query="1") is not None, True)
        yield address


@needs_prometheus
def test_prometheus_accepts_the_queries_of_panels_and_runbooks(asked: str) -> None:
    blocks = re.findall(r"```promql\n(.*?)```", Path("docs/operations.md").read_text(), re.DOTALL)
    runbooks = [line for block in blocks for line in block.splitlines()]
    assert runbooks
    for query in queries() + runbooks:
        assert get(asked, "query", query=query) is not None


def test_metrics_in_runbooks_exist(server: RunningServer) -> None:
    blocks = re.findall(r"```promql\n(.*?)```", Path("docs/operations.md").read_text(), re.DOTALL)
    assert names_in("\n".join(blocks)) - served_names(server) - records() == set()
