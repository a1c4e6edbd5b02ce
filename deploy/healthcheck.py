"""Exits 0 where the server of this container takes requests: grpc.health.v1, as probes ask it."""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

port = os.environ["SECATEUR_ADDRESS"].rpartition(":")[2]
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    request = health_pb2.HealthCheckRequest()
    answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=4)
sys.exit(answer.status != health_pb2.HealthCheckResponse.SERVING)
