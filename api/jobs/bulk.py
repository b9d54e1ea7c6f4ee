"""Work on all users, divided by the 16,384 slots of a Redis Cluster: in this process, or on the workers of Ray.

A job is a small frozen dataclass that travels to where it is run, and is then called with slots: it does its work for
the users whose records lie there. Every job may be called again for the same slots and goes on where it was, so a lost
worker costs time only. What a job opens (services, a checkpoint's folder, files) must be reachable from every worker,
under the same names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Protocol, TypeVar

from memory_service.protocol.slots import ALL_SLOTS
from model.errors import RamrecError

RANGES_A_WORKER = 4
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
"""Ray's words, read when it is imported, for listening on loopback alone, as it does on a desktop, and for telling
nobody.
"""
STORE_BYTES = 100 * 2**20
"""Ray's shared memory: jobs and results are small."""
Report = Callable[[int, int], None]
"""Is told of users looked at and users done, as often as the work likes."""
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class BulkError(RamrecError):
    """The work cannot be done, or not to its end; what is done stays done."""


class Job(Protocol[Result_co]):
    """Work on the users of some slots. Raises RamrecError."""

    def __call__(self, slots: range, report: Report) -> Result_co:
        """Do it."""


class Runner(Protocol):
    """Where jobs run, and how many `workers` there are."""

    @property
    def workers(self) -> int:
        """How many parts are worked on at a time."""

    def run(self, job: Job[Result], parts: Sequence[range], report: Report) -> Iterator[Result]:
        """Call the job with every part; results in any order.

        Raises:
            RamrecError: a call did. BulkError: a worker was lost, again and again.
        """


@dataclass(frozen=True)
class Local:
    """This process, one part after another."""

    workers: int = 1

    def run(self, job: Job[Result], parts: Sequence[range], report: Report) -> Iterator[Result]:
        """See `Runner`."""
        return (job(slots, report) for slots in parts)


HERE: Runner = Local()


class OnRay(AbstractContextManager["OnRay"]):
    """A Ray cluster, every worker one core and one part at a time; the report comes when a part is done.

    Args:
        workers: how many; None: as many as the cluster has cores.
        address: of a running cluster (`auto`, `HOST:PORT`, `ray://…`); None: one is started on this machine, for
            loopback alone, and ended at the end.

    Raises:
        BulkError: Ray is not installed, or there is no cluster.
    """

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        if address is None:
            os.environ |= ALONE
        try:
            import ray
        except ImportError as error:
            raise BulkError("Ray is not installed: pip install 'ramrec[ray]'") from error
        self._ray: Any = ray
        try:
            _connect(ray, workers, address)
        except (OSError, RuntimeError, ValueError) as error:
            raise BulkError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
        self.workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the cluster; unfinished work is ended."""
        self._ray.shutdown()

    def run(self, job: Job[Result], parts: Sequence[range], report: Report) -> Iterator[Result]:
        """See `Runner`."""
        ray, remote = self._ray, self._ray.remote(num_cpus=1)(_counted)
        waiting, under_way = list(reversed(parts)), list[Any]()
        try:
            while waiting or under_way:
                while waiting and len(under_way) < self.workers:
                    under_way.append(remote.remote(job, waiting.pop()))
                (done,), under_way = ray.wait(under_way)
                result, looked_at, count = self._result(done)
                report(looked_at, count)
                yield result
        finally:
            for other in under_way:
                ray.cancel(other)

    def _result(self, done: Any) -> Any:
        try:
            return self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RamrecError):
                raise error.cause from None
            raise BulkError(f"a Ray worker failed: {error.cause!r}") from error
        except self._ray.exceptions.RayError as error:
            raise BulkError(f"a Ray worker was lost: {error}") from error


def _connect(ray: Any, workers: int | None, address: str | None) -> None:
    quiet = {"log_to_driver": False, "configure_logging": False}
    if address is not None:
        ray.init(address, **quiet)
        return
    ray.init("local", num_cpus=workers, include_dashboard=False, object_store_memory=STORE_BYTES, **quiet)


def _counted(job: Job[Result], slots: range) -> tuple[Result, int, int]:
    """Runs in a worker: the job's result, and the sums of what it reported."""
    looked_at = done = 0

    def count(more: int, more_done: int) -> None:
        nonlocal looked_at, done
        looked_at, done = looked_at + more, done + more_done

    result = job(slots, count)
    return result, looked_at, done


def divided(parts: int, slots: range = ALL_SLOTS) -> list[range]:
    """Slots in at most so many parts of the same size, or nearly so.

    >>> divided(3, range(100, 110))
    [range(100, 103), range(103, 106), range(106, 110)]
    """
    bounds = [slots.start + len(slots) * part // parts for part in range(parts + 1)]
    return [range(first, stop) for first, stop in pairwise(bounds) if stop > first]


def shares(where: Runner) -> list[range]:
    """All slots, in as many parts as there are workers, or more of them: who is done early takes another."""
    return divided(where.workers * RANGES_A_WORKER) if where.workers > 1 else [ALL_SLOTS]


def runner(engine: str, workers: int | None, address: str | None) -> AbstractContextManager[Runner]:
    """What `--engine` names. Raises BulkError."""
    return OnRay(workers, address) if engine == "ray" else nullcontext(HERE)
