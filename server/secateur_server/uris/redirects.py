"""Limits what a web server may answer: redirects within --allow-uri, and ranges as requested.

aiohttp calls a middleware for each request that it sends, also for those after a redirect.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

Handler = Callable[[Any], Awaitable[Any]]

# The schemes that use the middleware.
HTTP = ("http", "https")


class NotListed(Exception):
    """A redirect leads to a URL that no prefix allows.

    Args:
        target: The URL, without its query.
    """

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.target = target


@dataclass(frozen=True)
class Guard:
    """A middleware of aiohttp.

    Attributes:
        prefixes: Prefixes of allowed URLs.
        max_range_bytes: The largest answer to a request for a range.
    """

    prefixes: tuple[str, ...]
    max_range_bytes: int

    async def __call__(self, request: Any, handler: Handler) -> Any:
        """Sends a request.

        Args:
            request: The request of aiohttp.
            handler: Sends it.

        Raises:
            NotListed: No prefix allows the URL.
            ValueError: The answer is larger than the requested range.
        """
        if not any(_is_in(request.url, prefix) for prefix in self.prefixes):
            raise NotListed(f"{request.url.origin()}{request.url.raw_path}")
        answer = await handler(request)
        if "Range" in request.headers and answer.status in (200, 206):
            length = answer.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > self.max_range_bytes:
                answer.close()  # fsspec would read all of it to memory
                raise ValueError(
                    "the remote ignores the requested range; use a server that supports Range"
                )
        return answer


def options(kind: Any, prefixes: tuple[str, ...], max_range_bytes: int) -> dict[str, Any]:
    """The options of fsspec's HTTP file system: those of the operator, and a guard.

    Args:
        kind: The class of the file system.
        prefixes: Prefixes of allowed URLs.
        max_range_bytes: The largest answer to a request for a range.
    """
    from fsspec.config import apply_config

    configured = apply_config(kind, {}).get("client_kwargs", {})
    headers = {"Accept-Encoding": "identity", **configured.get("headers", {})}
    guarded = {
        "headers": headers,
        "auto_decompress": False,
        "middlewares": (Guard(prefixes, max_range_bytes),),
    }
    return {"client_kwargs": {**configured, **guarded}}


def _is_in(url: Any, prefix: str) -> bool:
    from yarl import URL

    listed = URL(prefix)
    if (url.scheme, url.host, url.port) != (listed.scheme, listed.host, listed.port):
        return False
    if ".." in unquote(url.raw_path).replace("\\", "/").split("/"):
        return False
    path: str = url.raw_path
    return path.startswith(listed.raw_path.rstrip("/") + "/")
