import json
from datetime import UTC, datetime

import httpx
import pytest

from memcube.client import AsyncMemCubeClient, RetryPolicy
from memcube.errors import BadRequest, Corrupt, Unavailable
from memcube.ingest import Journal, Target, ingest, make_plan, read_file
from memcube.ingest.formats import detect
from memcube.ingest.plan import BATCH_ITEMS, journal_path
from memcube.testing.api import KEY, FakeApi

LOCOMO = [
    {
        "sample_id": f"conv-{n}",
        "conversation": {
            "speaker_a": "Ann",
            "speaker_b": "Bob",
            "session_1_date_time": "1:56 pm on 8 May, 2023",
            "session_1": [
                {"speaker": "Ann", "dia_id": "D1:1", "text": f"hello {n}"},
                {"speaker": "Bob", "dia_id": "D1:2", "text": "hi Ann"},
            ],
            "session_2_date_time": "2:00 pm on 9 May, 2023",
            "session_2": [{"speaker": "Ann", "dia_id": "D2:1", "text": "hello again"}],
        },
        "qa": [],
    }
    for n in (1, 2)
]


def write(folder, text, name="file"):
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def lines(*entries):
    return "\n".join(json.dumps(entry) for entry in entries)


def client_of(api, **retry):
    policy = RetryPolicy(base_s=0.0, **retry)
    return AsyncMemCubeClient("http://server", KEY, transport=api.transport, retry=policy)


@pytest.mark.parametrize(
    ("text", "format"),
    [
        (json.dumps(LOCOMO), "locomo"),
        ('{"role": "user", "content": "a"}', "jsonl"),
        ('\n{"messages": []}', "jsonl"),
        ("[1] A note", "text"),
        ("{curly} prose", "text"),
        ('["a", "list"]', "text"),
        ("Prose.", "text"),
    ],
)
def test_a_format_is_told_by_its_content(text, format):
    assert detect(text) == format


def test_a_locomo_turn_keeps_speaker_session_time_and_dia_id(tmp_path):
    reading = read_file(write(tmp_path, LOCOMO))
    item = reading.records[1].item
    assert (item.user_id, item.run_id, item.metadata) == ("conv-1", "session-1", {"dia_id": "D1:2"})
    message = item.messages[0]
    assert (message.role, message.name, message.id) == ("assistant", "Bob", "D1:2")
    assert message.time == datetime(2023, 5, 8, 13, 56, 1, tzinfo=UTC)


def test_conversations_put_under_one_user_keep_their_runs_apart(tmp_path):
    reading = read_file(write(tmp_path, LOCOMO), target=Target(user_id="me"))
    assert {r.item.run_id for r in reading.records if r.item.run_id.endswith("-1")} == {
        "conv-1-session-1",
        "conv-2-session-1",
    }


def test_message_lines_take_scope_time_and_parts(tmp_path):
    path = write(
        tmp_path,
        lines(
            {"role": "user", "content": "a", "user_id": "bob", "time": "2024-01-01T00:00:00"},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "b"}, {"type": "image_url"}],
            },
            {"role": "assistant", "content": None, "tool_calls": []},
            {"messages": [{"role": "user", "content": "c"}], "run_id": "r", "tags": ["x"]},
        ),
    )
    reading = read_file(path, target=Target(user_id="ann", tags=("all",)))
    items = [record.item for record in reading.records]
    assert [item.messages[0].content for item in items] == ["a", "b", "c"]
    assert [item.user_id for item in items] == ["bob", "ann", "ann"]
    assert items[0].messages[0].time == datetime(2024, 1, 1, tzinfo=UTC)
    assert (items[2].run_id, items[2].tags) == ("r", ("all", "x"))
    assert reading.num_empty == 1


