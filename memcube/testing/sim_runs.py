"""Many seeds of the simulation, in parts that can be kept in a file, so that a run goes on after a stop.

    python -m memcube.testing.simulation --seeds 0:10000 --into parts.jsonl

A part in the file counts only for the same code and the same number of operations.
"""

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import memcube
from memcube.testing.simulation import NUM_OPS, simulate

PART = 50
_CODE = ("*.py", "catalog/*.py", "scheduler/**/*.py", "testing/sim*.py", "testing/memory_books.py")
_NOT_SIMULATED = ("sim_bugs.py", "sim_runs.py")
_TELL_EVERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What some seeds came to. ``broken`` gives by seed the first invariant that broke, and when."""

    first: int
    stop: int
    num_ops: int
    code: str
    num_events: int = 0
    cpu_s: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.stop - self.first


def run_part(first: int, stop: int, num_ops: int, code: str) -> Part:
    """Simulate seeds."""
    counts: Counter[str] = Counter()
    broken: dict[str, str] = {}
    num_events, started_s = 0, time.process_time()
    for seed in range(first, stop):
        outcome = simulate(seed, num_ops=num_ops)
        counts += outcome.counts
        num_events += outcome.num_events
        if outcome.error is not None:
            broken[str(seed)] = f"at {outcome.at_s:.3f} s: {outcome.error}"
    return Part(
        first=first,
        stop=stop,
        num_ops=num_ops,
        code=code,
        num_events=num_events,
        cpu_s=time.process_time() - started_s,
        counts=dict(counts),
        broken=broken,
    )


def code_digest() -> str:
    """What is simulated and what simulates it."""
    root = Path(memcube.__file__).parent
    paths = [path for pattern in _CODE for path in root.glob(pattern)]
    found = hashlib.sha256()
    for path in sorted(path for path in paths if path.name not in _NOT_SIMULATED):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def run_parts(
    seeds: range, *, num_ops: int = NUM_OPS, processes: int = 1, into: Path | None = None
) -> Iterator[Part]:
    """All parts of some seeds, those first that the file has. Each that is new is added to it when it is done."""
    code = code_digest()
    wanted = [(at, min(at + PART, seeds.stop)) for at in range(seeds.start, seeds.stop, PART)]
    for part in _read(into):
        if (part.first, part.stop) in wanted and (part.num_ops, part.code) == (num_ops, code):
            wanted.remove((part.first, part.stop))
            yield part
    if processes == 1:
        for first, stop in wanted:
            yield _kept(run_part(first, stop, num_ops, code), into)
        return
    # A fork of a process with threads may hang.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        started = [pool.submit(run_part, *one, num_ops, code) for one in wanted]
        try:
            for done in as_completed(started):
                yield _kept(done.result(), into)
        finally:
            pool.shutdown(cancel_futures=True)


def _read(path: Path | None) -> list[Part]:
    if path is None or not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(Part(**json.loads(line)))
        except json.JSONDecodeError:
            continue  # a run was stopped while it wrote this
    return found


def _kept(part: Part, path: Path | None) -> Part:
    if path is not None:
        with path.open("a") as file:
            file.write("\n" * (file.tell() > 0) + json.dumps(asdict(part)))
    return part


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m memcube.testing.simulation",
        description="Simulate the scheduler among faults.",
    )
    parser.add_argument("--seeds", default="0:300", help="FIRST:LAST, or one seed")
    parser.add_argument("--ops", type=int, default=NUM_OPS, help="operations of a seed")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--into", type=Path, help="keep the parts in this file, and go on with it")
    parser.add_argument("--stop", action="store_true", help="stop where a seed broke")
    given = parser.parse_args()
    first, _, last = given.seeds.partition(":")
    seeds = range(int(first), int(last) if last else int(first) + 1)
    total = Progress(len(seeds))
    parts = run_parts(seeds, num_ops=given.ops, processes=given.processes, into=given.into)
    for part in parts:
        total.add(part)
        for seed, error in part.broken.items():
            print(f"seed {seed} {error}", flush=True)
        if part.broken and given.stop:
            break
    print(total)
    for seed in sorted(total.broken):
        print(f"replay: python -m memcube.testing.simulation --seeds {seed} --ops {given.ops}")
    sys.exit(1 if total.broken else 0)


class Progress:
    """What is done of a run, and how long the rest will take."""

    def __init__(self, num_seeds: int) -> None:
        self._num_seeds = num_seeds
        self.num_done = self.num_events = 0
        self.cpu_s = 0.0
        self.counts: Counter[str] = Counter()
        self.broken: list[int] = []
        self._started_s = self._told_s = time.monotonic()
        self._num_new = 0

    def add(self, part: Part) -> None:
        """Count a part, and tell of it now and then."""
        self.num_done += len(part)
        self.num_events += part.num_events
        self.cpu_s += part.cpu_s
        self.counts += Counter(part.counts)
        self.broken += [int(seed) for seed in part.broken]
        now_s = time.monotonic()
        if now_s - self._started_s < 0.5:
            self._num_new = 0  # what the file had came at once
            return
        self._num_new += len(part)
        if now_s - self._told_s >= _TELL_EVERY_S:
            self._told_s = now_s
            per_s = self._num_new / (now_s - self._started_s)
            print(
                f"{self.num_done:,} of {self._num_seeds:,} seeds, {per_s * 60:,.0f} a minute, "
                f"{(self._num_seeds - self.num_done) / per_s / 60:.1f} min left, "
                f"{len(self.broken)} broken",
                file=sys.stderr,
                flush=True,
            )

    def __str__(self) -> str:
        each_ms = self.cpu_s / max(self.num_done, 1) * 1e3
        counts = ", ".join(f"{name}: {count:,}" for name, count in sorted(self.counts.items()))
        return (
            f"{self.num_done} seeds, {self.num_events:,} events, {self.cpu_s:.1f} CPU-s "
            f"({each_ms:.1f} ms a seed), {len(self.broken)} broken\n{counts}"
        )
