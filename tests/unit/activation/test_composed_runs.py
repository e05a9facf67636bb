import pytest

from memcube.activation.compose import BLEND_SHARE, Composer
from memcube.activation.contract import Member, Mode, SegmentRef
from memcube.activation.forward import KvBuffer, Row
from memcube.activation.rope import Rope
from memcube.errors import Unavailable
from tests.unit.activation.test_batcher import LOADED, MODEL, House, alone, fingerprint, prompt

PREFIX = prompt(20, seed=50)
MEMORIES = [prompt(length, seed=51 + i) for i, length in enumerate((70, 64, 90))]
QUESTION = prompt(25, seed=60)


class Composed(House):
    """A house that composes, asked by the memories' numbers."""

    def __init__(self, *, modes=(Mode.BLEND, Mode.FAST), **options):
        super().__init__(**options)
        self.batcher.composing.modes = frozenset(modes)

    def start(self, order, question=QUESTION, **options):
        ids, segments, members = laid_out(order)
        options = {"mode": Mode.BLEND, "segments": segments, "members": members} | options
        return self.submit([*ids, *question], **options)

    def chat(self, order, question=QUESTION, **options):
        run = self.start(order, question, **options)
        self.finish()
        return self.answer(run)


def laid_out(order):
    ids, segments, members = list(PREFIX), [], []
    for number in order:
        start = len(ids)
        ids += MEMORIES[number]
        segments.append(SegmentRef(start, len(ids)))
        members.append(Member(f"cube-{number}", start))
    return ids, tuple(segments), tuple(members)


def reference(order, mode, max_tokens=8):
    """Greedy tokens by the composer alone."""
    composer = Composer(MODEL, Rope(LOADED.model))
    prefix = KvBuffer(LOADED.layout, "cpu")
    MODEL.forward([Row(prefix, PREFIX, logits="none")])
    segments = [composer.build(prefix, MEMORIES[number]) for number in order]
    buffer = KvBuffer(LOADED.layout, "cpu")
    buffer.load(prefix.view(), 0)
    composition = composer.attach(buffer, segments)
    chosen = composer.choose(buffer, composition, QUESTION) if mode is Mode.BLEND else []
    (logits_1V,) = MODEL.forward([composer.row(buffer, composition, chosen, QUESTION)])
    tokens = [int(logits_1V.argmax())]
    while len(tokens) < max_tokens:
        (logits_1V,) = MODEL.forward([Row(buffer, tokens[-1:])])
        tokens.append(int(logits_1V.argmax()))
    return tokens, len(chosen)


def test_the_first_answer_is_exact_and_its_segments_are_built_in_idle_time():
    house = Composed()
    answer = house.chat([0, 1, 2])
    ids, _, _ = laid_out([0, 1, 2])
    assert answer.tokens == alone([*ids, *QUESTION]).tokens
    assert answer.usage.prefilled == answer.usage.prompt_tokens
    lengths = sorted(block.num_tokens for block in house.pool.blocks() if block.parent is None)
    assert lengths == [64, 70, 90]


@pytest.mark.parametrize("mode", [Mode.BLEND, Mode.FAST])
def test_segments_are_composed_in_another_order_as_the_composer_does_it(mode):
    house = Composed()
    house.chat([0, 1, 2])
    before = fingerprint(house.pool)
    answer = house.chat([2, 1, 0], mode=mode)
    tokens, num_chosen = reference([2, 1, 0], mode)
    assert answer.tokens == tokens
    usage = answer.usage
    assert usage.attached_exact == 20 + 90  # the prefix, and the first one, as it was built
    assert usage.attached_composed == 64 + 70
    assert usage.recomputed == num_chosen == (int(BLEND_SHARE * 224) if mode is Mode.BLEND else 0)
    assert usage.attached_exact + usage.attached_composed + usage.prefilled == usage.prompt_tokens
    assert usage.composed == (SegmentRef(110, 174), SegmentRef(174, 244))
    after = fingerprint(house.pool)
    assert {key: after[key] for key in before} == before