@pytest.mark.parametrize(
    "bad",
    [
        "{not json",
        "[]",
        '{"role": 1, "content": "a"}',
        '{"content": "a"}',
        '{"role": "user", "content": 3}',
        '{"role": "user", "content": "a", "time": "soon"}',
        '{"messages": {}}',
        '{"messages": ["a"]}',
        '{"role": "user", "content": "a", "tags": "x"}',
        '{"role": "user", "content": "a", "metadata": []}',
        '{"role": "user", "content": "a\\u0000"}',
        '{"role": "user", "content": [{"text": "\\ud800"}]}',
        '{"role": "", "content": "a"}',
        json.dumps({"role": "user", "content": "a" * 200_001}),
        json.dumps({"role": "user", "content": "a", "user_id": "a" * 257}),
        json.dumps({"role": "user", "content": "a", "tags": [""]}),
        json.dumps({"role": "user", "content": "a", "tags": ["t"] * 65}),
        json.dumps({"role": "user", "content": "a", "metadata": {"k": "a" * 16_384}}),
        json.dumps({"role": "user", "content": "a", "metadata": {"k": "\x00"}}),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, bad):
    path = write(tmp_path, '{"role": "user", "content": "a"}\n\n' + bad)
    with pytest.raises(BadRequest, match=r"file:3"):
        read_file(path)


def test_paragraphs_of_a_text_are_facts_of_their_own(tmp_path):
    reading = read_file(write(tmp_path, "one\ntwo\n\n\n three \n"), target=Target(user_id="ann"))
    assert [record.item.text for record in reading.records] == ["one\ntwo", "three"]


def test_a_paragraph_over_the_limit_is_cut_at_line_ends_and_a_line_over_it_is_named(tmp_path):
    long = "\n".join(["a" * 90_000] * 3)
    reading = read_file(write(tmp_path, long))
    assert [len(record.item.text or "") for record in reading.records] == [180_001, 90_000]
    with pytest.raises(BadRequest, match=r"file:2: 200,001 characters"):
        read_file(write(tmp_path, "one\n" + "a" * 200_001))


def test_a_bad_turn_of_a_locomo_file_is_named(tmp_path):
    broken = json.loads(json.dumps(LOCOMO))
    broken[1]["conversation"]["session_1"][0]["text"] = "a\x00"
    with pytest.raises(BadRequest, match=r"conv-2 D1:1: can't hold a NUL"):
        read_file(write(tmp_path, broken))
    del broken[1]["conversation"]["session_1_date_time"]
    with pytest.raises(BadRequest, match=r"conversation 2: .* lacks 'session_1_date_time'"):
        read_file(write(tmp_path, broken))


def test_a_file_that_is_missing_empty_or_not_utf8_is_refused(tmp_path):
    with pytest.raises(BadRequest, match="can't be read"):
        read_file(tmp_path / "none")
    with pytest.raises(BadRequest, match="nothing to remember"):
        read_file(write(tmp_path, " \n"))
    (tmp_path / "bytes").write_bytes(b"a\n\xff")
    with pytest.raises(BadRequest, match="bytes:2"):
        read_file(tmp_path / "bytes")


def test_a_conversation_keeps_its_order_and_none_is_lost(tmp_path):
    entries = [
        {"role": "user", "content": str(n), "run_id": f"r{n % 7}"} for n in range(3 * BATCH_ITEMS)
    ]
    plan = make_plan(read_file(write(tmp_path, lines(*entries))))
    assert plan.num_items == len(entries)
    for run in range(7):
        holding = [s for s in plan.streams if any(i.run_id == f"r{run}" for b in s for i in b)]
        assert len(holding) == 1
        texts = [i.messages[0].content for b in holding[0] for i in b if i.run_id == f"r{run}"]
        assert texts == [str(n) for n in range(len(entries)) if n % 7 == run]


def test_a_plan_depends_on_content_and_target_alone(tmp_path):
    one, other = write(tmp_path, "a\n\nb", "one"), write(tmp_path, "a\n\nb", "other")
    plan = make_plan(read_file(one))
    assert make_plan(read_file(other)).digest == plan.digest
    assert make_plan(read_file(one, target=Target(user_id="x"))).digest != plan.digest
    paths = {journal_path(tmp_path, plan, url=u, api_key=k) for u in "ab" for k in ("1", None)}
    assert len(paths) == 4


@pytest.mark.parametrize("journal_kept", [True, False])
async def test_a_broken_run_goes_on_and_does_nothing_twice(tmp_path, journal_kept):
    api = FakeApi()
    text = "\n\n".join(f"fact {n}" for n in range(8 * BATCH_ITEMS))
    plan = make_plan(read_file(write(tmp_path, text)))
    path = tmp_path / "journal.json"
    broken = iter(range(100))
    whole = api.answer

    def breaking(request):
        return httpx.Response(503) if next(broken) == 5 else whole(request)

    api.transport = httpx.MockTransport(breaking)
    async with client_of(api, max_tries=1) as client:
        with pytest.raises(Unavailable):
            await ingest(client, plan, Journal(path, num_streams=4))
        before = len(api.cubes)
        assert 0 < before < plan.num_items
        if not journal_kept:
            path.unlink()
        done = await ingest(client, plan, Journal(path, num_streams=4))
    assert len(api.cubes) == plan.num_items
    assert done.repeated == 0
    assert (done.skipped > 0) == journal_kept


async def test_a_second_run_sends_nothing_and_a_third_with_new_keys_all(tmp_path):
    api = FakeApi()
    plan = make_plan(read_file(write(tmp_path, "a\n\nb")))
    path = tmp_path / "journal.json"
    told = []
    async with client_of(api) as client:
        await ingest(client, plan, Journal(path, num_streams=4), progress=told.append)
        num_requests = len(api.requests)
        second = await ingest(client, plan, Journal(path, num_streams=4), progress=told.append)
        assert (second.added, second.skipped, len(api.requests)) == (0, 2, num_requests)
        journal = Journal(path, num_streams=4)
        journal.start_over()
        third = await ingest(client, plan, journal)
    assert third.repeated == 2
    assert sum(told) == 4


@pytest.mark.parametrize("content", ["", "{}", '{"salt": "", "done": [1]}'])
def test_a_journal_that_makes_no_sense_is_told(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(Corrupt, match="remove it"):
        Journal(path, num_streams=4)
