import io
import json
import stat
from pathlib import Path

import httpx
import pytest

from memcube.cli.output import as_lines, safe
from memcube.cli.serve import NotInstalled, server_command

COMMANDS = [
    "serve",
    "add",
    "search",
    "get",
    "list",
    "delete",
    "history",
    "context",
    "migrate",
    "compare",
    "rollback",
    "doctor",
    "ingest",
    "status",
    "version",
]
NESTED = [
    ["keys", "create"],
    ["keys", "list"],
    ["keys", "revoke"],
    ["eval", "locomo"],
    ["snapshot", "create"],
    ["snapshot", "list"],
    ["snapshot", "delete"],
    ["proposals", "list"],
    ["proposals", "find"],
    ["proposals", "apply"],
    ["proposals", "dismiss"],
]


def test_what_is_added_is_found_shown_listed_and_forgotten(memcube, api):
    code, out, _ = memcube("add", "Ann likes tea", "--user", "ann", "--tag", "drinks")
    id = out.split()[1]
    assert (code, out.split()[0]) == (0, "added")
    assert "Ann likes tea" in memcube("search", "tea", "--user", "ann")[1]
    assert "#drinks" in memcube("get", id)[1]
    assert id in memcube("list", "--user", "ann")[1]
    assert "v1" in memcube("history", id)[1]
    assert memcube("context", "tea")[1] == "Ann likes tea\n"
    assert memcube("delete", id)[0] == 0
    assert api.cubes == {}


def test_a_migration_says_what_was_built_and_where_it_lies(memcube):
    id = memcube("add", "Ann likes tea")[1].split()[1]
    code, out, _ = memcube("migrate", id, "--tier", "activation")
    assert code == 0
    assert out == "3 tokens of 1 cubes, 3 built now\n    27 bytes  device  node/engine-0\n"
    assert memcube("migrate", id, "--tier", "plaintext")[1] == "dropped 0 bytes of KV\n"
    assert json.loads(memcube("migrate", id, "--tier", "activation", "--json")[1])["tokens"] == 3
    assert memcube("migrate", id, "--tier", "parametric")[0] == 2
    assert memcube("migrate", id)[0] == 2


@pytest.mark.parametrize(
    "argv",
    [
        ["search", "tea"],
        ["get", "ID"],
        ["list"],
        ["history", "ID"],
        ["context", "tea"],
        ["status"],
        ["keys", "list"],
        ["snapshot", "list"],
        ["compare", "--since", "2024-01-01"],
        ["proposals", "list"],
        ["doctor"],
    ],
)
def test_every_reading_command_prints_json(memcube, argv):
    id = json.loads(memcube("add", "tea", "--json")[1])["results"][0]["id"]
    code, out, _ = memcube(*[id if part == "ID" else part for part in argv], "--json")
    assert code == 0
    json.loads(out)


def test_a_message_takes_role_name_and_time(memcube, api):
    memcube("add", "hi", "--role", "user", "--name", "Ann", "--time", "2024-05-01T10:00:00")
    (cube,) = api.cubes.values()
    assert (cube["role"], cube["speaker"], cube["event_time"]) == (
        "user",
        "Ann",
        "2024-05-01T10:00:00Z",
    )
    assert memcube("add", "hi", "--name", "Ann")[0] == 2


def test_a_scope_is_deleted_after_a_question_or_yes(memcube, api, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    memcube("add", "a", "--user", "ann")
    memcube("add", "b", "--user", "bob")
    assert memcube("delete", "--user", "ann", "--yes")[1] == "deleted 1\n"
    assert memcube("delete")[0] == 2
    assert memcube("delete", "1", "--user", "bob")[0] == 2
    assert memcube("delete", "--user", "bob")[0] == 1
    assert len(api.cubes) == 1


def test_a_key_is_printed_once_and_alone(memcube):
    assert memcube("keys", "create", "app")[1] == "mk_secret\n"
    id = memcube("keys", "list")[1].split()[0]
    assert memcube("keys", "revoke", id)[0] == 0


def test_an_error_is_one_line_with_exit_code_1(memcube):
    code, out, err = memcube("get", "none")
    assert (code, out) == (1, "")
    assert err == "memcube: no cube 'none' (request req-1)\n"


def test_wrong_usage_exits_with_2(memcube):
    for argv in (
        ["search"],
        ["nonsense"],
        ["search", "a", "--mode", "best"],
        ["search", "a", "--filters", "{"],
    ):
        assert memcube(*argv)[0] == 2


def test_no_server_exits_with_3_and_says_how_to_start_one(memcube, api):
    code, _, err = memcube("list", options=[])
    assert code == 3
    assert "memcube serve" in err
    api.failures.append(httpx.ConnectError("refused"))
    code, _, err = memcube("status")
    assert code == 3
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [[name] for name in COMMANDS] + NESTED, ids=" ".join)
def test_every_command_has_help_with_an_example(memcube, command):
    code, out, _ = memcube(*command, "--help", options=[])
    assert code == 0
    assert command == ["version"] or "Example" in out


