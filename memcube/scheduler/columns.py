"""What is known of many things as arrays that grow: a million cubes take some 150 bytes each, beside their ids."""

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T", bound=Hashable)
NONE = -1
"""No row."""


class Columns:
    """Arrays of one length, by name; rows are added at the end and never move."""

    def __init__(self, kinds: Mapping[str, tuple[str, object]], *, room: int = 1024) -> None:
        """``kinds`` gives each column's dtype and what a new row holds."""
        self._kinds = dict(kinds)
        self._room = room
        self.num_rows = 0
        self._arrays = {
            name: np.full(room, first, dtype=dtype) for name, (dtype, first) in kinds.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        """A column of all rows. It is the array itself, and holds until rows are added."""
        return self._arrays[name][: self.num_rows]

    def put(self, row: int, values: Mapping[str, object]) -> None:
        """Set columns of one row."""
        for name, value in values.items():
            self._arrays[name][row] = value

    def add(self, num: int = 1) -> int:
        """Add rows; the first one's number."""
        first, self.num_rows = self.num_rows, self.num_rows + num
        if self.num_rows > self._room:
            self._room = max(self.num_rows, self._room * 2)
            for name, (dtype, fill) in self._kinds.items():
                grown = np.full(self._room, fill, dtype=dtype)
                grown[:first] = self._arrays[name][:first]
                self._arrays[name] = grown
        return first

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())


class Names(Generic[T]):
    """Numbers for things, from 0, in the order in which they are first named."""

    def __init__(self) -> None:
        self._numbers: dict[T, int] = {}
        self._names: list[T] = []

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: int) -> T:
        return self._names[number]

    def __iter__(self):
        return iter(self._names)

    def get(self, name: T) -> int:
        """Its number, or ``NONE``."""
        return self._numbers.get(name, NONE)

    def number(self, name: T) -> int:
        """Its number; a new one if it has none."""
        found = self._numbers.get(name)
        if found is None:
            found = self._numbers[name] = len(self._names)
            self._names.append(name)
        return found
