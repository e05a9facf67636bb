"""The scheduler: plans over up to a million cubes, the simulation, and whether its retention pays on a trace.

    python -m benchmarks.bench_scheduler [--parts plan,simulation,tiering] [--seeds 0:10000] [--no-results]

Each size of a plan runs in a process of its own, for its peak memory. Figures of parts that are not run
stay as they were. The simulation has a result file of its own; with ``--into FILE`` it goes on after a stop. What is modelled in ``tiering``: requests of the trace come at its times to engines that serve
one at a time, the next free one takes the next; a block of 512 tokens takes 36.6 ms to prefill (14,000
tokens a second), one that is resident 2.7 ms to load (64 MiB at 25 GB/s). There are as few engines as carry
the trace without any cache. Time to first token is waiting, loading and prefill.
"""

import argparse
import heapq
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_trace import TRACE
from benchmarks.plots import can_draw, svg
from benchmarks.reference_caches import Belady, Cache, Lru
from benchmarks.results import RESULTS, ROOT, Figure, show, write_results
from memcube.ids import CubeId, TenantId
from memcube.policies.replay import Request, hits, read_mooncake
from memcube.policies.retention import Retention
from memcube.scheduler.actions import Medium, Place, Tier
from memcube.scheduler.enact import Enactor
from memcube.scheduler.planner import Planner
from memcube.scheduler.world import Capacity, Node, World
from memcube.testing.sim_bugs import PLANTED
from memcube.testing.sim_runs import Progress, run_parts
from memcube.testing.simulation import NUM_OPS, simulate

PARTS = ("plan", "simulation", "tiering")
SIZES = (10_000, 100_000, 1_000_000)
CAPACITIES = (1_000, 5_859)
MOST_FOR_A_BUG = 1_000
_FAULTS = (
    "scheduler crashes",
    "pauses",
    "node crashes",
    "nodes lost",
    "damages",
    "evictions",
)
PREFILL_S, LOAD_S = 512 / 14_000, 64 * 2**20 / 25e9
_NOW = 1.8e9
_FULL_PLANS = 3
"""The same plan so often: the fastest counts, as others use the machine."""
_STEADY_ROUNDS, _USED_A_ROUND = 20, 1_000
_FIGURE = ROOT / "docs" / "scheduler-plan.svg"


# -- plans -----------------------------------------------------------------------------------------


def build_world(num_cubes: int, *, num_nodes: int = 4, num_tenants: int = 100) -> World:
    """Cubes of ages, sizes and uses as they come, spread over nodes."""
    rng = np.random.default_rng(0)
    world = World(kv_bytes_per_token=23_000)
    for n in range(num_nodes):
        world.set_node(Node(name=f"n{n}"))
        world.set_place(Place(Tier.PLAINTEXT, Medium.DISK, f"n{n}"), Capacity(num_bytes=1 << 40))
        world.set_place(
            Place(Tier.ACTIVATION, Medium.DEVICE, f"n{n}"), Capacity(num_bytes=20 << 30)
        )
        world.set_place(Place(Tier.ACTIVATION, Medium.HOST, f"n{n}"), Capacity(num_bytes=200 << 30))
    tenants = [TenantId(f"t{n}") for n in range(num_tenants)]
    for tenant in tenants:
        world.tenants.number(tenant)
        for user in range(50):
            world.scopes.number((tenant, f"u{user}"))
    world.labels.number(frozenset())
    numbers = np.arange(num_cubes)
    age = rng.exponential(30 * 86_400, num_cubes)
    rows = world.load(
        [(tenants[n % num_tenants], CubeId(f"{n:036d}")) for n in range(num_cubes)],
        {
            "tenant": numbers % num_tenants,
            "scope": numbers % num_tenants * 50 + rng.integers(0, 50, num_cubes),
            "labels": 0,
            "state": 1,
            "kind": rng.integers(0, 5, num_cubes),
            "sensitivity": rng.integers(0, 3, num_cubes),
            "searchable": True,
            "consents": rng.random(num_cubes) < 0.5,
            "session_bound": rng.random(num_cubes) < 0.2,
            "version": 1,
            "indexed_version": 1,
            "rate": rng.exponential(0.5, num_cubes),
            "tokens": rng.integers(10, 800, num_cubes),
            "num_bytes": rng.integers(500, 5_000, num_cubes),
            "used_at": _NOW - rng.exponential(5 * 86_400, num_cubes),
            "changed_at": _NOW - age,
            "created_at": _NOW - age,
            "expires_at": np.where(
                rng.random(num_cubes) < 0.05, _NOW + rng.exponential(30 * 86_400, num_cubes), np.inf
            ),
        },
    )
    for n in range(num_nodes):
        here = rows[rows % num_nodes == n]
        place = world.places.get(Place(Tier.PLAINTEXT, Medium.DISK, f"n{n}"))
        sizes, versions = world.cubes["num_bytes"][here], world.cubes["version"][here]
        world.load_held(here, place, sizes, versions)
    return world


