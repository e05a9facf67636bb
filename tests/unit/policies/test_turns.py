import pytest

from memcube.policies.turns import Turns, exact_chain_pays


def test_a_conversation_is_the_likelier_to_go_on_the_longer_it_is():
    turns = Turns()
    found = []
    for _ in range(8):
        turns.add("c")
        found.append(turns.probability("c"))
    assert found == sorted(found)
    assert found[0] == pytest.approx(0.33, abs=0.05)
    assert 0.7 < found[-1] < 0.9


def test_what_was_counted_outweighs_what_was_assumed():
    turns = Turns()
    for number in range(500):
        turns.add(f"c{number}")
    assert turns.probability("c1") < 0.05
    for number in range(500):
        turns.add(f"c{number}")
    turns.add("new")
    assert turns.probability("new") > 0.9


def test_of_an_unknown_or_long_forgotten_conversation_nothing_is_expected():
    turns = Turns(max_conversations=2)
    for name in ("a", "b", "c"):
        turns.add(name)
    assert turns.probability("a") == turns.probability("x") == 0.0
    assert turns.probability("c") > 0.0


@pytest.mark.parametrize(
    ("build", "saved", "probability", "pays"),
    [
        (1000, 400, 0.5, True),
        (1000, 100, 0.33, False),
        (1000, 100, 0.82, True),
        (1000, 0, 0.99, False),
        (1000, 1000, 0.0, False),
        (1000, 1, 1.0, True),
    ],
)
def test_a_chain_is_built_where_it_saves_more_than_it_takes(build, saved, probability, pays):
    found = exact_chain_pays(build_tokens=build, saved_tokens=saved, probability=probability)
    assert found is pays
