"""Converts values to and from protobuf messages. Nothing is measured here."""
