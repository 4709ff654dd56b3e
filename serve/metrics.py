"""Figures for Prometheus, at `/metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

if TYPE_CHECKING:
    from retnet_export.serve.cache import PrefixCache
    from retnet_export.serve.scheduler import Scheduler

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """What a server counts; hears of jobs as the scheduler's observer. Of no process-wide registry, so there may be several."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("retnet_requests", "Requests by path and status.", ["path", "status"], registry=registry)
        self._jobs = Counter("retnet_jobs", "Prompts by result: done, failed or cancelled.", ["result"], registry=registry)
        self._prompt = Counter("retnet_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter("retnet_prompt_tokens_cached", "Tokens of prompts that came from the cache.", registry=registry)
        self._hits = Counter("retnet_cache_hits", "Prompts of which at least a part came from the cache.", registry=registry)
        self._misses = Counter("retnet_cache_misses", "Prompts that were read from their beginning.", registry=registry)
        self._generated = Counter("retnet_generated_tokens", "Tokens that were generated.", registry=registry)
        self._first = Histogram(
            "retnet_time_to_first_token_seconds", "From a request to its first token.", registry=registry, buckets=SECONDS
        )
        self._token = Histogram("retnet_time_per_token_seconds", "From a token to the next.", registry=registry, buckets=SECONDS)

    def watch(self, scheduler: Scheduler, cache: PrefixCache | None) -> None:
        """Show how busy a scheduler and how full a cache is."""
        for name, text, value in (
            ("retnet_queue", "Prompts that wait.", lambda: scheduler.load.waiting),
            ("retnet_reading", "Prompts that are being read.", lambda: scheduler.load.reading),
            ("retnet_running", "Sequences that generate.", lambda: scheduler.load.generating),
            ("retnet_slots", "Sequences that can generate together.", lambda: scheduler.load.slots),
            ("retnet_cache_bytes", "Bytes of snapshots in the cache.", lambda: cache.bytes if cache else 0),
            ("retnet_cache_entries", "Snapshots in the cache.", lambda: len(cache) if cache else 0),
        ):
            Gauge(name, text, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)

    def read(self, tokens: int, cached: int) -> None:
        self._prompt.inc(tokens)
        self._cached.inc(cached)
        (self._hits if cached else self._misses).inc()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)
        self._generated.inc()

    def token(self, seconds: float | None) -> None:
        if seconds is not None:
            self._token.observe(seconds)
        self._generated.inc()

    def ended(self, result: str, tokens: int) -> None:
        self._jobs.labels(result).inc()
