"""``memcube scheduler``: what lies where, what is moved and why, and the queue of background work."""

from typing import Annotated, Any

import typer

from memcube.cli.connection import Json
from memcube.cli.output import print_json, safe
from memcube.client import Event, Where

app = typer.Typer(help="What the scheduler plans, does and did.", no_args_is_help=True)
Tenant = Annotated[str | None, typer.Option(help="Of this tenant alone (an operator's choice).")]
Limit = Annotated[int, typer.Option(help="How many at most.", min=1)]
TaskId = Annotated[str, typer.Argument(help="The id of a task.")]


@app.command()
def status(context: typer.Context, json: Json = False) -> None:
    """Say who leads, what was moved, how full places are and what waits. Needs an operator's key.

    Example: memcube scheduler status
    """
    with context.obj.open() as client:
        told = client.scheduler.status()
    if json:
        print_json(told)
        return
    for line in _status_lines(told):
        typer.echo(safe(line))


@app.command()
def plan(
    context: typer.Context,
    limit: Limit = 20,
    now: Annotated[
        bool, typer.Option("--now", help="Make a round at once instead of saying what it would do.")
    ] = False,
    json: Json = False,
) -> None:
    """Say what would be done now, and what is refused and why. Needs an operator's key.

    Examples:

      memcube scheduler plan

      memcube scheduler plan --now
    """
    with context.obj.open() as client:
        found = client.scheduler.plan(dry_run=not now, limit=limit)
    if json:
        print_json(found)
        return
    for action in (*found.actions, *found.refusals):
        why = f"refused: {action['refused']}" if action.get("refused") else action["reason"]
        about = (action["action"], action["tenant"], action.get("cube") or "", _way(action), why)
        typer.echo(safe("  ".join(part for part in about if part)))
    done = "done" if now else "to be done"
    typer.echo(f"{found.num_actions} {done}, {found.num_refused} refused", err=True)
    for one in found.refused:
        typer.echo(safe(f"{one['count']:6}  {one['policy']}: {one['reason']}"), err=True)


@app.command()
def journal(
    context: typer.Context,
    tenant: Tenant = None,
    cube: Annotated[str | None, typer.Option(help="Of this memory alone.")] = None,
    before: Annotated[str | None, typer.Option(help="Older ones than this event.")] = None,
    limit: Limit = 20,
    json: Json = False,
) -> None:
    """List what is moved and was, newest first; an operator sees what became of nodes, shards and the lead too.

    Example: memcube scheduler journal --cube 0197a1c2-…
    """
    with context.obj.open() as client:
        found = client.scheduler.journal(tenant=tenant, cube=cube, before=before, limit=limit)
    if json:
        print_json(found)
        return
    for event in found.events:
        _show(event)


@app.command()
def tasks(
    context: typer.Context,
    state: Annotated[
        str | None, typer.Option(help="waiting, running, done or dead ones alone.")
    ] = None,
    tenant: Tenant = None,
    before: Annotated[str | None, typer.Option(help="Older ones than this task.")] = None,
    limit: Limit = 20,
    json: Json = False,
) -> None:
    """List the queue's tasks, newest first; dead ones wait for somebody to retry them.

    Example: memcube scheduler tasks --state dead
    """
    with context.obj.open() as client:
        found = client.scheduler.tasks(state=state, tenant=tenant, before=before, limit=limit)
    if json:
        print_json(found)
        return
    for event in found.events:
        _show(event)


@app.command()
def retry(context: typer.Context, id: TaskId, json: Json = False) -> None:
    """Let a dead task run again.

    Example: memcube scheduler retry 0197a1c2-…
    """
    with context.obj.open() as client:
        event = client.scheduler.retry(id)
    if json:
        print_json(event)
        return
    _show(event)


@app.command()
def accept(context: typer.Context, id: TaskId, json: Json = False) -> None:
    """Start the job that a task of kind consolidate proposes.

    Example: memcube scheduler accept 0197a1c2-…
    """
    with context.obj.open() as client:
        job = client.scheduler.accept(id)
    if json:
        print_json(job)
        return
    typer.echo(safe(f"job {job.id}  {job.state}"))


def _status_lines(told: dict[str, Any]) -> list[str]:
    leads = f"leads under epoch {told['epoch']}" if told["leading"] else "does not lead"
    lines = [f"{leads}, {told['rounds']} rounds, {told['moves_open']} moves under way"]
    for name, part in told["parts"].items():
        state = f"failed: {part['error']}" if part["error"] else f"{part['took_s']:.2f} s"
        lines.append(f"part {name}: {part['rounds']} rounds, {state}")
    for tier, why in told["failing"].items():
        lines.append(f"places of the {tier} tier could not be looked at: {why}")
    for place in told["places"]:
        capacity = place["capacity_bytes"]
        fill = f", {place['used_bytes'] / capacity:.0%} full" if capacity else ""
        state = "" if place["readable"] else ", can't be read now"
        lines.append(f"place {place['place']}: {place['used_bytes']:,} bytes{fill}{state}")
    counts = ", ".join(f"{count} {state}" for state, count in told["queue"]["by_state"].items())
    lines.append(f"queue: {counts}")
    return lines


def _way(action: Any) -> str:
    ends = [end for end in (action.get("source"), action.get("target")) if end]
    return " → ".join(ends)


def _show(event: Event) -> None:
    way = " → ".join(_place(end) for end in (event.source, event.target) if end is not None)
    about = (
        event.id,
        f"{event.updated_at:%Y-%m-%d %H:%M:%S}",
        event.kind,
        event.state,
        event.tenant or event.node or "",
        event.cube or "",
        way,
        event.policy or "",
        event.reason,
        f"({event.outcome})" if event.outcome else "",
    )
    typer.echo(safe("  ".join(part for part in about if part)))


def _place(where: Where) -> str:
    return f"{where.location}:{where.tier}/{where.medium}"
