"""Bulk jobs: work on all users, divided by Redis Cluster's 16,384 hash slots, in this process or on Ray workers.

A job is a small frozen dataclass that is sent to a worker and called there with a range of hash slots; it works on the
users whose records are in these slots. A job can be called again for the same slots and continues where it stopped, so
a lost worker costs only time. What a job opens (services, folders, files) must be reachable from every worker under the
same name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Protocol, TypeVar

from memory_service.protocol.hash_slots import ALL_SLOTS
from model.errors import RamrecError

PARTS_PER_WORKER = 4
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
"""Environment variables that Ray reads on import: listen on loopback only, send no usage statistics."""
STORE_BYTES = 100 * 2**20
"""Ray's shared memory; jobs and results are small."""
Report = Callable[[int, int], None]
"""A callback for progress: more users looked at, more users done."""
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class BulkError(RamrecError):
    """A job cannot be done, or not completed; what is done stays done."""


class BulkJob(Protocol[Result_co]):
    """Work on the users of some hash slots. Raises RamrecError."""

    def __call__(self, slots: range, report: Report) -> Result_co:
        """Does the work."""


class Runner(Protocol):
    """Runs jobs."""

    @property
    def workers(self) -> int:
        """How many parts run at the same time."""

    def run(self, job: BulkJob[Result], parts: Sequence[range], report: Report) -> Iterator[Result]:
        """Calls the job with every part. Yields the results in any order.

        Raises:
            RamrecError: the job raised it.
            BulkError: a worker was lost repeatedly.
        """


@dataclass(frozen=True)
class LocalRunner:
    """Runs one part after another in this process."""

    workers: int = 1

    def run(self, job: BulkJob[Result], parts: Sequence[range], report: Report) -> Iterator[Result]:
        """See `Runner`."""
        return (job(slots, report) for slots in parts)


LOCAL: Runner = LocalRunner()


class RayRunner(AbstractContextManager["RayRunner"]):
    """Runs parts on the workers of a Ray cluster, each on one core; progress is reported when a part is done.

    Args:
        workers: how many; None: as many as the cluster has cores.
        address: of a running cluster (`auto`, `HOST:PORT`, `ray://…`); None: start one on this machine, on loopback
            only, and stop it at the end.

    Raises:
        BulkError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, workers: int | None = None, address: str | None = None) -> None:
        if address is None:
            os.environ |= LOOPBACK_ONLY
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
        """Disconnects from the cluster; unfinished parts are cancelled."""
        self._ray.shutdown()

    def run(self, job: BulkJob[Result], parts: Sequence[range], report: Report) -> Iterator[Result]:
        """See `Runner`."""
        ray, remote = self._ray, self._ray.remote(num_cpus=1)(_counted)
        waiting, running = list(reversed(parts)), list[Any]()
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    running.append(remote.remote(job, waiting.pop()))
                (ended,), running = ray.wait(running)
                result, looked_at, done = self._result(ended)
                report(looked_at, done)
                yield result
        finally:
            for other in running:
                ray.cancel(other)

    def _result(self, ended: Any) -> Any:
        try:
            return self._ray.get(ended)
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


def _counted(job: BulkJob[Result], slots: range) -> tuple[Result, int, int]:
    """Runs in a worker. Returns the job's result and the sums of what it reported."""
    looked_at = done = 0

    def count(more: int, more_done: int) -> None:
        nonlocal looked_at, done
        looked_at, done = looked_at + more, done + more_done

    result = job(slots, count)
    return result, looked_at, done


def split(parts: int, slots: range = ALL_SLOTS) -> list[range]:
    """Splits slots into at most `parts` ranges of (nearly) the same size.

    >>> split(3, range(100, 110))
    [range(100, 103), range(103, 106), range(106, 110)]
    """
    bounds = [slots.start + len(slots) * part // parts for part in range(parts + 1)]
    return [range(first, stop) for first, stop in pairwise(bounds) if stop > first]


def parts_for(runner: Runner) -> list[range]:
    """Splits all slots for the workers of a runner: several parts each, so that they finish at about the same time."""
    return split(runner.workers * PARTS_PER_WORKER) if runner.workers > 1 else [ALL_SLOTS]


def open_runner(engine: str, workers: int | None, address: str | None) -> AbstractContextManager[Runner]:
    """The runner that the option `--engine` names. Raises BulkError."""
    return RayRunner(workers, address) if engine == "ray" else nullcontext(LOCAL)
