"""Parts of a thread that are read as one."""

from typing import NamedTuple

WINDOW_TURNS = 12
"""About 350 tokens of a chat: segments of 256 to 512 lose least when their KV is composed."""


class Window(NamedTuple):
    """Turns ``number * WINDOW_TURNS`` and the next ones of a thread."""

    thread: str
    number: int

    @classmethod
    def of(cls, thread: str, seq: int) -> "Window":
        """The window that a turn lies in."""
        return cls(thread, seq // WINDOW_TURNS)

    @property
    def first(self) -> int:
        return self.number * WINDOW_TURNS

    @property
    def last(self) -> int:
        return self.first + WINDOW_TURNS - 1