def measure_plan(num_cubes: int) -> dict[str, float]:
    """One size, in this process: the first plan, and rounds in which a thousand cubes were used."""
    world, planner = build_world(num_cubes), Planner()
    full, plan = [], planner.plan(world, _NOW, full=True)
    for _ in range(_FULL_PLANS):
        started_s = time.process_time()
        plan = planner.plan(world, _NOW, full=True)
        full.append(time.process_time() - started_s)
    planner.settle(world, plan)
    rng, steady = np.random.default_rng(1), []
    for step in range(_STEADY_ROUNDS):
        now = _NOW + 2.0 * (step + 1)
        for row in rng.integers(0, num_cubes, _USED_A_ROUND).tolist():
            world.use(row, 1, now)
        started_s = time.process_time()
        planner.settle(world, planner.plan(world, now))
        steady.append(time.process_time() - started_s)
    return {
        "full_s": min(full),
        "num_actions": len(plan.actions),
        "steady_ms": float(np.median(steady)) * 1e3,
        "slowest_ms": max(steady) * 1e3,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def plan_figures() -> tuple[list[Figure], dict[str, Any]]:
    found: dict[int, dict[str, float]] = {}
    for size in SIZES:
        command = [sys.executable, "-m", "benchmarks.bench_scheduler", "--one", str(size)]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found[size] = json.loads(told.stdout)
        print(size, found[size], flush=True)
    figures = []
    for size, got in found.items():
        largest = size == SIZES[-1]
        figures += [
            Figure(
                name=f"plan over {size:,} cubes",
                value=got["full_s"],
                unit="CPU-s",
                goal="<= 5" if largest else None,
                beside=f"{got['num_actions']:,.0f} actions",
            ),
            Figure(
                name=f"peak memory with {size:,} cubes",
                value=got["peak_mb"],
                unit="MB",
                goal="<= 2000" if largest else None,
            ),
            Figure(
                name=f"steady round over {size:,} cubes, median",
                value=got["steady_ms"],
                unit="CPU-ms",
                goal="<= 200" if largest else None,
                beside=f"slowest of {_STEADY_ROUNDS}: {got['slowest_ms']:.0f}",
            ),
        ]
    for small, large in pairwise(SIZES):
        figures.append(
            Figure(
                name=f"plan over {large:,} for one over {small:,}",
                value=found[large]["full_s"] / found[small]["full_s"],
                unit="×",
                goal=f"<= {large / small:g}",
            )
        )
    return figures, {str(size): got for size, got in found.items()}


def draw(sizes: Sequence[int], found: dict[str, Any], path: Path) -> None:
    """Time against the number of cubes, as SVG."""
    if not can_draw(path):
        return
    with svg(path, (7, 4)) as (canvas, axes):
        full_ms = [found[str(size)]["full_s"] * 1e3 for size in sizes]
        steady_ms = [found[str(size)]["steady_ms"] for size in sizes]
        axes.plot(sizes, full_ms, "o-", color="black", label="all cubes are looked at")
        axes.plot(sizes, steady_ms, "o--", color="black", label="1,000 cubes were used since")
        linear = [full_ms[0] * size / sizes[0] for size in sizes]
        axes.plot(sizes, linear, color="tab:gray", linewidth=1, label="linear")
        axes.set_xlabel("cubes")
        axes.set_ylabel("CPU-ms of a plan")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        canvas.legend(loc="outside right upper", frameon=False)


# -- the simulation --------------------------------------------------------------------------------


def simulation_figures(
    seeds: range, *, processes: int = 1, into: Path | None = None
) -> tuple[list[Figure], dict[str, Any]]:
    """Seeds without a bug, and by which seed each planted one is found."""
    total = Progress(len(seeds))
    for part in run_parts(seeds, num_ops=NUM_OPS, processes=processes, into=into):
        total.add(part)
        for seed, error in part.broken.items():
            print(f"seed {seed} {error}", flush=True)
    found = {bug.__name__: _found_at(bug) for bug in PLANTED}
    counts = total.counts
    faults = {name: counts[name] for name in _FAULTS}
    lost, again = counts["drops whose other copy was lost"], counts["of them listed again"]
    figures = [
        Figure(name="simulated seeds", value=total.num_done, unit="", goal=">= 10000"),
        Figure(name="operations of each", value=NUM_OPS, unit="", goal=">= 200"),
        Figure(name="seeds that broke an invariant", value=len(total.broken), unit="", goal="<= 0"),
        Figure(name="events in all", value=total.num_events, unit=""),
        Figure(
            name="faults that were injected, beside messages lost, late and doubled",
            value=sum(faults.values()),
            unit="",
            beside=", ".join(f"{name}: {count:,}" for name, count in faults.items()),
        ),
        Figure(
            name="drops whose other copy was lost around their commit",
            value=lost,
            unit="",
            beside=f"listed again: {again:,}",
        ),
        Figure(name="a seed", value=total.cpu_s / total.num_done * 1e3, unit="CPU-ms"),
        Figure(name="planted bugs", value=len(PLANTED), unit=""),
        Figure(
            name="seeds until the last planted bug is found",
            value=max(found.values()) + 1,
            unit="",
            goal="<= 100",
            beside=", ".join(f"{name}: seed {seed}" for name, seed in found.items()),
        ),
    ]
    details = {
        "seeds": f"{seeds.start}:{seeds.stop}",
        "broken": sorted(total.broken),
        "faults": faults,
        "planted bugs found at seed": found,
        "counts": dict(sorted(counts.items())),
    }
    return figures, details


def _found_at(bug: type[Enactor]) -> int:
    """The first seed that finds a planted bug, of the seeds from 0 on."""
    return next(
        seed
        for seed in range(MOST_FOR_A_BUG)
        if simulate(seed, num_ops=NUM_OPS, enactor_class=bug).error is not None
    )


# -- does tiering pay ------------------------------------------------------------------------------


def reference_hits(requests: Iterable[Request], cache: Cache) -> list[int]:
    """How many of each request's first blocks a cache has that takes in all that is used."""
    found = []
    for request in requests:
        blocks = request.blocks
        found.append(next((n for n, key in enumerate(blocks) if key not in cache), len(blocks)))
        for key in reversed(blocks):
            cache.use(key)
    return found


def first_tokens_s(requests: Sequence[Request], found: Sequence[int], num_engines: int) -> float:
    """The mean time to first token."""
    free_at = [0.0] * num_engines
    total_s = 0.0
    for request, num_hits in zip(requests, found, strict=True):
        begun_s = max(heapq.heappop(free_at), request.at_s)
        done_s = begun_s + num_hits * LOAD_S + (len(request.blocks) - num_hits) * PREFILL_S
        heapq.heappush(free_at, done_s)
        total_s += done_s - request.at_s
    return total_s / len(requests)


def work_s(requests: Sequence[Request], found: Sequence[int]) -> float:
    """What all engines together do."""
    num_hits = sum(found)
    num_blocks = sum(len(request.blocks) for request in requests)
    return num_hits * LOAD_S + (num_blocks - num_hits) * PREFILL_S


def tiering_figures(trace: Path) -> tuple[list[Figure], dict[str, Any]]:
    requests = read_mooncake(trace)
    uses = [request.blocks[::-1] for request in requests]
    none = [0] * len(requests)
    num_engines = int(work_s(requests, none) / requests[-1].at_s) + 1
    figures, details = [], {"engines": num_engines, "without a cache": 0.0}
    details["without a cache"] = first_tokens_s(requests, none, num_engines)
    for capacity in CAPACITIES:
        found = {
            "ours": [n for _, n in hits(requests, Retention(capacity))],
            "LRU": reference_hits(requests, Lru(capacity)),
            "Belady": reference_hits(requests, Belady(capacity, uses)),
        }
        mean_s = {name: first_tokens_s(requests, one, num_engines) for name, one in found.items()}
        works = {name: work_s(requests, one) for name, one in found.items()}
        details[str(capacity)] = mean_s
        print(capacity, mean_s, flush=True)
        figures += [
            Figure(
                name=f"modelled time to first token over LRU's, {capacity:,} blocks",
                value=mean_s["ours"] / mean_s["LRU"],
                unit="×",
                goal="<= 0.8",
                beside=f"Belady {mean_s['Belady'] / mean_s['LRU']:.3f}; "
                + ", ".join(f"{name} {value:.2f} s" for name, value in mean_s.items()),
            ),
            Figure(
                name=f"work of the engines over LRU's, {capacity:,} blocks",
                value=works["ours"] / works["LRU"],
                unit="×",
                beside=f"Belady {works['Belady'] / works['LRU']:.3f}",
            ),
        ]
    return figures, details


# -- all -------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="The scheduler's figures.")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seeds", default="0:10000", help="FIRST:LAST")
    parser.add_argument("--processes", type=int, default=1, help="of the simulation")
    parser.add_argument("--into", type=Path, help="keep the simulation's parts in this file")
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--no-results", action="store_true", help="only print")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measure_plan(given.one)))
        return
    parts = given.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if "simulation" in parts:
        first, _, last = given.seeds.partition(":")
        seeds = range(int(first), int(last))
        simulated, about = simulation_figures(seeds, processes=given.processes, into=given.into)
        if given.no_results:
            show(simulated)
        else:
            command = f"make bench-scheduler ARGS='--parts simulation --seeds {given.seeds}'"
            write_results("simulation", command, simulated, **about)
    parts = [part for part in parts if part != "simulation"]
    if not parts:
        return
    figures: dict[str, list[Figure]] = {}
    details: dict[str, Any] = {}
    if "plan" in parts:
        figures["plan"], details["plan"] = plan_figures()
        draw(SIZES, details["plan"], _FIGURE)
    if "tiering" in parts:
        if not given.trace.is_file():
            sys.exit(f"no trace at {given.trace}; name one: --trace FILE")
        figures["tiering"], details["tiering"] = tiering_figures(given.trace)
    if given.no_results:
        show([figure for part in PARTS for figure in figures.get(part, ())])
        return
    earlier, told_earlier = _before()
    figures, details = earlier | figures, told_earlier | details
    told = [figure for part in PARTS for figure in figures.get(part, ())]
    details["parts"] = {part: [asdict(figure) for figure in got] for part, got in figures.items()}
    write_results("scheduler", "make bench-scheduler", told, **details)


def _before() -> tuple[dict[str, list[Figure]], dict[str, Any]]:
    """The figures of an earlier run, by part."""
    path = RESULTS / "scheduler.json"
    if not path.exists():
        return {}, {}
    details = json.loads(path.read_text())["details"]
    parts = details.pop("parts")
    return {part: [Figure(**one) for one in got] for part, got in parts.items()}, details


if __name__ == "__main__":
    main()
