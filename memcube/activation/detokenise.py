"""Token ids to text as they come, with characters that span tokens kept whole."""

from typing import Any, Protocol

_LOST = "\ufffd"
_MAX_OPEN = 3
"""A character has four bytes at most, so at most so many replacement characters at the end of a text
can still become something else."""
_MAX_WINDOW = 64


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(
        self, token_ids: list[int], skip_special_tokens: bool = False, **kwargs: Any
    ) -> str | list[str]: ...


class TextStream:
    """The text of one growing sequence of tokens; special tokens have none.

    What is shown together is what the tokenizer makes of all tokens at once. Only a window is
    decoded at a time: the tokens that are not yet shown and, before them, those shown last, as some
    decoders treat the first token of a text in their own way.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_before = 0
        """How many tokens at the window's begin are there as context only."""
        self._num_shown = 0
        """How many characters of the window's text are shown."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; often none."""
        self._window.append(token_id)
        text = self._decode(self._window)
        open_at = len(text) - len(_open_end(text))
        if open_at < len(text) and len(self._window) < _MAX_WINDOW:
            return self._show(text, open_at)
        shown = self._show(text, len(text))
        if shown or len(self._window) >= _MAX_WINDOW:
            self._window = self._window[self._num_before :]
            self._num_before = len(self._window)
            self._num_shown = len(self._decode(self._window))
        return shown

    def flush(self) -> str:
        """What is still open, as it is, when no more tokens come."""
        text = self._decode(self._window)
        return self._show(text, len(text))

    def _show(self, text: str, end: int) -> str:
        shown = text[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        return shown

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # a list only for a list of lists
        return text


def _open_end(text: str) -> str:
    """The replacement characters at the end that more bytes may turn into a character."""
    end = text[-_MAX_OPEN:]
    return end[len(end.rstrip(_LOST)) :]
