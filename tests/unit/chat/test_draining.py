from memcube.chat.draining import DrainWatch
from memcube.chat.router import Part, Router


def engine_of(router: Router) -> int:
    route = router.choose([Part("a", 1000)])
    router.done(route)
    return route.engine


async def test_an_engine_of_a_node_that_drains_gets_nothing_new_until_it_does_no_more():
    router, draining = Router(2), set[str]()
    asked = 0

    async def nodes() -> list[str | None]:
        nonlocal asked
        asked += 1
        return ["a", "b"]

    watch = DrainWatch(router, draining=lambda: draining, nodes=nodes)
    assert engine_of(router) == 0
    await watch.look()
    assert (engine_of(router), asked) == (0, 0)
    draining.add("a")
    await watch.look()
    assert engine_of(router) == 1
    draining.clear()
    await watch.look()
    assert (engine_of(router), asked) == (0, 1)


async def test_where_all_drain_or_the_others_are_down_they_answer_all_the_same():
    router = Router(2)

    async def nodes() -> list[str | None]:
        return ["a", None]

    await DrainWatch(router, draining=lambda: {"a"}, nodes=nodes).look()
    assert engine_of(router) == 1
    router.lost(1)
    assert engine_of(router) == 0
    router.leave_out({0, 1})
    assert engine_of(router) == 0
