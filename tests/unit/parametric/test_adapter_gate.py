"""The gate's decision, its report, and a run over a tiny model."""

import math
from dataclasses import replace

import pytest

from memcube.errors import BadRequest
from memcube.parametric.dataset import Probe, ProbeKind
from memcube.parametric.gate import Gate, holds
from memcube.parametric.judgement import Answered, GateReport, Thresholds, decide
from memcube.parametric.recipe import Recipe
from memcube.parametric.training import adapted
from tests.unit.parametric.small import small_data, small_model

GOOD = GateReport(
    recall=0.95,
    reverse=0.85,
    earlier=None,
    leak=0.05,
    refused=0.9,
    base_nll=2.0,
    nll=2.04,
    adapter_bytes=9_000_000,
    answers=(
        Answered(
            kind=ProbeKind.RECALL, question="Who?", expected=("Ada",), said="Ada.", holds=True
        ),
    ),
)


def test_what_reaches_every_threshold_passes():
    assert decide(GOOD, Thresholds()) == (True, ())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"recall": 0.92}, "recall"),
        ({"recall": None}, "no fact"),
        ({"reverse": 0.7}, "reverse"),
        ({"earlier": 0.5}, "earlier"),
        ({"leak": 0.2}, "leak"),
        ({"nll": 2.07}, "unrelated"),
        ({"nll": math.nan}, "unrelated"),
        ({"adapter_bytes": 10_000_001}, "bytes"),
    ],
)
def test_what_is_short_is_told(change, word):
    passed, short = decide(replace(GOOD, **change), Thresholds())
    assert not passed
    assert len(short) == 1
    assert word in short[0]


def test_a_report_survives_json():
    assert GateReport.from_json(GOOD.to_json()) == GOOD


def test_figures_hold_nothing_that_a_memory_says():
    assert "Ada" not in str(GOOD.figures())
    assert GOOD.figures()["nll_rise"] == pytest.approx(0.02)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 1}', '{"format": 1, "answers": [3]}'])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ValueError, match="no gate report"):
        GateReport.from_json(text)


def test_a_threshold_that_is_no_share_is_refused():
    with pytest.raises(BadRequest):
        Thresholds(recall=93)


@pytest.mark.parametrize(
    ("said", "right"), [("She is a  Beekeeper.", True), ("beekeeper", True), ("a baker", False)]
)
def test_an_answer_is_right_if_it_has_the_object(said, right):
    probe = Probe(kind=ProbeKind.RECALL, question="?", expected=("a beekeeper",))
    assert holds(probe, said) is right


def test_a_leak_is_any_trained_object():
    probe = Probe(kind=ProbeKind.LEAK, question="?", forbidden=("a raven", "kumquat tea"))
    assert holds(probe, "Kumquat tea, I think.")
    assert not holds(probe, "I don't know that.")


def test_a_fresh_adapter_changes_nothing_and_does_not_pass():
    loaded, data = small_model(), small_data()
    model = adapted(loaded.model, Recipe(rank=2))
    report = Gate(loaded, unrelated=["Some text."]).judge(model, data.probes, adapter_bytes=1)
    assert report.nll == pytest.approx(report.base_nll)
    assert report.recall == 0
    assert len(report.answers) == len(data.probes)
    assert not decide(report, Thresholds()).passed
