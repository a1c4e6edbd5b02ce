"""Checks of the fields of a request."""

from collections.abc import Sized

from google.protobuf.message import Message

from secateur_server.errors import AmountOutOfRange, InvalidSpec


def chosen(message: Message, oneof: str, path: str) -> str:
    """The name of the field of a oneof that is set.

    Args:
        message: With the oneof.
        oneof: Its name.
        path: The path of the message in the request.

    Raises:
        InvalidSpec: None of its fields is set.
    """
    name: str | None = message.WhichOneof(oneof)
    if name is None:
        fields = message.DESCRIPTOR.oneofs_by_name[oneof].fields
        choices = " or ".join(field.name for field in fields)
        raise InvalidSpec(f"{path}.{oneof}", f"{choices} is needed")
    return name


def check_length(field: str, items: Sized, most: int, what: str) -> None:
    """Refuses a list that is longer than a documented limit, before any work on it.

    Raises:
        InvalidSpec: It names the field and the limit.
    """
    if len(items) > most:
        raise InvalidSpec(field, f"{len(items)} {what} are more than {most}; give fewer")


def fraction_of(value: float, field: str) -> float:
    """A fraction.

    Raises:
        AmountOutOfRange: It is outside [0, 1].
    """
    if not 0.0 <= value <= 1.0:
        raise AmountOutOfRange(field, f"{value} is not in [0, 1]")
    return value
