"""Whether conversations go on, and whether to build a chain of KV for the case; pure.

The chance of a next turn grows with the number of turns so far: in the traces at hand from 0.33
after the first to 0.82. That is what is assumed until enough of one's own turns were counted.
"""

from collections import Counter, OrderedDict

_MAX_CONVERSATIONS = 10_000
_MAX_TURNS = 12
"""Conversations with more turns are counted as if they had so many."""
_ASSUMED = 20
"""The assumption weighs as much as so many turns."""
IDLE_PRICE = 0.2
"""What a token computed in idle time costs, where one that somebody waits for costs 1."""


class Turns:
    """Counts the turns of conversations, those lately active."""

    def __init__(self, max_conversations: int = _MAX_CONVERSATIONS) -> None:
        self._max = max_conversations
        self._turns: OrderedDict[str, int] = OrderedDict()
        self._had: Counter[int] = Counter()
        self._went_on: Counter[int] = Counter()

    def add(self, conversation: str) -> None:
        """Count one more turn."""
        before = self._turns.pop(conversation, 0)
        if before:
            self._went_on[min(before, _MAX_TURNS)] += 1
        self._turns[conversation] = before + 1
        self._had[min(before + 1, _MAX_TURNS)] += 1
        if len(self._turns) > self._max:
            self._turns.popitem(last=False)

    def probability(self, conversation: str) -> float:
        """How likely another turn follows; 0 for a conversation that is not known."""
        turns = min(self._turns.get(conversation, 0), _MAX_TURNS)
        if not turns:
            return 0.0
        assumed = 0.82 - 0.49 * 0.7 ** (turns - 1)
        return (self._went_on[turns] + _ASSUMED * assumed) / (self._had[turns] + _ASSUMED)


def exact_chain_pays(*, build_tokens: int, saved_tokens: int, probability: float) -> bool:
    """Whether to compute a conversation's exact KV in idle time, after a composed answer.

    ``saved_tokens`` are those that the next turn then need not compute while somebody waits. Further
    turns are about as likely as the next one.
    """
    if not 0.0 < probability < 1.0:
        return probability >= 1.0 and saved_tokens > 0
    turns_to_come = probability / (1.0 - probability)
    return turns_to_come * saved_tokens >= IDLE_PRICE * build_tokens
