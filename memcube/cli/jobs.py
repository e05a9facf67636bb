"""``memcube consolidate``, ``memcube jobs`` and ``memcube adapters``: memories into weights."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from memcube.cli.connection import Agent, Json, Run, User
from memcube.cli.memories import Kind
from memcube.cli.output import print_json, safe
from memcube.client import Adapter, Job, MemCubeClient

POLL_S = 0.5
JobId = Annotated[str, typer.Argument(help="The id of a job.")]
AdapterId = Annotated[str, typer.Argument(help="The id or name of an adapter.")]

app = typer.Typer(help="Watch, cancel and resume long work.", no_args_is_help=True)
adapters = typer.Typer(help="Versions of adapters, and which serve.", no_args_is_help=True)


def register(main: typer.Typer) -> None:
    """Add the commands to the application."""
    main.command()(consolidate)
    main.add_typer(app, name="jobs")
    main.add_typer(adapters, name="adapters")


def consolidate(
    context: typer.Context,
    cubes: Annotated[
        list[str] | None, typer.Argument(help="Ids of memories; none: all of the scope.")
    ] = None,
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    adapter: Annotated[
        str | None, typer.Option(help="The adapter's name. (default: made of the scope)")
    ] = None,
    kind: Annotated[Kind | None, typer.Option(help="Memories of this kind alone.")] = None,
    tag: Annotated[str | None, typer.Option(help="Memories with this tag alone.")] = None,
    stable_days: Annotated[float, typer.Option(help="Not changed for so many days.", min=0)] = 0.0,
    min_uses: Annotated[int, typer.Option(help="Used at least so often.", min=0)] = 0,
    steps: Annotated[int | None, typer.Option(help="Training steps at most.", min=1)] = None,
    rank: Annotated[int | None, typer.Option(help="The adapter's rank.", min=1)] = None,
    distil: Annotated[
        float | None,
        typer.Option(help="Weight of distilling from the model with the memories read.", min=0),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed, the same adapter.", min=0)
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Without what the serving version holds.")
    ] = False,
    activate: Annotated[
        bool, typer.Option(help="Let it serve at once, if it passes its gate.")
    ] = True,
    wait: Annotated[bool, typer.Option(help="Follow the job to its end.")] = True,
    json: Json = False,
) -> None:
    """Train an adapter that knows memories without reading them.

    It is judged before it serves: one that is not good enough changes nothing. The command ends with
    status 1 unless the job is done; Ctrl-C leaves the job running.

    Examples:

      memcube consolidate --user ann

      memcube consolidate --user ann --kind fact --stable-days 30 --no-wait
    """
    given = {"steps": steps, "rank": rank, "distil_weight": distil, "seed": seed}
    recipe = {name: value for name, value in given.items() if value is not None}
    with context.obj.open() as client:
        job = client.jobs.consolidate(
            adapter=adapter,
            cubes=cubes or (),
            user_id=user,
            agent_id=agent,
            run_id=run,
            cube_kind=kind,
            tag=tag,
            stable_days=stable_days or None,
            min_uses=min_uses or None,
            extend=not alone,
            activate=activate,
            recipe=recipe or None,
        )
        typer.echo(f"job {job.id}", err=True)
        if wait:
            job = follow(client, job)
    _show(job, json=json)
    if wait and job.state != "done":
        raise typer.Exit(1)


@app.command("list")
def list_jobs(
    context: typer.Context,
    state: Annotated[str | None, typer.Option(help="Those in this state alone.")] = None,
    limit: Annotated[int, typer.Option(help="How many at most.", min=1)] = 20,
    json: Json = False,
) -> None:
    """List jobs, newest first.

    Example: memcube jobs list --state running
    """
    with context.obj.open() as client:
        found = client.jobs.list(state=state, limit=limit)
    if json:
        print_json(found.jobs)
        return
    for job in found.jobs:
        _show(job)


@app.command()
def get(context: typer.Context, id: JobId, json: Json = False) -> None:
    """Show a job.

    Example: memcube jobs get 0197a1c2-…
    """
    with context.obj.open() as client:
        _show(client.jobs.get(id), json=json)


@app.command()
def logs(
    context: typer.Context,
    id: JobId,
    follow_it: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
) -> None:
    """Print a job's log.

    Example: memcube jobs logs 0197a1c2-… --follow
    """
    with context.obj.open() as client:
        job = client.jobs.get(id)
        if follow_it:
            follow(client, job)
            return
        for line in client.jobs.logs(id):
            typer.echo(safe(f"{line.at:%H:%M:%S} {line.text}"))


@app.command()
def cancel(context: typer.Context, id: JobId, json: Json = False) -> None:
    """Cancel a job.

    Example: memcube jobs cancel 0197a1c2-…
    """
    with context.obj.open() as client:
        _show(client.jobs.cancel(id), json=json)


@app.command()
def resume(context: typer.Context, id: JobId, json: Json = False) -> None:
    """Go on with a failed or cancelled job from its last checkpoint.

    Example: memcube jobs resume 0197a1c2-…
    """
    with context.obj.open() as client:
        _show(client.jobs.resume(id), json=json)


@app.command()
def report(
    context: typer.Context,
    id: JobId,
    html: Annotated[
        Path | None, typer.Option(help="Write it to this file as a page with plots.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what the gate found of an adapter.

    Example: memcube jobs report 0197a1c2-… --html report.html
    """
    with context.obj.open() as client:
        found = client.jobs.report(id)
        if html is not None:
            html.write_text(client.jobs.page(id), encoding="utf-8")
            typer.echo(f"wrote {html}", err=True)
    if json:
        print_json(found)
        return
    for name, value in found["figures"].items():
        if value is not None:
            typer.echo(f"{name:14} {value:,.4g}")
    typer.echo("short: " + "; ".join(found["short"]) if found["short"] else "passed")


