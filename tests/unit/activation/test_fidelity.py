from dataclasses import replace

import pytest
import torch

from memcube.activation.contract import Mode
from memcube.activation.fidelity import (
    ANSWER_TOKENS,
    THRESHOLDS,
    Fidelity,
    FidelityReport,
    Prepared,
    Tally,
    Trial,
    measure_fidelity,
    trials,
)
from memcube.activation.forward import PackedModel, Row
from memcube.activation.needles import make_cases
from tests.unit.activation.tiny import CONFIGS, EXACT_ONLY, Reference


class Words:
    """A tokenizer of words, which writes its ids where it should write words."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [3 + sum(word.encode()) % 190 for word in text.split()]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(f"<{id}>" for id in ids)


def loaded_of(config):
    return replace(Reference(config).loaded(), tokenizer=Words())


@pytest.fixture(scope="module")
def loaded():
    return loaded_of(CONFIGS["llama"])


@pytest.fixture(scope="module")
def model(loaded):
    return PackedModel(loaded)


@pytest.fixture(scope="module")
def trial(loaded, model):
    (made,) = trials(loaded, model, num_cases=1, seed=5, segment_tokens=60)
    return made


def figures(trial, prepared):
    tally = Tally()
    tally.add(trial, prepared)
    return tally.fidelity()


def test_a_full_prefill_is_no_distance_from_itself(trial):
    found = figures(trial, [Prepared(trial.copy(trial.full)) for _ in trial.case.questions])
    assert found.kl < 1e-6
    assert (found.top1, found.share) == (1.0, 0.0)


def test_a_blend_that_computes_all_again_is_a_full_prefill(trial):
    found = figures(trial, [trial.blended(q, share=1.0) for q in trial.case.questions])
    assert found.kl < 1e-6
    assert found.top1 == 1.0
    assert 0.4 < found.share < 0.6  # of two segments the second


def test_what_is_left_out_is_seen(trial):
    left_out = figures(trial, [Prepared(trial.copy(trial.prefix)) for _ in trial.case.questions])
    composed = figures(trial, [trial.composed() for _ in trial.case.questions])
    assert left_out.kl > composed.kl > 1e-4


def test_an_answer_is_the_variants_own_to_its_end(loaded, model, trial):
    (own, *_) = trial.composed()
    question = trial.case.questions[0]
    answer, ids = [], list(question.ids)
    while len(answer) < ANSWER_TOKENS and not (answer and answer[-1] in loaded.eos_ids):
        (logits_1V,) = model.forward([Row(own, ids)])
        ids = [int(logits_1V.argmax())]
        answer += ids
    said = loaded.tokenizer.decode(answer)
    for text, expected in [(said, True), (said + "<0>", False)]:
        questions = (replace(question, answer=text),)
        asked = Trial(loaded, model, replace(trial.case, questions=questions))
        (outcome,) = asked.outcomes([asked.composed()])
        assert outcome.says_it is expected


def test_the_gate_reports_each_mode_and_passes_what_reaches_its_thresholds(loaded, model):
    report = measure_fidelity(loaded, model, num_cases=1)
    assert report.modes.keys() == {Mode.BLEND, Mode.FAST}
    assert report.asked == 2
    assert report.modes[Mode.BLEND].share <= 0.25
    assert report.modes[Mode.FAST].share == 0.0
    assert report.passed == ()  # a random model recalls nothing
    assert FidelityReport.from_json(report.to_json()) == report


def test_a_mode_passes_by_all_its_figures():
    good = Fidelity(kl=0.02, top1=0.96, recall=0.95, share=0.15, num_tokens=99, num_facts=9)
    limits = THRESHOLDS[Mode.BLEND]
    assert good.passes(limits)
    worse = [{"kl": 0.04}, {"top1": 0.9}, {"recall": 0.8}, {"share": 0.3}, {"num_facts": 0}]
    assert not any(replace(good, **change).passes(limits) for change in worse)
    assert not replace(good, kl=float("nan")).passes(limits)


def test_a_model_whose_keys_cannot_be_moved_is_not_measured():
    loaded = loaded_of(EXACT_ONLY["window"])
    report = measure_fidelity(loaded, PackedModel(loaded))
    assert "sliding window" in report.why_not
    assert report.passed == ()
    assert FidelityReport.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "{", '{"format": 1}', '{"format": 1, "modes": 3}']
)
def test_a_broken_report_is_refused(text):
    with pytest.raises(ValueError, match=r"report|JSON|Expecting"):
        FidelityReport.from_json(text)


def test_cases_vary_and_are_made_again_by_their_seed():
    def made(seed):
        return make_cases(
            lambda system, question: f"{system} {question}",
            lambda text: Words()(text)["input_ids"],
            num_cases=6,
            seed=seed,
        )

    cases = made(1)
    assert cases == made(1)
    assert cases != made(2)
    assert [len(case.segments) for case in cases] == [2, 3, 4, 2, 3, 4]
    assert all(200 < len(ids) <= 256 for case in cases for ids in case.segments)
    assert len({question.text for case in cases for question in case.questions}) == 18
    assert torch.tensor(cases[0].prefix_ids).equal(torch.tensor(cases[1].prefix_ids))


def test_each_segment_holds_the_answer_to_its_question():
    cases = make_cases(
        lambda system, question: f"{system}|{question}",
        lambda text: list(text.encode()),
        num_cases=9,
        segment_tokens=1500,
    )
    for case in cases:
        texts = [bytes(ids).decode() for ids in case.segments]
        for index, question in enumerate(case.questions):
            assert question.answered_by(texts[index])
            assert question.text in bytes(question.ids).decode()
