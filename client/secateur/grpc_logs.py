"""Keeps gRPC's notes on failed handshakes off stderr: the errors of this package say as much.

gRPC reads the variable once, when it is imported. Where somebody has set it, or has imported grpc
before, nothing changes, and no process that this one starts sees it.
"""

import os
import sys

if "grpc" not in sys.modules and "GRPC_VERBOSITY" not in os.environ:
    os.environ["GRPC_VERBOSITY"] = "NONE"
    import grpc  # noqa: F401

    del os.environ["GRPC_VERBOSITY"]
