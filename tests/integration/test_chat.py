"""The chat, by the official OpenAI client over a running system with the packaged model."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, OpenAI

from memcube.client import MemCubeClient
from memcube.testing.process import SystemProcess
from memcube.testing.waiting import until

pytestmark = pytest.mark.long

MODEL = "SmolLM2-135M-Instruct"
TURNS = [
    {
        "role": "user",
        "name": "Ann" if n % 2 else "Bob",
        "content": f"On day {n} I walked {n + 2} miles along the river with my old dog Rex.",
    }
    for n in range(24)
]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemProcess]:
    with SystemProcess(tmp_path_factory.mktemp("chat") / "data", chat=True) as running:
        yield running


@pytest.fixture
def openai(system: SystemProcess) -> OpenAI:
    return OpenAI(base_url=f"{system.url}/v1", api_key=system.key, max_retries=0, timeout=120)


def ask(openai: OpenAI, question: str, user: str, memory: dict[str, Any] | None = None, **more):
    return openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=12,
        temperature=0,
        extra_body={"memory": {"user_id": user} | (memory or {})},
        **more,
    )


def test_the_second_question_attaches_what_the_first_one_read(
    system: SystemProcess, openai: OpenAI
):
    with MemCubeClient(system.url, system.key) as client:
        client.add(TURNS, user_id="river")
    first = ask(openai, "What is the dog called?", "river")
    second = ask(openai, "Who walks along the river?", "river")
    told = [answer.model_extra["memory"] for answer in (first, second)]
    assert [cube["form"] for cube in told[0]["cubes"]] == ["text"] * len(told[0]["cubes"])
    assert {cube["form"] for cube in told[1]["cubes"]} == {"exact_kv"}
    assert told[1]["tokens_prefilled"] < told[0]["tokens_prefilled"] / 5
    assert told[1]["ttft_ms"] < told[0]["ttft_ms"] / 2
    assert second.usage.prompt_tokens_details.cached_tokens == told[1]["tokens_attached"]


def test_streamed_and_whole_answers_are_the_same(openai: OpenAI):
    whole = ask(openai, "What is the dog called?", "river").choices[0].message.content
    stream = ask(
        openai,
        "What is the dog called?",
        "river",
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == whole
    assert chunks[-1].usage.completion_tokens == 12


def test_no_kv_crosses_a_tenant(system: SystemProcess, openai: OpenAI):
    with MemCubeClient(system.url, system.key) as client:
        other = client.keys.create("other", tenant="other").key
    with MemCubeClient(system.url, other) as client:
        client.add(TURNS, user_id="river")
    theirs = OpenAI(base_url=f"{system.url}/v1", api_key=other, max_retries=0, timeout=120)
    ask(openai, "What is the dog called?", "river")
    first = ask(theirs, "What is the dog called?", "river")
    assert first.model_extra["memory"]["tokens_attached"] == 0


def test_two_tenants_at_once_get_their_own_memories_and_kv(system: SystemProcess):
    """The same user and the same questions in both, streamed side by side."""
    clients, mine = {}, {}
    for name, dog in (("kennel", "Rex"), ("pound", "Fido")):
        with MemCubeClient(system.url, system.key) as operator:
            key = operator.keys.create(name, tenant=name).key
        with MemCubeClient(system.url, key) as client:
            text = "On day {} I walked along the river with my old dog {}."
            added = client.add_batch(
                [{"text": text.format(n, dog), "user_id": "both"} for n in range(12)]
            )
            mine[name] = {id for result in added.results for id in result.ids}
        clients[name] = OpenAI(base_url=f"{system.url}/v1", api_key=key, max_retries=0, timeout=120)

    def chats(name: str) -> list[dict]:
        reports = []
        for question in ("What is the dog called?", "Who walks along the river?"):
            *_, last = ask(clients[name], question, "both", stream=True)
            reports.append(last.model_extra["memory"])
        return reports

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(clients, pool.map(chats, clients), strict=True))
    for name, (first, second) in found.items():
        assert first["tokens_attached"] == 0
        assert second["tokens_attached"] > 0
        for told in (first, second):
            used = {cube["id"] for cube in told["cubes"]}
            assert used
            assert used <= mine[name]


def test_a_deleted_memory_is_in_no_later_answer(system: SystemProcess, openai: OpenAI):
    with MemCubeClient(system.url, system.key) as client:
        client.add(TURNS, user_id="forgetful")
        used = ask(openai, "What is the dog called?", "forgetful").model_extra["memory"]["cubes"]
        client.delete(used[0]["id"])
    later = ask(openai, "What is the dog called?", "forgetful").model_extra["memory"]["cubes"]
    assert used[0]["id"] not in {cube["id"] for cube in later}


def about(openai: OpenAI, question: str, *cubes: str) -> dict:
    """The report of an answer that these cubes were to be used for."""
    answer = openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=4,
        temperature=0,
        extra_body={"memory": {"cube_ids": list(cubes), "token_budget": 2048}},
    )
    return answer.model_extra["memory"]


def test_a_migrated_composite_is_attached_by_its_first_question_until_a_member_goes(
    system: SystemProcess, openai: OpenAI
):
    # Words of its own: the same text of another user's would share its KV.
    turns = [turn | {"content": turn["content"].replace("Rex", "Bello")} for turn in TURNS]
    with MemCubeClient(system.url, system.key) as client:
        ids = client.add(turns, user_id="migrated").ids
        whole = client.cubes.create(ids, user_id="migrated").id
        done = client.cubes.migrate(whole, "activation")
        assert done.cubes == len(TURNS)
        assert done.built_tokens > 400
        assert [place.medium for place in done.residency] == ["device"]
        assert done.size_bytes > 400 * 40_000  # a token's KV has 46,080 bytes
        told = about(openai, "What is the dog called?", whole)
        assert {cube["form"] for cube in told["cubes"]} == {"exact_kv"}
        assert told["tokens_prefilled"] < 100
        again = client.cubes.migrate(whole, "activation")
        assert again.built_tokens < 70  # what is behind the last whole block
        client.delete(ids[0])
        kv = [p for p in client.cubes.get(whole).residency if p.tier == "activation"]
        assert kv == []
        told = about(openai, "What is the dog called?", whole)
        assert ids[0] not in {cube["id"] for cube in told["cubes"]}
        assert told["tokens_prefilled"] > 400
        assert client.cubes.migrate(whole, "activation").built_tokens < 70
        assert client.cubes.migrate(whole, "plaintext").dropped_bytes > 0
        assert {p.tier for p in client.cubes.get(ids[1]).residency} == {"plaintext"}


def test_a_killed_engine_comes_back_and_answers(system: SystemProcess, openai: OpenAI):
    assert system.kill_one("ray::KVCacheActor") == 1

    def says() -> str | None:
        return ask(openai, "What is the dog called?", "river").choices[0].message.content

    assert until(says, within_s=240, passing=(APIError,))


def test_models_and_embeddings_are_openais(openai: OpenAI):
    assert MODEL in [model.id for model in openai.models.list()]
    made = openai.embeddings.create(model="all-MiniLM-L6-v2", input=["tea", "milk"])
    assert [len(one.embedding) for one in made.data] == [384, 384]


def test_kv_outlives_a_restart_on_disk(tmp_path: Path):
    system = SystemProcess(tmp_path / "data", chat=True)
    try:
        attached = []
        for start in range(2):
            system.start()
            openai = OpenAI(base_url=f"{system.url}/v1", api_key=system.key, max_retries=0)
            if start == 0:
                with MemCubeClient(system.url, system.key) as client:
                    client.add(TURNS, user_id="river")
            answer = ask(openai, "What is the dog called?", "river")
            attached.append(answer.model_extra["memory"]["tokens_attached"])
            system.stop()
        assert attached[0] == 0
        assert attached[1] > 0
    finally:
        system.stop()


@pytest.mark.slow
def test_once_the_gate_has_passed_a_memory_read_for_one_question_is_composed_for_another(
    tmp_path: Path,
):
    overrides = ["activation.composing=auto", "activation.gate_cases=1"]
    with SystemProcess(tmp_path / "data", overrides, chat=True) as system:
        openai = OpenAI(base_url=f"{system.url}/v1", api_key=system.key, max_retries=0)
        with MemCubeClient(system.url, system.key) as client:
            turns = [
                # All of one length, so that the halves are what both together are packed into.
                {
                    "role": "user",
                    "content": f"On day {n} we {what} with aunt Mary; it took all of {n + 2} minutes.",
                }
                for n, what in enumerate(
                    ["baked a dark bread"] * 12 + ["painted a row boat"] * 12, 10
                )
            ]
            ids = [result.id for result in client.add(turns, user_id="handy").results]

            def judged() -> dict[str, Any] | None:
                gate = client.status()["engines"][0]["composing"]
                return None if gate["state"] == "measuring" else gate

            gate = until(judged, within_s=600, every_s=1.0)
        assert gate["state"] == "done"
        assert "blend" in gate["modes"]
        assert gate["report"]["modes"]["blend"]["kl"] <= 0.03

        def forms(cube_ids: list[str]) -> list[str]:
            choice = {"mode": "blend", "token_budget": 2000, "cube_ids": cube_ids}
            answer = ask(openai, "Who was there?", "handy", choice).model_extra["memory"]
            return [cube["form"] for cube in answer["cubes"]]

        # Each half is read alone, and then both together.
        assert forms(ids[:12]) == ["text"] * 12
        assert forms(ids[12:]) == ["text"] * 12
        assert forms(ids) == ["exact_kv"] * 12 + ["composed_kv"] * 12
