"""The servicers: a few lines for each RPC."""
