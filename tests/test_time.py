"""Rules about clocks, for the tests and for the server."""

import re
from pathlib import Path

CLOCKS = "monotonic|perf_counter|time_ns|time\\.time"


def test_no_test_asserts_wall_clock_time() -> None:
    bounds = [
        f"{path}: {line.strip()}"
        for path in Path("tests").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(rf"^\s*assert .*({CLOCKS})\(\).* <", line)
    ]
    assert bounds == []


def test_only_the_clock_of_the_store_reads_the_system_clock() -> None:
    """The system clock may be set, so ages must not depend on it.

    Except those of fetched files in references.py: one that is removed early is fetched again; and
    those of objects in a shared store, whose times are those of the object store's clock.
    """
    readers = {p.name for p in Path("server").rglob("*.py") if "time.time()" in p.read_text()}
    of_shared = {"claims.py", "store.py"}
    assert readers == {"clock.py", "references.py", *of_shared}
    local = Path("server/secateur_server/storage/store.py").read_text()
    assert "time.time()" not in local
