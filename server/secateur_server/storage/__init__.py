"""Checkpoints on the server's disk: blobs under their digests, and a record for each checkpoint."""
