"""Fields that a newer client knows and this server does not."""

from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from secateur_proto import pruner_pb2
from secateur_server.errors import UnknownField

_PACKAGE = pruner_pb2.DESCRIPTOR.package
# How many messages are searched for the field at fault, so that a long request cannot make the
# search long. Where it is further behind, the error names the outermost message.
_MOST_SEARCHED = 10_000


def check_known(message: Message) -> None:
    """Refuses a request with a field that this server does not know.

    It may be a choice of the caller, which must not be ignored. Messages of other packages, such as
    those of health checks, are not checked.

    Raises:
        UnknownField: It names the message that has the field.
    """
    if message.DESCRIPTOR.file.package != _PACKAGE:
        return
    if len(UnknownFieldSet(message)):
        raise _error(message, "")
    if "header" not in message.DESCRIPTOR.fields_by_name:
        _check_parts(message, "")
    elif message.HasField("header"):
        # Only the header: copies of the data, which has no fields, would take time.
        _check_parts(message.header, "header")  # type: ignore[attr-defined]


def _check_parts(message: Message, path: str) -> None:
    """Compares sizes, since protobuf discards unknown fields much faster than Python finds them."""
    before = message.SerializeToString()
    message.DiscardUnknownFields()
    if message.ByteSize() == len(before):
        return
    original = type(message).FromString(before)
    for at, part in islice(_parts(original, path), _MOST_SEARCHED):
        if len(UnknownFieldSet(part)):
            raise _error(part, at)
    raise _error(original, path)


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


def _error(message: Message, path: str) -> UnknownField:
    unknown = UnknownFieldSet(message)
    number = f"field {unknown[0].field_number}" if len(unknown) else "a field"
    kind = message.DESCRIPTOR.full_name
    return UnknownField(path or "message", kind, number, version("secateur"))
