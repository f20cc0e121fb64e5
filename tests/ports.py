"""Ports for the servers that tests start."""

import contextlib
import random
import socket
from pathlib import Path

FIRST = 10_000


def free_port() -> int:
    """A port that nobody has and that the system gives to no connection.

    What binding to port 0 gives may be the end of some connection by the time that a server is ready to have it.
    """
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")  # by the system, to whoever asks for any port
    end = int(given.read_text().split()[0]) if given.exists() else 32_768
    while True:
        port = random.SystemRandom().randrange(FIRST, max(end, FIRST + 1000))
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
