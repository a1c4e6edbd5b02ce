"""Who calls."""

import grpc
from blake3 import blake3


def owner_of(context: grpc.ServicerContext) -> str:
    """Whose checkpoints a call sees: one owner for each token, and one for those without.

    Returns: hexadecimal digits, of which the token cannot be found out.
    """
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            text = value.encode() if isinstance(value, str) else value
            return blake3(b"secateur owner\n" + text).hexdigest()[:32]
    return "0" * 32
