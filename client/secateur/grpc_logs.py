"""Keeps gRPC's log lines on failed handshakes off stderr: errors of this package have the facts.

gRPC reads the variable once, when it is imported. If the variable is set, or grpc was imported
before, nothing changes. Child processes never see the variable.
"""

import os
import sys

if "grpc" not in sys.modules and "GRPC_VERBOSITY" not in os.environ:
    os.environ["GRPC_VERBOSITY"] = "NONE"
    import grpc  # noqa: F401

    del os.environ["GRPC_VERBOSITY"]
