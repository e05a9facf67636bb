"""A model for work that nobody waits for: it computes when an engine has nothing else to do.

Its calls come from a thread of their own and look like ``PackedModel``'s. They are cut into pieces
of a few tokens, and a request that comes waits for one piece at most.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memcube.activation.forward import PackedModel, Row


class IdleModel:
    """A ``RowModel`` whose calls block until an engine has had the time for them."""

    def __init__(
        self,
        model: PackedModel,
        post: Callable[[Callable[[], Any]], "Future[Any]"],
        *,
        piece_tokens: int,
        pause: Callable[[], None],
    ) -> None:
        """``post`` hands a call to the thread that computes; ``pause`` is called before each, and
        returns when there is room for it on the machine.

        Its future, and so each call here, raises ``Unavailable`` where the engine is closed.
        """
        self.layout = model.layout
        self.device = model.device
        self._model = model
        self._post = post
        self._piece_tokens = piece_tokens
        self._pause = pause

    def forward(self, rows: Sequence[Row]) -> list[Tensor | None]:
        """As ``PackedModel.forward`` gives it; a longer call piece by piece."""
        if sum(len(row.token_ids) for row in rows) <= self._piece_tokens:
            return self._made(lambda: self._model.forward(rows))
        return [self._in_pieces(row) for row in rows]

    def taken(self, row: Row) -> Tensor:
        """As ``PackedModel.taken`` gives it, in one piece."""
        return self._made(lambda: self._model.taken(row))

    def _made(self, call: Callable[[], Any]) -> Any:
        self._pause()
        return self._post(call).result()

    def _in_pieces(self, row: Row) -> Tensor | None:
        found = [
            self._made(lambda piece=piece: self._model.forward([piece])[0])
            for piece in _pieces(row, self._piece_tokens)
        ]
        wanted = [logits for logits in found if logits is not None]
        return torch.cat(wanted) if wanted else None


def _pieces(row: Row, num_tokens: int) -> Iterator[Row]:
    """The row as rows of so many tokens at most. Tokens see those of earlier pieces as they would
    within one, so what comes of it is the same."""
    count = len(row.token_ids)
    for start in range(0, count, num_tokens):
        part = slice(start, start + num_tokens)
        is_last = start + num_tokens >= count
        yield replace(
            row,
            token_ids=row.token_ids[part],
            positions=None if row.positions is None else row.positions[part],
            logits="none" if row.logits == "last" and not is_last else row.logits,
        )
