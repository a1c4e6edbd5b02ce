"""grpc.health.v1: readiness and liveness."""

from collections.abc import Iterable, Iterator
from typing import Any

from grpc_health.v1 import health, health_pb2

# SERVING until the process ends. The other names show whether the server accepts requests.
LIVENESS = "liveness"


class Health(health.HealthServicer):  # type: ignore[misc]  # it has no types
    """Readiness under "" and the names of the services, liveness under LIVENESS."""

    def __init__(self, services: Iterable[str]) -> None:
        super().__init__()
        self._ready = ("", *services)
        self._is_draining = False
        self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)

    def serve(self) -> None:
        """Reports that the server accepts requests."""
        self._set(health_pb2.HealthCheckResponse.SERVING)

    def drain(self) -> None:
        """Reports that the server accepts no more requests, and ends all watches after that."""
        self._is_draining = True
        self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        self.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)

    def _set(self, status: Any) -> None:
        for name in self._ready:
            self.set(name, status)

    def Watch(  # noqa: N802 (the rpc's name)
        self, request: Any, context: Any, send_response_callback: Any = None
    ) -> Iterator[Any]:
        """Streams the status, and ends once the watcher has been told that the server drains.

        The drain may begin between two answers, so a watcher that has only seen SERVING waits for
        the next one.
        """
        for response in super().Watch(request, context, send_response_callback):
            yield response
            knows = response.status != health_pb2.HealthCheckResponse.SERVING
            if self._is_draining and (knows or request.service == LIVENESS):
                return
