"""Which engine answers: the one that is likely to begin first.

Pure: no clock, no I/O. An engine that holds much of a prompt as KV has less to read; one with
little in line begins earlier. What engines hold is remembered from what was sent where: a guess
that may be wrong after evictions, which costs time and nothing else.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

from memcube.errors import Unavailable

MAX_REMEMBERED = 50_000
DECODE_CHARS = 500
"""What an answer takes beside its prompt, in characters read: so that short prompts spread too."""


class Part(NamedTuple):
    """A part of a prompt that is kept as KV on its own: a segment, or the turns up to one."""

    digest: str
    num_chars: int


class Route(NamedTuple):
    """Where a request went, and what it added to that engine's line."""

    engine: int
    work: int


class Attempt:
    """A request's try at one engine, as a context: an engine that is gone is passed over within it,
    if another is left to ask. What was ``said`` another would say again, and differently."""

    def __init__(
        self, router: "Router", parts: Sequence[Part], among: Collection[int], *, is_last: bool
    ) -> None:
        self.said = False
        self._router = router
        self._parts = parts
        self._among = among
        self._is_last = is_last

    def __enter__(self) -> Route:
        self._route = self._router.choose(self._parts, self._among)
        return self._route

    def __exit__(
        self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None
    ) -> bool:
        self._router.done(self._route)
        if kind is None:
            self._router.back(self._route.engine)
        if kind is not Unavailable or self.said or self._is_last:
            return False
        self._router.lost(self._route.engine)
        return True


class Router:
    """Chooses among engines numbered 0 … n-1. It belongs to one event loop."""

    def __init__(self, num_engines: int) -> None:
        if num_engines < 1:
            raise ValueError("a router needs an engine")
        self._in_line = [0] * num_engines
        self._held: list[OrderedDict[str, None]] = [OrderedDict() for _ in range(num_engines)]
        self._down: set[int] = set()
        self._left_out: frozenset[int] = frozenset()

    def leave_out(self, engines: Collection[int]) -> None:
        """Give these nothing new while another is up; they replace those that were left out before."""
        self._left_out = frozenset(engines)

    def attempts(
        self, parts: Sequence[Part], among: Collection[int] | None = None
    ) -> Iterator[Attempt]:
        """Attempts at as many engines as there are, or are named; the last one raises what its engine does.
        To be left with the first that succeeds."""
        wanted = range(len(self._held)) if among is None else among
        for left in reversed(range(len(wanted))):
            yield Attempt(self, parts, wanted, is_last=not left)

    def choose(self, parts: Sequence[Part], among: Collection[int] | None = None) -> Route:
        """The engine for a prompt of these parts. It counts as in its line until ``done``."""
        everyone = range(len(self._held)) if among is None else among
        up = [i for i in everyone if i not in self._down] or everyone
        candidates = [i for i in up if i not in self._left_out] or up
        engine = min(candidates, key=lambda i: (self._missing(i, parts) + self._in_line[i], i))
        route = Route(engine, self._missing(engine, parts) + DECODE_CHARS)
        self._in_line[engine] += route.work
        held = self._held[engine]
        for part in parts:
            held[part.digest] = None
            held.move_to_end(part.digest)
        while len(held) > MAX_REMEMBERED:
            held.popitem(last=False)
        return route

    def done(self, route: Route) -> None:
        """The request is answered, failed or given up."""
        self._in_line[route.engine] -= route.work

    def lost(self, engine: int) -> None:
        """The engine did not answer: what it held is gone, and others are asked first."""
        self._held[engine].clear()
        self._down.add(engine)

    def back(self, engine: int) -> None:
        """The engine answered."""
        self._down.discard(engine)

    def _missing(self, engine: int, parts: Sequence[Part]) -> int:
        held = self._held[engine]
        return sum(part.num_chars for part in parts if part.digest not in held)