def test_composed_kv_never_gets_into_the_exact_chain():
    house = Composed()
    house.chat([0, 1, 2])
    house.chat([2, 1, 0], max_tokens=40)
    ids, _, _ = laid_out([2, 1, 0])
    exact = house.ask([*ids, *QUESTION])
    assert exact.tokens == alone([*ids, *QUESTION]).tokens
    assert exact.usage.attached_exact <= len(PREFIX) + len(MEMORIES[2])


def test_an_exact_chain_at_hand_is_taken_before_segments():
    house = Composed()
    house.chat([0, 1, 2])
    answer = house.chat([0, 1, 2], prompt(30, seed=61))
    assert answer.usage.attached_composed == 0
    assert answer.usage.prefilled < 64
    ids, _, _ = laid_out([0, 1, 2])
    assert answer.tokens == alone([*ids, *prompt(30, seed=61)]).tokens


def test_a_mode_that_is_not_allowed_is_served_exactly():
    house = Composed(modes=[Mode.FAST])
    house.chat([0, 1, 2])
    answer = house.chat([2, 1, 0])
    ids, _, _ = laid_out([2, 1, 0])
    assert answer.usage.attached_composed == 0
    assert answer.tokens == alone([*ids, *QUESTION]).tokens


def test_a_segment_that_is_gone_when_its_turn_comes_is_prefilled():
    house = Composed()
    house.chat([0, 1, 2])
    run = house.start([2, 1, 0])
    house.batcher._admit(house.clock())
    assert run.plan.exact_end is not None
    house.pool.forget({"cube-0", "cube-1", "cube-2"}, None, "test")
    house.finish()
    ids, _, _ = laid_out([2, 1, 0])
    assert house.answer(run).tokens == alone([*ids, *QUESTION]).tokens
    assert house.answer(run).usage.attached_composed == 0


def test_tenants_share_no_segment():
    house = Composed()
    house.chat([0, 1, 2])
    other = house.chat([2, 1, 0], tenant="b", salt="b")
    assert other.usage.prefilled == other.usage.prompt_tokens


def test_only_segments_that_hold_a_forgotten_cube_go():
    house = Composed()
    house.chat([0, 1, 2])
    house.batcher.forget({"cube-1"}, None)
    usage = house.chat([2, 0], prompt(9, seed=62)).usage
    assert usage.attached_composed == 70
    assert house.chat([0, 1], prompt(9, seed=63)).usage.attached_composed == 0


def test_a_deleted_cubes_segment_is_not_built_any_more():
    house = Composed()
    run = house.start([0, 1, 2])
    house.step()
    house.batcher.forget({"cube-1"}, None)
    house.finish()
    assert house.answer(run)
    assert all("cube-1" not in block.cubes for block in house.pool.blocks())


def test_after_a_composed_answer_the_exact_chain_is_built_where_it_pays():
    house = Composed()
    house.chat([0, 1, 2])
    for number in range(6):  # a conversation that is likely to go on
        answer = house.chat([2, 1, 0], prompt(30 + number, seed=70 + number), group="talk")
    ids, _, _ = laid_out([2, 1, 0])
    assert house.batcher.stats().background == 0
    following = house.chat([2, 1, 0], prompt(12, seed=90), group="talk")
    assert following.usage.attached_composed == 0
    assert following.usage.attached_exact >= len(ids) // 16 * 16 - 16
    assert following.tokens == alone([*ids, *prompt(12, seed=90)]).tokens
    assert answer.usage.composed == ()


def test_no_chain_is_built_for_who_will_not_come_back():
    house = Composed()
    house.chat([0, 1, 2])
    house.chat([2, 1, 0], group="")
    assert house.chat([2, 1, 0], group="").usage.attached_composed > 0


def test_a_choice_that_fails_ends_its_run_alone(monkeypatch):
    house = Composed()
    house.chat([0, 1, 2])

    def failing(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(house.batcher.composing, "choose", failing)
    composed, other = house.start([2, 1, 0]), house.submit(prompt(30))
    house.finish()
    with pytest.raises(Unavailable, match="no such kernel"):
        house.answer(composed)
    assert house.answer(other).tokens == alone(prompt(30)).tokens
    assert house.batcher.stats().buffer_bytes == 0
