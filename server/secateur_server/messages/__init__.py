"""Protobuf messages to plain values, and back."""
