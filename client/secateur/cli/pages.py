"""The option --html, and its page."""

import os
from typing import Any, Protocol

import click

from secateur.cli.options import Function
from secateur.files import check_writable
from secateur.page.rendering import environment
from secateur.paths import path_of


def html_option(function: Function) -> Function:
    """Adds --html; the path of a page."""
    text = "also write a page for a browser: one file that needs no network"
    return click.option("--html", metavar="FILE", type=_page, help=text)(function)


class _Paged(Protocol):
    """An answer that can be a page."""

    def to_html(self, path: str | os.PathLike[str], title: str, **more: Any) -> None: ...


def _page(text: str) -> str:
    if text == "-":
        raise click.BadParameter("a page is a file; name one, such as page.html")
    return text


def check_page(html: str | None) -> None:
    """Fails early if a page cannot be written.

    Raises:
        SecateurError: jinja2 is not installed, or the file cannot be written.
    """
    if html is not None:
        environment()
        check_writable(path_of(html))


def write_page(found: _Paged, html: str | None, title: str, **more: Any) -> None:
    """Writes the page, if --html was given."""
    if html is not None:
        found.to_html(html, title, **more)
