"""Which models are loaded: the one that serves and, while another one is to replace it, that one too.

The memory service, which reads it from Redis, says which; every api process follows. Interactions are written for the
wanted model. Users are answered by the model that their record belongs to, users without a record by the serving one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from pathlib import Path

import torch

from api.catalogue.filters import Filter
from api.http.metrics import ApiMetrics
from api.http.problems import ApiProblem, CheckpointRefused
from api.models.engine import Engine
from memory_service.protocol.structs import ModelReply, ModelRequest
from model.checkpoint import CheckpointError, find_checkpoint
from model.serving.recommender import Recommender

MODEL_TRIES = 3
"""How often interactions are written, if the wanted model changes meanwhile."""
RETRY_S = 30.0
"""A model that could not be loaded is tried again after this time."""
log = logging.getLogger(__name__)


class LoadedModels:
    """The engines of the loaded models, by version; `engine` is the first. `run`: the configured checkpoint folder."""

    def __init__(self, engine: Engine, run: Path) -> None:
        self.serving = self.wanted = engine
        self.engines = {engine.version: engine}
        self._run = run
        self._failed: tuple[ModelReply, float] | None = None
        self._lock = asyncio.Lock()

    @property
    def stuck(self) -> bool:
        """Whether the memory service works with a model that could not be loaded here."""
        return self._failed is not None

    def show(self, metrics: ApiMetrics) -> None:
        """Write which models are loaded to the metrics."""
        metrics.works_with(self.serving.version, self.wanted.version, stuck=self.stuck)

    async def sync(self) -> None:
        """Take over the models and the catalogue of the memory service. Raises MemoryUnavailable."""
        await self.follow()
        await self.sync_catalogues()

    async def sync_catalogues(self) -> None:
        """Fetch new and changed items, for every model. Raises MemoryUnavailable."""
        for engine in list(self.engines.values()):
            await engine.sync()

    async def follow(self) -> None:
        """Take over the serving and the wanted model of the memory service. Raises MemoryUnavailable.

        If one of them cannot be loaded, that is logged and nothing changes.
        """
        async with self._lock:
            state = await self.serving.memory.model()
            if self._failed is not None and self._failed[0] == state and time.monotonic() < self._failed[1] + RETRY_S:
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
            self.engines = {engine.version: engine for engine in (serving, wanted)}

    async def prepare(self, wanted: Collection[Filter]) -> None:
        """Compute the masks of filters, for every model that may answer."""
        for engine in list(self.engines.values()):
            await engine.prepare(wanted)

    async def find(self, version: str) -> Engine | None:
        """The engine of a model, after a look at the wanted model if it is not loaded. Raises MemoryUnavailable."""
        if version not in self.engines:
            await self.follow()
        return self.engines.get(version)

    async def reload(self, run: Path | None = None) -> ModelReply:
        """Make the model in a folder (None: the configured one, read again) the wanted one in all processes. Nothing
        changes before it is loaded here and in the memory service.

        Raises:
            CheckpointRefused: the model cannot be used. MemoryUnavailable.
        """
        folder = (run or self._run).absolute()
        try:
            recommender = await asyncio.to_thread(Recommender.load, folder, self.serving.recommender.device)
        except CheckpointError as error:
            raise CheckpointRefused(str(error)) from error
        async with self._lock:
            await self._take(recommender)
        await self.serving.memory.change_model(ModelRequest(recommender.version, str(folder)))
        await self.follow()
        return await self.serving.memory.model()

    async def reload_on_signal(self) -> None:
        """Reload the configured folder; the outcome is logged."""
        try:
            state = await self.reload()
            log.warning("reload: model %s serves, %s is wanted", state.serving, state.wanted)
        except ApiProblem as problem:
            log.error("reload: %s: %s", problem.code, problem.detail)

    async def _loaded(self, version: str, run: str) -> Engine:
        engine = self.engines.get(version)
        if engine is None:
            folders = [Path(run), self._run] if run else [self._run]
            device = self.serving.recommender.device
            engine = await self._take(await asyncio.to_thread(_load, version, folders, device))
        return engine

    async def _take(self, recommender: Recommender) -> Engine:
        """The engine of a model, with the whole catalogue."""
        if recommender.version not in self.engines:
            engine = self.serving.beside(recommender)
            await engine.sync()
            self.engines[recommender.version] = engine
        return self.engines[recommender.version]


def _load(version: str, folders: list[Path], device: torch.device) -> Recommender:
    return Recommender.of(find_checkpoint(version, folders), device)
