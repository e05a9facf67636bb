import json
import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from memcube.errors import BadRequest
from memcube.evaluation.locomo import load_locomo
from memcube.filters import parse_filter
from memcube.ids import TenantId
from memcube.retrieval import weights
from memcube.retrieval.features import NAMES
from memcube.retrieval.ranker import SEEDS, Mode, Retriever
from memcube.retrieval.weights import RankerWeights

FACT_QUERIES = {
    "What is the cat called?": "The cat is called Miso.",
    "Is there anything they are allergic to?": "Allergic to peanuts.",
    "What does she work as?": "Works as a nurse in Leeds.",
    "Which colour is their favourite?": "Favourite colour is teal.",
    "Do they drive a van?": "Drives an old red van.",
    "Born where?": "Born in Lisbon in 1987.",
}


def place(texts, wanted):
    return texts.index(wanted) if wanted in texts else len(texts)


async def test_a_question_finds_the_turn_that_answers_it(world):
    await world.put_conversation()
    texts = await world.texts("What did Ann see in the fjord in Norway?")
    assert texts[0] == "Yes, we went kayaking in the fjord and saw two orcas."


async def test_the_answer_to_a_question_is_found_though_it_shares_no_word_with_the_query(world):
    await world.put_conversation()
    texts = await world.texts("What colour did Ann choose?")
    assert "A dark green, like the one at our grandmother's house." in texts[:2]
    plain = await world.texts("What colour did Ann choose?", mode=Mode.SPARSE)
    assert "A dark green, like the one at our grandmother's house." not in plain[:2]


async def test_the_speaker_that_a_query_names_goes_before_the_other(world):
    await world.put_conversation()
    bobs = "I painted mine yesterday in a dull brown."
    anns = "My sister visited last week, we painted the fence."
    for_bob = await world.texts("What did Bob paint?")
    for_ann = await world.texts("What did Ann paint?")
    assert for_bob.index(bobs) < for_bob.index(anns)
    assert for_ann.index(anns) < for_ann.index(bobs)


async def test_the_turns_of_the_month_asked_for_go_first(world):
    thread = "t" * 64
    for seq, month in enumerate((1, 2, 3, 4)):
        await world.put(
            "We had dinner at the harbour.",
            thread=thread,
            seq=seq,
            event_time=world.now.replace(year=2025, month=month),
        )
    hits = await world.retriever.search(
        world.tenant, "Where was dinner in March 2025?", where=None, now=world.now, limit=4
    )
    assert hits[0].cube.payload["event_time"].month == 3


@pytest.mark.parametrize(("query", "answer"), FACT_QUERIES.items())
async def test_on_bare_facts_hybrid_is_no_worse_than_dense_or_bm25(world, query, answer):
    for fact in world.facts:
        await world.put(fact)
    places = {mode: place(await world.texts(query, mode=mode), answer) for mode in Mode}
    assert places[Mode.HYBRID] <= min(places[Mode.DENSE], places[Mode.SPARSE])


async def test_a_fact_that_is_clearly_nearest_in_meaning_goes_before_a_chance_word(
    world, monkeypatch
):
    meanings = {
        "Enjoys sushi.": [1.0, 0.1, 0.0],
        "Visited the Favourite Dish Museum in Leeds with Priya Patel.": [0.1, 1.0, 0.0],
        "Drives a van.": [0.0, 0.3, 1.0],
        "what is the user's favourite meal": [1.0, 0.2, 0.1],
    }

    async def embed(texts, purpose):
        vectors = np.zeros((len(texts), world.embedder.dim), dtype=np.float32)
        vectors[:, :3] = [meanings[text] for text in texts]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    monkeypatch.setattr(world.embedder, "embed", embed)
    for text in list(meanings)[:3]:
        await world.put(text)
    assert (await world.texts("what is the user's favourite meal"))[0] == "Enjoys sushi."


async def test_dense_embeds_the_query_as_given_and_hybrid_without_the_names(world):
    await world.put_conversation()
    world.embedder.calls.clear()
    await world.texts("What did Bob grow?", mode=Mode.DENSE)
    await world.texts("What did Bob grow?")
    assert [texts for texts, _ in world.embedder.calls] == [
        ("What did Bob grow?",),
        ("What did grow?",),
    ]


async def test_dense_scores_are_cosines_and_sparse_scores_are_the_stores_bm25(world):
    await world.put_conversation()
    query, at = "kayaking in the fjord", {"where": None, "now": world.now}
    (vector,) = await world.embedder.embed([query], "query")
    dense = await world.retriever.search(world.tenant, query, limit=3, mode=Mode.DENSE, **at)
    (best,) = await world.store.get(world.tenant, [dense[0].id], with_vectors=True)
    assert dense[0].score == pytest.approx(float(np.dot(best.vector, vector)), abs=1e-5)
    sparse = await world.retriever.search(world.tenant, query, limit=3, mode=Mode.SPARSE, **at)
    stores = await world.store.search_sparse(world.tenant, query, limit=3, **at)
    assert [(hit.id, hit.score) for hit in sparse] == [(hit.id, hit.score) for hit in stores]


@pytest.mark.parametrize("query", ["", "   ", "?", "the of and", "zzyzx", "日本語", "a" * 8000])
async def test_a_query_without_a_known_word_still_gets_the_nearest_by_cosine(world, query):
    await world.put_conversation()
    assert len(await world.texts(query, limit=5)) == 5


@pytest.mark.parametrize("mode", Mode)
async def test_an_empty_scope_gives_nothing(world, mode):
    assert await world.texts("anything", mode=mode) == []


