"""The service: what one caller's request does to the catalog and the index, also when parts fail."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest

from memcube.catalog import Change, Idempotency, Principal, Role
from memcube.catalog.adapters import WRITTEN_BY
from memcube.config import load_config
from memcube.cube import Draft, MemCube, Origin, Parent, Relation, Sensitivity
from memcube.errors import (
    BadRequest,
    Forbidden,
    Frozen,
    IdempotencyMismatch,
    IllegalMove,
    LimitExceeded,
    NotFound,
    Unauthenticated,
    Unavailable,
    VersionMismatch,
)
from memcube.filters import Compare, Not, Op, Or, parse_filter
from memcube.ids import uuid7
from memcube.reader.messages import Header, Message
from memcube.retrieval.ranker import Mode
from memcube.service import AddOutcome, AddRequest, SearchScope
from memcube.testing.local import START, LocalSystem

ANN = Header(user_id="ann")


@pytest.fixture
def who(system: LocalSystem) -> Principal:
    return system.principal()


async def add(
    system: LocalSystem,
    who: Principal,
    *texts: str,
    header: Header = ANN,
    wait: bool = True,
    key: str | None = None,
) -> list[MemCube]:
    """One cube a text, each a request of its own in one call."""
    outcomes = await system.service.add(
        who,
        [AddRequest(text=text, header=header) for text in texts],
        wait_indexed=wait,
        idempotency=None if key is None else Idempotency(key=key, body_hash=repr(texts)),
    )
    return [outcome.results[0].cube for outcome in outcomes]


async def say(
    system: LocalSystem, who: Principal, *turns: Message, header: Header = ANN
) -> AddOutcome:
    (outcome,) = await system.service.add(
        who, [AddRequest(messages=turns, header=header)], wait_indexed=True
    )
    return outcome


def turn(content: str, name: str | None = None, **rest) -> Message:
    return Message(role="user", content=content, name=name, **rest)


async def found(
    system: LocalSystem, who: Principal, query: str, *, mode: Mode = Mode.SPARSE, **scope
) -> list[str]:
    """Texts of the hits, best first."""
    hits = await system.service.search(who, query, SearchScope(**scope), top_k=20, mode=mode)
    return [hit.cube.text for hit in hits.hits]


async def get(system: LocalSystem, who: Principal, cube: MemCube) -> MemCube:
    return await system.service.get(who, cube.id)


# -- add -------------------------------------------------------------------------------------------


async def test_what_is_added_is_found_by_the_next_search(system: LocalSystem, who):
    await add(system, who, "kumquat jam", "pear cake")
    for mode in Mode:
        assert (await found(system, who, "kumquat", mode=mode))[0] == "kumquat jam"


async def test_each_turn_is_a_cube_with_its_speaker_and_time(system: LocalSystem, who):
    said = datetime(2026, 2, 1, 9, 30, tzinfo=UTC)
    outcome = await say(
        system, who, turn("I like tea.", "Ann", time=said, id="D1:1"), turn("Me too.", "Bob")
    )
    one, two = (result.cube for result in outcome.results)
    assert (one.text, one.descriptive.speaker, one.descriptive.event_time) == (
        "I like tea.",
        "Ann",
        said,
    )
    assert one.descriptive.sources[0].ref == "D1:1"
    assert (two.descriptive.seq, one.descriptive.seq) == (1, 0)
    assert two.descriptive.event_time is None


async def test_a_long_turn_is_split_at_sentences_and_keeps_its_speaker_time_and_source(
    tmp_path: Path, catalog_template: Path
):
    config = load_config(None, [f"data_dir={tmp_path}", "reader.max_chars=100"])
    system = LocalSystem.open(tmp_path, config=config, template=catalog_template)
    who = system.principal()
    sentences = [f"Sentence number {i} about kumquats and their jam." for i in range(6)]
    outcome = await say(system, who, turn(" ".join(sentences), "Ann", time=START, id="D1:1"))
    parts = [result.cube for result in outcome.results]
    assert [part.text for part in parts] == [" ".join(sentences[i : i + 2]) for i in (0, 2, 4)]
    assert {part.descriptive.speaker for part in parts} == {"Ann"}
    assert {part.descriptive.event_time for part in parts} == {START}
    assert {part.descriptive.sources[0].ref for part in parts} == {"D1:1"}
    assert [part.descriptive.seq for part in parts] == [0, 1, 2]
    assert " ".join(part.text for part in parts) == " ".join(sentences)
    system.close()


async def test_an_exact_repeat_in_the_same_scope_is_one_cube_with_a_higher_count(
    system: LocalSystem, who
):
    first = await say(system, who, turn("Good morning!", "Ann"), turn("Good  morning! ", "Ann"))
    assert [r.event for r in first.results] == ["added", "repeated"]
    again = await say(system, who, turn("Good morning!", "Ann"))
    (only,) = again.results
    assert (only.event, only.cube.usage.repeats) == ("repeated", 3)
    assert only.cube.id == first.results[0].cube.id
    others = [
        await say(system, who, turn("Good morning!", "Bob")),
        await say(system, who, turn("Good morning!", "Ann"), header=Header(user_id="bob")),
        await say(system, system.principal("other"), turn("Good morning!", "Ann")),
    ]
    assert {o.results[0].event for o in others} == {"added"}
    assert len({o.results[0].cube.id for o in (first, *others)}) == 4


async def test_an_add_that_waits_for_storage_alone_is_indexed_behind_it(system: LocalSystem, who):
    (outcome,) = await system.service.add(
        who, [AddRequest(text="tea", header=ANN)], wait_indexed=False
    )
    assert outcome.indexed == frozenset()
    await system.reconcile()
    assert await found(system, who, "tea") == ["tea"]


async def test_one_bad_request_of_a_call_leaves_nothing_of_the_others(system: LocalSystem, who):
    texts = ("tea", " ", "milk")
    requests = [AddRequest(text=t, header=ANN, at=f"items[{i}].") for i, t in enumerate(texts)]
    with pytest.raises(BadRequest) as refused:
        await system.service.add(who, requests, wait_indexed=True)
    assert refused.value.field == "items[1].text"
    assert (await system.service.find(who, limit=9)).cubes == []
    assert system.shards[0].held() == {}


async def test_more_cubes_than_a_request_may_hold_are_refused_before_they_are_read(
    tmp_path: Path, catalog_template: Path
):
    config = load_config(None, [f"data_dir={tmp_path}", "limits.batch_texts=3"])
    system = LocalSystem.open(tmp_path, config=config, template=catalog_template)
    who = system.principal()
    with pytest.raises(LimitExceeded, match="at most 3, given 4"):
        await say(system, who, *(turn(" ") for _ in range(4)))
    long = " ".join(f"Sentence {i} is here." for i in range(400))
    with pytest.raises(LimitExceeded, match="at most 3"):
        await say(system, who, turn(long))
    assert (await system.service.find(who, limit=9)).cubes == []
    system.close()


async def test_an_add_while_the_index_is_down_is_told_unavailable_and_kept(
    system: LocalSystem, who
):
    system.shards[0].down = True
    with pytest.raises(Unavailable):
        await add(system, who, "tea", key="k")
    with pytest.raises(Unavailable):
        await add(system, who, "tea", key="k")
    system.shards[0].down = False
    (cube,) = await add(system, who, "tea", key="k")
    assert cube.usage.repeats == 1
    assert await found(system, who, "tea") == ["tea"]


async def test_an_add_that_was_not_acknowledged_is_indexed_by_the_reconcile_loop(
    system: LocalSystem, who
):
    system.shards[0].down = True
    with pytest.raises(Unavailable):
        await add(system, who, "tea")
    system.shards[0].down = False
    await system.reconcile()
    assert await found(system, who, "tea") == ["tea"]


async def test_an_add_under_stored_succeeds_while_the_index_is_down(system: LocalSystem, who):
    system.shards[0].down = True
    (cube,) = await add(system, who, "tea", wait=False)
    assert (await get(system, who, cube)).text == "tea"


# -- retries ---------------------------------------------------------------------------------------


async def test_a_retry_has_one_effect_and_the_same_answer(system: LocalSystem, who):
    first = await add(system, who, "tea", "milk", key="k")
    again = await add(system, who, "tea", "milk", key="k")
    assert [c.id for c in again] == [c.id for c in first]
    assert {c.usage.repeats for c in again} == {1}
    assert len(system.shards[0].puts) == 1


async def test_a_retry_key_with_another_request_is_refused(system: LocalSystem, who):
    await add(system, who, "tea", key="k")
    with pytest.raises(IdempotencyMismatch):
        await add(system, who, "milk", key="k")
    assert await found(system, who, "milk") == []


async def test_a_retry_after_an_update_answers_as_the_first_time_did(system: LocalSystem, who):
    (cube,) = await add(system, who, "tea", key="k")
    await system.service.update(who, cube.id, Change(text="milk"), expected_version=None)
    (again,) = await add(system, who, "tea", key="k")
    assert (again.text, again.version) == ("tea", 1)
    assert await found(system, who, "milk") == ["milk"]
    assert await found(system, who, "tea") == []


async def test_a_retry_after_a_delete_brings_nothing_back(system: LocalSystem, who):
    (cube,) = await add(system, who, "tea", key="k")
    await system.service.delete(who, cube.id)
    (again,) = await add(system, who, "tea", key="k")
    assert again.id == cube.id
    assert again.text == ""
    assert await found(system, who, "tea") == []
    with pytest.raises(NotFound):
        await get(system, who, cube)


async def test_a_retry_key_of_another_tenant_is_another_key(system: LocalSystem, who):
    (mine,) = await add(system, who, "tea", key="k")
    (theirs,) = await add(system, system.principal("other"), "tea", key="k")
    assert mine.id != theirs.id


# -- forget ----------------------------------------------------------------------------------------


async def test_what_is_deleted_is_found_in_no_way(system: LocalSystem, who):
    tea, black = await add(system, who, "green tea", "black tea")
    await system.service.delete(who, tea.id)
    assert await found(system, who, "tea") == ["black tea"]
    assert system.shards[0].held().keys() == {black.id}
    for call in (
        system.service.get(who, tea.id),
        system.service.get(who, tea.id, version=1),
        system.service.get(who, tea.id, as_of=system.clock()),
        system.service.history(who, tea.id),
        system.service.lineage(who, tea.id),
        system.service.residency(who, tea.id),
        system.service.delete(who, tea.id),
    ):
        with pytest.raises(NotFound):
            await call


@pytest.mark.parametrize("mode", Mode)
async def test_what_is_deleted_while_the_index_is_down_is_never_returned(
    system: LocalSystem, who, mode: Mode
):
    tea, milk = await add(system, who, "green tea", "milk tea")
    shard = system.shards[0]
    shard.down = True
    await system.service.delete(who, tea.id)
    shard.down = False
    assert tea.id in shard.held(), "the index holds it still"
    assert await found(system, who, "tea", mode=mode) == ["milk tea"]
    block = await system.service.context(who, "tea", SearchScope(), token_budget=500, top_k=None)
    assert block.ids == (milk.id,)
    await system.reconcile()
    assert set(shard.held()) == {milk.id}


async def test_what_has_run_out_is_never_returned(system: LocalSystem, who):
    header = Header(user_id="ann", expires_at=system.clock() + timedelta(seconds=60))
    (tea,) = await add(system, who, "tea", header=header)
    system.clock.advance(59)
    assert await found(system, who, "tea") == ["tea"]
    system.clock.advance(1)
    for mode in Mode:
        assert await found(system, who, "tea", mode=mode) == []
    assert (await system.service.find(who, limit=9)).cubes == []
    with pytest.raises(NotFound):
        await get(system, who, tea)


async def test_an_expiry_that_came_while_the_index_was_down_holds_at_once(system: LocalSystem, who):
    (tea,) = await add(system, who, "tea")
    system.shards[0].down = True
    until = system.clock() + timedelta(seconds=5)
    told = await system.service.update(who, tea.id, Change(expires_at=until), expected_version=None)
    assert not told.indexed
    system.shards[0].down = False
    system.clock.advance(5)
    assert await found(system, who, "tea") == []


async def test_a_scope_is_forgotten_whole_and_nothing_beside_it(system: LocalSystem, who):
    await add(system, who, "tea", "milk")
    await add(system, who, "tea of bob", header=Header(user_id="bob"))
    await add(system, system.principal("other"), "tea elsewhere")
    forgotten = await system.service.delete_scope(who, user_id="ann", agent_id=None, run_id=None)
    assert forgotten == 2
    assert await found(system, who, "tea milk") == ["tea of bob"]
    assert await found(system, system.principal("other"), "tea") == ["tea elsewhere"]
    assert len(system.shards[0].held()) == 2


async def test_a_whole_tenant_is_not_forgotten_by_a_scope_without_names(system: LocalSystem, who):
    await add(system, who, "tea")
    with pytest.raises(BadRequest, match="at least one"):
        await system.service.delete_scope(who, user_id=None, agent_id=None, run_id=None)
    assert await found(system, who, "tea") == ["tea"]


# -- change ----------------------------------------------------------------------------------------


async def test_after_an_update_only_the_new_text_is_found(system: LocalSystem, who):
    (cube,) = await add(system, who, "tea")
    changed = await system.service.update(who, cube.id, Change(text="milk"), expected_version=1)
    assert (changed.version, changed.indexed) == (2, True)
    assert await found(system, who, "tea") == []
    assert await found(system, who, "milk") == ["milk"]
    assert (await system.service.get(who, cube.id, version=1)).text == "tea"


async def test_an_update_while_the_index_is_down_is_kept_and_no_old_text_is_returned(
    system: LocalSystem, who
):
    (cube,) = await add(system, who, "tea")
    system.shards[0].down = True
    changed = await system.service.update(who, cube.id, Change(text="milk"), expected_version=None)
    assert not changed.indexed
    system.shards[0].down = False
    assert await found(system, who, "tea milk") == []
    await system.reconcile()
    assert await found(system, who, "tea milk") == ["milk"]


async def test_a_change_is_kept_while_the_shard_restarts_at_every_write(system: LocalSystem, who):
    (cube,) = await add(system, who, "tea")
    shard = system.shards[0]

    def restart() -> None:
        shard.restart()
        shard.on_put = restart

    shard.on_put = restart
    changed = await system.service.update(who, cube.id, Change(text="milk"), expected_version=None)
    assert (changed.text, changed.indexed) == ("milk", False)
    shard.on_put = None
    await system.reconcile()
    assert await found(system, who, "tea milk") == ["milk"]


async def test_an_archived_cube_leaves_search_and_a_restored_one_comes_back(
    system: LocalSystem, who
):
    (cube,) = await add(system, who, "tea")
    archived = await system.service.archive(who, cube.id)
    assert (archived.state, archived.indexed) == ("archived", False)
    assert await found(system, who, "tea") == []
    assert (await get(system, who, cube)).text == "tea"
    restored = await system.service.restore(who, cube.id)
    assert (restored.state, restored.version, restored.indexed) == ("activated", 2, True)
    assert await found(system, who, "tea") == ["tea"]


async def test_a_frozen_cube_is_found_and_refuses_every_change(system: LocalSystem, who):
    (cube,) = await add(system, who, "tea")
    await system.service.set_frozen(who, cube.id, True)
    for call in (
        system.service.update(who, cube.id, Change(text="milk"), expected_version=None),
        system.service.archive(who, cube.id),
        system.service.rollback(who, cube.id, 1),
        system.service.delete(who, cube.id),
        system.service.delete_scope(who, user_id="ann", agent_id=None, run_id=None),
    ):
        with pytest.raises(Frozen):
            await call
    assert await found(system, who, "tea") == ["tea"]
    await system.service.set_frozen(who, cube.id, False)
    await system.service.delete(who, cube.id)


async def test_a_rollback_is_found_by_the_old_text_again(system: LocalSystem, who):
    (cube,) = await add(system, who, "tea")
    await system.service.update(who, cube.id, Change(text="milk"), expected_version=None)
    back = await system.service.rollback(who, cube.id, 1)
    assert (back.version, back.text) == (3, "tea")
    assert await found(system, who, "tea milk") == ["tea"]
    history = await system.service.history(who, cube.id)
    assert [v.text for v in history] == ["tea", "milk", "tea"]


# -- composites ------------------------------------------------------------------------------------


async def composed(system: LocalSystem, who: Principal, members: Sequence[MemCube], **rest):
    return await system.service.create_composite(
        who, [c.id for c in members], ANN, text="", relation=Relation.COMPOSED, **rest
    )


async def test_a_composition_names_its_cubes_at_their_versions(system: LocalSystem, who):
    tea, milk = await add(system, who, "tea", "milk")
    tea = await system.service.update(who, tea.id, Change(text="tea 2"), expected_version=None)
    whole = await composed(system, who, [tea, milk])
    assert whole.members == (tea.id, milk.id)
    lineage = await system.service.lineage(who, whole.id)
    assert {(e.id, e.version, e.relation) for e in lineage.ancestors} == {
        (tea.id, 2, "composed"),
        (milk.id, 1, "composed"),
    }


async def test_a_cube_may_be_held_twice_and_is_one_parent(system: LocalSystem, who):
    tea, milk = await add(system, who, "tea", "milk")
    whole = await composed(system, who, [tea, milk, tea])
    assert whole.members == (tea.id, milk.id, tea.id)
    assert len(whole.parents) == 2


async def test_a_composition_of_what_is_not_there_is_refused(system: LocalSystem, who):
    (tea,) = await add(system, who, "tea")
    (foreign,) = await add(system, system.principal("other"), "milk")
    for id in (foreign.id, uuid7(START), "no id"):
        with pytest.raises(NotFound):
            await system.service.create_composite(who, [tea.id, id], ANN, text="")
    assert len((await system.service.find(who, limit=9)).cubes) == 1


async def test_a_search_within_a_composite_finds_its_members_at_every_depth(
    system: LocalSystem, who
):
    tea, milk, _ = await add(system, who, "green tea", "milk tea", "black tea")
    inner = await composed(system, who, [milk])
    outer = await composed(system, who, [inner, tea])
    assert set(await found(system, who, "tea", cube_ids=(outer.id,))) == {"green tea", "milk tea"}
    assert await found(system, who, "tea", cube_ids=(inner.id,)) == ["milk tea"]


async def test_a_fusion_takes_its_parents_out_of_search_and_names_them(system: LocalSystem, who):
    secret = Header(user_id="ann", tags=("x",), sensitivity=Sensitivity.SECRET, priority=3)
    (tea,) = await add(system, who, "tea", header=secret)
    (milk,) = await add(system, who, "milk")
    fused = await system.service.fuse(who, [tea.id, milk.id, tea.id], text=None)
    assert fused.text == "tea\nmilk"
    assert fused.governance.sensitivity == "secret"
    assert fused.governance.priority == 3
    assert (fused.descriptive.user_id, fused.descriptive.tags) == ("ann", ("x",))
    assert {(p.id, p.relation) for p in fused.parents} == {(tea.id, "fused"), (milk.id, "fused")}
    assert await found(system, who, "tea milk") == ["tea\nmilk"]
    assert (await get(system, who, tea)).state == "merged"
    assert set(system.shards[0].held()) == {fused.id}


async def test_a_retry_of_a_fusion_answers_with_the_same_cube(system: LocalSystem, who):
    tea, milk = await add(system, who, "tea", "milk")
    key = Idempotency(key="k", body_hash="h")
    first = await system.service.fuse(who, [tea.id, milk.id], text="both", idempotency=key)
    again = await system.service.fuse(who, [tea.id, milk.id], text="both", idempotency=key)
    assert again.id == first.id
    with pytest.raises(IllegalMove):
        await system.service.fuse(who, [tea.id, milk.id], text="both")


async def test_a_fusion_that_can_not_be_leaves_all_as_it_was(system: LocalSystem, who):
    tea, milk = await add(system, who, "tea", "milk")
    (foreign,) = await add(system, system.principal("other"), "bread")
    frozen = await system.service.set_frozen(who, milk.id, True)
    one, two = await composed(system, who, []), await composed(system, who, [])
    for ids, text, error in (
        ([tea.id], None, BadRequest),
        ([tea.id, tea.id], None, BadRequest),
        ([tea.id, foreign.id], None, NotFound),
        ([tea.id, frozen.id], None, Frozen),
        ([tea.id, one.id], "x" * 200_001, LimitExceeded),
        ([one.id, two.id], None, BadRequest),
        ([tea.id, one.id], " \n", BadRequest),
    ):
        with pytest.raises(error):
            await system.service.fuse(who, ids, text=text)
    assert set(await found(system, who, "tea milk")) == {"tea", "milk"}
    assert (await get(system, who, tea)).state == "generated"


# -- search ----------------------------------------------------------------------------------------


async def test_a_search_sees_its_scope_alone(system: LocalSystem, who):
    await add(system, who, "tea of ann", header=Header(user_id="ann", run_id="1"))
    await add(system, who, "tea of bob", header=Header(user_id="bob", agent_id="g"))
    await add(system, system.principal("other"), "tea of another tenant")
    assert await found(system, who, "tea", user_id="ann") == ["tea of ann"]
    assert await found(system, who, "tea", agent_id="g") == ["tea of bob"]
    assert await found(system, who, "tea", user_id="ann", run_id="2") == []
    assert set(await found(system, who, "tea")) == {"tea of ann", "tea of bob"}


async def test_a_filter_narrows_and_never_widens(system: LocalSystem, who):
    await add(system, who, "tea", header=Header(user_id="ann", metadata={"n": 1}))
    await add(system, who, "teas", header=Header(user_id="bob", metadata={"n": 2}))
    await add(system, system.principal("other"), "tea", header=Header(metadata={"n": 1}))
    everything = parse_filter({"or": [{"metadata.n": 1}, {"not": {"metadata.n": 1}}]})
    assert await found(system, who, "tea", user_id="ann", filters=everything) == ["tea"]
    assert await found(system, who, "tea", filters=Compare("metadata.n", Op.GT, 1)) == ["teas"]


async def test_a_threshold_and_a_limit_bound_what_is_returned(system: LocalSystem, who):
    await add(system, who, *(f"tea number {i}" for i in range(8)))
    search = system.service.search
    three = await search(who, "tea", SearchScope(), top_k=3, mode=Mode.SPARSE)
    assert len(three.hits) == 3
    bound = three.hits[1].score
    above = await search(who, "tea", SearchScope(), top_k=9, mode=Mode.SPARSE, threshold=bound)
    assert all(hit.score >= bound for hit in above.hits)
    none = await search(who, "tea", SearchScope(), top_k=9, mode=Mode.SPARSE, threshold=1e9)
    assert none.hits == []


async def test_a_search_tells_what_it_used_and_the_count_follows(system: LocalSystem, who):
    tea, milk = await add(system, who, "tea", "milk")
    await found(system, who, "tea")
    await found(system, who, "tea")
    assert system.uses == {who.tenant: {tea.id: 2}}
    await system.reconcile()
    assert (await get(system, who, tea)).usage.uses == 2
    assert (await get(system, who, tea)).state == "activated"
    assert (await get(system, who, milk)).usage.uses == 0


async def test_a_context_holds_what_was_found_and_names_it(system: LocalSystem, who):
    outcome = await say(system, who, turn("I like kumquats.", "Ann", time=START))
    block = await system.service.context(
        who, "kumquats", SearchScope(user_id="ann"), token_budget=200, top_k=5
    )
    assert "[2026-03-01 12:00] Ann: I like kumquats." in block.text
    assert block.ids == (outcome.results[0].cube.id,)


async def test_a_search_while_the_shard_is_down_says_so(system: LocalSystem, who):
    await add(system, who, "tea")
    system.shards[0].down = True
    with pytest.raises(Unavailable):
        await found(system, who, "tea")


# -- keys ------------------------------------------------------------------------------------------


async def test_a_revoked_key_ends_at_once(system: LocalSystem):
    admin = system.principal(role=Role.ADMIN)
    info, secret = await system.service.create_key(admin.tenant, "ci", Role.WRITER, None)
    assert (await system.service.authenticate(secret)).key_id == info.id
    await system.service.revoke_key(admin, info.id)
    with pytest.raises(Unauthenticated):
        await system.service.authenticate(secret)


async def test_a_key_above_ones_own_role_is_not_ones_to_revoke(system: LocalSystem):
    admin = system.principal(role=Role.ADMIN)
    info, secret = await system.service.create_key(admin.tenant, "root", Role.OPERATOR, None)
    with pytest.raises(Forbidden):
        await system.service.revoke_key(admin, info.id)
    assert (await system.service.authenticate(secret)).role is Role.OPERATOR
    await system.service.revoke_key(system.principal(role=Role.OPERATOR), info.id)


async def test_another_tenants_key_is_not_there_to_be_revoked(system: LocalSystem):
    other = system.principal("other", Role.ADMIN)
    info, secret = await system.service.create_key(other.tenant, "ci", Role.WRITER, None)
    with pytest.raises(NotFound):
        await system.service.revoke_key(system.principal(role=Role.ADMIN), info.id)
    assert (await system.service.authenticate(secret)).tenant == "other"


async def test_counts_are_the_tenants_own(system: LocalSystem, who):
    await add(system, who, "tea", "milk")
    await add(system, system.principal("other"), "bread")
    assert (await system.service.stats(who)).cubes_by_state == {"generated": 2}
    assert (await system.service.total_stats()).cubes_by_state == {"generated": 3}


async def test_no_search_of_many_among_near_duplicates_leaves_its_tenant(system: LocalSystem):
    """Every tenant holds the same sentences but for one word; a hit's id tells whose it is."""
    random = Random(7)
    words = ["kumquat", "pear", "tea", "garden", "Ann", "Oslo", "window", "jam"]
    callers = [system.principal(f"t{i}") for i in range(12)]
    own: dict[str, set[str]] = {}
    for i, who in enumerate(callers):
        texts = [f"{a} and {b} number {i}" for a in words for b in words[:3]]
        own[who.tenant] = {c.id for c in await add(system, who, *texts)}
    for _ in range(200):
        who = random.choice(callers)
        query = " ".join(random.choices(words, k=3)) + f" number {random.randrange(12)}"
        anyone = Compare("user_id", Op.EQ, "ann")
        found = await system.service.search(
            who,
            query,
            SearchScope(filters=random.choice([None, anyone, Or((anyone, Not(anyone)))])),
            top_k=50,
            mode=random.choice(list(Mode)),
        )
        assert found.hits
        assert {hit.id for hit in found.hits} <= own[who.tenant]


