"""No test depends on how fast, or how busy, the machine is; no age on the system's clock."""

import re
from pathlib import Path

CLOCKS = "monotonic|perf_counter|time_ns|time\\.time"


def test_no_test_bounds_the_seconds_of_the_clock() -> None:
    bounds = [
        f"{path}: {line.strip()}"
        for path in Path("tests").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(rf"^\s*assert .*({CLOCKS})\(\).* <", line)
    ]
    assert bounds == []


def test_the_server_measures_no_age_by_the_systems_clock() -> None:
    """Somebody may set it; the store's clock alone reads it, for times that callers see."""
    readers = [p.name for p in Path("server").rglob("*.py") if "time.time()" in p.read_text()]
    assert readers == ["clock.py"]
