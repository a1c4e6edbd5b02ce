"""Checkpoints on the server's disk: files under their digests, and records of who owns what."""