# -- what an adapter said of a memory


def heard(system: LocalSystem, who: Principal, cube: MemCube) -> MemCube:
    """What an adapter's answer about a cube is written back as."""
    draft = Draft(
        text=f"heard: {cube.text}",
        user_id="ann",
        origin=Origin.INFERENCE,
        parents=(Parent(id=cube.id, version=cube.version, relation=Relation.DERIVED),),
        metadata={WRITTEN_BY: "0" * 64},
    )
    added = system.catalog.cubes.add(who.tenant, [draft], author="job", now=system.clock())
    return added.results[0].cube


@pytest.mark.parametrize("way", ["delete", "change", "archive", "fuse", "roll back"])
async def test_what_an_adapter_said_of_a_memory_goes_when_that_goes_or_changes(
    system: LocalSystem, who: Principal, way: str
):
    oboe, tea = await add(system, who, "Ada plays the oboe", "Ada likes tea")
    if way == "roll back":
        change = Change(text="Ada plays the harp")
        oboe = await system.service.update(who, oboe.id, change, expected_version=None)
    said, other = heard(system, who, oboe), heard(system, who, tea)
    await system.reconcile()
    service = system.service
    match way:
        case "delete":
            await service.delete(who, oboe.id)
        case "change":
            new = Change(text="Ada plays the harp")
            await service.update(who, oboe.id, new, expected_version=None)
        case "archive":
            await service.archive(who, oboe.id)
        case "fuse":
            apple = await add(system, who, "Ada likes apples")
            await service.fuse(who, [oboe.id, apple[0].id], text=None)
        case "roll back":
            await service.rollback(who, oboe.id, 1)
    with pytest.raises(NotFound):
        await get(system, who, said)
    assert await get(system, who, other)
    assert not [t for t in await found(system, who, "oboe heard") if "oboe" in t and "heard" in t]


