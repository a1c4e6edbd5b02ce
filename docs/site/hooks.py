"""Adds pages that are not in docs/. Relative links then work on the site and on GitHub."""

import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

import grpc_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "recipes/README.md")
# The target of a Markdown link that is neither a URL nor a fragment.
TARGET = re.compile(r"(?<=\]\()(?!\w+:)[^)#\s]+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the root folder, files that pages link to, and the gRPC reference."""
    for name in ROOT_PAGES:
        add(files, config, name)
    for page in list(files.documentation_pages()):
        for path in linked(page.src_uri, page.content_string):
            if files.get_file_from_path(site_path(path)) is None:
                add(files, config, path)
    for uri, content in grpc_reference.pages(ROOT / "protos").items():
        files.append(File.generated(config, uri, content=content))
    return files


def add(files: Files, config: MkDocsConfig, path: str) -> None:
    """Adds a file of the repository under its own path."""
    files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between files of the site."""
    uri = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        path = repository_path(uri, match[0])
        if not (ROOT / path).is_file():
            return match[0]
        return relpath(site_path(path), dirname(uri) or ".")

    return TARGET.sub(moved, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Names the theme's search dialog for screen readers."""
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"')


def linked(uri: str, markdown: str) -> Iterator[str]:
    """Yields the files of the repository to which a page links."""
    for target in TARGET.findall(markdown):
        path = repository_path(uri, target)
        if (ROOT / path).is_file():
            yield path


def repository_path(uri: str, target: str) -> str:
    """Returns the path in the repository of what a page of the site links to."""
    page = uri if uri in ROOT_PAGES else join("docs", uri)
    return normpath(join(dirname(page), target))


def site_path(path: str) -> str:
    """Returns the path among the site's sources of a file of the repository."""
    return path.removeprefix("docs/")
