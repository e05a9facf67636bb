from hypothesis import given
from hypothesis import strategies as st

from memcube.activation.plan import Kind, Need, Share, plan_step

DECODE, PROMPT, BACKGROUND = Kind.DECODE, Kind.PROMPT, Kind.BACKGROUND


def plan(*needs, budget=256, background=64):
    return plan_step(needs, budget_tokens=budget, background_tokens=background, block_tokens=64)


def test_every_decoding_run_gets_its_token_beside_a_prompt():
    assert plan(Need(0, DECODE, 1), Need(1, PROMPT, 5000), Need(2, DECODE, 1), budget=34) == [
        Share(0, 1),
        Share(1, 32),
        Share(2, 1),
    ]


def test_a_short_prompt_does_not_wait_for_a_long_one():
    shares = plan(Need(0, PROMPT, 5000), Need(1, PROMPT, 30), Need(2, PROMPT, 900))
    assert shares == [Share(0, 128), Share(1, 30), Share(2, 98)]


def test_the_prompt_that_waits_longest_gets_what_is_left():
    assert plan(Need(0, PROMPT, 5000), Need(1, PROMPT, 30)) == [Share(0, 226), Share(1, 30)]
    assert plan(Need(0, PROMPT, 20), Need(1, PROMPT, 5000)) == [Share(0, 20), Share(1, 236)]


def test_a_share_ends_with_a_block_where_it_can():
    assert plan(Need(0, PROMPT, 5000, align=10)) == [Share(0, 10 + 3 * 64)]
    assert plan(Need(0, PROMPT, 5000, align=64), budget=40) == [Share(0, 40)]


def test_background_work_waits_for_an_idle_step():
    background = Need(1, BACKGROUND, 700, align=64)
    assert plan(Need(0, DECODE, 1), background) == [Share(0, 1)]
    assert plan(background) == [Share(1, 64)]


def test_rows_of_one_adapter_stand_side_by_side_those_without_first():
    shares = plan(
        Need(0, DECODE, 1, adapter="b"),
        Need(1, DECODE, 1),
        Need(2, DECODE, 1, adapter="a"),
        Need(3, DECODE, 1, adapter="b"),
        Need(4, DECODE, 1),
    )
    assert [share.run for share in shares] == [1, 4, 2, 0, 3]


def test_prompts_go_on_where_decoding_takes_all_of_the_budget():
    shares = plan(*(Need(i, DECODE, 1) for i in range(8)), Need(8, PROMPT, 100), budget=4)
    assert shares[-1] == Share(8, 1)


needs = st.lists(
    st.builds(
        lambda kind, tokens, align: (kind, 1 if kind is DECODE else tokens, align),
        st.sampled_from(Kind),
        st.integers(1, 3000),
        st.integers(0, 64),
    ),
    max_size=12,
)


@given(needs, st.integers(1, 600))
def test_a_plan_moves_on_and_keeps_to_the_budget(given_needs, budget):
    rows = [Need(run, kind, tokens, align) for run, (kind, tokens, align) in enumerate(given_needs)]
    shares = plan(*rows, budget=budget)
    assert bool(shares) == bool(rows)
    assert len({share.run for share in shares}) == len(shares)
    assert all(1 <= share.tokens <= rows[share.run].tokens for share in shares)
    decoding = sum(need.kind is DECODE for need in rows)
    assert sum(share.tokens for share in shares) <= max(budget, decoding + 1, 64)
    prompts = [need for need in rows if need.kind is PROMPT]
    if prompts:
        assert prompts[0].run in {share.run for share in shares}
