"""The scheduler over a running system with the packaged model: KV is built, struck and built again, and a
successor leads soon after a kill."""

from collections.abc import Iterator

import pytest

from memcube.client import Event, MemCubeClient
from memcube.errors import MemCubeError
from memcube.testing.process import SystemProcess
from memcube.testing.waiting import until

pytestmark = pytest.mark.long

RESTARTING = (MemCubeError,)
"""A part that restarts may not answer."""
TEXT = "On the first day of spring Ann walked along the river with her old dog Rex. " * 12
SETTINGS = [
    "scheduler.interval_s=0.5",
    "scheduler.compare_s=2",
    "scheduler.profile={stable_s: 0, settle_s: 2, rate: 0.5}",
    "activation.composing=off",
]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemProcess]:
    folder = tmp_path_factory.mktemp("moves") / "data"
    with SystemProcess(folder, SETTINGS, chat=True) as running:
        yield running


@pytest.fixture
def client(system: SystemProcess) -> Iterator[MemCubeClient]:
    with MemCubeClient(system.url, system.key) as client:
        yield client


def last(client: MemCubeClient, id: str, policy: str) -> Event | None:
    """The last action on a memory, if it is this policy's and has ended."""
    found = client.scheduler.journal(cube=id, limit=1).events
    return found[0] if found and found[0].ended and found[0].policy == policy else None


@pytest.fixture
def hot(client: MemCubeClient) -> str:
    """A memory that is used much."""
    (id,) = client.add(TEXT, user_id="ann").ids
    for _ in range(30):
        client.search("the dog at the river", user_id="ann")
    return id


def test_kv_of_what_is_used_is_built_lost_with_its_engine_struck_and_built_again(
    system: SystemProcess, client: MemCubeClient, hot: str
):
    built = until(lambda: last(client, hot, "promotion"), within_s=240, passing=RESTARTING)
    assert (built.state, built.target.tier) == ("done", "activation")
    places = [one for one in client.cubes.get(hot).residency if one.tier == "activation"]
    assert places[0].location == built.target.location

    def used_bytes() -> int:
        places = client.scheduler.status()["places"]
        return sum(one["used_bytes"] for one in places if one["tier"] == "activation")

    assert until(used_bytes, within_s=120, passing=RESTARTING)
    parts = client.scheduler.status()["parts"]
    assert {name: part["error"] for name, part in parts.items() if part["error"]} == {}

    assert until(lambda: system.kill_one("ray::KVCacheActor"), within_s=60, passing=RESTARTING)
    seen: set[str] = set()

    def again() -> bool:
        events = client.scheduler.journal(cube=hot).events
        seen.update(event.id for event in events if event.policy == "reconcile")
        newest = events[0]
        return bool(seen) and newest.policy == "promotion" and newest.state == "done"

    assert until(again, within_s=240, passing=RESTARTING)


def test_a_successor_leads_soon_after_a_kill(system: SystemProcess, client: MemCubeClient):
    before = until(lambda: client.scheduler.status()["epoch"], within_s=120, passing=RESTARTING)
    assert until(lambda: system.kill_one("ray::SchedulerActor"), within_s=60, passing=RESTARTING)

    def leads() -> bool:
        told = client.scheduler.status()
        return (told["epoch"] or 0) > before and told["rounds"] > 0

    # That it takes less than ten seconds is measured by `make bench-kills`.
    assert until(leads, within_s=60, passing=RESTARTING)
