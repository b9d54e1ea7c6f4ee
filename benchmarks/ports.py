"""Ports for servers that are killed and come back."""

import itertools
import os
import socket

PORTS = range(20_000, 32_000)
"""Below those that Linux gives to outgoing connections: one of these would keep a server from its port."""
APART = 509
"""How far from each other processes that were started one after another begin to look."""
_places = itertools.count(os.getpid() * APART)


def free_port() -> int:
    """A port on loopback that nobody uses just now, that this process has not been given before, and that no outgoing
    connection will be given.
    """
    while True:
        port = PORTS[next(_places) % len(PORTS)]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
