"""A tour of the main job: ``python -m cluster.demo``, or ``make demo``.

Starts a system of its own on a free port with data in a temporary folder, takes an invented
conversation (``sample.jsonl``) through everything that a memory goes through, kills a part of the
system, and stops it. Each call is printed with its time, each step with the CPU time of all the
system's processes. The exit status is 0 only if every step's outcome was the expected one.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil
from rich.console import Console
from rich.markup import escape

from cluster.environment import temp_dir
from memcube.client import Hit, MemCubeClient
from memcube.errors import MemCubeError, NotFound, VersionMismatch
from memcube.evaluation.runner import CpuClock, cpu_clock_of
from memcube.ingest import read_file
from memcube.testing.process import SystemProcess

T = TypeVar("T")
SAMPLE = Path(__file__).with_name("sample.jsonl")
USER = "ines"
ASKED = (
    ("When does the exhibition open?", "5.1"),
    ("What is Ines's dog called?", "2.1"),
    ("Can Ines drive a car?", "3.8"),
    ("Why can't Tobias have seafood?", "3.5"),
)
"""Questions and the turn that answers each; the later ones share fewer words with their answer."""


MODES = ("dense", "sparse", "hybrid")


class Unexpected(Exception):
    """A step's outcome was not the expected one."""


@dataclass
class Tour:
    """What the steps share: where to print, whom to ask, and which turn became which memory."""

    system: SystemProcess
    console: Console = field(default_factory=lambda: Console(highlight=False))
    ids: dict[str, str] = field(default_factory=dict)
    """Ids of memories by the turn that they hold, such as ``3.5``."""

    _client: MemCubeClient | None = None
    _cpu: CpuClock | None = None

    @property
    def client(self) -> MemCubeClient:
        assert self._client is not None, "the first step makes it"
        return self._client

    def count_no_cpu(self) -> None:
        """From now on: the time of a process that ends is no longer in the sum."""
        self._cpu = None

    def connect(self) -> None:
        self._client = MemCubeClient(self.system.url, self.system.key)
        self._cpu = cpu_clock_of(self.system.pid)

    @contextmanager
    def step(self, number: int, title: str) -> Iterator[None]:
        """Print a step's heading, and what it cost when it is done."""
        self.console.print(f"\n[bold cyan]{number:>2}. {escape(title)}[/]")
        started, cpu_s = time.perf_counter(), self._cpu() if self._cpu else None
        yield
        cost = f"{(time.perf_counter() - started) * 1e3:,.0f} ms"
        if self._cpu is not None and cpu_s is not None:
            cost += f", {max(self._cpu() - cpu_s, 0.0) * 1e3:,.0f} CPU-ms"
        self.console.print(f"    [green]✓ as expected[/] [dim]({cost})[/]")

    def call(self, what: str, call: Callable[[], T]) -> T:
        """What a call gives; its time is printed."""
        started = time.perf_counter()
        try:
            return call()
        finally:
            took_ms = (time.perf_counter() - started) * 1e3
            self.console.print(f"    {escape(what):<60.60} {took_ms:>10,.1f} ms")

    def say(self, text: str) -> None:
        self.console.print(f"      [dim]{escape(text)}[/]", soft_wrap=True)

    def turns(self, hits: Sequence[Hit]) -> list[str]:
        """The turns that hits stand for; a memory that is no turn is given by its id."""
        names = {id: turn for turn, id in self.ids.items()}
        return [names.get(hit.id, hit.id) for hit in hits]


def expect(held: bool, otherwise: str) -> None:
    """Go on if it held.

    Raises:
        Unexpected: it did not.
    """
    if not held:
        raise Unexpected(otherwise)


def start(tour: Tour) -> None:
    """Start Ray, the actors and the gateway, on an empty data folder."""
    with tour.console.status("starting Ray, the embedder, a shard, the scheduler, the gateway …"):
        tour.call("start on a free port, with an empty data folder", tour.system.start)
    tour.connect()
    tour.say(f"{tour.system.url}, data in {tour.system.data_dir}")
    expect(tour.client.ready(), "the system said that it is not ready")


