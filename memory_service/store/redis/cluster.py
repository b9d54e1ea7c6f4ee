"""A Redis Cluster: each batch goes to all primaries concerned at once, and follows hash slots that move.

A primary that is out of reach fails the commands for its own hash slots only, at once, until it answers or is replaced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, NoScriptError, RedisError, TryAgainError
from typing_extensions import override

from memory_service.store.redis.adapter import Command
from memory_service.store.redis.connection import RedisConnection
from memory_service.store.redis.durability import Durability
from memory_service.store.redis.errors import UNREACHABLE, ShardUnavailable, StoreUnavailable, as_unavailable
from memory_service.store.redis.nodes import ClusterNodes
from memory_service.store.redis.topology import Address

TRIES = 16
"""Times that a command is sent while its hash slot moves."""
PAUSE_S = 0.03
"""Pause between these after the first few."""
NODE_SHIFT = 40
"""The bits of a cursor from here on number the primary that a walk is at; those below are that primary's own cursor."""
REDIRECTED = (AskError, MovedError, NoScriptError, TryAgainError)
"""Answers to a command that was not executed and is to be sent again."""


class ClusterConnection(RedisConnection):
    """A Redis Cluster that is found through any of its servers (`urls`).

    `replicas` is the number of Redis replicas of each primary that confirm durable writes.

    Raises:
        StoreURLError: a URL cannot be used for a cluster.
    """

    def __init__(self, urls: Sequence[str], timeout_s: float, scripts: Sequence[str], replicas: int) -> None:
        self._nodes, self._scripts = ClusterNodes(urls, timeout_s), scripts
        self._durability = Durability(self._nodes, replicas, timeout_s)

    @property
    @override
    def unreplicated(self) -> int:
        return self._durability.unreplicated

    @property
    @override
    def lost(self) -> int:
        return self._nodes.lost

    @override
    def grouped(self, keys: Sequence[bytes]) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for index, key in enumerate(keys):
            groups.setdefault(key_slot(key), []).append(index)
        return list(groups.values())

    # ---------------------------------------------------------------------------------------------- send

    @override
    async def send(self, commands: Sequence[Command], *, durable: bool = False, partly: bool = False) -> list[Any]:
        await self._nodes.connect()
        answers: list[Any] = [None] * len(commands)
        left: dict[int, Address | None] = dict.fromkeys(range(len(commands)))
        for attempt in range(TRIES):
            left = await self._round(commands, answers, left, durable)
            _raise_first(answers, left, partly)
            if not left:
                return answers
            if attempt > TRIES // 4:
                await asyncio.sleep(PAUSE_S)
        raise ShardUnavailable("hash slots of the Redis Cluster are being moved; try again")

    async def _round(
        self, commands: Sequence[Command], answers: list[Any], left: dict[int, Address | None], durable: bool
    ) -> dict[int, Address | None]:
        """Send the commands that are left, by index, and fill in their answers; returns those to be sent again.

        Each is sent to the primary of its hash slot, or, where it names one, to the server that imports the slot (ASK).
        """
        groups: dict[tuple[Address, bool], list[int]] = {}
        for index, importing in left.items():
            try:
                node = importing or self._nodes.primary_for(commands[index])
                groups.setdefault((node, importing is not None), []).append(index)
            except ShardUnavailable as error:
                answers[index] = error
        parts = (
            self._answers_of(node, [commands[index] for index in some], asking, durable)
            for (node, asking), some in groups.items()
        )
        again: dict[int, Address | None] = {}
        for ((node, _), some), part in zip(groups.items(), await asyncio.gather(*parts), strict=True):
            for index, answer in zip(some, part, strict=True):
                answers[index] = answer
                if isinstance(answer, REDIRECTED):
                    again[index] = await self._redirected(node, answer)
        return again

    async def _answers_of(self, node: Address, commands: list[Command], asking: bool, durable: bool) -> list[Any]:
        """Answers of one server; each is a ShardUnavailable if it is out of reach, or does not confirm the writes."""
        try:
            return await self._at(node, commands, asking, durable)
        except (ShardUnavailable, RedisError) as error:
            return [error] * len(commands)

    async def _at(
        self, node: Address, commands: list[Command], asking: bool = False, durable: bool = False
    ) -> list[Any]:
        """Answers of one server, some of which may be errors. Raises ShardUnavailable."""
        server, waits = self._nodes.server(node), self._durability.waits(node) if durable else []
        sent = [word for command in commands for word in (("ASKING",), command)] if asking else commands
        try:
            answers = await server.send([*sent, *waits])
        except UNREACHABLE as error:
            raise self._nodes.lose(node, error) from error
        confirmed = answers.pop() if waits else None
        answers = answers[1::2] if asking else answers
        for answer in answers:
            if isinstance(answer, UNREACHABLE):
                raise self._nodes.lose(node, answer) from answer
        if waits and not all(isinstance(answer, Exception) for answer in answers):
            await self._durability.confirm(node, confirmed)
        return answers

    async def _redirected(self, node: Address, answer: Exception) -> Address | None:
        """Do what a server asks for before a command is sent again; the server that imports its slot, if any."""
        match answer:
            case MovedError():  # before AskError, of which redis-py derives it
                self._nodes.move(answer.slot_id, Address(answer.host or node.host, answer.port))
            case AskError():
                return Address(answer.host or node.host, answer.port)
            case NoScriptError():
                with suppress(*UNREACHABLE, ShardUnavailable):
                    await self._nodes.server(node).send([("SCRIPT", "LOAD", script) for script in self._scripts])
        return None

    # ---------------------------------------------------------------------------------------------- rest

    @override
    async def ping(self) -> None:
        await self._nodes.connect()
        pings = (self._at(node, [("PING",)]) for node in self._nodes.reachable())
        found = await asyncio.gather(*pings, return_exceptions=True)
        if all(isinstance(answer, BaseException) for answer in found):
            raise StoreUnavailable("no primary of the Redis Cluster answers")

    @override
    async def scan(self, cursor: int, match: bytes, count: int) -> tuple[int, list[bytes]]:
        await self._nodes.connect()
        primaries = self._nodes.primaries()
        at, inner = cursor >> NODE_SHIFT, cursor & (1 << NODE_SHIFT) - 1
        if at >= len(primaries):
            return 0, []
        (answer,) = await self._at(primaries[at], [("SCAN", inner, "MATCH", match, "COUNT", count)])
        _raise_first([answer], {}, partly=False)
        after, keys = int(answer[0]), answer[1]
        if after:
            return at << NODE_SHIFT | after, keys
        return (at + 1 << NODE_SHIFT if at + 1 < len(primaries) else 0), keys

    @override
    async def primaries(self) -> list[str]:
        await self._nodes.connect()
        return [str(node) for node in self._nodes.primaries()]

    @override
    async def refresh(self) -> None:
        await self._nodes.refresh()

    @override
    async def listeners(self) -> list[Redis]:
        await self._nodes.connect()
        return [self._nodes.listener(node) for node in self._nodes.primaries()]

    @override
    async def close(self) -> None:
        await self._nodes.close()


def _raise_first(answers: Sequence[Any], left: dict[int, Address | None], partly: bool) -> None:
    """Raise the first error among the answers that are final; with `partly`, not for a primary out of reach."""
    for index, answer in enumerate(answers):
        is_accepted = partly and isinstance(answer, ShardUnavailable)
        if isinstance(answer, Exception) and index not in left and not is_accepted:
            raise as_unavailable(answer, ShardUnavailable)
