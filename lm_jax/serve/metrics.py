"""What the server tells Prometheus of itself."""

import functools

import prometheus_client

from lm_jax.generate.continuous_batching import Engine

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Counts of one engine, and how long tokens took to come."""

    def __init__(self, engine: Engine):
        self.registry = prometheus_client.CollectorRegistry()
        gauge = lambda name, says: prometheus_client.Gauge(f"lm_jax_{name}", says, registry=self.registry)
        gauge("slots", "slots that there are").set(len(engine.slots))
        gauge("slots_busy", "slots in which a text is written").set_function(lambda: len(engine.busy))
        gauge("requests_waiting", "requests without a slot").set_function(
            lambda: len(engine.waiting) + len(engine.scoring)
        )
        for name, says in (
            ("read", "prompt tokens that were read"),
            ("shared", "prompt tokens that were there already"),
        ):
            gauge(f"prompt_tokens_{name}", says).set_function(functools.partial(engine.counts.__getitem__, name))
        self.tokens = prometheus_client.Counter("lm_jax_tokens", "tokens that were written", registry=self.registry)
        self.seconds = [
            prometheus_client.Histogram(f"lm_jax_{name}_seconds", says, registry=self.registry, buckets=SECONDS)
            for name, says in (("between_tokens", "between two tokens"), ("first_token", "to the first token"))
        ]

    def token(self, seconds: float, first: bool) -> None:
        """A token came, so long after the one before it, or after the request."""
        self.tokens.inc()
        self.seconds[first].observe(seconds)

    def page(self) -> bytes:
        """All of it, in Prometheus's format."""
        return prometheus_client.generate_latest(self.registry)
