"""The services: a few lines for each RPC."""
