"""Choosing TCP ports of this machine to listen on.

A port is chosen some seconds before a server listens on it. One of the ephemeral range may by then be
taken by any connection that anybody opened (Ray alone opens a hundred at its start), so these lie below it:
Linux hands out 32768 and up by default, and Ray's workers take 10002 to 19999.
"""

import secrets
import socket

from memcube.errors import Conflict

FIRST = 20_000
END = 32_768
_DRAWS = 1_000


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on now, drawn at random.

    Raises:
        Conflict: hardly any is free.
    """
    found: set[int] = set()
    for _ in range(_DRAWS):
        if len(found) == count:
            return list(found)
        port = FIRST + secrets.randbelow(END - FIRST)
        if is_free("127.0.0.1", port):
            found.add(port)
    raise Conflict(f"no {count} free ports between {FIRST} and {END - 1}")


def free_range(length: int) -> int:
    """The first of some such ports in a row.

    Raises:
        Conflict: hardly any are free.
    """
    for _ in range(_DRAWS):
        start = FIRST + secrets.randbelow(END - FIRST - length)
        if all(is_free("127.0.0.1", start + i) for i in range(length)):
            return start
    raise Conflict(f"no {length} free ports in a row between {FIRST} and {END - 1}")


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError:
            return False
        return True
