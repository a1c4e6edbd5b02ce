"""Decodes the files of an upload, and the page token of a list."""

import re
from collections.abc import Sequence

from secateur_proto.checkpoint_pb2 import File
from secateur_proto.checkpoints_pb2 import UploadFile
from secateur_server.errors import InvalidRequest, quote
from secateur_server.storage.records import StoredFile
from secateur_server.storage.uploads import MAX_FILES

_DIGEST = re.compile("[0-9a-f]{64}")
_TOKEN = re.compile("[0-9a-f]{32}")


def decode_files(files: Sequence[UploadFile]) -> list[tuple[StoredFile, int]]:
    """Decodes the files of an upload, each with the offset from which it is sent.

    Raises:
        InvalidRequest: A file is wrong.
    """
    if not files:
        raise InvalidRequest("header.files", "is empty; send files or a uri")
    check_count("header.files", len(files), MAX_FILES)
    decoded, names = [], set()
    for index, message in enumerate(files):
        field = f"header.files[{index}]"
        file = decode_file(message.file, f"{field}.file")
        if not file.filename:
            raise InvalidRequest(f"{field}.file.filename", "is empty; send a name")
        if message.offset > file.size:
            raise InvalidRequest(
                f"{field}.offset", f"{message.offset} is after the end, {file.size}"
            )
        if file.filename in names:
            raise InvalidRequest(
                f"{field}.file.filename", f"{quote(file.filename)} is listed twice"
            )
        names.add(file.filename)
        decoded.append((file, message.offset))
    return decoded


def check_count(field: str, count: int, most: int) -> None:
    """Raises InvalidRequest if there are more entries than `most`."""
    if count > most:
        raise InvalidRequest(field, f"{count} entries; send at most {most} in one call")


def decode_file(message: File, field: str, is_digest_required: bool = False) -> StoredFile:
    """Decodes a file's name, size and digest.

    Raises:
        InvalidRequest: One of them is wrong.
    """
    name, digest = message.filename, message.blake3
    is_plain = "/" not in name and "\0" not in name and name not in (".", "..")
    if not is_plain or len(name.encode()) > 255:
        raise InvalidRequest(f"{field}.filename", f"{quote(name)} is not the name of a file")
    if message.size_bytes == 0:
        raise InvalidRequest(f"{field}.size_bytes", "is 0; send the size")
    if (digest or is_digest_required) and not _DIGEST.fullmatch(digest):
        raise InvalidRequest(f"{field}.blake3", f"{quote(digest)} is not a hex BLAKE3")
    return StoredFile(name, message.size_bytes, digest)


def page_token(text: str) -> str:
    """Checks a page token. Raises InvalidRequest."""
    if text and not _TOKEN.fullmatch(text):
        raise InvalidRequest("page_token", f"{quote(text)} is not a token of this server")
    return text
