"""grpc.health.v1: whether the server takes requests, and whether it lives."""

from collections.abc import Iterable, Iterator
from typing import Any

from grpc_health.v1 import health, health_pb2

# Serves until the process ends; the other names are about taking requests.
LIVENESS = "liveness"


class Health(health.HealthServicer):  # type: ignore[misc]  # it has no types
    """Readiness under "" and the services' names, liveness under its own."""

    def __init__(self, services: Iterable[str]) -> None:
        super().__init__()
        self._ready = ("", *services)
        self._is_draining = False
        self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)

    def serve(self) -> None:
        """Requests are taken."""
        self._set(health_pb2.HealthCheckResponse.SERVING)

    def drain(self) -> None:
        """Takes no more requests. Who watches is told so and let go, not to hold up the end."""
        self._is_draining = True
        self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)

    def _set(self, status: Any) -> None:
        for name in self._ready:
            self.set(name, status)

    def Watch(  # noqa: N802 (the rpc's name)
        self, request: Any, context: Any, send_response_callback: Any = None
    ) -> Iterator[Any]:
        """As health.HealthServicer.Watch, until who watches knows that the server drains.

        The drain may come between two answers: who has only seen SERVING is not let go yet.
        """
        for response in super().Watch(request, context, send_response_callback):
            yield response
            knows = response.status != health_pb2.HealthCheckResponse.SERVING
            if self._is_draining and (knows or request.service == LIVENESS):
                return
