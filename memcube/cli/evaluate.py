"""``memcube eval locomo FILE``."""

import json as json_text
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from memcube.cli.output import progress_bar
from memcube.errors import BadRequest
from memcube.evaluation.locomo import Conversation, load_locomo
from memcube.evaluation.runner import SYSTEMS, Progress, cpu_clock_of, run_locomo

app = typer.Typer(help="Measure how well memory is found.", no_args_is_help=True)

MEASURES = ("recall@5", "recall@10", "recall@20", "mrr", "ndcg@10")
HEADINGS = ("R@5", "R@10", "R@20", "MRR", "nDCG@10", "asked")
CATEGORIES = {
    "1": "1 multi-hop",
    "2": "2 temporal",
    "3": "3 open-domain",
    "4": "4 single-hop",
    "5": "5 adversarial",
}


@app.callback()
def _group() -> None:
    """Measure how well memory is found."""


@app.command()
def locomo(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Conversations in LoCoMo's form.")],
    json: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
    systems: Annotated[str, typer.Option(help="Search modes to compare, with commas.")] = ",".join(
        SYSTEMS
    ),
    conversation: Annotated[
        list[str] | None, typer.Option(help="Only this one; can be given again.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the stored conversations there.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions in flight at once.")] = 1,
) -> None:
    """Store conversations, ask their questions, count how much of the evidence comes back.

    Each conversation gets a user of its own, which is deleted at the end. Recall, MRR and nDCG are
    in percent; CPU is of all processes of the server, if it runs on this machine.

    Examples:

      memcube eval locomo locomo.json --json figures.json

      memcube eval locomo locomo.json --systems hybrid --conversation conv-26
    """
    if json is not None and not json.absolute().parent.is_dir():
        raise typer.BadParameter(f"no such folder: {json.parent}", param_hint="--json")
    modes = [mode.strip() for mode in systems.split(",") if mode.strip()]
    chosen = _chosen(load_locomo(file), conversation or [])
    with context.obj.open() as client, progress_bar("items") as bar:
        tasks: dict[str, Any] = {}

        def show(progress: Progress) -> None:
            if progress.phase not in tasks:
                tasks[progress.phase] = bar.add_task(progress.phase, total=progress.total, rate="")
            task = tasks[progress.phase]
            bar.update(task, completed=progress.done)
            speed = bar.tasks[task].speed
            bar.update(task, rate=f"{speed:,.0f}" if speed else "")

        figures = run_locomo(
            client,
            chosen,
            suffix=uuid4().hex[:8],
            modes=modes,
            concurrency=concurrency,
            keep=keep,
            cpu_clock=cpu_clock_of(client.address.pid if client.address.is_local else None),
            progress=show,
        )
    _print(figures)
    if json is not None:
        json.write_text(json_text.dumps(figures, indent=2) + "\n")


def _chosen(conversations: list[Conversation], ids: list[str]) -> list[Conversation]:
    known = {conversation.id: conversation for conversation in conversations}
    for id in ids:
        if id not in known:
            raise BadRequest(f"no such one in the file; there are: {', '.join(known)}", id)
    return [known[id] for id in ids] if ids else conversations


def _print(figures: dict[str, Any]) -> None:
    overall = _table("Evidence found, %", "system", *HEADINGS, "CPU ms", "p50 ms", "p95 ms")
    parts = _table("By category", "system", "category", *HEADINGS)
    for system, told in figures.items():
        cpu_ms = told["cpu_ms_per_query"]
        times = told["ms_per_query"]
        overall.add_row(
            system,
            *_row(told["overall"]),
            "–" if cpu_ms is None else f"{cpu_ms:.1f}",
            f"{times['p50']:.1f}",
            f"{times['p95']:.1f}",
        )
        for category, means in told["by_category"].items():
            parts.add_row(system, CATEGORIES.get(category, category), *_row(means))
        rest = _row(told["without_adversarial"])
        parts.add_row(system, "all but adversarial", *rest, end_section=True)
    console = Console()
    console.print(overall)
    console.print(parts)
    console.print(
        "R: share of a question's evidence turns in the first k; ms: a query", style="dim"
    )


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        left = name in ("system", "category")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table


def _row(means: dict[str, float]) -> list[str]:
    found = [f"{means[name]:.1f}" if name in means else "–" for name in MEASURES]
    return [*found, f"{means['num_questions']:,}"]
