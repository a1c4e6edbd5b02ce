"""The wire of secateur: generated stubs, and `framing`, how a state_dict is cut into messages."""
