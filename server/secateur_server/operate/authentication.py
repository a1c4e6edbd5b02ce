"""Who calls: tenants, and the tokens by which they are known."""

import hashlib
import hmac
import logging
import os
import tomllib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from secateur_proto.sizes import byte_count
from secateur_server.errors import Unauthenticated
from secateur_server.operate.reload import Reloaded, Unusable
from secateur_server.runtime.context import ANONYMOUS, Tenant

log = logging.getLogger(__name__)

# Shorter ones can be found by trying.
MIN_CHARACTERS = 16
_HASHED = "sha256:"
_NO_TOKEN = (
    "this server needs a bearer token: give --token, SECATEUR_TOKEN, or in Python Client(token=...)"
)
# Of a table [tenants.NAME].
_KEYS = ("tokens", "memory", "requests", "store", "allow")


class BadTokens(Unusable):
    """A file of tokens that cannot be used."""


class Authenticator:
    """Finds out who calls. Without a file everybody may, and each token has its own checkpoints.

    reloaded: is called with whether the file could be read, each time that it has changed.
    """

    def __init__(self, path: Path | None, reloaded: Callable[[bool], None]) -> None:
        self._file: Reloaded[dict[bytes, Tenant]] | None = None
        if path:
            what, version = f"list of tokens {path}", partial(_version, path)
            self._file = Reloaded(what, version, partial(_read, path), reloaded)

    @property
    def tenants(self) -> list[Tenant]:
        """Those of the file."""
        return list(self._file.value().values()) if self._file else []

    def caller(self, metadata: Iterable[tuple[str, str | bytes]]) -> Tenant:
        """The tenant of a call's metadata.  Errors: Unauthenticated."""
        values = [value for key, value in metadata if key == "authorization"]
        if len(values) > 1:  # whoever looked at it before us may have looked at the other one
            raise Unauthenticated("authorization", "it is there more than once")
        value = values[0] if values else ""
        text = value.encode() if isinstance(value, str) else value
        if self._file is None:
            return Tenant("", _owner_of(text)) if text else ANONYMOUS
        scheme, _, token = text.partition(b" ")
        if scheme.lower() != b"bearer" or not token:
            raise Unauthenticated("authorization", _NO_TOKEN)
        found, asked = None, hashlib.sha256(token.strip()).digest()
        for digest, tenant in self._file.value().items():  # all of them: the time tells nothing
            if hmac.compare_digest(digest, asked):
                found = tenant
        if found is None:
            raise Unauthenticated("authorization", "the token is not known")
        return found


def _read(path: Path) -> dict[bytes, Tenant]:
    """As read_tokens; the log has how many there are."""
    tenants = read_tokens(path)
    log.info("read %d tokens from %s", len(tenants), path)
    return tenants


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _owner_of(text: bytes) -> str:
    """An owner's name, of which the token cannot be found out."""
    return blake3(b"secateur owner\n" + text).hexdigest()[:32]


def read_tokens(path: Path) -> dict[bytes, Tenant]:
    """The tenants of a TOML file, by the SHA-256 of each of their tokens.

        [tenants.vision]
        tokens = ["...", "sha256:..."]   # at least 16 characters, or the hex SHA-256 of them
        memory = "8GiB"                  # of models served at once
        requests = 8                     # served at once
        store = "100GiB"                 # of checkpoints
        allow = ["file:///models/vision", "s3://bucket/vision"]

    Errors: BadTokens.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadTokens(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # tomllib's own is one
        raise BadTokens(f"{path} is no TOML: {error}") from None
    tenants = tables.pop("tenants", None)
    is_good = isinstance(tenants, dict) and tenants and not tables
    if not is_good or not all(isinstance(table, dict) for table in tenants.values()):
        raise BadTokens(f"{path} has tables [tenants.NAME], at least one, and nothing else")
    found: dict[bytes, Tenant] = {}
    for name, table in tenants.items():
        tenant, digests = _tenant(f"{path}: tenants.{name}", name, table)
        if digests & found.keys():
            raise BadTokens(f"{path}: tenants.{name}: a token is another tenant's as well")
        found |= dict.fromkeys(digests, tenant)
    return found


def _tenant(where: str, name: str, table: Any) -> tuple[Tenant, set[bytes]]:
    """Errors: BadTokens, which tells no token, wherever it stands."""
    rest = dict(table)
    if unknown := next((key for key in table if key not in _KEYS), None):
        raise BadTokens(f"{where}: {_unknown(unknown)}")
    tokens = _texts(where, "tokens", rest.pop("tokens", ()))
    if not tokens:
        raise BadTokens(f"{where}.tokens: there is none")
    requests = rest.pop("requests", None)
    if requests is not None and (type(requests) is not int or requests < 1):
        raise BadTokens(f"{where}.requests: is no number of requests")
    allow = rest.pop("allow", None)
    tenant = Tenant(
        name,
        _owner_of(b"tenant\n" + name.encode()),
        _bytes(where, "memory", rest.pop("memory", None)),
        requests,
        _bytes(where, "store", rest.pop("store", None)),
        None if allow is None else _uris(where, allow),
    )
    return tenant, {_digest(where, token) for token in tokens}


def _unknown(key: str) -> str:
    """What is wrong with a key; a long one may be a token, and is not named."""
    known = f"the keys are {', '.join(_KEYS)}"
    if len(key) >= MIN_CHARACTERS:
        return f"a key is unknown; {known}"
    near = get_close_matches(key, _KEYS, 1)
    return f"{key!r} is unknown; {f'the nearest is {near[0]!r}' if near else known}"


def _texts(where: str, key: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, list | tuple) and all(isinstance(value, str) for value in values):
        return tuple(values)
    raise BadTokens(f"{where}.{key}: is no list of texts")


def _bytes(where: str, key: str, value: Any) -> int | None:
    try:
        return None if value is None else byte_count(str(value))
    except ValueError:
        raise BadTokens(f"{where}.{key}: is no number of bytes, such as 512MiB or 16GiB") from None


def _uris(where: str, values: Any) -> tuple[str, ...]:
    uris = _texts(where, "allow", values)
    for uri in uris:
        scheme, separator, place = uri.partition("://")
        is_place = place.startswith("/") or scheme != "file"
        if not (scheme and separator and is_place) or ".." in place.split("/"):
            raise BadTokens(f"{where}.allow: {uri!r} is no scheme://place, or file:///folder")
    return uris


def _digest(where: str, token: str) -> bytes:
    if not token.startswith(_HASHED):
        if len(token) < MIN_CHARACTERS:
            raise BadTokens(f"{where}.tokens: one has less than {MIN_CHARACTERS} characters")
        if not (token.isascii() and token.isprintable()) or token != token.strip():
            raise BadTokens(f"{where}.tokens: one cannot be sent: it is not plain ASCII")
        return hashlib.sha256(token.encode()).digest()
    try:
        digest = bytes.fromhex(token.removeprefix(_HASHED))
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise BadTokens(f"{where}.tokens: what follows {_HASHED} is no hex SHA-256")
    return digest
