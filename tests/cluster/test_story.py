"""The scheduler's story on a served system with two nodes joined: memories that are used become KV, a set is proposed
for consolidation, one node is drained and another killed, while a chat goes on; the journal tells it all.

``pytest tests/cluster/test_story.py -s`` shows the journal.
"""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI, OpenAIError

from cluster.testing import joining, kill_joined, node_of
from memcube.catalog import Catalog
from memcube.client import Event, MemCubeClient
from memcube.errors import MemCubeError
from memcube.ids import TenantId
from memcube.testing.process import SystemProcess
from memcube.testing.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TENANT = TenantId("default")
WITHIN_S = 240.0
RETRY_S = 1.0
SETTINGS = [
    "scheduler.interval_s=0.5",
    "scheduler.pending_grace_s=1",
    "scheduler.consents=all",
    "scheduler.profile={stable_s: 0, settle_s: 2, rate: 0.5, lasting_s: 0, min_cubes: 3}",
]
WALK = "On the first day of spring Ann walked along the river with her old dog Rex. " * 8
FACTS = ("Ann likes to drink kumquat tea.", "Ann lives in Brellin.", "Ann plays the zither.")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemProcess]:
    with SystemProcess(tmp_path_factory.mktemp("story") / "data", SETTINGS, chat=True) as running:
        yield running


class Chats:
    """Asks the same question until it is stopped; what fails is asked once more, a second later."""

    def __init__(self, system: SystemProcess) -> None:
        self._openai = OpenAI(
            base_url=f"{system.url}/v1", api_key=system.key, max_retries=0, timeout=60
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.told: list[dict[str, Any]] = []
        self.failed_once: list[str] = []
        self.failed_twice: list[str] = []
        self.longest_s = 0.0

    def __enter__(self) -> "Chats":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=120)

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            began = time.monotonic()
            try:
                self._ask()
            except OpenAIError as failed:
                self.failed_once.append(str(failed))
                time.sleep(RETRY_S)
                try:
                    self._ask()
                except OpenAIError as again:
                    self.failed_twice.append(str(again))
            self.longest_s = max(self.longest_s, time.monotonic() - began)

    def _ask(self) -> None:
        answer = self._openai.chat.completions.create(
            model="SmolLM2-135M-Instruct",
            messages=[{"role": "user", "content": "What is Ann's dog called?"}],
            max_tokens=4,
            temperature=0,
            extra_body={"memory": {"user_id": "ann"}},
        )
        assert answer.model_extra is not None
        self.told.append(answer.model_extra["memory"])

    def go_on(self) -> None:
        """Return when two more were answered."""
        before = len(self.told)
        until(lambda: len(self.told) > before + 1, within_s=WITHIN_S, what="an answer")


def whole_journal(client: MemCubeClient) -> list[Event]:
    """Oldest first."""
    events: list[Event] = []
    before = None
    while True:
        page = client.scheduler.journal(limit=100, before=before)
        events += page.events
        if (before := page.next) is None:
            return events[::-1]


def place(where: Any) -> str:
    return "" if where is None else f"{where.tier} {where.location}"


def show(events: list[Event]) -> None:
    for event in events:
        if event.type == "cluster":
            about = event.node or ""
        else:
            about = f"{event.cube or 'all of the tenant'}: {place(event.source)} → {place(event.target)}"
        by = f"{event.policy}: " if event.policy else ""
        print(
            f"{event.created_at:%H:%M:%S} {event.kind} {event.state}  {about}  {by}{event.reason}"
        )


def test_the_journal_tells_what_became_of_memories_and_nodes(system: SystemProcess):
    catalog = Catalog.open(f"sqlite:///{system.data_dir / 'catalog.db'}")
    with (
        MemCubeClient(system.url, system.key) as client,
        joining(system, "--name", "b", "--label", "zone=west"),
        joining(system, "--name", "c") as third,
    ):

        def has_shard(name: str) -> bool:
            return bool(client.nodes.get(name)["shards"])

        for name in ("b", "c"):
            until(
                lambda n=name: has_shard(n), within_s=WITHIN_S, passing=(MemCubeError,), what=name
            )
        (walk,) = client.add(WALK, user_id="ann").ids
        ids = {walk, *(client.add(fact, user_id="ann", kind="fact").ids[0] for fact in FACTS)}
        with Chats(system) as chats:
            chats.go_on()

            def ended(**wanted: Any) -> Event | None:
                for event in client.scheduler.journal(limit=100).events:
                    if event.ended and all(getattr(event, k) == v for k, v in wanted.items()):
                        return event
                return None

            hot = until(
                lambda: ended(policy="promotion", cube=walk, state="done"), within_s=WITHIN_S
            )
            assert (hot.kind, hot.target.tier) == ("copy", "activation")

            def proposed() -> Event | None:
                tasks = client.scheduler.tasks(limit=100).events
                return next((t for t in tasks if t.kind == "consolidate" and t.ended), None)

            task = until(proposed, within_s=WITHIN_S, what="a proposal")
            assert (task.state, task.result["outcome"]) == ("done", "proposed"), task
            assert set(task.cubes) <= ids

            client.nodes.move_tenant(TENANT, to="zone=west")
            until(lambda: node_of(catalog, TENANT) == "b", within_s=WITHIN_S, what="the move")
            chats.go_on()
            client.nodes.drain("b")
            until(lambda: client.nodes.get("b")["state"] == "drained", within_s=WITHIN_S)
            chats.go_on()
            if node_of(catalog, TENANT) != "c":
                client.nodes.move_tenant(TENANT, to="c")
                until(lambda: node_of(catalog, TENANT) == "c", within_s=WITHIN_S)
            assert chats.failed_twice == []
            kill_joined(third)
            until(
                lambda: node_of(catalog, TENANT) != "c",
                within_s=WITHIN_S,
                what="the lost node's shard elsewhere",
            )
            chats.go_on()
            until(lambda: client.nodes.get("c")["state"] == "down", within_s=WITHIN_S)
        assert {hit.id for hit in client.search("kumquat tea", user_id="ann").results} <= ids
        assert "exact_kv" in {cube["form"] for told in chats.told for cube in told["cubes"]}
        journal = whole_journal(client)
    catalog.close()
    show(journal)
    print(
        f"{len(chats.told)} answers, {len(chats.failed_once)} repeated, the longest took {chats.longest_s:.1f} s"
    )
    happened = [(event.kind, event.node) for event in journal if event.type == "cluster"]
    assert {("node_up", "b"), ("node_up", "c"), ("leader", None)} <= set(happened)
    assert happened.index(("node_drains", "b")) < happened.index(("node_down", "c"))
    told = {(event.kind, event.policy) for event in journal if event.state == "done"}
    assert {("copy", "promotion"), ("copy", "operator"), ("copy", "spread")} <= told
    assert ("consolidate", "consolidation") in told
    assert ("drop", "leftovers") in told
