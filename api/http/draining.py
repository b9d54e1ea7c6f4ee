"""A server that stops without leaving a request unanswered."""

from __future__ import annotations

import signal
import time
from types import FrameType

import uvicorn

from api.http.services import Services


class DrainingServer(uvicorn.Server):
    """On SIGTERM it goes on serving for `drain_s` seconds, in which it reports that it is not ready and closes each
    connection with its next response, so that callers and load balancers turn elsewhere. Then it stops as uvicorn does.
    Once it has no connections, on SIGINT or on a second SIGTERM, it stops at once.

    Without this, a kept-alive connection could be closed just as its caller sends a request.
    """

    def __init__(self, config: uvicorn.Config, drain_s: float) -> None:
        super().__init__(config)
        self._drain_s = drain_s
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if sig != signal.SIGTERM or self._until is not None or not self.started:
            super().handle_exit(sig, frame)
            return
        self._captured_signals.append(sig)
        self._until = time.monotonic() + self._drain_s
        services: Services = self.lifespan.state["services"]
        services.stopping.set()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; returns whether to stop."""
        if self._until is not None and (time.monotonic() >= self._until or not self.server_state.connections):
            self.should_exit = True
        return await super().on_tick(counter)
