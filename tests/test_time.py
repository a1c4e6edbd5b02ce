"""No test depends on how fast, or how busy, the machine is."""

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
