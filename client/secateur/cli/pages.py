"""The option --html."""

from pathlib import Path

import click

from secateur.cli.options import Function
from secateur.page.rendering import environment, page_path


def html_option(function: Function) -> Function:
    """Adds --html, the path of a page."""
    text = "also write a page for a browser: one file that needs no network"
    return click.option("--html", metavar="FILE", type=_page, help=text)(function)


def _page(text: str) -> str:
    if text == "-":
        raise click.BadParameter("a page is a file; name one, such as page.html")
    return text


def title_of(what: str, model: str) -> str:
    """Returns the heading of a page: its subject, and the name of IN."""
    return f"{what} of {Path(model).name or model}"


def check_page(html: str | None) -> None:
    """Fails early if a page cannot be written.

    Raises:
        SecateurError: jinja2 is not installed, or the file cannot be written.
    """
    if html is not None:
        environment()
        page_path(html)
