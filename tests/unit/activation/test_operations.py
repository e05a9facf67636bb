from hypothesis import given
from hypothesis import strategies as st

from memcube.activation.contract import SegmentRef
from memcube.activation.operations import Choose, Decode, Extend, Load, plan_composed, plan_exact

SEGMENTS = (SegmentRef(40, 300), SegmentRef(300, 560), SegmentRef(560, 800))


def plan(*stored, num_exact=0, recompute=True):
    return plan_composed(
        850, SEGMENTS, stored, num_exact=num_exact, block_tokens=64, recompute=recompute
    )


def test_nothing_stored_is_an_exact_prompt_whose_later_segments_are_missed():
    found = plan(False, False, False)
    assert found.operations == plan_exact(850).operations
    assert (found.exact_end, found.cold) == (None, [0, 1, 2])


def test_stored_segments_are_composed_and_what_matters_is_computed_again():
    assert plan(True, True, True).operations == [
        Extend(40),
        Load(0, SEGMENTS[0]),
        Load(1, SEGMENTS[1]),
        Load(2, SEGMENTS[2]),
        Choose(),
        Decode(),
    ]
    assert plan(True, True, True).exact_end == 300


def test_without_recomputing_the_rest_of_the_prompt_is_prefilled():
    assert plan(True, True, True, recompute=False).operations[-2:] == [Extend(850), Decode()]


def test_the_first_segment_alone_keeps_the_prompt_exact():
    found = plan(True, False, False)
    assert found.operations == [Extend(40), Load(0, SEGMENTS[0]), Extend(850), Decode()]
    assert found.exact_end is None


def test_a_segment_that_is_not_stored_is_prefilled_in_its_place():
    found = plan(False, True, False)
    assert found.operations == [
        Extend(300),
        Load(1, SEGMENTS[1]),
        Extend(800),
        Choose(),
        Decode(),
    ]
    assert (found.exact_end, found.cold) == (300, [0, 2])


def test_segments_that_the_exact_chain_reaches_are_taken_from_it():
    found = plan(True, True, True, num_exact=512)
    assert found.operations == [Extend(560), Load(2, SEGMENTS[2]), Choose(), Decode()]
    assert plan(True, True, True, num_exact=768).operations == plan_exact(850).operations


@given(st.lists(st.booleans(), min_size=3, max_size=3), st.integers(0, 850), st.booleans())
def test_a_plan_fills_all_slots_in_order_and_once(stored, num_exact, recompute):
    found = plan(*stored, num_exact=num_exact, recompute=recompute)
    slot = 0
    for operation in found.operations:
        if isinstance(operation, Extend):
            assert operation.end > slot
            slot = operation.end
        elif isinstance(operation, Load):
            assert operation.segment.start == slot
            slot = operation.segment.end
        elif isinstance(operation, Choose):
            assert slot == SEGMENTS[-1].end
            slot = 850
    assert slot == 850
    loaded = [op.index for op in found.operations if isinstance(op, Load)]
    assert (found.exact_end is not None) == any(index > 0 for index in loaded)
    assert not set(loaded) & set(found.cold)
