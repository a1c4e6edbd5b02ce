"""What a web server may answer: redirects within what the operator listed, and no more than asked.

aiohttp calls a middleware for each request that it sends, those after a redirect among them.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

Handler = Callable[[Any], Awaitable[Any]]

# The schemes that this is for.
HTTP = ("http", "https")


class NotListed(Exception):
    """A request was to go where no prefix allows it.  target: its URL, without its query."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.target = target


@dataclass(frozen=True)
class Guard:
    """A middleware of aiohttp.

    prefixes: of the URLs that requests may go to.  most: bytes of an answer to a range.
    """

    prefixes: tuple[str, ...]
    most: int

    async def __call__(self, request: Any, handler: Handler) -> Any:
        """As aiohttp calls it.  Errors: NotListed, ValueError."""
        if not any(_is_in(request.url, prefix) for prefix in self.prefixes):
            raise NotListed(f"{request.url.origin()}{request.url.raw_path}")
        answer = await handler(request)
        if "Range" in request.headers and answer.status in (200, 206):
            length = answer.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > self.most:
                answer.close()  # it would be read whole, to memory
                raise ValueError("the remote does not answer a request for a range with that range")
        return answer


def options(kind: Any, prefixes: tuple[str, ...], most: int) -> dict[str, Any]:
    """The options of fsspec's file system `kind` of HTTP: the operator's, and a guard."""
    from fsspec.config import apply_config

    configured = apply_config(kind, {}).get("client_kwargs", {})
    headers = {"Accept-Encoding": "identity", **configured.get("headers", {})}
    guarded = {
        "headers": headers,
        "auto_decompress": False,
        "middlewares": (Guard(prefixes, most),),
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
