"""OpenTelemetry traces of calls and their stages. Needs secateur[otel]."""

from importlib.metadata import version
from typing import Any

import grpc

from secateur_server.runtime.context import RequestContext


class NoTraces(Exception):
    """The packages of OpenTelemetry are not installed."""


class Traces:
    """Sends spans by OTLP over gRPC to a collector, http://HOST:PORT or https://HOST:PORT.

    Attributes:
        interceptor: Creates a span for each call, in the caller's trace (W3C traceparent).

    Raises:
        NoTraces: The packages of OpenTelemetry are not installed.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.instrumentation.grpc import server_interceptor
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise NoTraces(
                f"--otlp-endpoint needs {error.name}: pip install 'secateur[otel]'"
            ) from None
        names = {"service.name": "secateur", "service.version": version("secateur")}
        self._provider = TracerProvider(resource=Resource.create(names))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("secateur")
        self.interceptor: grpc.ServerInterceptor = server_interceptor(  # type: ignore[no-untyped-call]
            self._provider
        )

    def record_call(self, call: RequestContext) -> None:
        """Creates the spans of the stages of a finished call, below the call's own span."""
        from opentelemetry.trace import get_current_span

        get_current_span().set_attributes(_attributes(call))
        for name, stage in call.stages.items():
            attributes = {"secateur.seconds": stage.seconds}
            span = self._tracer.start_span(name, start_time=stage.begun, attributes=attributes)
            span.end(stage.ended)

    def close(self) -> None:
        """Sends the remaining spans."""
        self._provider.shutdown()


def _attributes(call: RequestContext) -> dict[str, Any]:
    return {
        "secateur.request_id": call.id,
        "secateur.tenant": call.tenant.name,
        "secateur.received_bytes": call.received,
        "secateur.sent_bytes": call.sent,
        "secateur.elements": call.elements,
    }