def add(tour: Tour) -> None:
    """Remember a conversation of two people, one memory a turn."""
    items = [record.item for record in read_file(SAMPLE).records]
    answer = tour.call(
        f"add {len(items)} turns of five days, searchable on return",
        lambda: tour.client.add_batch(items, wait="indexed", idempotency_key="demo"),
    )
    added = [one for result in answer.results for one in result.results]
    expect(len(added) == len(items), f"{len(items)} turns became {len(added)} memories")
    expect(all(one.event == "added" and one.indexed for one in added), "not all were added")
    for item, one in zip(items, added, strict=True):
        for message in item.messages or ():
            tour.ids[str(getattr(message, "id", None))] = one.id
    again = tour.call(
        "the same request once more, with its Idempotency-Key",
        lambda: tour.client.add_batch(items, wait="indexed", idempotency_key="demo"),
    )
    expect(
        [one.id for result in again.results for one in result.results] == list(tour.ids.values()),
        "the repeated request did not answer as the first time",
    )
    repeated = tour.call(
        "one of the turns again, as a request of its own",
        lambda: tour.client.add_batch(items[:1]),
    ).results[0]
    expect(repeated.results[0].event == "repeated", "an exact repeat was stored twice")
    cubes = tour.client.status()["cubes"]
    expect(sum(cubes.values()) == len(items), f"it holds {cubes}, not {len(items)}")
    tour.say(f"it holds {len(items)} memories: what was said twice is there once, and counted")


def search(tour: Tour) -> None:
    """Ask the same questions by meaning, by words, and by the learned fusion of both."""
    heading = "".join(f"{mode:>14}" for mode in MODES)
    tour.console.print(f"    {'place of the right turn':<32}{heading}")
    for query, right in ASKED:
        found = {m: tour.client.search(query, user_id=USER, mode=m) for m in MODES}
        turns = {mode: tour.turns(result.results) for mode, result in found.items()}
        places = {m: turns[m].index(right) + 1 if right in turns[m] else None for m in MODES}
        cells = (f"{places[m] or '–':>5} {found[m].took_ms['total']:5.0f} ms" for m in MODES)
        tour.console.print(f"    {query:<32}{''.join(cells)}")
        place = places["hybrid"]
        if place is None or place > 3:
            raise Unexpected(f"{query!r}: turn {right} is not among the first 3 of hybrid")
        hit = found["hybrid"][place - 1]
        tour.say(f"{hit.speaker}: {hit.text}")


def filtered(tour: Tour) -> None:
    """Look only where a filter allows: by speaker, time and metadata, inside the index."""
    where = {
        "speaker": "Tobias",
        "event_time": {"gte": "2026-04-01T00:00:00Z", "lt": "2026-08-01T00:00:00Z"},
        "not": {"metadata.session": 3},
    }
    tour.say(f"filter {where}")
    found = tour.call(
        "search 'a new job', filtered",
        lambda: tour.client.search("a new job", user_id=USER, filters=where, top_k=10),
    )
    turns = tour.turns(found.results)
    expect(bool(turns) and turns[0] == "4.6", f"the first hit is {turns[:1]}, not turn 4.6")
    expect(all(turn.startswith("4.") for turn in turns), f"the filter let through {turns}")
    expect(all(hit.speaker == "Tobias" for hit in found), "the filter let another speaker through")
    tour.say(f"{len(turns)} hits, all of June and by Tobias; the first: {found[0].text}")


