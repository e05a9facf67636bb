"""What goes into one step: pure, over what each run could use.

Each run that decodes gets its one token, as a step costs nearly the same with it or without.
What the budget leaves goes to prompts. The one that waits longest has at least half of it, so that
none starves; the shortest rest come next, so that a short question doesn't wait for a long prompt.
Work that nobody waits for gets what an otherwise idle step has.
"""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """What a run's tokens are for."""

    DECODE = 0
    PROMPT = 1
    BACKGROUND = 2


class Need(NamedTuple):
    """What one run could use in this step, by its place among the runs.

    ``align``: how many tokens lead to the next end of a block. A share ends at one where it can,
    as stored blocks are looked for only there.
    """

    run: int
    kind: Kind
    tokens: int
    align: int = 0
    adapter: str | None = None


class Share(NamedTuple):
    """The tokens of one run in this step."""

    run: int
    tokens: int


def plan_step(
    needs: Sequence[Need], *, budget_tokens: int, background_tokens: int, block_tokens: int
) -> list[Share]:
    """The shares of one step, rows of one adapter side by side; needs come oldest first."""
    shares = {need.run: 1 for need in needs if need.kind is Kind.DECODE}
    prompts = [need for need in needs if need.kind is Kind.PROMPT]
    left = budget_tokens - len(shares)
    if not shares and not prompts:
        prompts = [need for need in needs if need.kind is Kind.BACKGROUND]
        left = background_tokens
    if prompts:
        oldest, *others = prompts
        first = min(oldest.tokens, max(left - left // 2, 1))
        left -= first
        for need in sorted(others, key=lambda need: need.tokens):
            if left <= 0:
                break
            shares[need.run] = _aligned(need, min(need.tokens, left), block_tokens)
            left -= shares[need.run]
        shares[oldest.run] = _aligned(
            oldest, min(oldest.tokens, first + max(left, 0)), block_tokens
        )
    by_adapter = sorted(
        (need for need in needs if need.run in shares),
        key=lambda need: (need.adapter is not None, need.adapter or ""),
    )
    return [Share(need.run, shares[need.run]) for need in by_adapter]


def _aligned(need: Need, tokens: int, block_tokens: int) -> int:
    """So many tokens, or fewer that end with a block."""
    if tokens == need.tokens or tokens < need.align:
        return tokens
    return tokens - (tokens - need.align) % block_tokens if need.align else tokens