async def test_what_an_adapter_said_stays_while_the_text_does(system: LocalSystem, who: Principal):
    (oboe,) = await add(system, who, "Ada plays the oboe")
    said = heard(system, who, oboe)
    change = Change(tags=("music",))
    await system.service.update(who, oboe.id, change, expected_version=None)
    assert await get(system, who, said)


async def test_a_refused_deletion_takes_nothing_back(system: LocalSystem, who: Principal):
    (oboe,) = await add(system, who, "Ada plays the oboe")
    said = heard(system, who, oboe)
    await system.service.set_frozen(who, oboe.id, True)
    with pytest.raises(Frozen):
        await system.service.delete(who, oboe.id)
    await system.service.set_frozen(who, oboe.id, False)
    with pytest.raises(VersionMismatch):
        await system.service.update(who, oboe.id, Change(text="x"), expected_version=7)
    assert await get(system, who, said)


async def test_a_frozen_cube_of_what_an_adapter_said_stays_and_forbids_the_deletion(
    system: LocalSystem, who: Principal
):
    (oboe,) = await add(system, who, "Ada plays the oboe")
    said = heard(system, who, oboe)
    await system.service.set_frozen(who, said.id, True)
    change = Change(text="Ada plays the harp")
    assert (await system.service.update(who, oboe.id, change, expected_version=None)).version == 2
    with pytest.raises(Frozen, match=said.id):
        await system.service.delete(who, oboe.id)
    assert await get(system, who, said)
    assert await get(system, who, oboe)