@adapters.command("list")
def list_adapters(context: typer.Context, json: Json = False) -> None:
    """List all versions of all adapters.

    Example: memcube adapters list
    """
    with context.obj.open() as client:
        found = client.adapters.list()
    if json:
        print_json(found)
        return
    for adapter in found:
        _show_adapter(adapter)


@adapters.command()
def activate(
    context: typer.Context,
    adapter: AdapterId,
    version: Annotated[int, typer.Argument(help="Which version.", min=1)],
) -> None:
    """Let a version serve.

    Example: memcube adapters activate ann 2
    """
    with context.obj.open() as client:
        _show_adapter(client.adapters.activate(_adapter_id(client, adapter), version))


@adapters.command()
def rollback(context: typer.Context, adapter: AdapterId) -> None:
    """Let the version serve again that did before.

    Example: memcube adapters rollback ann
    """
    with context.obj.open() as client:
        _show_adapter(client.adapters.rollback(_adapter_id(client, adapter)))


def follow(client: MemCubeClient, job: Job) -> Job:
    """Tell a job's log and draw its progress on stderr until it has ended."""
    told = 0
    with _bar() as bar:
        task = bar.add_task("queued", total=None, left="")
        while True:
            job = client.jobs.get(job.id)
            for line in client.jobs.logs(job.id, after=told):
                bar.console.print(safe(line.text), markup=False, highlight=False)
                told = line.seq
            if job.has_ended:
                return job
            step, total = job.progress.get("step"), job.progress.get("num_steps")
            loss = job.progress.get("answer_loss")
            bar.update(
                task,
                description=job.state,
                completed=step or 0,
                total=total,
                left="" if loss is None else f"loss {loss:.3f}",
            )
            time.sleep(POLL_S)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total}"),
        TextColumn("{task.fields[left]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _adapter_id(client: MemCubeClient, given: str) -> str:
    """The id of an adapter of this name; else what was given is an id."""
    return next((a.id for a in client.adapters.list() if a.name == given), given)


def _show(job: Job, *, json: bool = False) -> None:
    if json:
        print_json(job)
        return
    result = job.result or {}
    version = f"version {result['version']}" if "version" in result else ""
    about = (job.id, job.kind, job.adapter or "", job.state, version, job.error or "")
    typer.echo(safe("  ".join(part for part in about if part)))


def _show_adapter(adapter: Adapter) -> None:
    reason = f"({adapter.reason})" if adapter.reason else ""
    about = (adapter.id, adapter.name, f"v{adapter.version}", adapter.state, reason)
    typer.echo(safe("  ".join(part for part in about if part)))
