"""The commands of the lifecycle: snapshot, compare, rollback, proposals, doctor."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import typer

from memcube.cli.connection import Agent, Json, Run, User
from memcube.cli.output import print_json, safe
from memcube.client import Diagnosis, Proposal, Version

Since = Annotated[datetime | None, typer.Option("--since", help="The first time, in UTC.")]
SnapshotName = Annotated[
    str | None, typer.Option("--snapshot", help="A snapshot's name or id: its scope and its time.")
]
ProposalId = Annotated[str, typer.Argument(help="The id of a proposal.")]

snapshots = typer.Typer(help="Give a scope at a time a name.", no_args_is_help=True)
proposals = typer.Typer(help="Memories that could be one: find, apply.", no_args_is_help=True)


class State(StrEnum):
    OPEN = "open"
    APPLIED = "applied"
    DISMISSED = "dismissed"
    OUTDATED = "outdated"


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (compare, rollback, doctor):
        app.command()(command)
    app.add_typer(snapshots, name="snapshot")
    app.add_typer(proposals, name="proposals")


@snapshots.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What to call it.")],
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    at: Annotated[datetime | None, typer.Option(help="When, in UTC. (default: now)")] = None,
    json: Json = False,
) -> None:
    """Give what a scope is now, or was at a time, a name. Nothing is copied.

    Example: memcube snapshot create before-the-move --user ann
    """
    with context.obj.open() as client:
        made = client.snapshots.create(name, user_id=user, agent_id=agent, run_id=run, at=_utc(at))
    if json:
        print_json(made)
        return
    typer.echo(safe(f"{made.name}  {made.at.isoformat()}  {made.id}"))


@snapshots.command("list")
def list_snapshots(context: typer.Context, json: Json = False) -> None:
    """List the snapshots, the latest time first.

    Example: memcube snapshot list
    """
    with context.obj.open() as client:
        found = client.snapshots.list()
    if json:
        print_json(found)
        return
    for one in found.snapshots:
        scope = (one.user_id, one.agent_id, one.run_id)
        named = [f"{n}={v}" for n, v in zip(("user", "agent", "run"), scope, strict=True) if v]
        about = (one.name, one.at.isoformat(), *(named or ["all"]), one.id)
        typer.echo(safe("  ".join(about)))


@snapshots.command()
def delete(
    context: typer.Context, id: Annotated[str, typer.Argument(help="The id of a snapshot.")]
) -> None:
    """Delete a snapshot; no memory changes.

    Example: memcube snapshot delete 0197a1c2-…
    """
    with context.obj.open() as client:
        typer.echo(f"deleted {client.snapshots.delete(id).id}")


def compare(
    context: typer.Context,
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    since: Since = None,
    snapshot: SnapshotName = None,
    until: Annotated[
        datetime | None, typer.Option(help="The second time, in UTC. (default: now)")
    ] = None,
    json: Json = False,
) -> None:
    """Show what was added (+), changed (~), moved (>) and deleted (-) between two times.

    Example: memcube compare --user ann --since 2026-03-01
    """
    _one_of(since, snapshot, "--since")
    with context.obj.open() as client:
        cursor: str | None = None
        shown = 0
        while True:
            page = client.compare(
                since=_utc(since),
                snapshot=snapshot,
                until=_utc(until),
                user_id=user,
                agent_id=agent,
                run_id=run,
                limit=200,
                cursor=cursor,
            )
            # The time that the first page called now is that of all.
            until, cursor, shown = page.until, page.next_cursor, shown + len(page.results)
            if json:
                print_json(page)
            else:
                for one in page:
                    _print_difference(one.change, one.id, one.before, one.after, one.state_after)
            if cursor is None:
                break
    if not shown and not json:
        typer.echo("nothing changed", err=True)


def rollback(
    context: typer.Context,
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    to: Annotated[datetime | None, typer.Option(help="The time to go back to, in UTC.")] = None,
    snapshot: SnapshotName = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    json: Json = False,
) -> None:
    """Take a scope back to a time: as new versions, which can be rolled back in turn.

    Example: memcube rollback --user ann --to 2026-03-01T12:00:00
    """
    _one_of(to, snapshot, "--to")
    if not yes:
        typer.confirm(f"Take it back to {snapshot or to}?", abort=True)
    with context.obj.open() as client:
        done = client.rollback(
            to=_utc(to), snapshot=snapshot, user_id=user, agent_id=agent, run_id=run
        )
    if json:
        print_json(done)
        return
    typer.echo(f"{len(done.changed)} back, {len(done.out_of_search)} out of search")
    for gone in done.cannot_restore:
        typer.echo(f"cannot be restored: {gone.id}, gone since {gone.at.isoformat()}", err=True)


@proposals.command("list")
def list_proposals(
    context: typer.Context,
    state: Annotated[State | None, typer.Option(help="In this state only.")] = State.OPEN,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many at most.")] = 50,
    json: Json = False,
) -> None:
    """List proposals, newest first; by default the open ones.

    Example: memcube proposals list --state outdated
    """
    with context.obj.open() as client:
        found = client.proposals.list(state=state, limit=limit)
    if json:
        print_json(found)
        return
    for one in found:
        _print_proposal(one)


@proposals.command()
def find(
    context: typer.Context,
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Memories to look at, the newest first.")
    ] = None,
    json: Json = False,
) -> None:
    """Look for near-duplicates and contradictions in a scope. Changes nothing.

    Example: memcube proposals find --user ann
    """
    with context.obj.open() as client:
        found = client.proposals.find(user_id=user, agent_id=agent, run_id=run, limit=limit)
    if json:
        print_json(found)
        return
    for one in found:
        _print_proposal(one)
    if not found.proposals:
        typer.echo("nothing new", err=True)


@proposals.command()
def apply(context: typer.Context, id: ProposalId, json: Json = False) -> None:
    """Merge a proposal's memories into one; they stay as its ancestors.

    Example: memcube proposals apply 0197a1c2-…
    """
    with context.obj.open() as client:
        done = client.proposals.apply(id)
    if json:
        print_json(done)
        return
    typer.echo(safe(f"merged {len(done.proposal.cubes)} into {done.cube.id}\n    {done.cube.text}"))


@proposals.command()
def dismiss(context: typer.Context, id: ProposalId) -> None:
    """Close a proposal without a change; it is not made again.

    Example: memcube proposals dismiss 0197a1c2-…
    """
    with context.obj.open() as client:
        typer.echo(f"dismissed {client.proposals.dismiss(id).id}")


def doctor(
    context: typer.Context,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what a rule can mend.")] = False,
    json: Json = False,
) -> None:
    """Look whether the parts of the system agree. Needs an operator's key.

    Exits with 1 when something is wrong that was not mended.

    Example: memcube doctor --repair
    """
    sound, cursor = True, None
    with context.obj.open() as client:
        while True:
            found = client.doctor(repair=repair, cursor=cursor)
            sound, cursor = sound and found.sound, found.next_cursor
            if json:
                print_json(found)
            else:
                _print_diagnosis(found)
            if cursor is None:
                break
    if not sound:
        raise typer.Exit(1)


def _print_diagnosis(found: Diagnosis) -> None:
    looked = ", ".join(f"{count:,} of {name}" for name, count in found.looked_at.items())
    typer.echo(f"looked at {looked}: {'all is well' if not found.findings else 'found'}")
    for one in found.findings:
        mended = f", {one.repaired:,} mended" if one.repaired else ""
        typer.echo(safe(f"    {one.count:,} {one.check} {one.kind}{mended}: {one.advice}"))
        for example in one.examples:
            typer.echo(safe(f"        {example}"))


def _print_proposal(one: Proposal) -> None:
    why = "  ".join(f"{name} {value}" for name, value in one.why.items())
    typer.echo(safe(f"{one.state} {one.kind}  {why}"))
    for cube in one.cubes:
        text = "(changed since)" if cube.text is None else _line(cube.text)
        typer.echo(safe(f"    - {text}  {cube.id} v{cube.version}"))
    typer.echo(safe(f"    = {_line(one.text)}\n    {one.id}"))


def _print_difference(
    change: str, id: str, before: Version | None, after: Version | None, state: str | None
) -> None:
    sign = {"added": "+", "changed": "~", "moved": ">", "deleted": "-"}[change]
    moved = f" {state}" if change == "moved" else ""
    typer.echo(safe(f"{sign}{moved} {id}"))
    if change == "changed" and before is not None:
        typer.echo(safe(f"    - {_line(before.text)}"))
    if after is not None:
        typer.echo(safe(f"    + {_line(after.text)}"))


def _one_of(time: datetime | None, snapshot: str | None, option: str) -> None:
    if (time is None) == (snapshot is None):
        raise typer.BadParameter(f"give either {option} or --snapshot")


def _utc(time: datetime | None) -> datetime | None:
    return time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time


def _line(text: str) -> str:
    return " ".join(text.split())