def context(tour: Tour) -> None:
    """Make a block for a prompt, within a token budget."""
    asked = "What shall I cook when Tobias and Wen visit?"
    block = tour.call(
        "context of at most 150 tokens",
        lambda: tour.client.context(asked, user_id=USER, token_budget=150),
    )
    for line in block.context.splitlines():
        tour.say(line)
    tour.say(f"({block.num_tokens} tokens, {len(block.ids)} memories, oldest first)")
    expect(0 < block.num_tokens <= block.budget, "the block is empty or over its budget")
    expect(tour.ids["5.6"] in block.ids, "what the two don't eat is not in the block")


def change(tour: Tour) -> None:
    """Change a fact; read the old version by number and by time; go back."""
    client = tour.client
    id = client.add("Tobias works at a bank in Ghent.", user_id=USER, kind="fact").ids[0]
    before = datetime.now(UTC)
    new = tour.call(
        "change its text, if it still is at version 1",
        lambda: client.update(id, text="Tobias teaches physics in Leuven.", expected_version=1),
    )
    expect(new.version == 2, f"the change made version {new.version}")
    try:
        tour.call(
            "the same from somebody who has not seen the change",
            lambda: client.update(id, text="Tobias bakes bread.", expected_version=1),
        )
    except VersionMismatch as refused:
        tour.say(f"refused: {refused}")
    else:
        raise Unexpected("a change of an old version went through")
    old = tour.call("read it as it was before the change", lambda: client.get(id, as_of=before))
    expect(old.text == "Tobias works at a bank in Ghent.", f"it was {old.text!r}")
    back = tour.call("go back to version 1", lambda: client.cubes.rollback(id, 1))
    expect((back.version, back.text) == (3, old.text), f"version {back.version} says {back.text!r}")
    for version in tour.call("all versions", lambda: client.history(id)).versions:
        tour.say(f"v{version.version}  {version.reason:<13}  {version.text}")


def compose(tour: Tour) -> None:
    """Hold memories together, search inside; make one of two, and see where it came from."""
    client = tour.client
    pixel = [tour.ids[turn] for turn in ("2.1", "2.3", "2.7", "4.5")]
    album = tour.call(
        "compose four turns: 'Pixel'",
        lambda: client.cubes.compose(pixel, title="Pixel", user_id=USER),
    )
    inside = tour.call(
        "search 'museum' inside it", lambda: client.search("museum", cube_ids=[album.id])
    )
    expect({hit.id for hit in inside} <= set(pixel), "a hit is no member of the composite")
    expect(tour.turns(inside.results)[0] == "2.7", "the turn about the catalogue is not first")
    parents = [tour.ids["3.5"], tour.ids["5.6"]]
    text = "Tobias must not eat shellfish; Wen eats no meat."
    fused = tour.call("fuse two turns into one fact", lambda: client.cubes.fuse(parents, text=text))
    tour.ids["fused"] = fused.id
    lineage = tour.call("its lineage", lambda: client.cubes.lineage(fused.id))
    for edge in lineage.ancestors:
        tour.say(f"{edge.relation} from v{edge.version}: {client.get(edge.id).text}")
    expect({edge.id for edge in lineage.ancestors} == set(parents), "it names other parents")
    expect(
        all(client.get(id).state == "merged" for id in parents), "a parent is not in state merged"
    )
    found = tour.call(
        "search 'What must Wen and Tobias not eat?'",
        lambda: client.search("What must Wen and Tobias not eat?", user_id=USER, top_k=40),
    )
    turns = tour.turns(found.results)
    expect(turns[0] == "fused", f"the first hit is {turns[0]}, not the fused fact")
    expect(not {"3.5", "5.6"} & set(turns), "a merged memory is still found")


