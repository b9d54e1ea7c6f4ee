"""How fast `ramrec serve` answers, beside the floor, and where the time goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measures import Measure, measured
from benchmarks.ports import free_port
from benchmarks.serving.asking import BATCH, SEQUENCE, Closed, Look, Probes, closed_loop, open_loop
from benchmarks.serving.deployment import Deployment, running

CONNECTIONS, BATCH_CONNECTIONS = 32, 4
WARM_UP_S = 3.0
RATE = 1000.0
PROBE_MS = REFUSAL_MS = 50.0
EXCESS = 2.0


@dataclass(frozen=True)
class Bench:
    """What is asked, of whom, and for how long each time."""

    deployment: Deployment
    bodies: Path
    seconds: float

    def closed(self, path: str, bodies: str, connections: int) -> Closed:
        """A closed loop after a warm-up, answers looked at beside."""
        url, file = self.deployment.url + path, self.bodies / bodies
        look = Look(url, file)
        closed_loop(url, file, connections, min(WARM_UP_S, self.seconds))
        return closed_loop(url, file, connections, self.seconds, look)

    def users(self) -> Closed:
        """The load that most is measured with: `POST /recommend` by user id."""
        return self.closed("/recommend", "users", CONNECTIONS)


def measure(bench: Bench) -> list[Measure]:
    """Throughput and latency, and a profile of the first."""
    with floor() as url:
        look_at = bench.bodies / "users"
        closed_loop(f"{url}/recommend", look_at, CONNECTIONS, min(WARM_UP_S, bench.seconds))
        limit = closed_loop(f"{url}/recommend", look_at, CONNECTIONS, bench.seconds)
    before = Spent.until_now(bench.deployment)
    ours = bench.users()
    spent = Spent.until_now(bench.deployment)
    name = f"POST /recommend by user_id, {CONNECTIONS} connections"
    return [
        measured(f"floor: fixed list through FastAPI, {CONNECTIONS} connections", limit.rate, "req/s"),
        measured(
            name, ours.rate, "req/s", at_least=2000, reference="the floor", limit=limit.rate, ratio_at_least=0.25
        ),
        measured(f"{name}: p50", ours.p50_ms, "ms"),
        measured(f"{name}: p99", ours.p99_ms, "ms"),
        *profile(before, spent),
        measured("profile: CPU a request, wrk", ours.cpu_s / ours.requests * 1e6, "µs"),
        *_latency(bench),
        measured(f"an explicit sequence of {SEQUENCE} items, {CONNECTIONS} connections",
                 bench.closed("/recommend", "sequences", CONNECTIONS).rate, "req/s", at_least=1000),
        measured(f"POST /recommend/batch of {BATCH}, {BATCH_CONNECTIONS} connections",
                 bench.closed("/recommend/batch", "batches", BATCH_CONNECTIONS).rate * BATCH, "users/s", at_least=3000),
    ]  # fmt: skip


@contextmanager
def floor() -> Iterator[str]:
    """`benchmarks.serving.floor` as a process of its own; gives its URL."""
    port = free_port()
    with running(["-m", "benchmarks.serving.floor", "--port", str(port)], port) as served:
        yield served.url


def _latency(bench: Bench) -> list[Measure]:
    """Open loop at RATE."""
    url, bodies = f"{bench.deployment.url}/recommend", bench.bodies / "users"
    open_loop(url, bodies, RATE, min(WARM_UP_S, bench.seconds))
    report = open_loop(url, bodies, RATE, bench.seconds, Look(url, bodies))
    name, answers = f"POST /recommend by user_id, {RATE:,.0f} req/s, open loop", report["answers"]["200"]
    wrong = report["sent"] - answers["count"]
    return [
        measured(f"{name}: p50", answers["p50_ms"], "ms", at_most=3),
        measured(f"{name}: p99", answers["p99_ms"], "ms", at_most=10),
        measured(f"{name}: longest", answers["max_ms"], "ms"),
        measured(f"{name}: not answered with 200", wrong, "requests", at_most=0),
        measured(f"{name}: the load generator sent late by, p99", report["sent_late_p99_ms"], "ms"),
        measured(f"{name}: CPU a request of the load generator", report["cpu_s"] / report["sent"] * 1e6, "µs"),
    ]


# --------------------------------------------------------------------------------------------------- profile


@dataclass(frozen=True)
class Spent:
    """CPU seconds by process, and seconds and count of each stage as the api times them, since they started."""

    cpu_s: dict[str, float]
    stages: dict[str, tuple[float, float]]

    @classmethod
    def until_now(cls, deployment: Deployment) -> Spent:
        return cls(deployment.cpu_s(), deployment.stages())

    def requests(self, before: Spent) -> float:
        """Answered since; every request passes the queue once."""
        return self.stages["queue"][1] - before.stages.get("queue", (0.0, 0.0))[1]

    def api_s(self, before: Spent) -> float:
        """CPU seconds of the api for a request since."""
        used = sum(seconds - before.cpu_s[name] for name, seconds in self.cpu_s.items() if name.startswith("api"))
        return used / self.requests(before)


def profile(before: Spent, after: Spent) -> list[Measure]:
    """Where the time of the requests between two looks went."""
    requests, found = after.requests(before), []
    for name, seconds in after.cpu_s.items():
        used = (seconds - before.cpu_s[name]) / requests
        found.append(measured(f"profile: CPU a request, {name}", used * 1e6, "µs"))
    for stage, (seconds, count) in after.stages.items():
        before_s, before_count = before.stages.get(stage, (0.0, 0.0))
        if count > before_count:
            name = f"profile: time in stage {stage}, {requests / (count - before_count):.1f} requests at a time"
            share = (seconds - before_s) / (count - before_count)
            found.append(measured(name, share * 1e6, "µs"))
    return found


# -------------------------------------------------------------------------------------------------- overload


def overload(bench: Bench) -> list[Measure]:
    """EXCESS times the sustainable load, open loop, health probes beside."""
    peak = bench.users().rate
    probes = Probes(bench.deployment.url)
    url, bodies = f"{bench.deployment.url}/recommend", bench.bodies / "users"
    report = open_loop(url, bodies, EXCESS * peak, bench.seconds, probes)
    name, answers = f"{EXCESS:g} times the sustainable load, open loop", report["answers"]
    good, refused = answers["200"], [answers[code] for code in ("429", "503") if code in answers]
    refusals = sum(one["count"] for one in refused)
    others = report["sent"] - good["count"] - refusals
    return [
        measured(f"{name}: goodput", good["a_second"], "req/s",
                 reference="the peak of the closed loop", limit=peak, ratio_at_least=0.8),
        measured(f"{name}: p50 of answers", good["p50_ms"], "ms"),
        measured(f"{name}: p99 of answers", good["p99_ms"], "ms"),
        measured(f"{name}: refused with 429 or 503", refusals / report["sent"], "share"),
        measured(f"{name}: refusals without Retry-After",
                 refusals - sum(one["with_retry_after"] for one in refused), "requests", at_most=0),
        measured(f"{name}: p99 of refusals", max((one["p99_ms"] for one in refused), default=0.0), "ms",
                 at_most=REFUSAL_MS),
        measured(f"{name}: any other outcome", others, "requests", at_most=0),
        *(
            measured(f"{name}: longest answer of {path}, {len(times)} probes", max(times) * 1e3, "ms", at_most=PROBE_MS)
            for path, times in probes.times.items()
        ),
        measured(f"{name}: probes that failed", probes.failed, "probes", at_most=0),
        measured(f"{name}: the load generator sent late by, p99", report["sent_late_p99_ms"], "ms"),
        measured(f"{name}: CPU a request of the load generator", report["cpu_s"] / report["sent"] * 1e6, "µs"),
    ]  # fmt: skip