def test_remembered_control_characters_do_not_reach_the_terminal(memcube):
    memcube("add", "\x1b]0;title\x07 \u202ereversed")
    assert "\x1b" not in memcube("search", "title")[1]
    assert safe("a\x1b[2J\u202e\n") == "a\\x1b[2J\\x202e\n"


def test_a_file_is_remembered_once(memcube, api, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("tea is hot\n\nice is cold")
    code, out, _ = memcube("ingest", str(path), "--user", "ann")
    assert (code, "2 added" in out) == (0, True)
    assert "sent by an earlier run" in memcube("ingest", str(path), "--user", "ann")[1]
    told = json.loads(memcube("ingest", str(path), "--user", "ann", "--again", "--json")[1])
    assert (told["added"], told["repeated"]) == (0, 2)
    assert {cube["user_id"] for cube in api.cubes.values()} == {"ann"}
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


def test_a_bad_file_is_refused_before_anything_is_sent(memcube, api, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"role": "user", "content": "a"}\n{"role": "user", "content": 3}')
    code, _, err = memcube("ingest", str(path))
    assert code == 1
    assert "chat.jsonl:2" in err
    assert api.requests == []


def test_an_evaluation_prints_a_table_and_writes_its_figures(memcube, api, tmp_path):
    talk = {
        "speaker_a": "Ann",
        "speaker_b": "Bob",
        "session_1_date_time": "1:56 pm on 8 May, 2023",
        "session_1": [{"speaker": "Ann", "dia_id": "D1:1", "text": "I like tea"}],
    }
    qa = [{"question": "who likes tea", "answer": "Ann", "evidence": ["D1:1"], "category": 4}]
    path = tmp_path / "locomo.json"
    path.write_text(json.dumps([{"sample_id": "conv-1", "conversation": talk, "qa": qa}]))
    out = tmp_path / "figures.json"
    code, printed, err = memcube(
        "eval", "locomo", str(path), "--json", str(out), "--systems", "hybrid,sparse"
    )
    assert code == 0, err
    assert "R@10" in printed
    assert "4 single-hop" in printed
    assert "…" not in printed
    figures = json.loads(out.read_text())
    assert list(figures) == ["memcube", "bm25"]
    assert figures["bm25"]["overall"]["recall@10"] == 100
    assert api.cubes == {}
    assert "conv-1" in memcube("eval", "locomo", str(path), "--conversation", "conv-9")[2]


def test_serve_passes_its_options_to_the_system(tmp_path):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "up.py").touch()
    given = {"--config": Path("c.yaml"), "--data": Path("d"), "--port": 0, "--left-out": None}
    command, environ = server_command(tmp_path, "cluster.up", given, ["a.b=1"])
    options = ["--config", "c.yaml", "--data", "d", "--port", "0"]
    assert command[1:] == ["-m", "cluster.up", *options, "a.b=1"]
    assert environ["PYTHONPATH"].startswith(str(tmp_path))


def test_figures_for_a_folder_that_is_not_there_are_refused_before_anything_is_asked(
    memcube, api, tmp_path
):
    path = tmp_path / "locomo.json"
    path.write_text("[]")
    assert memcube("eval", "locomo", str(path), "--json", str(tmp_path / "no" / "f"))[0] == 2
    assert api.requests == []


def test_a_refusal_of_the_file_system_is_one_line(memcube, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("tea")
    (tmp_path / "data").write_text("a file where the data folder should be")
    code, _, err = memcube("ingest", str(notes))
    assert code == 1
    assert err.count("\n") == 1


def test_lists_in_the_status_are_lines_too():
    told = {"shards": [{"shard": 0, "epoch": 1}], "names": ["a", "b"]}
    assert list(as_lines(told)) == ["shards.0.shard: 0", "shards.0.epoch: 1", "names: ['a', 'b']"]


def test_serve_of_the_clients_wheel_says_where_the_server_is(tmp_path):
    with pytest.raises(NotInstalled, match="make serve"):
        server_command(tmp_path, "cluster.up", {})
