"""Checks fields of a request as they are read."""

from collections.abc import Sized

from google.protobuf.message import Message

from secateur_server.errors import AmountOutOfRange, InvalidSpec


def chosen(message: Message, oneof: str, path: str) -> str:
    """The name of the field that is set in a oneof of a message. `path` is the message's.

    Raises:
        InvalidSpec: No field is set.
    """
    name: str | None = message.WhichOneof(oneof)
    if name is None:
        fields = message.DESCRIPTOR.oneofs_by_name[oneof].fields
        choices = " or ".join(field.name for field in fields)
        raise InvalidSpec(f"{path}.{oneof}", f"is not set; set {choices}")
    return name


def check_length(field: str, items: Sized, most: int, what: str) -> None:
    """Refuses a list of more than `most` items, before any work on it.

    Args:
        field: The path of the list.
        items: The list.
        most: The documented limit.
        what: The name of the items, for the error.

    Raises:
        InvalidSpec: The list is longer.
    """
    if len(items) > most:
        raise InvalidSpec(field, f"{len(items)} {what} are more than {most}; send fewer")


def fraction_of(value: float, field: str) -> float:
    """Returns `value`.

    Raises:
        AmountOutOfRange: It is outside [0, 1].
    """
    if not 0.0 <= value <= 1.0:
        raise AmountOutOfRange(field, f"{value} is outside [0, 1]")
    return value
