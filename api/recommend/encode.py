"""Second stage: the states that memory is searched with, as far as requests bring sequences of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from api.recommend.request import ParsedBatch, newest, wants
from memory_service.protocol.columns import Job
from model.memory.record import EncodeJob
from model.serving.recommender import NO_ITEMS

State = NDArray[np.float32]


@dataclass(frozen=True)
class EncodedBatch:
    """Parsed requests and the states to search with; every column has length B.

    states: (width,) float32, or None: that of the user's record. last: as in `ParsedBatch`, for these states. without:
    rows whose users ignore items that they took → the job that their state was encoded from.
    """

    parsed: ParsedBatch
    states: Sequence[State | None]
    last: Sequence[NDArray[np.uint32]]
    without: Mapping[int, Job] = field(default_factory=dict)

    def rows_for_memory(self) -> list[int]:
        """Rows of which memory may know something: of the user, or of others who were in the same situation."""
        return [
            row
            for row, (request, state) in enumerate(zip(self.parsed.requests, self.states, strict=True))
            if request.user_id is not None or (state is not None and wants(request, "collective"))
        ]


async def encode(parsed: ParsedBatch) -> EncodedBatch:
    """Encode the sequences that came with requests."""
    rows = [row for row, sequence in enumerate(parsed.sequences) if len(sequence)]
    states: list[State | None] = [None] * len(parsed)
    if rows:
        jobs = [EncodeJob(0, parsed.sequences[row].astype("<u4"), NO_ITEMS) for row in rows]
        for row, (_, state) in zip(rows, await parsed.engine.encode(jobs), strict=True):
            states[row] = np.asarray(state, np.float32)
    return EncodedBatch(parsed, states, parsed.last)


async def encode_without(batch: EncodedBatch, jobs: Mapping[int, Job]) -> EncodedBatch:
    """The batch with states that do not contain what their users ignore; `jobs`: row → how its state is encoded."""
    parsed = batch.parsed
    states = [None if len(parsed.sequences[row]) == 0 else state for row, state in enumerate(batch.states)]
    last = list(parsed.last)
    for (row, job), (_, state) in zip(jobs.items(), await parsed.engine.encode([*jobs.values()]), strict=True):
        states[row] = np.asarray(state, np.float32)
        last[row] = newest(job.unpack().items.astype("<u4"))
    return replace(batch, states=states, last=last, without=jobs)
