"""The frontier between what an adapter recalls, what it gives to strangers and what language it loses.

    python -m benchmarks.lora_frontier              draw docs/lora-frontier.svg and docs/lora-cost.svg
    python -m benchmarks.lora_frontier --run NAME   run one of the recipes of RECIPES and keep its figures

Runs are lines of ``lora_tries.jsonl``, written by ``bench_lora --log``. Beside them stand the recipes
that were measured with the same model before this trainer was written (REFERENCE); their facts are as
many, their wordings and strangers are others.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import bench_lora
from benchmarks.plots import can_draw, svg
from benchmarks.results import RESULTS, ROOT

TRIES = Path(__file__).with_name("lora_tries.jsonl")

_BARE = {"unknown": 0, "unknown_back": 0, "other_nouns": 0}
_NO_REPLAY = {"replay_tokens": 0, "kl_weight": 0.0}
RECIPES: dict[str, dict[str, Any]] = {
    "q,v rank 8, no replay, no negatives": {
        "recipe": {
            "targets": ["q_proj", "v_proj"],
            "rank": 8,
            "alpha": 16.0,
            "lr": 1e-3,
            **_NO_REPLAY,
        },
        "data": _BARE,
    },
    "no replay, no negatives": {"recipe": {"lr": 1e-3, **_NO_REPLAY}, "data": _BARE},
    "no replay": {"recipe": _NO_REPLAY},
    "no negatives": {"data": _BARE},
    "rank 4": {"recipe": {"rank": 4, "alpha": 8.0}},
    "MLP only": {"recipe": {"targets": ["gate_proj", "up_proj", "down_proj"]}},
    "distilled too": {"recipe": {"distil_weight": 1.0}},
}


class Point(NamedTuple):
    """Shares in percent; ``nll_rise`` too."""

    name: str
    recall: float
    leak: float
    nll_rise: float


_BASE_NLL = 2.311
REFERENCE = [
    Point(name, recall, leak, 100 * (nll / _BASE_NLL - 1))
    for name, recall, leak, nll in (
        ("q,v rank 8, no replay", 5, 8, 3.24),
        ("rank 16, no replay, no negatives", 95, 100, 3.43),
        ("replay 1x, negatives 1x", 87, 33, 2.384),
        ("MLP only", 80, 42, 2.349),
        ("rank 4", 47, 25, 2.389),
        ("replay 2x, negatives 2x", 73, 0, 2.377),
        ("the same, 234 steps", 90, 0, 2.73),
        ("220 steps, reverse too", 90, 8, 2.397),
        ("215 steps, replay 3x", 90, 25, 2.343),
        ("231 steps, questions only", 87, 8, 2.360),
    )
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", choices=RECIPES)
    given = parser.parse_args()
    if given.run:
        settings = json.dumps(RECIPES[given.run])
        bench_lora.main(["--name", given.run, "--settings", settings, "--log", str(TRIES)])
    draw_frontier(ROOT / "docs" / "lora-frontier.svg")
    draw_cost(ROOT / "docs" / "lora-cost.svg")


def tried() -> list[Point]:
    """The runs of 20 facts that were kept, and the default's result."""
    lines = [json.loads(line) for line in TRIES.read_text().splitlines()]
    default = RESULTS / "lora.json"
    if default.exists():
        lines.append(json.loads(default.read_text())["details"])
    return [
        Point(line["recipe_name"], *(100 * line[key] for key in ("recall", "leak", "nll_rise")))
        for line in lines
        if line["num_facts"] == 20
    ]


def draw_frontier(path: Path) -> None:
    """Recall over leak, coloured by the loss's rise; where all limits are kept is shaded."""
    if not can_draw(path):
        return
    from matplotlib.colors import BoundaryNorm
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    norm = BoundaryNorm([-2, 0, 3, 6, 20, 50], 256)
    ours = tried()
    with svg(path, (10, 5)) as (canvas, axes):
        axes.add_patch(Rectangle((-1, 93), 9, 9, color="tab:green", alpha=0.15, linewidth=0))
        names: list[Line2D] = []
        for points, marker, color in ((ours, "o", "black"), (REFERENCE, "s", "tab:gray")):
            dots = axes.scatter(
                [point.leak for point in points],
                [point.recall for point in points],
                c=[point.nll_rise for point in points],
                norm=norm,
                cmap="viridis_r",
                marker=marker,
                edgecolors=color,
                zorder=3,
            )
            for point in points:
                number = str(len(names) + 1)
                spot = (point.leak, point.recall)
                axes.annotate(number, spot, (5, 4), textcoords="offset points", fontsize=8)
                label = f"{number}  {point.name}"
                names.append(Line2D([], [], linestyle="", marker=marker, color=color, label=label))
        axes.set_xlabel("unknown people given a trained fact, %")
        axes.set_ylabel("recall on held-out wordings, no context, %")
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xticks(
            [0, 2, 4, 6, 8, 10, 20, 50, 100], map(str, (0, 2, 4, 6, 8, 10, 20, 50, 100))
        )
        axes.set_xlim(-1, 120)
        axes.set_ylim(0, 102)
        axes.grid(alpha=0.3)
        title = "circles: this trainer; squares: before,\nother wordings (facts.md)"
        canvas.legend(
            handles=names, title=title, loc="outside right upper", frameon=False, fontsize=8
        )
        canvas.colorbar(
            dots, ax=axes, location="bottom", label="loss on unrelated text, rise in %", shrink=0.7
        )


def draw_cost(path: Path) -> None:
    """CPU seconds and recall over the number of facts, of the results that there are."""
    found = [RESULTS / name for name in ("lora.json", "lora-50.json", "lora-100.json")]
    runs = [json.loads(file.read_text())["details"] for file in found if file.exists()]
    if not runs or not can_draw(path):
        return
    facts = [run["num_facts"] for run in runs]
    with svg(path, (7, 4)) as (_, axes):
        for part, label in (("steps", "training"), ("gate", "gate")):
            seconds = [run["cpu_s"][part] for run in runs]
            axes.plot(facts, seconds, marker="o", label=f"{label}, CPU-s")
        for run in runs:
            text = (
                f"recall {run['recall']:.0%}, reverse {run['reverse']:.0%}, leak {run['leak']:.0%}"
            )
            place = (run["num_facts"], run["cpu_s"]["steps"])
            axes.annotate(text, place, (0, 8), textcoords="offset points", fontsize=8, ha="center")
        axes.set_xlabel("facts")
        axes.set_ylabel("CPU seconds, one thread")
        axes.set_xlim(0, 120)
        axes.set_ylim(0, 1.15 * max(run["cpu_s"]["steps"] for run in runs))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", frameon=False)


if __name__ == "__main__":
    main()
