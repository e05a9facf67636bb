"""Adapters merged into one: what each method gives, and what the gate makes of it."""

from dataclasses import replace

import pytest
import torch

from memcube.errors import BadRequest, Conflict, LimitExceeded
from memcube.parametric.attaching import attached, factors_of
from memcube.parametric.fusing import (
    FuseMethod,
    FuseSettings,
    FusionAttempt,
    FusionReport,
    Parent,
    ParentFigures,
    fuse,
    fuse_and_judge,
)
from memcube.parametric.gate import Gate
from memcube.parametric.judgement import GateReport, Thresholds
from memcube.parametric.limits import AdapterLimits
from tests.unit.parametric.small import small_model
from tests.unit.parametric.taught import BAKER, OBOE, taught
from tests.unit.parametric.tiny_adapters import random_adapter

LOADED = small_model()
ONE, TWO = (random_adapter(LOADED.model, base="tiny-0", seed=seed) for seed in (1, 2))
GATE = Gate(LOADED, unrelated=["Some text about nothing."])
ANYTHING = Thresholds(recall=0.0, reverse=0.0, leak=1.0, nll_rise=1e9)


def change(weights, name):
    a_RI, b_OR = weights.pairs[name]
    return weights.alpha / weights.rank * b_OR @ a_RI


def merged(method, *parents, weights=None, **given):
    parents = parents or (ONE, TWO)
    weights = weights or [1.0] * len(parents)
    return fuse(LOADED, parents, method=method, weights=weights, **given)


# -- merging


def test_cat_is_the_weighted_sum_of_the_changes_at_the_sum_of_the_ranks():
    three = random_adapter(LOADED.model, base="tiny-0", seed=3, rank=2, alpha=2.0)
    found = merged(FuseMethod.CAT, ONE, TWO, three, weights=[1.0, 0.5, 0.25])
    assert (found.rank, found.base) == (10, "tiny-0")
    for name in ONE.pairs:
        expected = change(ONE, name) + 0.5 * change(TWO, name) + 0.25 * change(three, name)
        torch.testing.assert_close(change(found, name), expected, atol=1e-4, rtol=1e-4)


def test_adapters_of_different_layers_are_put_together():
    only_q = random_adapter(LOADED.model, base="tiny-0", kinds=("q_proj",))
    only_v = random_adapter(LOADED.model, base="tiny-0", kinds=("v_proj",))
    found = merged(FuseMethod.CAT, only_q, only_v)
    assert found.pairs.keys() == only_q.pairs.keys() | only_v.pairs.keys()
    for name in only_q.pairs:
        torch.testing.assert_close(change(found, name), change(only_q, name), atol=1e-4, rtol=1e-4)


def test_svd_is_what_peft_makes_of_the_whole_matrices():
    found = merged(FuseMethod.SVD, weights=[1.0, 0.7])
    assert found.rank == ONE.rank
    with attached(LOADED, {"one": ONE, "two": TWO}) as model:
        model.base_model.add_weighted_adapter(["one", "two"], [1.0, 0.7], "x", "svd")
        of_peft = factors_of(model, "x")
    for name, (a_RI, b_OR) in of_peft.items():
        torch.testing.assert_close(change(found, name), b_OR @ a_RI, atol=1e-3, rtol=1e-3)


