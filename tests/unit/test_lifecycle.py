import pytest

from memcube.errors import IllegalMove
from memcube.lifecycle import MOVES, SEARCHABLE, Event, State, legal_events, move


def test_every_move_of_the_table_leads_where_it_says():
    for (state, event), target in MOVES.items():
        assert move(state, event) is target


def test_every_move_that_is_not_in_the_table_is_refused_with_the_legal_ones():
    for state in State:
        for event in Event:
            if (state, event) in MOVES:
                continue
            with pytest.raises(IllegalMove) as refused:
                move(state, event)
            assert refused.value.legal == legal_events(state)


def test_nothing_leaves_deleted():
    assert legal_events(State.DELETED) == ()


def test_every_state_but_deleted_can_reach_deleted():
    for state in State:
        if state is not State.DELETED:
            assert move(state, Event.DELETE) is State.DELETED


def test_only_live_states_are_searchable():
    assert State.MERGED not in SEARCHABLE
    assert State.EXPIRED not in SEARCHABLE
