"""``memcube ingest FILE``."""

import asyncio
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from memcube.cli.connection import Agent, Connection, Json, Run, Tags, User
from memcube.cli.output import print_json, progress_bar
from memcube.ingest import Ingested, Journal, Plan, Target, ingest, make_plan, read_file
from memcube.ingest.plan import journal_path


class Format(StrEnum):
    LOCOMO = "locomo"
    JSONL = "jsonl"
    TEXT = "text"


class Wait(StrEnum):
    INDEXED = "indexed"
    STORED = "stored"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("ingest")(ingest_file)


def ingest_file(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="LoCoMo JSON, message JSONL or plain text.")],
    format: Annotated[Format | None, typer.Option(help="(default: told by the content)")] = None,
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    tag: Tags = None,
    wait: Annotated[
        Wait, typer.Option(help="When a batch counts: searchable, or safely stored.")
    ] = Wait.INDEXED,
    again: Annotated[
        bool, typer.Option("--again", help="Send all, also what an earlier run sent.")
    ] = False,
    json: Json = False,
) -> None:
    """Remember a whole file. Stopped half-way, run it again: it goes on and adds nothing twice.

    The file is checked first; a bad line is named by its number before anything is sent.

    Examples:

      memcube ingest chats.jsonl --user ann

      memcube ingest locomo.json

      memcube ingest notes.txt --user ann --tag notes
    """
    target = Target(user_id=user, agent_id=agent, run_id=run, tags=tuple(tag or ()))
    reading = read_file(file, format=format, target=target)
    plan = make_plan(reading)
    started = time.monotonic()
    done = asyncio.run(_send(context.obj, plan, wait=wait, again=again))
    took_s = time.monotonic() - started
    if json:
        counts = {"added": done.added, "repeated": done.repeated, "skipped": done.skipped}
        print_json(
            {
                "format": reading.format,
                **counts,
                "empty": reading.num_empty,
                "took_s": round(took_s, 3),
            }
        )
        return
    parts = [f"{done.added:,} added"]
    if done.repeated:
        parts.append(f"{done.repeated:,} known already")
    if done.skipped:
        parts.append(f"{done.skipped:,} sent by an earlier run (--again sends them once more)")
    if reading.num_empty:
        parts.append(f"{reading.num_empty:,} empty messages left out")
    typer.echo(f"{file} ({reading.format}): {', '.join(parts)}; {took_s:.1f} s")


async def _send(connection: Connection, plan: Plan, *, wait: str, again: bool) -> Ingested:
    async with connection.open_async() as client:
        address = client.address
        path = journal_path(connection.data_dir, plan, url=address.url, api_key=address.api_key)
        journal = Journal(path, num_streams=len(plan.streams))
        if again:
            journal.start_over()
        with progress_bar("items") as bar:
            task = bar.add_task("ingest", total=plan.num_items, rate="")

            def advance(num_items: int) -> None:
                bar.advance(task, num_items)
                speed = bar.tasks[0].speed
                bar.update(task, rate=f"{speed:,.0f}" if speed else "")

            return await ingest(client, plan, journal, wait=wait, progress=advance)
