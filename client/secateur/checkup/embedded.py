"""Whether the embedded server works."""

import json
import subprocess
import sys
from typing import Literal

from secateur.checkup.check import Check, Clock
from secateur.checkup.service import WEIGHTS

_CODE = """
import json, time
begin = time.monotonic()
from secateur import SecateurError, embedded
from secateur.checkup.service import HALF, MODEL, best_of
try:
    with embedded() as client:
        started = time.monotonic() - begin
        report = client.prune(MODEL, HALF, "none", False).report
        assert report.sparsity == 0.5, report
        pruned = best_of(lambda: client.prune(MODEL, HALF, "none", False))
        info = client.server_info()
    print(json.dumps({"started": started, "pruned": pruned, "device": info.device}))
except SecateurError as error:
    raise SystemExit(str(error))
"""


def check_embedded(clock: Clock, is_needed: bool) -> Check:
    """Starts an embedded server in a process of its own, and prunes on it.

    Args:
        clock: The time that the check has.
        is_needed: Whether commands fail without it, as no other server is named.
    """
    seconds = clock.rest()
    status: Literal["fail", "warn"] = "fail" if is_needed else "warn"
    try:
        command = [sys.executable, "-c", _CODE]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        advice = "run again, as the first start compiles; or give more time: --timeout SECONDS"
        return Check("embedded", status, f"it does not start in {seconds:.3g} s", advice)
    if ended.returncode:
        said = (ended.stderr.splitlines() or ["the process ended without a word"])[-1]
        found, _, advice = said.rpartition(": ")
        return Check("embedded", status, found or said, advice if found else "reinstall secateur")
    times = json.loads(ended.stdout)
    return Check(
        "embedded",
        "ok",
        f"starts in {times['started']:.1f} s, and prunes {WEIGHTS:,} weights on "
        f"{times['device']} in {times['pruned']:.3f} s",
    )
