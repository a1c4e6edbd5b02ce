"""The options of secateur-server, from its --help."""

import re
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO

from secateur_server.config import read_config


@cache
def options() -> frozenset[str]:
    """Returns the options in --help, without --help and --version."""
    with redirect_stdout(StringIO()) as out, suppress(SystemExit):
        read_config(["--help"], {})
    shown = out.getvalue()
    found = set(re.findall(r"^  (?:-\w, )?--([a-z-]+)", shown, re.MULTILINE))
    return frozenset(found - {"help", "version"})


def variables() -> set[str]:
    return {f"SECATEUR_{name.upper().replace('-', '_')}" for name in options()}
