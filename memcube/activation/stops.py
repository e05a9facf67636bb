"""Stop strings over a stream of text: found across pieces, and never shown."""

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string. One per request."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("an empty stop string stops before the first token")
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be shown now. The end that may be the beginning of a stop string is held back.

        After the first stop string ``stopped`` is set and nothing more comes.
        """
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that ``stop`` begins with, short of all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
