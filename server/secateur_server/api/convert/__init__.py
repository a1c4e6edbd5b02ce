"""Values to and from protobuf messages; nothing is measured here."""
