"""A server that is told to stop, and leaves nobody without an answer on its way."""

from __future__ import annotations

import signal
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI


class DrainingServer(uvicorn.Server):
    """On SIGTERM it goes on for `drain_s` seconds: it is not ready any more, and each answer closes its connection, so
    that callers, and what balances their load, go elsewhere. Then it stops as uvicorn does. Without connections, and on
    SIGINT or a second SIGTERM, it stops at once.

    Without that a kept connection is closed at a moment when its caller may just be using it.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_s: float) -> None:
        super().__init__(config)
        self._app, self._drain_s = app, drain_s
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if sig != signal.SIGTERM or self._until is not None or not self.started:
            super().handle_exit(sig, frame)
            return
        self._captured_signals.append(sig)
        self._until = time.monotonic() + self._drain_s
        self._app.state.leaving = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._until is not None and (time.monotonic() >= self._until or not self.server_state.connections):
            self.should_exit = True
        return await super().on_tick(counter)
