"""The runs' own buffers, within a budget of bytes."""

import torch

from memcube.activation.forward import KvBuffer
from memcube.activation.layout import KvLayout


class Buffers:
    """Hands out buffers and takes them back. All together, spare ones too, stay within the budget.

    Buffers are used again, as the pages of a new one have to be touched first: to fill 3,000 tokens
    of SmolLM2 took 100 ms in a new one and 28 in another's.
    """

    def __init__(
        self, layout: KvLayout, device: torch.device, *, budget_bytes: int, max_spare: int
    ) -> None:
        self._layout = layout
        self._device = device
        self._budget_bytes = budget_bytes
        self._max_spare = max_spare
        self._spare: list[KvBuffer] = []  # given back last last
        self.used_bytes = 0

    @property
    def spare_bytes(self) -> int:
        return sum(buffer.num_bytes for buffer in self._spare)

    def fit(self, num_tokens: int) -> bool:
        """Whether a buffer for so many tokens can be had now."""
        return self.used_bytes + self._bytes(num_tokens) <= self._budget_bytes

    def take(self, num_tokens: int) -> KvBuffer:
        """An empty buffer for so many tokens, which must fit."""
        room = self._budget_bytes - self.used_bytes
        fitting = [
            buffer
            for buffer in self._spare
            if num_tokens <= buffer.capacity <= 2 * num_tokens and buffer.num_bytes <= room
        ]
        if buffer := min(fitting, key=lambda buffer: buffer.capacity, default=None):
            self._spare.remove(buffer)
            buffer.truncate(0)
        else:
            while self._spare and self.spare_bytes + self._bytes(num_tokens) > room:
                del self._spare[0]
            buffer = KvBuffer(self._layout, self._device, num_tokens)
        self.used_bytes += buffer.num_bytes
        return buffer

    def give_back(self, buffer: KvBuffer) -> None:
        """A buffer that is not used any more."""
        self.used_bytes -= buffer.num_bytes
        self._spare.append(buffer)
        del self._spare[: -self._max_spare]

    def clear(self) -> None:
        """Let go of all, those in use too."""
        self._spare.clear()
        self.used_bytes = 0

    def _bytes(self, num_tokens: int) -> int:
        return num_tokens * self._layout.bytes_per_token
