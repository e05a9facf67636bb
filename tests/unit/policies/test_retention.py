import random

import numpy as np
import pytest

from memcube.policies.retention import Budget, Item, Retention
from memcube.policies.reuse import Features, ReuseModel, hint_level, num_steps, step_of


def item(
    key: str, *, num_bytes: int = 10, tenant: str = "a", group: str = "", saves_s: float = 1.0
):
    return Item(
        key=key, num_bytes=num_bytes, tenant=tenant, group=group, saves_s=saves_s, load_s=0.0
    )


def test_what_was_used_longest_ago_leaves_first_among_equals():
    policy = Retention(30, low=1.0)
    for key in "abc":
        policy.admit(item(key), 0.0)
    assert policy.admit(item("d"), 0.0).victims == ("a",)
    assert policy.admit(item("e"), 0.0).victims == ("b",)


def test_what_is_used_often_stays():
    policy = Retention(30, low=1.0)
    for key in "abc":
        policy.admit(item(key), 0.0)
    for _ in range(3):
        policy.hit("a", 0.0)
    assert policy.admit(item("d"), 0.0).victims == ("b",)


def test_what_is_no_longer_used_leaves_in_the_end_however_often_it_was():
    policy = Retention(30, low=1.0)
    policy.admit(item("old"), 0.0)
    for _ in range(50):
        policy.hit("old", 0.0)
    left = {v for n in range(400) for v in policy.admit(item(f"n{n}"), 0.0).victims}
    assert "old" in left


def test_what_saves_more_for_its_bytes_stays():
    policy = Retention(30, low=1.0)
    policy.admit(item("dear", saves_s=10.0), 0.0)
    policy.admit(item("cheap", saves_s=0.1), 0.0)
    policy.admit(item("big", num_bytes=10, saves_s=1.0), 0.0)
    assert policy.admit(item("new"), 0.0).victims == ("cheap",)


def test_a_hint_keeps_a_conversation_and_is_taken_back():
    policy = Retention(20, low=1.0)
    policy.admit(item("back soon", group="g"), 0.0)
    policy.admit(item("other"), 0.0)
    policy.hint("g", 1.0, 0.0)
    assert policy.admit(item("x"), 0.0).victims == ("other",)
    policy.hint("g", 0.0, 0.0)
    policy.hit("x", 0.0)
    policy.hit("x", 0.0)
    assert policy.admit(item("y"), 0.0).victims == ("back soon",)


def test_of_two_that_are_expected_the_sooner_one_is_worth_more():
    model = ReuseModel()
    soon, late = (
        model.class_of(Features.of(hint_level(1.0, wait), 1, 1, 0)) for wait in (500, 50_000)
    )
    model.fit(np.zeros((len(model), num_steps())), 0)
    assert model.index[soon][0] > 10 * model.index[late][0]
    # What is overdue is worth less than what is yet to come.
    assert model.index[soon][step_of(20_000)] < model.index[late][step_of(20_000)]


def test_over_the_high_watermark_it_evicts_down_to_the_low_one():
    policy = Retention(100, low=0.5)
    for n in range(10):
        policy.admit(item(str(n)), 0.0)
    decision = policy.admit(item("new"), 0.0)
    assert len(decision.victims) == 6
    assert policy.used_bytes == 50


def test_pinned_payloads_stay_and_what_finds_no_room_is_refused():
    policy = Retention(20, low=1.0)
    for key in "ab":
        policy.admit(item(key), 0.0)
        policy.pin(key)
    assert not policy.admit(item("c"), 0.0).admitted
    policy.unpin("a")
    assert policy.admit(item("c"), 0.0).victims == ("a",)


def test_a_tenant_has_a_cap_and_a_floor():
    policy = Retention(
        40, low=1.0, budgets={"small": Budget(cap_bytes=20), "safe": Budget(floor_bytes=10)}
    )
    policy.admit(item("s", tenant="safe"), 0.0)
    for key in "ab":
        policy.admit(item(key, tenant="small"), 0.0)
    assert policy.admit(item("c", tenant="small"), 0.0).victims == ("a",)
    left = {v for n in range(20) for v in policy.admit(item(f"n{n}", tenant="big"), 0.0).victims}
    assert "s" not in left


def test_what_is_too_large_changes_nothing():
    policy = Retention(20)
    policy.admit(item("a"), 0.0)
    assert not policy.admit(item("huge", num_bytes=21), 0.0).admitted
    assert policy.used_bytes == 10


@pytest.mark.parametrize("seed", range(20))
def test_it_never_holds_more_than_its_capacity_and_never_evicts_the_pinned(seed: int):
    rng = random.Random(seed)
    policy = Retention(200, low=0.8, budgets={"a": Budget(20, 120), "b": Budget(30)})
    here: dict[str, Item] = {}
    pinned: set[str] = set()
    for step in range(500):
        key = f"k{rng.randrange(60)}"
        act = rng.random()
        if act < 0.6:
            tenant = here[key].tenant if key in here else rng.choice("abc")
            one = here.get(key) or item(
                key, num_bytes=rng.randrange(1, 60), tenant=tenant, saves_s=rng.random()
            )
            decision = policy.admit(one, float(step))
            assert not pinned & set(decision.victims)
            assert len(set(decision.victims)) == len(decision.victims)
            for victim in decision.victims:
                del here[victim]
            if decision.admitted:
                here[key] = one
        elif act < 0.8:
            policy.hit(key, float(step))
        elif act < 0.9 and key in here:
            policy.pin(key)
            pinned.add(key)
        elif key in pinned:
            policy.unpin(key)
            pinned.discard(key)
        elif key in here:
            policy.forget(key)
            del here[key]
        assert policy.used_bytes == sum(one.num_bytes for one in here.values()) <= 200
        assert sum(one.num_bytes for one in here.values() if one.tenant == "a") <= 120
