"""The models that this process has loaded: the serving model, and the wanted model while users are moved to it.

Once another model was asked for, Redis says which one is wanted (`ModelState`), and every process follows. Records are
written for the wanted model; each user is answered by the model of their record. When all records are of the wanted
model it becomes the serving one. A process keeps the previous model for one step longer, as calls in progress may still
name it. Without that state in Redis, each process serves the model that it was started with.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from pathlib import Path

from memory_service.service.catalogue import Catalogue
from memory_service.service.outage import Outage
from memory_service.service.space import Space
from memory_service.store.coordination import ModelState
from memory_service.store.redis.errors import StoreUnavailable
from memory_service.store.store import Store
from model.checkpoint import Checkpoint, CheckpointError, find_checkpoint, load_checkpoint

RETRY_S = 30.0
"""Pause before a model that could not be loaded is tried again; its files may have arrived meanwhile."""
log = logging.getLogger(__name__)


class ModelMismatch(ValueError):  # noqa: N818 - a state, answered with 409
    """A call names a model that is not loaded here, or one that records are not written for."""


class Models:
    """The spaces of the loaded models.

    Args:
        outage: guards calls of Redis in the middle of other calls.
        checkpoint, run: the model that this process was started with, and its folder.
        space_of: makes the space of a model.
        complete: brings the collective index of a space to what Redis has.
    """

    def __init__(
        self,
        store: Store,
        outage: Outage,
        catalogue: Catalogue,
        checkpoint: Checkpoint,
        run: Path,
        space_of: Callable[[Checkpoint], Space],
        complete: Callable[[Space], Awaitable[None]],
    ) -> None:
        self._store, self._outage, self._catalogue = store, outage, catalogue
        self._space_of, self._complete = space_of, complete
        self._own, self._run = checkpoint, run
        self.serving = self.wanted = space_of(checkpoint)
        self.spaces = {checkpoint.version: self.serving}
        """The space of each loaded model, by version."""
        self.run_of = {checkpoint.version: str(run)}
        """The folder of each loaded model, by version."""
        self.trouble = ""
        """Why the model that Redis names cannot be loaded; empty if it can."""
        self._failed: tuple[ModelState, float] | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Load the models that Redis names, or name the model that this process was started with, if that is new.

        Raises:
            StoreUnavailable: Redis is out of reach.
            CheckpointError: the serving model cannot be loaded.
        """
        await self._catalogue.start(self._own)
        self.serving.know_items()
        async with self._lock:
            state = await self._store.model()
            if state is None:
                return
            version = self._own.version
            if version not in (state.base, state.serving, state.wanted):
                run = str(self._run)
                state = await self._swap(state, ModelState(version, run, version, run, version))
            try:
                self.serving = await self._loaded(state.serving, state.serving_run)
            except CheckpointError as error:
                if version != state.wanted:
                    raise
                log.warning("the wanted model %s serves at once: the previous one cannot be loaded: %s", version, error)
                state = await self._swap(state, state.replace(serving=version, serving_run=str(self._run)))
                self.serving = self.spaces[version]
            self.wanted = await self._loaded(state.wanted, state.wanted_run)
            self._keep(self.serving, self.wanted)

    async def follow(self) -> None:
        """Load the models that Redis names now, and drop the model that stopped serving one step earlier.

        Raises StoreUnavailable. If a model cannot be loaded, this is logged and nothing changes.
        """
        async with self._lock:
            state = await self._store.model()
            if state is None or self._failed_lately(state):
                return
            before = self.serving
            try:
                self.wanted = await self._loaded(state.wanted, state.wanted_run)
                serving = await self._loaded(state.serving, state.serving_run)
            except CheckpointError as error:
                log.error("cannot load the model that Redis names: %s", error)
                self.trouble, self._failed = str(error), (state, time.monotonic())
                return
            self.trouble = ""
            if serving is not before:
                await self._complete(serving)
                log.warning("model %s serves, instead of %s", serving.model_version, before.model_version)
                self.serving = serving
            self._keep(self.serving, self.wanted, before)

    async def want(self, version: str, run: Path) -> None:
        """Make model `version` from folder `run` the wanted one in all processes; with the serving model, an earlier
        wish is withdrawn.

        Raises:
            CheckpointError: it is missing or damaged, or does not fit the serving model; nothing has changed.
            StoreUnavailable: Redis is out of reach.
        """
        async with self._lock:
            await self._loaded(version, str(run))
            folder, state = await self._folder_of(version, run), await self._state()
            await self._swap(state, state.replace(wanted=version, wanted_run=folder, base=self._own.version))
        await self.follow()

    async def cut_over(self, version: str) -> None:
        """Let the wanted model serve. Raises ModelMismatch if `version` is not the wanted one, and StoreUnavailable."""
        async with self._lock:
            state = await self._state()
            if state.wanted != version:
                raise ModelMismatch(f"model {state.wanted} is wanted, not {version}")
            await self._swap(state, state.replace(serving=state.wanted, serving_run=state.wanted_run))
        await self.follow()

    # ------------------------------------------------------------------------------------------- spaces

    async def space(self, version: str) -> Space:
        """The space of a loaded model. Raises ModelMismatch."""
        return self.spaces.get(version) or await self._found_space(version)

    async def wanted_space(self, version: str) -> Space:
        """The space that records are written for. Raises ModelMismatch if `version` is not the wanted model."""
        space = await self.space(version)
        if space is not self.wanted:
            raise ModelMismatch(f"records are written for model {self.wanted.model_version}, the call is for {version}")
        return space

    def others(self, space: Space) -> list[Space]:
        """The spaces of the other loaded models."""
        return [other for other in self.spaces.values() if other is not space]

    async def follow_to(self, versions: Collection[str]) -> None:
        """`follow` if one of these models is not loaded: it may have become the wanted one."""
        if not self.spaces.keys() >= set(versions):
            await self.follow_if_up()

    async def follow_if_up(self) -> None:
        """`follow`, unless Redis is out of reach."""
        with suppress(StoreUnavailable), self._outage.guard():
            await self.follow()

    async def _found_space(self, version: str) -> Space:
        await self.follow_to([version])
        space = self.spaces.get(version)
        if space is None:
            serving = self.serving.model_version
            raise ModelMismatch(f"this service serves model {serving}, the call is for {version}")
        return space

    # ---------------------------------------------------------------------------------------- internals

    def _failed_lately(self, state: ModelState) -> bool:
        return self._failed is not None and self._failed[0] == state and time.monotonic() < self._failed[1] + RETRY_S

    async def _state(self) -> ModelState:
        """The state in Redis, or the one that applies as long as there is none."""
        served, run = self.serving.model_version, str(self._run)
        return await self._store.model() or ModelState(served, run, served, run, self._own.version)

    async def _swap(self, before: ModelState, after: ModelState) -> ModelState:
        """Replace the state in Redis, unless another process did so meanwhile; returns the state as it is now."""
        return after if await self._store.swap_model(before, after) else await self._state()

    async def _loaded(self, version: str, run: str) -> Space:
        space = self.spaces.get(version)
        if space is None:
            checkpoint = await asyncio.to_thread(find_checkpoint, version, [Path(run), self._run])
            self._check_fits(checkpoint)
            await self._catalogue.start(checkpoint)
            space = self.spaces[version] = await asyncio.to_thread(self._space_of, checkpoint)
            self._store.rules_of[version], self.run_of[version] = space.rules, run
        return space

    async def _folder_of(self, version: str, run: Path) -> str:
        """`run` if it holds the model, otherwise the folder that the model was read from."""
        with suppress(CheckpointError):
            if (await asyncio.to_thread(load_checkpoint, run, with_weights=False)).version == version:
                return str(run)
        return self.run_of[version]

    def _check_fits(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError if a record that moves from one model to the other and back could lose memories."""
        mine, other = self.serving.rules.capacity, checkpoint.config.rules.capacity
        if mine != other:
            raise CheckpointError(
                f"model {checkpoint.version} has rules.capacity {other}, the serving model {mine}: they must be equal"
            )

    def _keep(self, *spaces: Space) -> None:
        self.spaces = {space.model_version: space for space in spaces}
        self._store.rules_of = {version: space.rules for version, space in self.spaces.items()}
        self._store.rules = self.wanted.rules
        self.run_of = {version: self.run_of[version] for version in self.spaces}
