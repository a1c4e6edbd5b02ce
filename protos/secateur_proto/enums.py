"""The names of enum values as people write them, derived from the .proto files.

Both ends build their tables with these functions.
"""

from typing import Any

from google.protobuf.descriptor import EnumDescriptor


def plain_name(enum: EnumDescriptor, number: int) -> str:
    """Returns a value's name in lower case and without the enum's prefix.

    Args:
        enum: The enum's descriptor.
        number: Of one of its values.

    Returns:
        OUTPUT_MASKS is "masks".
    """
    prefix: str = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    name: str = enum.values_by_number[number].name
    return name.removeprefix(prefix).lower()


def values_by_name(enum: EnumDescriptor) -> dict[str, Any]:
    """Maps the plain name of each value of an enum to its number, without `..._UNSPECIFIED`."""
    return {plain_name(enum, value.number): value.number for value in enum.values if value.number}
