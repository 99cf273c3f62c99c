"""Metrics for dashboards, counted with prometheus-client.

After the prefix, the names are vLLM's, because most dashboards in this field use them.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llama.streaming import Stats

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one server.

    prefix: of every name, before a colon.
    running, waiting: return the number of requests with and without a slot; called on every scrape.
    """

    def __init__(self, prefix: str, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        Gauge(f"{prefix}:num_requests_running", "Requests with a slot", registry=r).set_function(running)
        Gauge(f"{prefix}:num_requests_waiting", "Requests in the queue", registry=r).set_function(waiting)
        self.http = Counter(
            "http_requests", "HTTP requests by status", ["method", "handler", "status"], registry=r
        )
        self.ended = Counter(
            f"{prefix}:request_success", "Answers by finish reason", ["finished_reason"], registry=r
        )
        self.prompt_tokens = Counter(f"{prefix}:prompt_tokens", "Tokens of prompts", registry=r)
        self.generation_tokens = Counter(f"{prefix}:generation_tokens", "Tokens generated", registry=r)
        self.reused_tokens = Counter(
            f"{prefix}:prefix_cache_hits", "Prompt tokens that were in the KV cache already", registry=r
        )
        self.first_token = Histogram(
            f"{prefix}:time_to_first_token_seconds", "Wait for the first token", buckets=SECONDS, registry=r
        )
        self.token = Histogram(
            f"{prefix}:inter_token_latency_seconds",
            "Mean time per further token",
            buckets=SECONDS,
            registry=r,
        )
        self.whole = Histogram(
            f"{prefix}:e2e_request_latency_seconds", "Time for an answer", buckets=SECONDS, registry=r
        )

    def observe(self, stats: Stats, finish_reason: str) -> None:
        """Count an answer that has ended."""
        self.ended.labels(finish_reason).inc()
        self.prompt_tokens.inc(stats.prompt_tokens)
        self.generation_tokens.inc(stats.new_tokens)
        self.reused_tokens.inc(stats.reused_tokens)
        decoding = (stats.new_tokens - 1) / stats.tokens_per_second if stats.tokens_per_second else 0.0
        if stats.new_tokens:
            self.first_token.observe(stats.first_token_seconds)
        if stats.tokens_per_second:
            self.token.observe(1 / stats.tokens_per_second)
        self.whole.observe(stats.first_token_seconds + decoding)

    def text(self) -> bytes:
        """All metrics, in Prometheus' format."""
        return generate_latest(self.registry)
