"""Numbers with units, as operators write them."""

_BINARY = (("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40))
_DECIMAL = (("KB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12))
_UNITS = (*_BINARY, *_DECIMAL, ("", 1))


def byte_count(text: str) -> int:
    """A number of bytes: 1048576, 512MiB, 16GB.  Errors: ValueError."""
    for suffix, factor in _UNITS:
        number = text.removesuffix(suffix)
        if text.endswith(suffix) and number.isdecimal() and int(number) > 0:
            return int(number) * factor
    raise ValueError(f"{text!r} is no number of bytes, such as 512MiB or 16GB")