def delete(tour: Tour) -> None:
    """Forget a memory, and see that no way leads to it."""
    client, id = tour.client, tour.ids["fused"]
    tour.call("delete the fused fact", lambda: client.delete(id))
    ways: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("its id", lambda: client.get(id)),
        ("an old version", lambda: client.get(id, version=1)),
        ("its history", lambda: client.history(id)),
        ("its lineage", lambda: client.cubes.lineage(id)),
    )
    for way, ask in ways:
        try:
            ask()
        except NotFound:
            continue
        raise Unexpected(f"it is still reached by {way}")
    tour.say("no answer by id, version, history or lineage (404)")
    for mode in ("hybrid", "dense", "sparse"):
        found = client.search("shellfish and meat", user_id=USER, mode=mode, top_k=50)
        expect(id not in [hit.id for hit in found], f"a {mode} search still finds it")
    expect(all(cube.id != id for cube in client.iterate(user_id=USER)), "a listing still holds it")
    tour.say("not found by any search, not listed")


def kill(tour: Tour) -> None:
    """``kill -9`` the process that holds the index; its data comes back, and new adds go in."""
    client = tour.client
    tour.count_no_cpu()
    query, right = ASKED[1]
    before = [hit.id for hit in client.search(query, user_id=USER)]
    expect(tour.system.kill_one("ray::QdrantActor") == 1, "there is not one QdrantActor")
    after = tour.call(
        "search, from the kill until it is answered again",
        lambda: client.search(query, user_id=USER),
    )
    expect([hit.id for hit in after] == before, "the answer is another one than before")
    tour.say(
        f"the same {len(before)} hits, turn {right} at place {before.index(tour.ids[right]) + 1}"
    )
    expect(tour.system.kill_one("ray::QdrantActor") == 1, "there is not one QdrantActor")
    note = tour.call(
        "add, from another kill until it is acknowledged",
        lambda: client.add("Pixel is afraid of thunder.", user_id=USER),
    )
    found = tour.call("search for it", lambda: client.search("thunder", user_id=USER))
    expect(found[0].id == note.ids[0], "what was added during the kill is not found")


def stop(tour: Tour) -> None:
    """Stop it as Ctrl-C does; nothing is left running, the data stays."""
    tree = psutil.Process(tour.system.pid).children(recursive=True)
    tour.client.close()
    tour.call(f"Ctrl-C; {len(tree)} processes", tour.system.stop)
    _, alive = psutil.wait_procs(tree, timeout=5)
    expect(not alive, f"still running: {[process.pid for process in alive]}")
    expect((tour.system.data_dir / "catalog.db").exists(), "the catalog is gone")


STEPS: tuple[tuple[str, Callable[[Tour], None]], ...] = (
    ("Start the system", start),
    ("Add a conversation", add),
    ("Search it in three ways", search),
    ("Search with a filter", filtered),
    ("Make a context block for a prompt", context),
    ("Change, look back, roll back", change),
    ("Compose and fuse, with lineage", compose),
    ("Delete", delete),
    ("kill -9 the QdrantActor, twice", kill),
    ("Stop", stop),
)


def run(tour: Tour) -> bool:
    """All steps; whether each one's outcome was as expected. The system is stopped in any case."""
    started = time.perf_counter()
    try:
        for number, (title, work) in enumerate(STEPS, 1):
            with tour.step(number, title):
                work(tour)
    except (Unexpected, MemCubeError, RuntimeError) as failed:
        tour.console.print(f"    [bold red]✗ not as expected:[/] {escape(str(failed))}")
        return False
    finally:
        tour.system.stop()
    took_s = time.perf_counter() - started
    tour.console.print(f"\n[bold]{len(STEPS)} steps as expected[/] in {took_s:.1f} s")
    return True


def main(arguments: list[str] | None = None) -> int:
    """Run the tour; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the data folder there")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="memcube-demo-"))
    tour = Tour(SystemProcess(folder / "data"))
    keep = given.keep
    try:
        held = run(tour)
        keep = keep or not held
        if keep:
            tour.console.print(f"the data, and the system's log, are left in {folder}")
    except KeyboardInterrupt:
        tour.console.print("\nstopped")
        held = False
    finally:
        shutil.rmtree(temp_dir(tour.system.data_dir), ignore_errors=True)
        if not keep:
            shutil.rmtree(folder)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
