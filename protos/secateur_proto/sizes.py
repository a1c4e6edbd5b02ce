"""Numbers of bytes as people write them. Both ends read them with this function."""

import re
from decimal import Decimal

_FACTORS = {
    "": 1,
    "B": 1,
    **{prefix + "B": 1000**power for power, prefix in enumerate("kMGT", 1)},
    **{prefix + "iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
    "KB": 1000,
}


def byte_count(text: str) -> int:
    """A number of bytes above 0: 1048576, 512MiB, 1.5GiB, 5 GB.

    Raises:
        ValueError: The text is not one.
    """
    found = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?) ?([A-Za-z]*)", text, re.ASCII)
    if found and found[2] in _FACTORS:
        count = Decimal(found[1]) * _FACTORS[found[2]]
        if count > 0 and count == int(count):
            return int(count)
    raise ValueError(f"{text!r} is not a number of bytes, such as 1048576, 512MiB or 5GB")
