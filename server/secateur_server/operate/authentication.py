"""Identifies the tenant of a call by its token."""

import hashlib
import hmac
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from secateur_server.errors import Unauthenticated
from secateur_server.operate.reload import Reloaded
from secateur_server.operate.tokens_file import owner_of, read_tokens
from secateur_server.runtime.context import ANONYMOUS, Tenant

log = logging.getLogger(__name__)

_NO_TOKEN = (
    "this server needs a bearer token: give --token, SECATEUR_TOKEN, or in Python Client(token=...)"
)


class Authenticator:
    """Identifies the tenant of a call. Without a tokens file, each token is a tenant of its own.

    Args:
        path: The tokens file; None: everybody may call.
        reloaded: Called each time that the file has changed, with whether it could be read.

    Raises:
        BadTokens: The file cannot be read, or is wrong.
    """

    def __init__(self, path: Path | None, reloaded: Callable[[bool], None]) -> None:
        self._file: Reloaded[dict[bytes, Tenant]] | None = None
        if path:
            read = partial(_read, path)
            self._file = Reloaded(f"list of tokens {path}", [path], read, reloaded)

    @property
    def tenants(self) -> list[Tenant]:
        """The tenants of the tokens file."""
        return list(self._file.value().values()) if self._file else []

    def authenticate(self, metadata: Iterable[tuple[str, str | bytes]]) -> Tenant:
        """Identifies the tenant of a call by its metadata.

        Raises:
            Unauthenticated: The call has no valid token.
        """
        values = [value for key, value in metadata if key == "authorization"]
        if len(values) > 1:  # a proxy may have checked the other one
            raise Unauthenticated("authorization", "the metadata has it more than once; send one")
        value = values[0] if values else ""
        text = value.encode() if isinstance(value, str) else value
        if self._file is None:
            return Tenant("", owner_of(text)) if text else ANONYMOUS
        scheme, _, token = text.partition(b" ")
        if scheme.lower() != b"bearer" or not token:
            raise Unauthenticated("authorization", _NO_TOKEN)
        found, asked = None, hashlib.sha256(token.strip()).digest()
        for digest, tenant in self._file.value().items():  # all of them, in constant time
            if hmac.compare_digest(digest, asked):
                found = tenant
        if found is None:
            raise Unauthenticated(
                "authorization", "the token is unknown; check it, or ask the operator for one"
            )
        return found


def _read(path: Path) -> dict[bytes, Tenant]:
    tenants = read_tokens(path)
    log.info("read %d tokens from %s", len(tenants), path)
    return tenants
