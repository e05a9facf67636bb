"""The benchmark of merging, at a tiny scale: it trains, merges, asks and draws."""

import pytest

from benchmarks.bench_lora_fuse import draw, figures_of, measure
from benchmarks.lora_facts import invented_facts
from memcube.parametric.fusing import FuseMethod, FuseSettings
from memcube.parametric.recipe import Recipe
from tests.unit.parametric.small import small_model


def test_it_measures_both_halves_merged_and_trained_jointly_and_draws_them(tmp_path):
    recipe = Recipe(
        rank=2,
        alpha=4,
        steps=2,
        decay_steps=1,
        row_tokens=300,
        replay_tokens=100,
        check_steps=0,
        autocast=False,
    )
    settings = FuseSettings(
        methods=(FuseMethod.LINEAR, FuseMethod.CAT), weights=(0.5,), ask_all=True
    )
    facts = invented_facts(2, 1, seed=0)
    details = measure(small_model, facts, recipe, settings, unrelated=["Some text."])
    assert [parent["facts"] for parent in details["fused"]["parents"]] == [1, 1]
    assert [a["method"] for a in details["fused"]["attempts"]] == ["linear", "cat"]
    assert [a["rank"] for a in details["fused"]["attempts"]] == [2, 4]
    assert details["steps"] == {"apart": [2, 2], "joint": 2}
    assert {figure.name for figure in figures_of(details)} >= {"trained jointly: recall"}
    pytest.importorskip("matplotlib")
    draw(details, tmp_path / "plot.svg")
    assert "trained jointly" in (tmp_path / "plot.svg").read_text()
