"""Lifecycle states of a MemCube and the one table of legal moves.

``frozen`` is a flag beside the state, not a state: a frozen cube keeps its state and
refuses every event but ``unfreeze``, ``use`` and ``expire`` (retention wins over freezing).
"""

from enum import StrEnum

from memcube.errors import IllegalMove


class State(StrEnum):
    """Where a cube is in its life."""

    GENERATED = "generated"
    ACTIVATED = "activated"
    MERGED = "merged"
    ARCHIVED = "archived"
    EXPIRED = "expired"
    DELETED = "deleted"


class Event(StrEnum):
    """What may happen to a cube."""

    USE = "use"
    UPDATE = "update"
    MERGE = "merge"
    ARCHIVE = "archive"
    RESTORE = "restore"
    EXPIRE = "expire"
    DELETE = "delete"


MOVES: dict[tuple[State, Event], State] = {
    (State.GENERATED, Event.USE): State.ACTIVATED,
    (State.GENERATED, Event.UPDATE): State.GENERATED,
    (State.GENERATED, Event.MERGE): State.MERGED,
    (State.GENERATED, Event.ARCHIVE): State.ARCHIVED,
    (State.GENERATED, Event.EXPIRE): State.EXPIRED,
    (State.GENERATED, Event.DELETE): State.DELETED,
    (State.ACTIVATED, Event.USE): State.ACTIVATED,
    (State.ACTIVATED, Event.UPDATE): State.ACTIVATED,
    (State.ACTIVATED, Event.MERGE): State.MERGED,
    (State.ACTIVATED, Event.ARCHIVE): State.ARCHIVED,
    (State.ACTIVATED, Event.EXPIRE): State.EXPIRED,
    (State.ACTIVATED, Event.DELETE): State.DELETED,
    (State.MERGED, Event.RESTORE): State.ACTIVATED,
    (State.MERGED, Event.ARCHIVE): State.ARCHIVED,
    (State.MERGED, Event.EXPIRE): State.EXPIRED,
    (State.MERGED, Event.DELETE): State.DELETED,
    (State.ARCHIVED, Event.RESTORE): State.ACTIVATED,
    (State.ARCHIVED, Event.EXPIRE): State.EXPIRED,
    (State.ARCHIVED, Event.DELETE): State.DELETED,
    (State.EXPIRED, Event.DELETE): State.DELETED,
}

SEARCHABLE: frozenset[State] = frozenset({State.GENERATED, State.ACTIVATED})
"""States whose cubes lie in the plaintext index and are found by a search."""

READABLE: frozenset[State] = SEARCHABLE | {State.MERGED, State.ARCHIVED}
"""States whose cubes are found by id."""


def legal_events(state: State) -> tuple[Event, ...]:
    """The events that a cube in this state may take, in the table's order."""
    return tuple(event for (from_state, event) in MOVES if from_state is state)


def move(state: State, event: Event) -> State:
    """The state after an event.

    Raises:
        IllegalMove: the table has no such move.
    """
    try:
        return MOVES[state, event]
    except KeyError:
        raise IllegalMove(state, event, tuple(legal_events(state))) from None
