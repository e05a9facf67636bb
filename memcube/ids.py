"""Identifiers, and keys made of several of them.

A key over caller-controlled strings is hashed with each part length-framed, so that no two
different tuples give the same bytes (``("a", "bc")`` and ``("ab", "c")`` differ).
"""

import hashlib
import os
from collections.abc import Callable
from datetime import datetime
from typing import NewType
from uuid import UUID

from memcube.errors import NotFound

TenantId = NewType("TenantId", str)
CubeId = NewType("CubeId", str)
"""A UUID in its canonical, lower-case text form."""

IdSource = Callable[[datetime], CubeId]


def uuid7(now: datetime) -> CubeId:
    """A new time-ordered UUID (RFC 9562, version 7): 48 bits of milliseconds, 74 random bits."""
    millis = int(now.timestamp() * 1000) & ((1 << 48) - 1)
    random = int.from_bytes(os.urandom(10))
    value = millis << 80 | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62 | random & ((1 << 62) - 1)
    return CubeId(str(UUID(int=value)))


def parse_cube_id(text: str) -> CubeId:
    """The id in canonical form.

    Raises:
        NotFound: the text is no UUID. Nothing can have that id, so the answer is that of an
            unknown one.
    """
    try:
        return CubeId(str(UUID(text)))
    except ValueError:
        raise NotFound("cube", text[:64]) from None


Part = str | int | bytes | None


def framed(*parts: Part) -> bytes:
    """An injective encoding of a tuple: type, length and bytes of each part."""
    out = bytearray()
    for part in parts:
        if part is None:
            tag, body = b"n", b""
        elif isinstance(part, str):
            tag, body = b"s", part.encode("utf-8", "surrogatepass")
        elif isinstance(part, bytes):
            tag, body = b"b", part
        else:
            tag, body = b"i", str(int(part)).encode()
        out += tag + len(body).to_bytes(8) + body
    return bytes(out)


def digest(*parts: Part) -> str:
    """SHA-256 in hex of the framed tuple."""
    return hashlib.sha256(framed(*parts)).hexdigest()


def digest64(*parts: Part) -> int:
    """A 63-bit non-negative integer of the framed tuple, for integer payload indexes."""
    return int.from_bytes(hashlib.blake2b(framed(*parts), digest_size=8).digest()) >> 1
