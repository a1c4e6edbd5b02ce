"""The operations page lists all options, metrics, error reasons and alerts."""

import re
from pathlib import Path

from secateur_server import errors
from secateur_server.operate.tokens_file import read_tokens
from tests.conftest import RunningServer
from tests.deploy.options import options
from tests.deploy.promql import alerts, families
from tests.deploy.test_rules import kinds

TEXT = Path("docs/operations.md").read_text()


def section(title: str) -> str:
    """Returns the text from a heading to the next one of its level."""
    level = "#" * re.findall(rf"^(#+) {re.escape(title)}$", TEXT, re.MULTILINE)[0].count("#")
    found = re.search(rf"^{level} {re.escape(title)}$(.*?)(?=^{level} |\Z)", TEXT, re.M | re.S)
    assert found, title
    return found[1]


def first_cells(title: str) -> list[str]:
    return [
        name
        for cell in re.findall(r"^\| (`.*?`) \|", section(title), re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", cell)
    ]


def test_every_option_is_in_its_table() -> None:
    listed = first_cells("Options")
    assert len(set(listed)) == len(listed)
    assert set(listed) == {f"--{name}" for name in options()}


def test_options_in_the_text_exist() -> None:
    named = set(re.findall(r"--([a-z]+(?:-[a-z]+)*)", re.sub(r"```.*?```", "", TEXT, flags=re.S)))
    assert named - {"profile"} <= options()


def test_every_metric_is_in_its_table(server: RunningServer) -> None:
    listed = first_cells("Metrics")
    assert {name for name in listed if name.startswith(("secateur_", "grpc_", "process_"))} >= (
        families(server)
    )
    assert len(set(listed)) == len(listed)


def test_metrics_in_the_text_exist(server: RunningServer) -> None:
    named = set(re.findall(r"\b(?:secateur|grpc_server|process)_[a-z_]+", TEXT))
    parts = {re.sub(r"_(bucket|sum|count)$", "", name) for name in named}
    assert parts - families(server) == set()


def test_every_reason_of_an_error_is_in_its_table_with_its_status() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", section("Error reasons"), re.M))
    assert rows == {kind.reason: kind.status for kind in kinds(errors.RequestError)}


def test_every_alert_has_a_section_that_begins_with_its_severity() -> None:
    found = re.findall(r"^### (\w+)\n\n(\w+)", section("Alerts"), re.MULTILINE)
    assert found == [
        (alert["alert"], str(alert["labels"]["severity"]).capitalize()) for alert in alerts()
    ]


def test_the_example_of_a_tokens_file_is_valid(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "tokens.toml").write_text(text)
    tenants = read_tokens(tmp_path / "tokens.toml").values()
    assert sorted(tenant.name for tenant in tenants) == ["speech", "vision", "vision"]
