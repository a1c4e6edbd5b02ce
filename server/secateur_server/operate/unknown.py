"""Fields that a newer client knows and this server does not."""

from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from secateur_proto import pruner_pb2
from secateur_server.errors import UnknownField

_PACKAGE = pruner_pb2.DESCRIPTOR.package
# The search for the field at fault is bounded in messages, and in bytes of unknown fields: protobuf
# lists 1.5 million of these a second, and lets no other thread run meanwhile. Beyond the bounds the
# error names the outermost message. So it does for a long message, which would be decoded again: a
# map, whose entries now come in the order of their hashes, takes seconds then.
_MOST_SEARCHED, _MOST_UNKNOWN_BYTES, _MOST_BYTES = 10_000, 64 << 10, 1 << 20


def check_known(message: Message, has_other_fields: bool) -> None:
    """Refuses a request with a field that this server does not know.

    It may be a choice of the caller, which must not be ignored. Messages of other packages, such as
    those of health checks, are not checked.

    Args:
        message: The request.
        has_other_fields: Whether it may have others than `header` and `data`.

    Raises:
        UnknownField: It names the message that has the field.
    """
    if message.DESCRIPTOR.file.package != _PACKAGE:
        return
    if has_other_fields or "header" not in message.DESCRIPTOR.fields_by_name:
        _check_parts(message, "")
    elif message.HasField("header"):  # to discard fields of one that is not set would set it
        # Only the header: copies of the data, which has no fields, would take time.
        _check_parts(message.header, "header")  # type: ignore[attr-defined]


def _check_parts(message: Message, path: str) -> None:
    """Compares sizes, since protobuf discards unknown fields much faster than it lists them."""
    before = message.SerializeToString()
    message.DiscardUnknownFields()
    if unknown := len(before) - message.ByteSize():
        if unknown > _MOST_UNKNOWN_BYTES or len(before) > _MOST_BYTES:
            raise _error(message, path, "a field")
        raise _found(type(message).FromString(before), path)


def _found(message: Message, path: str) -> UnknownField:
    """The error for a message with unknown fields, in it or in its parts."""
    for at, part in islice(_parts(message, path), _MOST_SEARCHED):
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
