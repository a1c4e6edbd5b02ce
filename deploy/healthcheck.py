"""Exits with 0 if the server of this container accepts requests, by grpc.health.v1.

    healthcheck.py [SERVICE]

The service "liveness" tells whether the server runs at all. With TLS, the probe trusts the
server's own certificate, whatever its name. It presents the same one if the server requires
client certificates.
"""

import os
import ssl
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def channel(address: str) -> grpc.Channel:
    """Connects as the server's own environment variables say."""
    certificate = os.environ.get("SECATEUR_TLS_CERT")
    if not certificate:
        return grpc.insecure_channel(address)
    chain, pair = Path(certificate).read_bytes(), (None, None)
    if os.environ.get("SECATEUR_TLS_CLIENT_CA"):
        pair = Path(os.environ["SECATEUR_TLS_KEY"]).read_bytes(), chain
    credentials = grpc.ssl_channel_credentials(chain, *pair)
    options = [("grpc.ssl_target_name_override", name_in(certificate))]
    return grpc.secure_channel(address, credentials, options)


def name_in(certificate: str) -> str:
    """Returns a name that the certificate covers: gRPC cannot connect without one."""
    found = ssl._ssl._test_decode_cert(certificate)  # the parser of ssl itself
    names = [name for kind, name in found["subjectAltName"] if kind in ("DNS", "IP Address")]
    return names[0].replace("*", "any")


def main() -> int:
    """Returns the exit status."""
    port = os.environ["SECATEUR_ADDRESS"].rpartition(":")[2]
    with channel(f"127.0.0.1:{port}") as opened:
        request = health_pb2.HealthCheckRequest(service="".join(sys.argv[1:]))
        answer = health_pb2_grpc.HealthStub(opened).Check(request, timeout=4)
    return int(answer.status != health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(main())
