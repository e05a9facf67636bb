"""The retention policy on a trace of requests, beside others at the same capacities.

    python -m benchmarks.bench_trace --trace FILE [--capacities 1000,5859] [--no-results]

The policy is the class, with the settings, that the media use. With hints an oracle tells it at each
request whether the conversation has a next turn, or also when; of the turns behind that one it says
nothing. Results go to ``results/trace.json`` and are drawn as ``docs/kv-trace.svg``; ``--no-results``
only prints.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.plots import can_draw, svg
from benchmarks.reference_caches import REFERENCES, Belady, Cache
from benchmarks.results import ROOT, Figure, write_results
from memcube.policies.replay import Hints, Replayed, Request, read_mooncake, replay
from memcube.policies.retention import Retention

TRACE = ROOT.parent / "shared" / "data" / "traces" / "mooncake_conversation.jsonl"
CAPACITIES = (1_000, 2_000, 5_859, 10_000, 20_000, 50_000)
_GAIN_AT = 5_859
_OURS: dict[str, Hints] = {"ours": "none", "whether": "whether", "when": "when"}
"""By the name in the table: what of the next turn is hinted."""
_FIGURE = ROOT / "docs" / "kv-trace.svg"


def replay_reference(requests: Sequence[Request], cache: Cache) -> Replayed:
    """As ``replay``, for a cache that takes in all that is used."""
    num_blocks = num_hits = 0
    for request in requests:
        blocks = request.blocks
        num_blocks += len(blocks)
        num_hits += next((n for n, key in enumerate(blocks) if key not in cache), len(blocks))
        # Last to first: what leaves first of a prompt is its end.
        for key in reversed(blocks):
            cache.use(key)
    return Replayed(num_blocks, num_hits)


def main() -> None:
    parser = argparse.ArgumentParser(description="The retention policy on a trace of requests.")
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--capacities", default=",".join(map(str, CAPACITIES)), help="in blocks")
    parser.add_argument("--no-results", action="store_true", help="only print")
    given = parser.parse_args()
    if not given.trace.is_file():
        sys.exit(f"no trace at {given.trace}; name one: --trace FILE")
    requests = read_mooncake(given.trace)
    uses = [request.blocks[::-1] for request in requests]
    print(f"{given.trace.name}: {len(requests)} requests, {sum(map(len, uses))} blocks")
    names = [*_OURS, *REFERENCES, "Belady"]
    print(f"{'blocks':>8} " + " ".join(f"{name:>8}" for name in names), flush=True)
    table: dict[int, dict[str, float]] = {}
    cpu_s = 0.0
    num_driven = 0
    for capacity in map(int, given.capacities.split(",")):
        ratios = table[capacity] = {}
        print(f"{capacity:8} ", end="", flush=True)
        for name in names:
            if name in _OURS:
                started_s = time.process_time()
                found = replay(requests, Retention(capacity), hints=_OURS[name])
                cpu_s += time.process_time() - started_s
                num_driven += found.num_blocks
            elif name == "Belady":
                found = replay_reference(requests, Belady(capacity, uses))
            else:
                found = replay_reference(requests, REFERENCES[name](capacity))
            ratios[name] = found.hit_ratio
            print(f"{found.hit_ratio:8.4f} ", end="", flush=True)
        print(flush=True)
    cpu_us = cpu_s / num_driven * 1e6
    print(f"{cpu_us:.1f} CPU-µs a block")
    if not given.no_results:
        ratios_of = {str(capacity): ratios for capacity, ratios in table.items()}
        write_results(
            "trace",
            "make bench-trace",
            _figures(table, cpu_us),
            trace=given.trace.name,
            hit_ratios=ratios_of,
        )
        draw(table, _FIGURE)


def _figures(table: dict[int, dict[str, float]], cpu_us: float) -> list[Figure]:
    figures = []
    for capacity, ratios in table.items():
        best = max(REFERENCES, key=ratios.__getitem__)
        halfway = (ratios["LRU"] + ratios["Belady"]) / 2
        least = max(ratios["LRU"] - 0.002, ratios[best] - 0.005)
        figures += [
            Figure(
                name=f"block hit ratio at {capacity:,} blocks",
                value=ratios["ours"],
                unit="",
                goal=f">= {least:.4f}",
                beside=f"LRU {ratios['LRU']:.4f}, best: {best} {ratios[best]:.4f}",
            ),
            Figure(
                name=f"block hit ratio at {capacity:,} blocks, next turns hinted with their time",
                value=ratios["when"],
                unit="",
                goal=f">= {halfway:.4f}",
                beside=f"without it {ratios['whether']:.4f}, Belady {ratios['Belady']:.4f}",
            ),
        ]
    if _GAIN_AT in table:
        ratios = table[_GAIN_AT]
        figures.append(
            Figure(
                name=f"hits over LRU's at {_GAIN_AT:,} blocks",
                value=ratios["ours"] / ratios["LRU"],
                unit="×",
                goal=">= 1.25",
            )
        )
    return [*figures, Figure(name="the policy's cost a block", value=cpu_us, unit="CPU-µs")]


def draw(table: Mapping[int, Mapping[str, float]], path: Path) -> None:
    """The hit ratios against the capacity, as SVG."""
    if not can_draw(path):
        return
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    ours = {
        "ours": ("ours", "-"),
        "whether": ("ours, told whether a next turn comes", "--"),
        "when": ("ours, told also when", ":"),
    }
    capacities = sorted(table)
    with svg(path, (9, 4.5)) as (canvas, axes):
        for name in table[capacities[0]]:
            ratios = [table[capacity][name] for capacity in capacities]
            if name in ours:
                label, line = ours[name]
                axes.plot(capacities, ratios, line, color="black", linewidth=2, label=label)
            elif name == "Belady":
                label = "Belady: knows all uses to come"
                axes.plot(capacities, ratios, color="tab:gray", linewidth=1, label=label)
            else:
                axes.plot(capacities, ratios, marker="o", markersize=3, linewidth=1, label=name)
        axes.set_xlabel("capacity in blocks")
        axes.set_ylabel("block hit ratio")
        axes.set_xscale("log")
        axes.set_xticks(capacities)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        canvas.legend(loc="outside right upper", frameon=False)


if __name__ == "__main__":
    main()
