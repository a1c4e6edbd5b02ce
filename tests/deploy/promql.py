"""Metrics in queries, metrics of a server, and a real Prometheus."""

import json
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import RunningServer

RULES = sorted(Path("deploy/prometheus/rules").glob("*.yml"))
OWN = {"up", "ALERTS"}  # Prometheus's own metrics

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus: make system"
)
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool: make system"
)

_TEXTS = r'"[^"]*"'
_LABELS_AND_RANGES = r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|without|on|ignoring|group_left)\s*\([^)]*\)"
_WORDS_AND_NUMBERS = r"[a-z_]+\s*(?=\()|\b(?:and|or|unless|offset)\b|\b[\d.]+(?:e-?\d+|[a-z]+)?\b"


def names_in(query: str) -> set[str]:
    """Returns the metrics in a query."""
    for pattern in (_TEXTS, _LABELS_AND_RANGES, _WORDS_AND_NUMBERS):
        query = re.sub(pattern, " ", query)
    return set(re.findall(r"[a-zA-Z_][\w:]*", query))


def rules() -> list[dict[str, Any]]:
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def records() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def metrics_of(server: RunningServer) -> str:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=300) as answer:
        text: str = answer.read().decode()
    return text


def families(server: RunningServer) -> set[str]:
    """Returns the metrics of a server, and histograms without the suffix."""
    return {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in text_string_to_metric_families(metrics_of(server))
    }


def served_names(server: RunningServer) -> set[str]:
    """Returns the names that queries may have, with or without samples."""
    found = set(families(server))
    for family in text_string_to_metric_families(metrics_of(server)):
        if family.type == "histogram":
            found |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
    return found


@contextmanager
def prometheus(folder: Path) -> Iterator[str]:
    """Runs a Prometheus with the configuration in `folder`. Yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        yield address
    finally:
        process.terminate()
        process.wait(timeout=300)


def get(address: str, path: str, **parameters: str) -> dict[str, Any] | None:
    """Returns the data of an answer, or None if Prometheus does not answer yet."""
    url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=300) as answer:
            data: dict[str, Any] = json.load(answer)["data"]
            return data
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return None
        raise AssertionError(f"{parameters}: {error.read().decode()}") from None
    except OSError:
        return None


def ask(address: str, query: str) -> list[float] | None:
    """Returns the values of a query, or None if Prometheus does not answer yet."""
    data = get(address, "query", query=query)
    return None if data is None else [float(series["value"][1]) for series in data["result"]]