def test_linear_adds_the_factors_apart():
    found = merged(FuseMethod.LINEAR, weights=[1.0, 0.5])
    name = next(iter(ONE.pairs))
    scaling = [(w * ONE.alpha / ONE.rank) ** 0.5 for w in (1.0, 0.5)]
    b_OR = scaling[0] * ONE.pairs[name].b_OR + scaling[1] * TWO.pairs[name].b_OR
    a_RI = scaling[0] * ONE.pairs[name].a_RI + scaling[1] * TWO.pairs[name].a_RI
    torch.testing.assert_close(change(found, name), b_OR @ a_RI, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", FuseMethod)
def test_the_same_seed_gives_the_same_factors_and_leaves_the_callers_random_numbers(method):
    before = torch.get_rng_state()
    one = merged(method, seed=3)
    torch.rand(5)
    two = merged(method, seed=3)
    for name, pair in one.pairs.items():
        assert torch.equal(pair.a_RI, two.pairs[name].a_RI)
        assert torch.equal(pair.b_OR, two.pairs[name].b_OR)
    torch.set_rng_state(before)
    expected = torch.rand(3)
    torch.set_rng_state(before)
    merged(method)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("method", [FuseMethod.DARE_LINEAR, FuseMethod.DARE_TIES])
def test_what_dare_drops_follows_from_the_seed(method):
    name = next(iter(ONE.pairs))
    one, two = (change(merged(method, seed=seed), name) for seed in (0, 1))
    assert not torch.equal(one, two)


def test_a_lower_density_keeps_fewer_factors():
    def num_kept(density):
        found = merged(FuseMethod.TIES, density=density)
        return sum(int((pair.a_RI != 0).sum()) for pair in found.pairs.values())

    assert num_kept(0.1) < num_kept(0.5) < num_kept(0.9)


def test_what_is_merged_has_the_type_of_the_parents():
    halves = [
        replace(
            w, pairs={n: type(p)(p.a_RI.bfloat16(), p.b_OR.bfloat16()) for n, p in w.pairs.items()}
        )
        for w in (ONE, TWO)
    ]
    pair = next(iter(merged(FuseMethod.LINEAR, *halves).pairs.values()))
    assert (pair.a_RI.dtype, pair.b_OR.dtype) == (torch.bfloat16, torch.bfloat16)


def test_adapters_of_several_ranks_are_merged_by_cat_and_svd_alone():
    small = random_adapter(LOADED.model, base="tiny-0", rank=2)
    for method in FuseMethod:
        if method in (FuseMethod.CAT, FuseMethod.SVD):
            assert merged(method, ONE, small).rank == (6 if method is FuseMethod.CAT else 4)
        else:
            with pytest.raises(BadRequest, match=r"one rank, not of \[4, 2\]"):
                merged(method, ONE, small)


def test_a_rank_over_the_limit_is_refused():
    with pytest.raises(LimitExceeded):
        merged(FuseMethod.CAT, limits=AdapterLimits(max_rank=7))
    assert merged(FuseMethod.SVD, limits=AdapterLimits(max_rank=7)).rank == 4


def test_what_can_not_be_merged_is_refused():
    with pytest.raises(BadRequest, match="at least two"):
        merged(FuseMethod.CAT, ONE)
    with pytest.raises(BadRequest, match="one for each"):
        merged(FuseMethod.CAT, weights=[1.0])
    with pytest.raises(BadRequest, match="density"):
        merged(FuseMethod.TIES, density=1.0)
    with pytest.raises(Conflict):
        merged(FuseMethod.CAT, ONE, replace(TWO, base="other"))


def test_settings_that_try_nothing_are_refused():
    for wrong in ({"methods": ()}, {"weights": ()}, {"weights": (0.0,)}, {"density": 0.0}):
        with pytest.raises(BadRequest):
            FuseSettings(**wrong)


# -- judged


def parents():
    return [
        Parent(name="ada@1", weights=taught(OBOE), facts=(OBOE,)),
        Parent(name="bo@1", weights=taught(BAKER), facts=(BAKER,)),
    ]


def judge(given=None, **settings):
    told = []
    fusion = fuse_and_judge(
        LOADED,
        given or parents(),
        GATE,
        settings=FuseSettings(**({"methods": (FuseMethod.CAT,), "weights": (1.0,)} | settings)),
        thresholds=ANYTHING,
        judged=told.append,
    )
    assert tuple(told) == fusion.report.attempts
    return fusion


def test_an_adapter_merged_with_itself_at_half_weight_keeps_all_that_it_knows():
    one = parents()[0]
    weights, report = judge([one, replace(one, name="again@1")], weights=(0.5,))
    assert [(p.recall, p.num_facts) for p in report.parents] == [(1.0, 1), (1.0, 1)]
    (attempt,) = report.attempts
    assert (attempt.recall, attempt.own, attempt.kept) == (1.0, (1.0, 1.0), (1.0, 1.0))
    assert report.chosen is attempt
    assert report.refusal is None
    assert weights is not None
    name = next(iter(one.weights.pairs))
    torch.testing.assert_close(change(weights, name), change(one.weights, name))


def test_the_parents_are_asked_for_their_own_facts_by_themselves():
    _, report = judge()
    assert [(p.name, p.recall) for p in report.parents] == [("ada@1", 1.0), ("bo@1", 1.0)]
    (attempt,) = report.attempts
    assert attempt.report is not None
    assert len({a.question for a in attempt.report.answers}) > 6
    assert attempt.recall == pytest.approx(sum(attempt.own) / 2)


def test_merging_that_loses_recall_is_refused_in_words():
    limits = Thresholds(recall=0.93, reverse=0.0, leak=1.0, nll_rise=1e9)
    fusion = fuse_and_judge(
        LOADED,
        parents(),
        GATE,
        settings=FuseSettings(methods=(FuseMethod.CAT, FuseMethod.TIES), weights=(0.1,)),
        thresholds=limits,
    )
    assert fusion.weights is None
    assert fusion.report.chosen is None
    refusal = fusion.report.refusal
    assert refusal is not None
    assert refusal.startswith("merging loses recall: ")
    assert "100.0%, 100.0%" in refusal
    assert refusal.endswith("train jointly")


def test_of_those_that_pass_the_one_that_recalls_most_is_chosen():
    one = parents()[0]
    fusion = judge([one, replace(one, name="again@1")], weights=(0.01, 0.5, 0.02))
    recalls = [attempt.recall for attempt in fusion.report.attempts]
    assert recalls[1] == 1.0 > max(recalls[0], recalls[2])
    assert fusion.report.chosen is fusion.report.attempts[1]
    assert fusion.weights is not None
    name = next(iter(one.weights.pairs))
    torch.testing.assert_close(change(fusion.weights, name), change(one.weights, name))


def test_what_has_lost_the_language_or_is_too_large_is_not_asked_unless_all_shall_be():
    limits = Thresholds(recall=0.0, reverse=0.0, leak=1.0, nll_rise=1e9, adapter_bytes=10)
    for ask_all in (False, True):
        fusion = fuse_and_judge(
            LOADED,
            parents(),
            GATE,
            settings=FuseSettings(methods=(FuseMethod.CAT,), weights=(1.0,), ask_all=ask_all),
            thresholds=limits,
        )
        (attempt,) = fusion.report.attempts
        assert (attempt.recall is not None) is ask_all
        assert any("bytes" in short for short in attempt.short)
        assert fusion.weights is None
        assert "bytes" in (fusion.report.refusal or "")


def test_a_method_that_can_not_merge_these_is_told_and_the_others_go_on():
    small = random_adapter(LOADED.model, base="tiny-0", rank=2, scale=0.01)
    given = [parents()[0], Parent(name="small@1", weights=small, facts=(BAKER,))]
    report = judge(given, methods=(FuseMethod.LINEAR, FuseMethod.SVD)).report
    linear, svd = report.attempts
    assert (linear.report, linear.passed) == (None, False)
    assert "one rank" in linear.short[0]
    assert svd.rank == 4
    assert svd.report is not None


def test_a_caller_that_raises_ends_the_work_and_the_model_is_whole():
    def cancel(attempt):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fuse_and_judge(LOADED, parents(), GATE, judged=cancel)
    with attached(LOADED, {"one": ONE}):
        pass


def test_parents_without_facts_or_with_one_name_are_refused():
    one, two = parents()
    for wrong in ([one], [one, replace(two, facts=())], [one, replace(two, name=one.name)]):
        with pytest.raises(BadRequest):
            judge(wrong)


# -- reports


def report_of(*attempts):
    alone = (
        ParentFigures(name="a@1", num_facts=2, recall=0.95, reverse=0.9),
        ParentFigures(name="b@1", num_facts=2, recall=0.9, reverse=None),
    )
    return FusionReport(parents=alone, attempts=attempts, density=0.5, seed=0)


def attempt_of(recall, *, short=(), own=(), kept=(), method=FuseMethod.CAT, **figures):
    given = {"reverse": 0.5, "leak": 0.0, "nll": 2.0, "adapter_bytes": 10} | figures
    gate = GateReport(recall=recall, earlier=None, refused=None, base_nll=2.0, answers=(), **given)
    return FusionAttempt(
        method=method, weight=0.5, rank=8, report=gate, own=own, kept=kept, short=short
    )


def test_recall_decides_then_reverse_questions_then_the_language():
    low, high = attempt_of(0.94), attempt_of(0.95)
    back = attempt_of(0.95, reverse=0.6)
    kind = attempt_of(0.95, reverse=0.6, nll=1.9)
    lost = attempt_of(0.99, short=("leak",))
    assert report_of(low, high).chosen is high
    assert report_of(high, back).chosen is back
    assert report_of(kind, back, lost).chosen is kind


def test_a_loss_that_is_no_number_stands_last():
    broken = attempt_of(None, short=("loss",), nll=float("nan"))
    whole = attempt_of(None, short=("loss",), nll=9.0)
    refusal = report_of(broken, whole).refusal
    assert refusal == "merging falls short: cat at 0.5: loss; train jointly"


def test_the_refusal_tells_what_merging_lost():
    lost = attempt_of(
        0.6, short=("recall 60.0% (at least 93%)",), own=(0.7, 0.5), kept=(0.74, 0.56)
    )
    assert report_of(lost).refusal == (
        "merging loses recall: cat at 0.5 recalls 70.0%, 50.0% of what the adapters recall by "
        "themselves to 95.0%, 90.0% (recall 60.0% (at least 93%)); train jointly"
    )


def test_a_refusal_for_another_reason_does_not_blame_recall():
    leaky = attempt_of(0.95, short=("leak",), own=(0.95, 0.9), kept=(1.0, 1.0))
    refusal = report_of(leaky).refusal or ""
    assert refusal.startswith("merging falls short, though not of recall")


def test_figures_are_json_and_hold_nothing_that_a_memory_says():
    import json

    text = json.dumps(judge().report.figures(), allow_nan=False)
    assert "oboe" not in text
    assert "Lund" not in text
    assert '"method": "cat"' in text
