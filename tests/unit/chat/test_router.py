import pytest

from memcube.chat.router import Part, Router
from memcube.errors import DeadlineExceeded, TooBusy, Unavailable

A, B = Part("a", 1000), Part("b", 1000)


def test_a_prompt_goes_where_its_parts_were_read():
    router = Router(3)
    first = router.choose([A])
    router.done(first)
    other = router.choose([B])
    router.done(other)
    assert router.choose([A, Part("question", 10)]).engine == first.engine


def test_a_long_line_outweighs_what_is_held():
    router = Router(2)
    first = router.choose([A])
    router.done(first)
    routes = [router.choose([A]) for _ in range(4)]
    assert {route.engine for route in routes} == {0, 1}


def test_equal_engines_take_turns_while_they_are_busy():
    router = Router(2)
    assert {router.choose([A]).engine, router.choose([B]).engine} == {0, 1}


def test_a_lost_engine_is_asked_again_only_when_it_is_back_or_alone():
    router = Router(2)
    router.done(router.choose([A]))
    router.lost(0)
    for _ in range(3):
        route = router.choose([A])
        assert route.engine == 1
        router.done(route)
    router.lost(1)
    assert router.choose([A]).engine in (0, 1)
    router.back(0)
    assert router.choose([B]).engine == 0


def test_what_is_done_leaves_the_line():
    router = Router(2)
    for _ in range(100):
        route = router.choose([A])
        assert route.engine == 0
        router.done(route)


def asked(router: Router, failing: dict[int, Exception], *, said: bool = False) -> list[int]:
    """The engines that were tried for a request, with what some of them raise."""
    tried = []
    for attempt in router.attempts([A]):
        with attempt as route:
            tried.append(route.engine)
            attempt.said = said
            if route.engine in failing:
                raise failing[route.engine]
            return tried
    raise AssertionError("the last attempt raises")


def test_each_engine_is_tried_once_until_one_answers():
    router = Router(3)
    down = Unavailable("it is being restarted")
    assert asked(router, {0: down, 1: down}) == [0, 1, 2]
    assert asked(router, {}) == [2]
    with pytest.raises(Unavailable):
        asked(router, dict.fromkeys(range(3), down))
    assert router._in_line == [0, 0, 0]


@pytest.mark.parametrize("error", [TooBusy("full", 1.0), DeadlineExceeded("late"), ValueError()])
def test_what_another_engine_would_not_mend_is_not_tried_there(error):
    router = Router(2)
    with pytest.raises(type(error)):
        asked(router, {0: error})
    assert router._in_line == [0, 0]
    assert asked(router, {}) == [0]


def test_what_was_said_is_not_said_again():
    with pytest.raises(Unavailable):
        asked(Router(2), {0: Unavailable("gone")}, said=True)
