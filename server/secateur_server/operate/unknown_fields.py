"""Refuses requests with fields of a newer client that this server does not know."""

from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from secateur_proto import pruner_pb2
from secateur_server.errors import UnknownField

_PACKAGE = pruner_pb2.DESCRIPTOR.package
# The search for the unknown field is limited in messages, and in bytes of unknown fields: protobuf
# lists 1.5 million of them a second, and holds the GIL meanwhile. Beyond these limits the error
# names the outermost message. Messages above _MAX_BYTES are not searched, since they would be
# decoded again: that takes seconds for a map, whose entries are then in the order of their hashes.
_MAX_SEARCHED, _MAX_UNKNOWN_BYTES, _MAX_BYTES = 10_000, 64 << 10, 1 << 20


def check_known(message: Message, has_other_fields: bool) -> None:
    """Refuses a request with a field that this server does not know.

    The field may be a choice of the caller, which must not be ignored. Messages of other packages,
    such as health checks, are not checked. `has_other_fields` says whether the request may have
    fields beside `header` and `data`.

    Raises:
        UnknownField: It names the message that has the field.
    """
    if message.DESCRIPTOR.file.package != _PACKAGE:
        return
    if has_other_fields or "header" not in message.DESCRIPTOR.fields_by_name:
        _check_parts(message, "")
    elif message.HasField("header"):  # discarding fields of an unset header would set it
        # Only the header, since copying the data, which has no fields, would take time.
        _check_parts(message.header, "header")  # type: ignore[attr-defined]


def _check_parts(message: Message, path: str) -> None:
    """Compares sizes: protobuf discards unknown fields much faster than it lists them."""
    before = message.SerializeToString()
    message.DiscardUnknownFields()
    if unknown := len(before) - message.ByteSize():
        if unknown > _MAX_UNKNOWN_BYTES or len(before) > _MAX_BYTES:
            raise _error(message, path, "a field")
        raise _found(type(message).FromString(before), path)


def _found(message: Message, path: str) -> UnknownField:
    """The error for a message with unknown fields, in it or in its parts."""
    for at, part in islice(_parts(message, path), _MAX_SEARCHED):
        if len(fields := UnknownFieldSet(part)):
            return _error(part, at, f"field {fields[0].field_number}")
    return _error(message, path, "a field")


def _parts(message: Message, path: str) -> Iterator[tuple[str, Message]]:
    """A message and all messages in it, each with its path."""
    yield path, message
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue  # protobuf counts an unknown field of a map's entry as one of the message
        at = f"{path}.{field.name}" if path else field.name
        if isinstance(value, Message):
            yield from _parts(value, at)
        else:
            for index, item in enumerate(value):
                yield from _parts(item, f"{at}[{index}]")


def _error(message: Message, path: str, field: str) -> UnknownField:
    return UnknownField(path or "message", message.DESCRIPTOR.full_name, field, version("secateur"))
