"""Prometheus's rules: their metrics exist, and each alert fires when it should."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from secateur_server import errors
from tests.conftest import RunningServer
from tests.deploy.promql import (
    OWN,
    RULES,
    alerts,
    names_in,
    needs_promtool,
    records,
    rules,
    served_names,
)

TESTS = sorted(Path("deploy/prometheus/tests").glob("*.yml"))


def promtool(*arguments: str) -> str:
    ended = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@needs_promtool
def test_promtool_finds_every_rule() -> None:
    found = re.findall(r"SUCCESS: (\d+) rules found", promtool("check", "rules", *map(str, RULES)))
    assert len(found) == len(RULES)
    assert sum(map(int, found)) == len(rules()) > 0


@needs_promtool
@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_the_tests_of_the_alerts_pass(path: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", str(path))


def test_each_alert_has_a_test_that_it_fires_and_one_that_it_does_not() -> None:
    seen: dict[str, set[bool]] = {}
    for path in TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for case in test.get("promql_expr_test", ()):
                for name in re.findall(r'^ALERTS\{alertname="(\w+)"', case["expr"]):
                    seen.setdefault(name, set()).add(bool(case["exp_samples"]))
    assert seen == {alert["alert"]: {True, False} for alert in alerts()}


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_has_a_severity_a_description_and_a_runbook(
    alert: dict[str, dict[str, str]],
) -> None:
    annotations = alert["annotations"]
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert all(text.strip() == text for text in annotations.values())
    page = "{{ with $externalLabels.runbook }}{{ . }}{{ else }}docs/operations.md{{ end }}"
    assert annotations["runbook_url"] == f"{page}#{str(alert['alert']).lower()}"


def test_metrics_in_rules_exist(server: RunningServer) -> None:
    named = set().union(*(names_in(rule["expr"]) for rule in rules()))
    assert "secateur_rejected_requests_total" in named
    assert named - served_names(server) - records() - OWN == set()


def test_recorded_rules_are_used_by_an_alert_or_the_dashboard() -> None:
    dashboard = Path("deploy/grafana/dashboards/secateur.json").read_text()
    used = set().union(*(names_in(rule["expr"]) for rule in rules()))
    assert {name for name in records() - used if name not in dashboard} == set()


def test_excluded_reasons_are_counted_as_failures() -> None:
    """Else the ratio of failed calls would be too low."""
    reasons = {kind.reason: kind.status for kind in kinds(errors.RequestError)}
    (taken_off,) = {
        match
        for rule in rules()
        for match in re.findall(r'rejected_requests_total\{reason=~"([^"]+)"', rule["expr"])
    }
    assert {reasons[reason] for reason in taken_off.split("|")} == {"RESOURCE_EXHAUSTED"}


def test_reasons_in_rules_exist() -> None:
    reasons = {kind.reason for kind in kinds(errors.RequestError)}
    named = re.findall(
        r'rejected_requests_total\{reason=~?"([^"]+)"', "\n".join(rule["expr"] for rule in rules())
    )
    assert {reason for text in named for reason in text.split("|")} <= reasons


def kinds(kind: type[errors.RequestError]) -> list[type[errors.RequestError]]:
    below = kind.__subclasses__()
    return below + [deeper for one in below for deeper in kinds(one)]
