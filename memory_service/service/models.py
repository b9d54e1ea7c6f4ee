"""Which models this process has loaded: the one that serves, and while another is to follow, that one too.

What is wanted stands in Redis (`ModelState`) once somebody asked for another model; every process follows it. Records
are written for the wanted model; each user is answered by the model that the record belongs to. Once all records are
of the wanted model it is made the serving one, and a process lets go of the other a step later: calls under way may
still name it. Without that key each process serves what it was started with.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from memory_service.service.catalogue import Catalogue
from memory_service.service.space import Space
from memory_service.store.store import ModelState, Store
from model.checkpoint import Checkpoint, CheckpointError, find_checkpoint, load_checkpoint

AGAIN_S = 30.0
"""A model that could not be loaded is tried again after this: its files may have come meanwhile."""
log = logging.getLogger(__name__)


class ModelMismatch(ValueError):  # noqa: N818 - a state, answered with 409
    """The caller works with a model that is not loaded here, or not to be written for any more."""


class Models:
    """The spaces of the loaded models, by version. `complete` brings a space's collective index to what Redis has."""

    def __init__(
        self,
        store: Store,
        catalogue: Catalogue,
        checkpoint: Checkpoint,
        run: Path,
        space_of: Callable[[Checkpoint], Space],
        complete: Callable[[Space], Awaitable[None]],
    ) -> None:
        self._store, self._catalogue, self._space_of, self._complete = store, catalogue, space_of, complete
        self._own, self._run = checkpoint, run
        self.serving = self.wanted = space_of(checkpoint)
        self.spaces = {checkpoint.version: self.serving}
        self.run_of = {checkpoint.version: str(run)}
        """The folder that each loaded model was read from."""
        self.trouble = ""
        """Why what Redis wants cannot be followed."""
        self._failed: tuple[ModelState, float] | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Follow Redis, or tell it of the model that this process was started with, where that is a new one.

        Raises:
            StoreUnavailable. CheckpointError: the model that serves cannot be loaded.
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
                log.warning("serving the wanted model %s at once: the one before is gone: %s", version, error)
                state = await self._swap(state, state.replace(serving=version, serving_run=str(self._run)))
                self.serving = self.spaces[version]
            self.wanted = await self._loaded(state.wanted, state.wanted_run)
            self._keep(self.serving, self.wanted)

    async def follow(self) -> None:
        """Take over what Redis says by now. What stopped serving at the step before is let go.

        Raises StoreUnavailable. A model that cannot be loaded is logged, and all stays as it is.
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
                log.error("cannot follow: %s", error)
                self.trouble, self._failed = str(error), (state, time.monotonic())
                return
            self.trouble = ""
            if serving is not before:
                await self._complete(serving)
                log.warning("model %s serves, in place of %s", serving.model_version, before.model_version)
                self.serving = serving
            self._keep(self.serving, self.wanted, before)

    async def want(self, version: str, run: Path) -> None:
        """Ask all processes for the model `version` in folder `run`; for the serving one: to stay with it.

        Raises:
            CheckpointError: not there, damaged, or it does not fit; nothing has changed. StoreUnavailable.
        """
        async with self._lock:
            await self._loaded(version, str(run))
            folder, state = await self._folder_of(version, run), await self._state()
            await self._swap(state, state.replace(wanted=version, wanted_run=folder, base=self._own.version))
        await self.follow()

    async def cut_over(self, version: str) -> None:
        """Make the wanted model the serving one. Raises ModelMismatch where another is wanted, StoreUnavailable."""
        async with self._lock:
            state = await self._state()
            if state.wanted != version:
                raise ModelMismatch(f"model {state.wanted} is wanted, not {version}")
            await self._swap(state, state.replace(serving=state.wanted, serving_run=state.wanted_run))
        await self.follow()

    def _failed_lately(self, state: ModelState) -> bool:
        return self._failed is not None and self._failed[0] == state and time.monotonic() < self._failed[1] + AGAIN_S

    async def _state(self) -> ModelState:
        """What Redis says; what is so where it says nothing yet."""
        served, run = self.serving.model_version, str(self._run)
        return await self._store.model() or ModelState(served, run, served, run, self._own.version)

    async def _swap(self, before: ModelState, after: ModelState) -> ModelState:
        """Tell Redis, unless another did meanwhile: then what is so now."""
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
        """`run`, where it holds the model; else the folder that the model was read from."""
        with suppress(CheckpointError):
            if (await asyncio.to_thread(load_checkpoint, run, with_weights=False)).version == version:
                return str(run)
        return self.run_of[version]

    def _check_fits(self, checkpoint: Checkpoint) -> None:
        """Records must go from one model to the other and back without losing a memory."""
        mine, other = self.serving.rules.capacity, checkpoint.config.rules.capacity
        if mine != other:
            raise CheckpointError(
                f"model {checkpoint.version} has rules.capacity {other}, the one that serves {mine}: they must agree"
            )

    def _keep(self, *spaces: Space) -> None:
        self.spaces = {space.model_version: space for space in spaces}
        self._store.rules_of = {version: space.rules for version, space in self.spaces.items()}
        self._store.rules = self.wanted.rules
        self.run_of = {version: self.run_of[version] for version in self.spaces}