async def test_a_limit_above_the_usual_pool_is_filled(world):
    for number in range(150):
        await world.put(f"Note {number} on the garden fence")
    texts = await world.texts("garden fence", limit=120)
    assert len(texts) == len(set(texts)) == 120
    assert SEEDS < 120


async def test_only_cubes_that_match_the_filter_come_back_also_as_neighbours(world):
    await world.put_conversation()
    where = parse_filter({"speaker": "Bob"})
    hits = await world.retriever.search(
        world.tenant, "What colour was the fence?", where=where, now=world.now, limit=50
    )
    assert {hit.cube.payload["speaker"] for hit in hits} == {"Bob"}


async def test_another_tenants_cubes_change_neither_hits_nor_scores(world):
    await world.put_conversation()
    query, how = "What did Ann see in the fjord?", {"where": None, "now": world.now, "limit": 10}
    before = await world.retriever.search(world.tenant, query, **how)
    for number in range(30):
        await world.put(f"fjord fjord {number}", tenant=TenantId("other"), speaker="Ann Lee")
    after = await Retriever(world.store, world.embedder, RankerWeights.load()).search(
        world.tenant, query, **how
    )
    assert [(hit.id, hit.score) for hit in after] == [(hit.id, hit.score) for hit in before]


async def test_the_same_query_gives_the_same_answer_and_ties_go_by_id(world):
    for _ in range(6):
        await world.put("The very same words.")
    how = {"where": None, "now": world.now, "limit": 4}
    first = await world.retriever.search(world.tenant, "same words", **how)
    again = await world.retriever.search(world.tenant, "same words", **how)
    assert [hit.id for hit in first] == [hit.id for hit in again] == sorted(h.id for h in first)
    assert len({hit.score for hit in first}) == 1


async def test_hybrid_scores_are_chances_that_fall_down_the_list_and_a_threshold_cuts_it(world):
    await world.put_conversation()
    query, how = "What did Ann see in the fjord?", {"where": None, "now": world.now, "limit": 10}
    scores = [hit.score for hit in await world.retriever.search(world.tenant, query, **how)]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score < 1 for score in scores)
    cut = await world.retriever.search(world.tenant, query, threshold=scores[2], **how)
    assert len(cut) == 3


async def test_a_query_that_nothing_answers_scores_lower_than_one_that_something_does(world):
    await world.put_conversation()
    how = {"where": None, "now": world.now, "limit": 1}
    (good,) = await world.retriever.search(world.tenant, "kayaking in the fjord, two orcas", **how)
    (bad,) = await world.retriever.search(world.tenant, "quarterly tax filings", **how)
    assert bad.score < good.score / 2


async def test_the_explanation_adds_up_to_the_score(world):
    await world.put_conversation()
    (hit,) = await world.retriever.search(
        world.tenant,
        "What did Ann see in the fjord?",
        where=None,
        now=world.now,
        limit=1,
        explain=True,
    )
    assert hit.explain is not None
    parts = {name: part for name, part in hit.explain.items() if name in NAMES}
    assert {"cosine", "bm25"} == set(hit.explain) - set(parts)
    packaged = RankerWeights.load()
    # The best by cosine is the best of all here, so its cosine is the pool's best.
    assert hit.score == pytest.approx(
        packaged.probability(sum(parts.values()), hit.explain["cosine"])
    )


async def test_a_scopes_speakers_are_asked_for_again_after_a_while(world):
    await world.put_conversation()
    await world.texts("What did Zoe grow?")
    await world.put("I grow leeks.", speaker="Zoe")
    world.embedder.calls.clear()
    await world.texts("What did Zoe grow?", now=world.now + timedelta(minutes=1))
    assert world.embedder.calls[0][0] == ("What did grow?",)


def test_weights_of_other_features_are_refused(tmp_path):
    good = json.loads(Path(weights.__file__).with_name("weights.json").read_text())
    path = tmp_path / "weights.json"
    for change in (
        {"weights": good["weights"] | {"surplus": 1.0}},
        {"weights": {}},
        {"scale": -1.0},
        {"offset": float("nan")},
        {"offset": None},
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(BadRequest):
            RankerWeights.load(path)
    with pytest.raises(BadRequest):
        RankerWeights.load(tmp_path / "missing.json")


@pytest.fixture
def conversation():
    beside = Path(__file__).parents[3].parent / "shared/data/locomo/dev.json"
    path = Path(os.environ.get("MEMCUBE_LOCOMO", beside))
    if not path.is_file():
        pytest.skip(f"no conversations at {path}; MEMCUBE_LOCOMO names another file")
    return load_locomo(path)[0]


async def test_on_locomo_with_hashed_words_hybrid_beats_bm25(world, conversation):
    turns = {}
    for number, session in conversation.sessions().items():
        for seq, turn in enumerate(session[:40]):
            id = await world.put(
                turn.text,
                speaker=turn.speaker,
                thread=f"{number:064}",
                seq=seq,
                event_time=turn.time,
            )
            turns[id] = turn.id
    found = dict.fromkeys((Mode.SPARSE, Mode.HYBRID), 0.0)
    for question in conversation.questions[::5]:
        for mode in found:
            hits = await world.retriever.search(
                world.tenant, question.text, where=None, now=world.now, limit=10, mode=mode
            )
            ranked = {turns[hit.id] for hit in hits}
            found[mode] += len(ranked & set(question.evidence)) / len(question.evidence)
    assert found[Mode.HYBRID] > 1.1 * found[Mode.SPARSE]
