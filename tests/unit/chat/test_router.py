from memcube.chat.router import Part, Router

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
