"""Which models the api has loaded: the one that serves, and while another is to follow, that one too.

The memory service says which (it reads it from Redis); every api process follows. Interactions are written for the
wanted model, a user is answered by the model that the user's record belongs to, and everybody else by the serving one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path

from api.catalogue.filters import Filter
from api.http.metrics import Metrics
from api.http.problems import ApiProblem, CheckpointRefused
from api.models.engine import Engine
from memory_service.protocol.structs import ModelReply, ModelRequest
from model.checkpoint import CheckpointError, find_checkpoint
from model.serving.recommender import Recommender

MODEL_TRIES = 3
"""How often a call that came with a model of the past is made again."""
AGAIN_S = 30.0
"""A model that could not be loaded is tried again after this."""
log = logging.getLogger(__name__)


class Models:
    """The engines of the loaded models, by version. `serves` is told of the serving one, now and at every change."""

    def __init__(self, engine: Engine, run: Path, serves: Callable[[Engine], None] = lambda engine: None) -> None:
        self.serving = self.wanted = engine
        self.engines = {engine.version: engine}
        self._run, self._serves = run, serves
        self._failed: tuple[ModelReply, float] | None = None
        self._lock = asyncio.Lock()
        serves(engine)

    @property
    def stuck(self) -> bool:
        """Whether the memory service works with a model that cannot be loaded here."""
        return self._failed is not None

    def show(self, metrics: Metrics) -> None:
        """Have the metrics say which models are loaded now."""
        metrics.works_with(self.serving.version, self.wanted.version, stuck=self.stuck)

    async def sync(self) -> None:
        """Follow the memory service, in its models and its catalogue. Raises MemoryUnavailable."""
        await self.follow()
        await self.sync_catalogues()

    async def sync_catalogues(self) -> None:
        """Learn what is new or changed in the catalogue, for every model. Raises MemoryUnavailable."""
        for engine in list(self.engines.values()):
            await engine.sync()

    async def follow(self) -> None:
        """Take over which models the memory service says serve and are wanted. Raises MemoryUnavailable.

        A model that cannot be loaded is logged, and all stays as it is.
        """
        async with self._lock:
            state = await self.serving.memory.model()
            if self._failed is not None and self._failed[0] == state and time.monotonic() < self._failed[1] + AGAIN_S:
                return
            try:
                wanted = await self._loaded(state.wanted, state.wanted_run)
                serving = await self._loaded(state.serving, state.serving_run)
            except CheckpointError as error:
                log.error("cannot follow the memory service: %s", error)
                self._failed = state, time.monotonic()
                return
            self.wanted, self._failed = wanted, None
            if serving is not self.serving:
                log.warning("model %s serves, in place of %s", serving.version, self.serving.version)
                self.serving = serving
                self._serves(serving)
            self.engines = {engine.version: engine for engine in (serving, wanted)}

    async def prepare(self, wanted: Collection[Filter]) -> None:
        """Find out what passes filters, for every model that may answer."""
        for engine in list(self.engines.values()):
            await engine.prepare(wanted)

    async def find(self, version: str) -> Engine | None:
        """The engine of a model, looking whether it is wanted by now. Raises MemoryUnavailable."""
        if version not in self.engines:
            await self.follow()
        return self.engines.get(version)

    async def reload(self, run: Path | None = None) -> ModelReply:
        """Ask all processes for the model in a folder (none: the configured one, read anew). Nothing changes for
        anybody until it is loaded here and in the memory service.

        Raises:
            CheckpointRefused: it cannot be used; says why. MemoryUnavailable.
        """
        folder = (run or self._run).absolute()
        try:
            recommender = await asyncio.to_thread(Recommender.load, folder)
        except CheckpointError as error:
            raise CheckpointRefused(str(error)) from error
        async with self._lock:
            await self._take(recommender)
        await self.serving.memory.change_model(ModelRequest(recommender.version, str(folder)))
        await self.follow()
        return await self.serving.memory.model()

    async def reload_on_signal(self) -> None:
        """`reload` of the configured folder, where only the log can say what went wrong."""
        try:
            state = await self.reload()
            log.warning("reload: model %s serves, %s is wanted", state.serving, state.wanted)
        except ApiProblem as problem:
            log.error("reload: %s: %s", problem.code, problem.detail)

    async def _loaded(self, version: str, run: str) -> Engine:
        engine = self.engines.get(version)
        if engine is None:
            folders = [Path(run), self._run] if run else [self._run]
            engine = await self._take(await asyncio.to_thread(_load, version, folders))
        return engine

    async def _take(self, recommender: Recommender) -> Engine:
        """An engine that knows the catalogue before anybody asks it."""
        if recommender.version not in self.engines:
            engine = self.serving.beside(recommender)
            await engine.sync()
            self.engines[recommender.version] = engine
        return self.engines[recommender.version]


def _load(version: str, folders: list[Path]) -> Recommender:
    return Recommender.of(find_checkpoint(version, folders))
