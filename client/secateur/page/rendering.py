"""Fills the template of pages, and writes the file."""

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from secateur.atomic import replacing
from secateur.errors import SecateurError
from secateur.page.views import Page, Table
from secateur.paths import path_of
from secateur.versions import VERSION

# A page stays below 10 MB: the library takes half a MB.
MOST_BYTES = 9 << 20
# Of a table; more would neither open fast nor be read.
MOST_ROWS = 20_000
# Of all frames of a table.
MOST_CELLS = 600_000

_LIBRARIES = ("vendor/d3.min.js", "vendor/plot.umd.min.js")
_SCRIPTS = ("format.js", "rows.js", "table.js", "charts.js", "pattern.js", "details.js", "page.js")


def write_page(page: Page, path: str | os.PathLike[str]) -> None:
    """Writes a page as one HTML file, whole or not at all.

    Args:
        page: What it holds.
        path: The file.

    Raises:
        SecateurError: jinja2 is not installed, or the path cannot be one.
    """
    to = page_path(path)
    # The name of a file may have bytes that are not UTF-8.
    data = render(page).encode(errors="replace")
    with replacing(to) as file:
        file.write(data)


def page_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a page that can be written.

    Raises:
        SecateurError: It is a folder, or in a folder that does not exist.
    """
    to = path_of(path)
    if to.is_dir():
        raise SecateurError(f"{to}: is a folder; name a file in it, such as page.html")
    if not to.absolute().parent.is_dir():
        raise SecateurError(f"{to}: no such folder exists")
    return to


def render(page: Page) -> str:
    """Returns a page as HTML."""
    bounded = _bounded(page)
    scripts = [*map(_asset, _LIBRARIES), _own_script()]
    template = environment().get_template("page.html")
    return str(
        template.render(
            page=bounded,
            data=_data(bounded),
            scripts=scripts,
            digests=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
            style=_asset("assets/page.css"),
            version=VERSION,
        )
    )


def environment() -> Any:
    """Returns jinja2's environment.

    Raises:
        SecateurError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise SecateurError("to_html needs jinja2: pip install 'secateur[html]'") from None
    loader = PackageLoader("secateur.page", "assets")
    return Environment(autoescape=True, loader=loader, undefined=StrictUndefined, trim_blocks=True)


@cache
def _asset(name: str) -> str:
    return files("secateur.page").joinpath(name).read_text("utf-8")


def _own_script() -> str:
    """The page's own files as one script, whose names are hidden from others."""
    parts = "\n".join(_asset(f"assets/{name}") for name in _SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}}})();\n'


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _data(page: Page) -> str:
    """What the script reads, as JSON for a script element: names may contain `</script>`."""
    data = {
        "charts": page.charts,
        "tables": [_plain(table) for table in page.tables],
        "details": page.details,
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plain(table: Table) -> dict[str, Any]:
    """A table as plain data; asdict would copy its many cells."""
    return {
        **vars(table),
        "columns": [vars(column) for column in table.columns],
        "frames": [vars(frame) for frame in table.frames],
    }


def _bounded(page: Page) -> Page:
    """A page that is not too large; a note says what it leaves out."""
    tables = [_bounded_table(table) for table in page.tables]
    notes = [
        f"{table.title}: this page has {len(table.names):,} of {len(whole.names):,} rows and "
        f"{len(table.frames):,} of {len(whole.frames):,} amounts; the JSON has all."
        for table, whole in zip(tables, page.tables, strict=True)
        if (len(table.names), len(table.frames)) != (len(whole.names), len(whole.frames))
    ]
    bounded = replace(page, tables=tables, notes=[*page.notes, *notes], details={})
    kept = dict(_fitting(page, MOST_BYTES - len(_data(bounded))))
    return replace(bounded, details=kept)


def _bounded_table(table: Table) -> Table:
    rows = min(MOST_ROWS, len(table.names))
    cells = max(1, rows * len(table.columns))
    most = max(1, MOST_CELLS // cells)
    step = -(-len(table.frames) // most)
    numbers = sorted({*range(0, len(table.frames), step), table.chosen})
    frames = [replace(table.frames[n], rows=table.frames[n].rows[:rows]) for n in numbers]
    return replace(
        table, names=table.names[:rows], frames=frames, chosen=numbers.index(table.chosen)
    )


def _fitting(page: Page, budget: int) -> Iterator[tuple[str, Any]]:
    """The details that fit, in their order."""
    for name, details in page.details.items():
        budget -= len(json.dumps([name, details]))
        if budget < 0:
            return
        yield name, details
