import pytest

from memcube.evaluation.metrics import measures, ndcg_at, recall_at, reciprocal_rank, summarise


def test_recall_is_the_share_of_the_evidence_among_the_first_k():
    assert recall_at(["a", "x", "b"], {"a", "b"}, 2) == 0.5
    assert recall_at(["a", "x", "b"], {"a", "b"}, 3) == 1.0


def test_the_reciprocal_rank_is_that_of_the_first_evidence_and_0_without_any():
    assert reciprocal_rank(["x", "a", "b"], {"a", "b"}) == 0.5
    assert reciprocal_rank(["x"], {"a"}) == 0.0


def test_ndcg_is_1_for_the_best_ranking_and_less_the_later_the_evidence_comes():
    assert ndcg_at(["a", "b", "x"], {"a", "b"}, 10) == pytest.approx(1.0)
    assert ndcg_at(["x", "a"], {"a"}, 10) == pytest.approx(0.6309, abs=1e-4)
    assert ndcg_at(["x"] * 10 + ["a"], {"a"}, 10) == 0.0


def test_the_summary_gives_percent_overall_by_category_and_without_the_adversarial():
    rows = [(1, measures(["a"], {"a"})), (5, measures(["x"], {"a"}))]
    found = summarise(rows)
    assert found["overall"]["recall@10"] == 50.0
    assert found["by_category"]["1"]["recall@10"] == 100.0
    assert found["by_category"]["5"]["recall@10"] == 0.0
    assert found["without_adversarial"]["recall@10"] == 100.0
    assert found["overall"]["num_questions"] == 2
