"""Traces, if OpenTelemetry's packages are installed; `opentelemetry-instrument` says where they go."""

from collections.abc import Mapping

from fastapi import FastAPI

try:
    from opentelemetry import trace
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
except ImportError:
    trace = None  # type: ignore[assignment]


def instrument(app: FastAPI) -> None:
    """Make a span of every request, as part of the client's trace if its headers name one."""
    if trace:
        FastAPIInstrumentor.instrument_app(app, exclude_spans=["receive", "send"])


class Span:
    """The span of the current request."""

    def __init__(self) -> None:
        self._span = trace.get_current_span() if trace else None

    def add(self, attributes: Mapping[str, str | int | float]) -> None:
        """Add attributes, named as in OpenTelemetry's conventions for generative AI."""
        if self._span:
            self._span.set_attributes(dict(attributes))
