"""Prometheus metrics of the api, in a registry of their own, so that several apps fit in one process."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector

from api.http.schemas.recommend import MemoryUse
from api.recommend.feedback import Feedback
from api.workers import Worker

STAGES = ("queue", "retrieve", "encode", "fuse", "score")
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class ApiMetrics:
    """All metrics of the api. `worker`: this process among those whose metrics are summed."""

    def __init__(self, feedback_key: str = "", worker: Worker | None = None) -> None:
        self.worker, self.registry = worker, CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.feedback = Feedback(feedback_key)
        self.registry.register(self.feedback)
        self.requests = Counter(
            "ramrec_api_requests", "Requests by route and status", ["route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "ramrec_api_request_seconds",
            "Time of a request, from its headers to the end of its answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.seconds = Histogram(
            "ramrec_api_seconds",
            "Time of a stage: a request's wait in the queue; a batch's retrieval, encoding, fusion and scoring",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._stages = {stage: self.seconds.labels(stage) for stage in STAGES}
        self.waited = self._stages["queue"].observe
        self.sources = Counter("ramrec_api_answers", "Answers by source", ["source"], registry=self.registry)
        self.degraded = Counter("ramrec_api_degraded", "Answers without the memory asked for", registry=self.registry)
        self.interactions = Counter(
            "ramrec_api_interactions", "Interactions by outcome", ["outcome"], registry=self.registry
        )
        self.model = Gauge(
            "ramrec_api_model",
            "1 for the model that serves, and for the one wanted",
            ["role", "version"],
            registry=self.registry,
        )
        self.model_trouble = Gauge(
            "ramrec_api_model_trouble",
            "1 while a model that the memory service names cannot be loaded",
            registry=self.registry,
        )
        self.entropy = Histogram(
            "ramrec_api_entropy",
            "Entropy of users answered from memory",
            buckets=[n / 10 for n in range(1, 11)],
            registry=self.registry,
        )
        self.k = Histogram(
            "ramrec_api_k",
            "Own-scope K of users answered from memory",
            buckets=(0, 1, 2, 3, 5, 8, 10, 12, 15, 20, 30, 50, 100),
            registry=self.registry,
        )
        self.bank_size = Histogram(
            "ramrec_api_bank_size",
            "Memories in the banks of users answered from memory",
            buckets=(0, 1, 3, 5, 10, 20, 30, 50, 75, 100, 200, 500, 1000),
            registry=self.registry,
        )

    def collect(self) -> Iterator[Metric]:
        """For `GET /metrics`: the metrics of this process, or the sums over all workers."""
        yield from self.registry.collect() if self.worker is None else self.worker.collect(self.registry)

    def stage(self, name: str, begin: float) -> float:
        """Record that a batch finished a stage that began at `begin` (of `time.perf_counter`). Returns the time now."""
        now = time.perf_counter()
        self._stages[name].observe(now - begin)
        return now

    def works_with(self, serving: str, wanted: str, *, stuck: bool) -> None:
        """Record which models are loaded; `stuck`: another one cannot be loaded."""
        self.model.clear()
        self.model.labels("serving", serving).set(1)
        self.model.labels("wanted", wanted).set(1)
        self.model_trouble.set(stuck)

    def answered(self, source: str, memory: MemoryUse, *, known: bool) -> None:
        """Record a response; `known`: its user has a record."""
        self.sources.labels(source).inc()
        if memory["degraded"]:
            self.degraded.inc()
        if known:
            self.entropy.observe(memory["entropy"])
            self.k.observe(memory["k"])
            self.bank_size.observe(memory["bank_size"])
