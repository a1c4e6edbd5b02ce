"""The tokens file: tenants, their tokens and their quotas, in TOML."""

import hashlib
import re
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from blake3 import blake3

from secateur_proto.sizes import byte_count
from secateur_server.operate.reload import Unusable
from secateur_server.runtime.context import Tenant

# Shorter tokens could be guessed.
MIN_CHARACTERS = 16
_HASHED = "sha256:"
# The keys of a table [tenants.NAME].
_KEYS = ("tokens", "memory", "requests", "store", "allow")


class BadTokens(Unusable):
    """The tokens file cannot be read, or is wrong."""


def owner_of(text: bytes) -> str:
    """The name of the owner of checkpoints, from which the token cannot be derived.

    Args:
        text: The `authorization` of a call without a tokens file, or the name of a tenant.
    """
    return blake3(b"secateur owner\n" + text).hexdigest()[:32]


def read_tokens(path: Path) -> dict[bytes, Tenant]:
    """Reads a tokens file.

        [tenants.vision]
        tokens = ["...", "sha256:..."]   # at least 16 characters, or the hex SHA-256 of them
        memory = "8GiB"                  # of models served at once
        requests = 8                     # served at once
        store = "100GiB"                 # of checkpoints
        allow = ["file:///models/vision", "s3://bucket/vision"]

    Returns:
        The tenants, by the SHA-256 of each of their tokens.

    Raises:
        BadTokens: The file cannot be read, or is wrong. The message contains no token.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadTokens(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise BadTokens(f"{path} is not TOML: {error}") from None
    tenants = tables.pop("tenants", None)
    is_good = isinstance(tenants, dict) and tenants and not tables
    if not is_good or not all(isinstance(table, dict) for table in tenants.values()):
        raise BadTokens(f"{path} must have tables [tenants.NAME], at least one, and nothing else")
    found: dict[bytes, Tenant] = {}
    for name, table in tenants.items():
        tenant, digests = _tenant(f"{path}: tenants.{name}", name, table)
        if digests & found.keys():
            raise BadTokens(f"{path}: tenants.{name}: a token belongs to another tenant too")
        found |= dict.fromkeys(digests, tenant)
    return found


def _tenant(where: str, name: str, table: Any) -> tuple[Tenant, set[bytes]]:
    """A tenant, and the digests of its tokens."""
    if unknown := next((key for key in table if key not in _KEYS), None):
        raise BadTokens(f"{where}: {_unknown(unknown)}")
    tokens = _texts(where, "tokens", table.get("tokens", ()))
    if not tokens:
        raise BadTokens(f"{where}.tokens: the list is empty; give at least one token")
    requests = table.get("requests")
    if requests is not None and (type(requests) is not int or requests < 1):
        raise BadTokens(f"{where}.requests: is not a whole number of at least 1")
    tenant = Tenant(
        name,
        owner_of(b"tenant\n" + name.encode()),
        _bytes(where, table, "memory"),
        requests,
        _bytes(where, table, "store"),
        _uris(where, table["allow"]) if "allow" in table else None,
    )
    return tenant, {_digest(where, token) for token in tokens}


def _unknown(key: str) -> str:
    """Describes an unknown key. A long key may be a misplaced token, so it is not named."""
    known = f"the keys are {', '.join(_KEYS)}"
    if len(key) >= MIN_CHARACTERS:
        return f"a key is unknown; {known}"
    near = get_close_matches(key, _KEYS, 1)
    return f"{key!r} is unknown; {f'the nearest is {near[0]!r}' if near else known}"


def _texts(where: str, key: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, list | tuple) and all(isinstance(value, str) for value in values):
        return tuple(values)
    raise BadTokens(f"{where}.{key}: is not a list of strings")


def _bytes(where: str, table: Any, key: str) -> int | None:
    try:
        return byte_count(str(table[key])) if key in table else None
    except ValueError:
        raise BadTokens(
            f"{where}.{key}: is not a number of bytes, such as 512MiB or 16GiB"
        ) from None


def _uris(where: str, values: Any) -> tuple[str, ...]:
    uris = _texts(where, "allow", values)
    for uri in uris:
        scheme, separator, place = uri.partition("://")
        is_place = place.startswith("/") or scheme != "file"
        if not (scheme and separator and is_place) or ".." in place.split("/"):
            raise BadTokens(f"{where}.allow: {uri!r} is not scheme://place, or file:///folder")
    return uris


def _digest(where: str, token: str) -> bytes:
    if token.startswith(_HASHED):
        if not re.fullmatch(f"{_HASHED}[0-9a-fA-F]{{64}}", token):
            raise BadTokens(f"{where}.tokens: {_HASHED} is not followed by 64 hex digits")
        return bytes.fromhex(token.removeprefix(_HASHED))
    if len(token) < MIN_CHARACTERS:
        raise BadTokens(f"{where}.tokens: a token has less than {MIN_CHARACTERS} characters")
    if not (token.isascii() and token.isprintable()) or token != token.strip():
        raise BadTokens(f"{where}.tokens: a token cannot be sent: it is not printable ASCII")
    return hashlib.sha256(token.encode()).digest()
