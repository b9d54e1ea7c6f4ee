"""Ports for servers that are killed and come back."""

import random
import socket

PORTS = range(20_000, 32_000)
"""Below those that Linux gives to outgoing connections: one of these would keep a server from its port."""


def free_port() -> int:
    """A port on loopback that nobody uses just now, and that no outgoing connection will be given."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
