"""The file systems of fsspec: they are opened for URIs, and their errors become ours."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from secateur_server.errors import (
    RequestError,
    UriChanged,
    UriFailed,
    UriNotAllowed,
    UriNotFound,
    quote,
)
from secateur_server.runtime.context import RequestContext
from secateur_server.uris.redirects import HTTP, NotListed, options
from secateur_server.uris.requests import Requests

_INSTALL = "pip install 'secateur[remote]'"
_OF_EXTRA = ("fsspec", "s3fs")

Prefixes = Sequence[str]

# Bytes of one request for a part of a file.
RANGE_BYTES = 8 << 20


def missing(prefix: str) -> str:
    """The package that is missing to open URIs of a prefix, and how to install it; empty: none.

    Args:
        prefix: Of URIs, with the scheme.
    """
    try:
        import fsspec

        fsspec.get_filesystem_class(prefix.partition("://")[0])
    except (ImportError, ValueError) as error:  # ValueError: fsspec does not know the scheme
        return f"{error}; on the server: {_installer(prefix)}"
    return ""


def _installer(uri: str) -> str:
    """The command that installs the package for a URI."""
    try:
        from fsspec.registry import known_implementations
    except ImportError:
        return _INSTALL
    known = known_implementations.get(uri.partition("://")[0], {})
    package = known.get("class", "fsspec").partition(".")[0]
    return _INSTALL if package in _OF_EXTRA else f"pip install {package}"


def open_system(
    context: RequestContext, field: str, uri: str, requests: Requests, prefixes: Prefixes
) -> tuple[Any, str]:
    """The file system of a URI, and the path in it.

    Args:
        context: The request.
        field: Of the request, for errors.
        uri: Of a file.
        requests: Makes the requests.
        prefixes: Prefixes of allowed URIs.

    Raises:
        UriFailed: It cannot be opened.
    """
    try:
        return _open(context, uri, requests, prefixes)
    except ImportError as error:  # of fsspec, or of its package for this scheme
        needed = ValueError(f"{error}; on the server: {_installer(uri)}")
        raise failed(field, uri, "opened", needed) from None
    except Exception as error:
        raise failed(field, uri, "opened", error) from None


def _open(
    context: RequestContext, uri: str, requests: Requests, prefixes: Prefixes
) -> tuple[Any, str]:
    import fsspec

    opened: tuple[Any, str]
    scheme = uri.partition("://")[0]
    kind = fsspec.get_filesystem_class(scheme)
    if scheme in HTTP:
        opened = fsspec.core.url_to_fs(uri, **options(kind, tuple(prefixes), RANGE_BYTES))
    elif kind.async_impl:
        opened = fsspec.core.url_to_fs(uri)
    else:  # it may connect, so in a thread; fsspec caches an instance for each thread
        connect = partial(fsspec.core.url_to_fs, uri, skip_instance_cache=True)
        opened = requests.result(context, requests.in_thread(context, connect))
    return opened


def not_found(field: str, uri: str, error: FileNotFoundError) -> RequestError:
    """The error for a missing file. Over HTTP, fsspec reports every failure as a missing file."""
    cause = error.__cause__
    is_hidden = isinstance(cause, OSError | NotListed | ValueError)
    if isinstance(cause, Exception) and (is_hidden or getattr(cause, "status", 404) != 404):
        return failed(field, uri, "read", cause)
    return UriNotFound(field, f"{quote(uri)} does not exist")


def changed(field: str, uri: str) -> UriChanged:
    """The error for a file that is not the one that was opened."""
    return UriChanged(field, f"{quote(uri)} changed while it was read; send the request again")


def failed(field: str, uri: str, what: str, error: Exception) -> RequestError:
    """The error for a failure of any kind; one of this server's own errors is unchanged.

    Args:
        field: Of the request.
        uri: Of the file.
        what: Read, written or opened.
        error: From fsspec or its libraries.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, NotListed):
        target = quote(error.target)
        return UriNotAllowed(
            field,
            f"{quote(uri)} redirects to {target}, which is not under an --allow-uri of the server",
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    return UriFailed(field, f"{quote(uri)} cannot be {what}: {reason}")
