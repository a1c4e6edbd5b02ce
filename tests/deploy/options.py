"""What secateur-server itself says of its options."""

import re
import subprocess
import sys
from functools import cache


@cache
def options() -> frozenset[str]:
    """The options that --help shows, without --help and --version."""
    command = [sys.executable, "-m", "secateur_server", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"^  (?:-\w, )?--([a-z-]+)", shown, re.MULTILINE))
    return frozenset(found - {"help", "version"})


def variables() -> set[str]:
    return {f"SECATEUR_{name.upper().replace('-', '_')}" for name in options()}
