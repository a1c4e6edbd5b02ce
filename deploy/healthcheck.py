"""Exits 0 where the server of this container takes requests: grpc.health.v1, as probes ask it.

healthcheck.py [SERVICE]: with "liveness" it asks whether the server runs at all.
Where the server has TLS, the probe trusts its certificate, whatever its name, and shows the same
one where the server asks callers for certificates.
"""

import os
import ssl
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def channel(address: str) -> grpc.Channel:
    """To the server, as its own variables say."""
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
    """A name that the certificate is for: gRPC has no way to ask without one."""
    found = ssl._ssl._test_decode_cert(certificate)  # what ssl itself reads certificates with
    names = [name for kind, name in found["subjectAltName"] if kind in ("DNS", "IP Address")]
    return names[0].replace("*", "any")


def main() -> int:
    """The exit status."""
    port = os.environ["SECATEUR_ADDRESS"].rpartition(":")[2]
    with channel(f"127.0.0.1:{port}") as opened:
        request = health_pb2.HealthCheckRequest(service="".join(sys.argv[1:]))
        answer = health_pb2_grpc.HealthStub(opened).Check(request, timeout=4)
    return int(answer.status != health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(main())
