"""Prometheus metrics of the service; every label has few values, none of which comes from a request."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from ddengine.serve.contract import STAGES, STATUS, Edited, Event, Failed, Prepared, Stats

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The counters of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        mine = self.registry
        self._jobs = Counter("ddengine_jobs", "Jobs by how they ended.", ["kind", "outcome"], registry=mine)
        self._refused = Counter(
            "ddengine_requests_refused", "Requests answered with an error.", ["code"], registry=mine
        )
        self._requests = Counter("ddengine_requests", "Requests.", ["route", "status"], registry=mine)
        self._stages = Histogram(
            "ddengine_stage_seconds", "Seconds of an edit by stage.", ["stage"], buckets=_BUCKETS, registry=mine
        )
        self._waits = Histogram("ddengine_wait_seconds", "Seconds a job waited.", buckets=_BUCKETS, registry=mine)
        self._edits = Histogram(
            "ddengine_job_seconds", "Seconds of a job, all in all.", ["kind"], buckets=_BUCKETS, registry=mine
        )
        self._open = Gauge("ddengine_jobs_open", "Jobs taken and not ended.", registry=mine)
        self._now = {
            name: Gauge(f"ddengine_{name}", text, registry=mine)
            for name, text in {
                "workers": "Workers.",
                "queued": "Jobs that wait at the workers.",
                "running": "Jobs that run.",
                "sources": "Prepared sources kept.",
                "source_bytes": "Bytes of memory of prepared sources.",
                "device_bytes": "Bytes of device memory that the allocators hold.",
                # Of the workers, and back to 0 with them: gauges, though they only grow.
                "source_hits": "Edits that found their source.",
                "source_misses": "Edits whose source was gone.",
                "source_evictions": "Sources dropped for room or time.",
                "batches": "Batches of two or more edits.",
                "batched": "Edits that ran in batches.",
            }.items()
        }
        for kind in ("edit", "source"):
            for outcome in ("ok", *STATUS):
                self._jobs.labels(kind, outcome)

    def ended(self, kind: str, final: Event, seconds: float) -> None:
        """A job of kind edit or source has ended."""
        self._jobs.labels(kind, final.code if isinstance(final, Failed) else "ok").inc()
        self._edits.labels(kind).observe(seconds)
        if isinstance(final, (Edited, Prepared)):
            self._waits.observe(final.waited_s)
            for stage in STAGES:
                if final.timings.get(stage, 0) > 0:
                    self._stages.labels(stage).observe(final.timings[stage])

    def refused(self, code: str) -> None:
        self._refused.labels(code if code in STATUS else "internal").inc()

    def answered(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def text(self, stats: Stats, open_jobs: int) -> bytes:
        """All of it in Prometheus' text format."""
        self._open.set(open_jobs)
        for name, gauge in self._now.items():
            gauge.set(getattr(stats, name))
        return generate_latest(self.registry)
