"""Numbers with units, as operators write them."""

from secateur_proto.sizes import byte_count

__all__ = ["byte_count"]
