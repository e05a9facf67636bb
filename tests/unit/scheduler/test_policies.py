"""What the policies propose, and what the vetoes let pass."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from worlds import GB, NOW, A, B, Small, kv, text

from memcube.cube import Kind, Sensitivity
from memcube.errors import BadRequest, UnknownBackend
from memcube.ids import CubeId
from memcube.lifecycle import State
from memcube.scheduler.actions import (
    Action,
    Archive,
    Consolidate,
    Copy,
    Drop,
    Expire,
    Medium,
    Place,
    Reindex,
)
from memcube.scheduler.planner import Planner, build_policies
from memcube.scheduler.refusals import Refusal
from memcube.scheduler.settings import DAY_S, MoveLimits, Profile
from memcube.scheduler.world import Capacity, CubeFacts, Held, Node


def of(plan: Any, kind: type) -> list[Any]:
    return [action for action in plan.actions if isinstance(action, kind)]


class TestPromotion:
    def test_what_is_stable_and_used_often_becomes_kv(self):
        small = Small()
        cube = small.add()
        (action,) = small.plan().actions
        assert (action.cube, action.source, action.target.medium) == (cube, None, "device")
        assert (action.num_bytes, action.policy) == (500_000, "promotion")
        assert "10.0 times a day" in action.reason

    @pytest.mark.parametrize(
        "why",
        [
            {"expires_at": NOW + 1e6},
            {"session_bound": True},
            {"changed_at": NOW - 60},
            {"rate": 0.5},
            {"state": State.ARCHIVED},
            {"tokens": 0},
        ],
        ids=lambda why: next(iter(why)),
    )
    def test_rules_come_before_scores(self, why: dict[str, Any]):
        small = Small()
        small.add(**why)
        assert of(small.plan(Profile(strategies={"frequency": 1.0})), Copy) == []

    def test_what_becomes_stable_is_looked_at_then_without_any_change(self):
        small = Small()
        small.add(changed_at=NOW - 60)
        planner = Planner()
        plan = planner.plan(small.world, NOW, full=True)
        planner.settle(small.world, plan)
        assert of(plan, Copy) == []
        assert len(small.world.pending(NOW + 3_000)) == 0
        assert len(of(planner.plan(small.world, NOW + 3_540), Copy)) == 1

    def test_the_best_come_first_when_there_is_little_room(self):
        small = Small(device_bytes=600_000, nodes=("n1",))
        small.world.set_place(kv("n1", Medium.DISK), Capacity(num_bytes=0))
        small.add(rate=5.0)
        best = small.add(rate=50.0)
        small.add(rate=7.0)
        (action,) = of(small.plan(), Copy)
        assert action.cube == best

    def test_it_is_brought_nearer_from_where_it_lies(self):
        small = Small()
        cube = small.add(text("n1"), kv("n1", Medium.DISK))
        (action,) = of(small.plan(), Copy)
        assert (action.cube, action.source) == (cube, kv("n1", Medium.DISK))
        assert action.target.medium == "device"

    def test_labels_choose_the_node(self):
        small = Small()
        small.world.set_node(Node(name="n2", labels=frozenset({"gpu:a"})))
        small.add(labels=frozenset({"gpu:a"}))
        assert of(small.plan(), Copy)[0].target == kv("n2")


class TestStrategies:
    @pytest.mark.parametrize("name", ["frequency", "cost", "lru", "similarity", "labels"])
    def test_each_can_decide_alone(self, name: str):
        small = Small()
        liked = small.add(labels=frozenset({"vip"}), rate=20.0)
        small.add(rate=0.1, used_at=NOW - 10 * DAY_S)
        small.world.set_affinity({small.world.row(A, liked): 0.9}, NOW)
        profile = Profile(strategies={name: 1.0}, wanted_labels=frozenset({"vip"}))
        assert [action.cube for action in of(small.plan(profile), Copy)] == [liked]

    def test_they_are_weighed(self):
        small = Small()
        labelled = small.add(labels=frozenset({"vip"}), rate=0.2)
        used = small.add(rate=30.0)
        profile = Profile(
            strategies={"labels": 3.0, "frequency": 1.0}, wanted_labels=frozenset({"vip"})
        )
        assert [a.cube for a in of(small.plan(profile), Copy)] == [labelled]
        profile = replace(profile, strategies={"labels": 1.0, "frequency": 3.0})
        assert [a.cube for a in of(small.plan(profile), Copy)] == [used]

    def test_affinity_fades(self):
        small = Small()
        cube = small.add(rate=0.0)
        small.world.set_affinity({small.world.row(A, cube): 0.9}, NOW - 3_600)
        assert of(small.plan(Profile(strategies={"similarity": 1.0})), Copy) == []

    def test_each_tenant_has_its_own(self):
        small = Small()
        recent = small.add(rate=0.0)
        small.add(tenant=B, rate=0.0)
        plan = small.plan(
            Profile(strategies={"lru": 1.0}), tenants={B: Profile(strategies={"frequency": 1.0})}
        )
        assert [action.cube for action in of(plan, Copy)] == [recent]

    def test_a_tenant_may_leave_policies_out(self):
        small = Small()
        small.add(tenant=B)
        plan = small.plan(tenants={B: Profile(policies=("expiry", "spread"))})
        assert plan.actions == ()

    def test_what_is_not_built_is_refused_by_name(self):
        with pytest.raises(UnknownBackend, match="frequency"):
            Profile(strategies={"magic": 1.0})
        with pytest.raises(UnknownBackend, match="promotion"):
            Profile(policies=("promote",))
        with pytest.raises(UnknownBackend):
            build_policies(["promote"])
        with pytest.raises(BadRequest):
            Profile(promote_score=0.3, demote_score=0.3)


class TestEviction:
    def full(self, **more: Any) -> Small:
        """A device over its high watermark: 10 payloads of 500 kB in 5 MB."""
        small = Small(device_bytes=5_000_000, nodes=("n1",))
        for n in range(10):
            small.add(text("n1"), kv("n1"), rate=10.0 + n, **more)
        return small

    def test_the_least_worthy_are_first_copied_below_then_dropped(self):
        small = self.full()
        copies = of(small.plan(), Copy)
        assert [(c.cube, c.target.medium) for c in copies] == [("0001", "disk"), ("0002", "disk")]
        for copy in copies:
            row = small.world.row(A, copy.cube)
            held = [*small.world.held_by(row), Held(copy.target, 1, 500_000)]
            small.world.set_held(row, held)
        drops = of(small.plan(), Drop)
        assert [(d.cube, d.place) for d in drops] == [("0001", kv("n1")), ("0002", kv("n1"))]

    def test_it_stops_at_the_low_watermark_and_rests_below_the_high_one(self):
        small = self.full()
        small.world.set_place(kv("n1"), Capacity(num_bytes=5_400_000, low=0.85, high=0.95))
        assert of(small.plan(), Drop) == of(small.plan(), Copy) == []

    def test_what_is_pinned_stays(self):
        small = self.full(pinned=True)
        assert small.plan().actions == ()

    def test_what_nobody_uses_any_more_is_dropped_without_pressure(self):
        small = Small()
        cube = small.add(text("n1"), kv("n1"), rate=0.1)
        (action,) = small.plan().actions
        assert (action.cube, action.place, action.policy) == (cube, kv("n1"), "decay")

    def test_kv_of_an_old_version_leaves_first(self):
        small = self.full()
        row = small.world.row(A, CubeId("0010"))
        held = [Held(text("n1"), 1, 1_000), Held(kv("n1"), 0, 500_000)]
        small.world.set_held(row, held)
        assert of(small.plan(), Drop)[0].cube == "0010"


class TestSpread:
    def test_a_node_that_drains_is_emptied_by_copies_that_take_over(self):
        small = Small()
        cube = small.add(rate=0.0)
        small.world.set_node(Node(name="n1", draining=True))
        (copy,) = small.plan().actions
        assert (copy.source, copy.target, copy.takes_over) == (text("n1"), text("n2"), True)
        row = small.world.row(A, cube)
        small.world.set_held(row, [Held(text("n1"), 1, 1_000), Held(text("n2"), 1, 1_000)])
        small.world.cubes["owner"][row] = small.world.places.get(text("n2"))
        (drop,) = small.plan().actions
        assert drop.place == text("n1")

    def test_a_lost_copy_is_built_of_the_catalog(self):
        small = Small()
        small.add(text("n1"), rate=0.0)
        small.world.remove_node("n1")
        (copy,) = small.plan().actions
        assert (copy.source, copy.target) == (None, text("n2"))

    def test_a_node_that_is_down_is_given_time_to_come_back(self):
        small = Small()
        small.add(rate=0.0)
        small.world.set_node(Node(name="n1", alive=False, since=NOW - 10))
        assert small.plan().actions == ()
        small.now = NOW + 60
        (copy,) = small.plan().actions
        assert copy.target == text("n2")

    def test_there_are_as_many_copies_as_the_profile_says(self):
        small = Small()
        small.add(rate=0.0)
        (copy,) = small.plan(Profile(replicas=2)).actions
        assert (copy.target, copy.takes_over) == (text("n2"), False)
        small = Small()
        small.add(text("n1"), text("n2"), rate=0.0)
        (drop,) = small.plan().actions
        assert drop.place == text("n2"), "the owner's copy stays"

    def test_kv_of_a_node_that_drains_goes_along(self):
        small = Small()
        small.add(text("n2"), kv("n1"))
        small.world.set_node(Node(name="n1", draining=True))
        (copy,) = of(small.plan(), Copy)
        assert (copy.source, copy.target.node) == (kv("n1"), "n2")

    def test_full_places_give_to_empty_ones_once(self):
        small = Small()
        for name in ("n1", "n2"):
            small.world.set_place(text(name), Capacity(num_bytes=10_000))
        for _ in range(8):
            small.add(rate=0.0)
        copies = of(small.plan(), Copy)
        assert 0 < len(copies) <= 3
        assert {copy.policy for copy in copies} == {"balance"}


class TestTimeAndWork:
    def test_what_is_over_expires_frozen_or_not(self):
        small = Small()
        cube = small.add(expires_at=NOW - 1, frozen=True, rate=0.0)
        (action,) = small.plan().actions
        assert isinstance(action, Expire)
        assert action.cube == cube

    def test_expiry_comes_up_when_it_is_due(self):
        small = Small()
        small.add(expires_at=NOW + 100, rate=0.0)
        planner = Planner()
        planner.settle(small.world, planner.plan(small.world, NOW, full=True))
        assert planner.plan(small.world, NOW + 99).actions == ()
        assert len(of(planner.plan(small.world, NOW + 100), Expire)) == 1

    def test_what_nobody_uses_is_archived_if_that_is_wished(self):
        small = Small()
        old = {"used_at": NOW - 50 * DAY_S, "changed_at": NOW - 50 * DAY_S, "rate": 0.0}
        cube = small.add(**old)
        small.add(frozen=True, **old)
        assert small.plan().actions == ()
        plan = small.plan(Profile(archive_after_s=30 * DAY_S))
        assert [a.cube for a in of(plan, Archive)] == [cube]

    def test_a_cube_that_the_index_lacks_is_reindexed_after_a_while(self):
        small = Small()
        cube = small.add(indexed_version=0, rate=0.0, changed_at=NOW - 60)
        small.add(indexed_version=0, rate=0.0, changed_at=NOW - 1)
        (action,) = small.plan().actions
        assert isinstance(action, Reindex)
        assert (action.cube, action.version) == (cube, 1)

    def test_a_scope_of_lasting_facts_is_proposed_for_consolidation_once_a_period(self):
        small = Small()
        lasting = {"consents": True, "changed_at": NOW - 30 * DAY_S, "scope": "ann", "rate": 1.0}
        cubes = {small.add(**lasting) for _ in range(3)}
        small.add(**{**lasting, "consents": False})
        small.add(**{**lasting, "sensitivity": Sensitivity.SECRET})
        small.add(**{**lasting, "kind": Kind.EPISODE})
        profile = Profile(min_cubes=3, policies=("consolidation",))
        planner = Planner()
        planner.profiles = replace(planner.profiles, default=profile)
        plan = planner.plan(small.world, NOW, full=True)
        (action,) = of(plan, Consolidate)
        assert (set(action.cubes), action.scope) == (cubes, "ann")
        assert planner.plan(small.world, NOW, full=True).actions == plan.actions, "a dry run"
        planner.settle(small.world, plan)
        assert planner.plan(small.world, NOW, full=True).actions == ()


def why(small: Small, action: Action, **more: Any) -> Refusal | None:
    plan = small.plan(Profile(policies=("expiry",)), asked=[action], **more)
    return plan.refused[0].why if plan.refused else None


def asked_copy(cube: CubeId, target: Place | None = None, **more: Any) -> Copy:
    given: dict[str, Any] = {"tenant": A, "version": 1, "epoch": 0, "num_bytes": 1_000, **more}
    given.setdefault("source", text("n1"))
    return Copy(cube=cube, target=target or text("n2"), **given)


def asked_drop(cube: CubeId, place: Place) -> Drop:
    return Drop(tenant=A, cube=cube, version=1, epoch=0, place=place, num_bytes=1_000)


class TestRefusals:
    def test_what_may_be_is_not_refused(self):
        small = Small()
        assert why(small, asked_copy(small.add())) is None

    def test_an_unknown_or_foreign_cube(self):
        small = Small()
        small.add(tenant=B)
        assert why(small, asked_copy(CubeId("0001"))) is Refusal.UNKNOWN

    def test_the_last_copy(self):
        small = Small()
        assert why(small, asked_drop(small.add(), text("n1"))) is Refusal.LAST_COPY

    def test_the_last_copy_that_can_be_read(self):
        small = Small()
        cube = small.add(text("n1"), text("n2"))
        small.world.set_node(Node(name="n2", alive=False, since=NOW))
        assert why(small, asked_drop(cube, text("n1"))) is Refusal.LAST_COPY

    def test_a_pinned_payload_but_not_on_a_node_that_drains(self):
        small = Small()
        cube = small.add(text("n2"), kv("n1"), pinned=True)
        assert why(small, asked_drop(cube, kv("n1"))) is Refusal.PINNED
        small.world.set_node(Node(name="n1", draining=True))
        assert why(small, asked_drop(cube, kv("n1"))) is None

    def test_an_archive_of_a_frozen_cube(self):
        small = Small()
        cube = small.add(frozen=True)
        assert why(small, Archive(tenant=A, cube=cube, epoch=0)) is Refusal.FROZEN

    def test_a_target_without_room(self):
        small = Small()
        small.world.set_place(text("n2"), Capacity(num_bytes=1_000))
        assert why(small, asked_copy(small.add())) is Refusal.OVER_CAPACITY

    def test_a_copy_in_place_needs_no_more_room(self):
        small = Small()
        small.world.set_place(text("n1"), Capacity(num_bytes=1_000))
        cube = small.add()
        assert why(small, asked_copy(cube, text("n1"), source=None)) is None

    @pytest.mark.parametrize("node", [{"alive": False}, {"draining": True}])
    def test_a_target_that_is_down_or_drains(self, node: dict[str, bool]):
        small = Small()
        cube = small.add()
        small.world.set_node(Node(name="n2", **node))
        assert why(small, asked_copy(cube)) is Refusal.NOT_FIT

    def test_a_source_that_is_down(self):
        small = Small()
        cube = small.add()
        small.world.set_node(Node(name="n1", alive=False, since=NOW))
        assert why(small, asked_copy(cube)) is Refusal.NO_SOURCE

    def test_a_secret_cube_in_an_adapter(self):
        small = Small()
        cubes = (small.add(consents=True), small.add(sensitivity=Sensitivity.SECRET, consents=True))
        action = Consolidate(tenant=A, scope="", cubes=cubes, epoch=0)
        assert why(small, action) is Refusal.SENSITIVE
        unwilling = Consolidate(tenant=A, scope="", cubes=(small.add(),), epoch=0)
        assert why(small, unwilling) is Refusal.SENSITIVE

    def test_a_second_action_of_a_cube(self):
        small = Small()
        cube = small.add()
        plan = small.plan(asked=[asked_copy(cube), asked_copy(cube, kv("n2"))])
        assert plan.num_refused["operator", Refusal.TAKEN] == 1

    def test_what_is_over_the_limits_of_a_round(self):
        small = Small()
        cubes = [small.add(rate=0.0) for _ in range(3)]
        plan = small.plan(
            asked=[asked_copy(cube) for cube in cubes], limits=MoveLimits(max_bytes=2_000)
        )
        assert len(plan.actions) == 2
        assert plan.refused[0].why is Refusal.OVER_LIMITS

    def test_a_tenant_does_not_take_a_round_for_itself(self):
        small = Small()
        mine = [small.add() for _ in range(8)]
        other = small.add(tenant=B, rate=3.0)
        limits = MoveLimits(max_actions=4, tenant_fraction=0.5)
        got = [action.cube for action in of(small.plan(limits=limits), Copy)]
        assert other in got
        assert len(got) == 4, "what nobody else wants is not left"
        assert set(got) < {*mine, other}

    def test_each_refusal_is_counted_and_told(self):
        small = Small()
        cube = small.add(rate=0.0)
        plan = small.plan(asked=[asked_drop(cube, text("n1"))])
        assert plan.num_refused == {("operator", Refusal.LAST_COPY): 1}
        assert plan.refused[0].action == asked_drop(cube, text("n1"))


class TestNoPingPong:
    def run(self, uses_at: Any, *, days: int = 20, device_bytes: int = GB) -> Counter[str]:
        """Let plans take effect at once, under a load; moves by cube."""
        small = Small(device_bytes=device_bytes, nodes=("n1",))
        small.world.set_place(kv("n1", Medium.DISK), Capacity(num_bytes=0))
        cubes = [small.add(rate=0.0, used_at=NOW) for _ in range(12)]
        planner, moves = Planner(), Counter[str]()
        for step in range(days * 24):
            small.now = now = NOW + 3_600.0 * step
            for n, cube in enumerate(cubes):
                if uses := uses_at(step, n):
                    small.world.use(small.world.row(A, cube), uses, now)
            plan = planner.plan(small.world, now)
            planner.settle(small.world, plan)
            for action in plan.actions:
                if not isinstance(action, Copy | Drop):
                    continue
                moves[str(action.cube)] += 1
                row = small.world.row(A, action.cube or CubeId(""))
                held = small.world.held_by(row)
                if isinstance(action, Copy):
                    held = [*held, Held(action.target, 1, action.num_bytes)]
                else:
                    held = [h for h in held if h.place != action.place]
                small.world.set_held(row, held)
                small.world.cubes["moved_at"][row] = now
        return moves

    def test_a_load_that_swings_around_the_threshold_moves_nothing_to_and_fro(self):
        # From none to four uses a day, day by day: the rate swings around the two that promote.
        moves = self.run(lambda step, n: 1 if step % 6 == 0 and step // 24 % 2 else 0)
        assert max(moves.values(), default=0) <= 2

    def test_equals_that_do_not_all_fit_do_not_displace_each_other(self):
        # 12 payloads of 500 kB, room for 6; each used every hour, a little more or less in turn.
        moves = self.run(
            lambda step, n: 1 + (step + n) % 3 // 2, days=5, device_bytes=6 * 500_000 + 1
        )
        assert sum(moves.values()) <= 12

    def test_a_newcomer_that_is_clearly_worth_more_gets_in(self):
        moves = self.run(
            lambda step, n: 0 if n == 11 and step < 48 else 40 if n == 11 else n % 3,
            days=5,
            device_bytes=3 * 500_000,
        )
        assert moves["0012"] >= 1


def test_a_dry_run_changes_nothing():
    small = Small()
    small.add()
    before = small.world.pending(NOW).tolist()
    first, second = small.plan(), small.plan()
    assert first.actions == second.actions != ()
    assert small.world.pending(NOW).tolist() == before
    assert small.world.used_bytes == [1_000, 0, 0, 0, 0, 0]


def test_a_steady_round_looks_only_at_what_changed():
    small = Small()
    for _ in range(50):
        small.add(rate=0.0)
    planner = Planner()
    planner.settle(small.world, planner.plan(small.world, NOW, full=True))
    small.world.use(7, 100, NOW + 1)
    plan = planner.plan(small.world, NOW + 1)
    assert plan.rows.tolist() == [7]
    assert len(of(plan, Copy)) == 1


def test_a_cube_that_is_gone_is_no_longer_planned_for():
    small = Small()
    cube = small.add()
    small.world.remove(A, cube)
    assert small.plan(full=True).actions == ()
    assert small.world.used_bytes == [0] * 6


def test_columns_agree_whether_loaded_at_once_or_one_by_one():
    one, many = Small(), Small()
    for _ in range(3):
        one.add(text("n1"), kv("n1"))
        many.add(text("n1"), kv("n1"))
    facts = CubeFacts(
        id=CubeId("0002"),
        tenant=A,
        version=2,
        epoch=3,
        num_bytes=5,
        tokens=7,
        changed_at=NOW,
        created_at=NOW,
    )
    one.world.put(facts, [Held(text("n2"), 1, 5)])
    assert one.world.cubes["plaintext"].tolist() == [1, 0, 1]
    assert one.world.cubes["outdated"].tolist() == [0, 1, 0]
    assert one.world.cubes["activation"].tolist() == [1, 0, 1]
    assert one.world.used_bytes[:2] == [2_000, 1_000_000]
    assert many.world.used_bytes[:2] == [3_000, 1_500_000]
