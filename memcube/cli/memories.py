"""The commands on memories: add, search, get, list, delete, history, context, migrate."""

import json as json_text
import sys
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer

from memcube.cli.connection import Agent, Json, Run, Tags, User
from memcube.cli.output import print_cube, print_json, safe
from memcube.client import Message

Id = Annotated[str, typer.Argument(help="The id of a memory.")]


class Mode(StrEnum):
    HYBRID = "hybrid"
    DENSE = "dense"
    SPARSE = "sparse"


class Tier(StrEnum):
    ACTIVATION = "activation"
    PLAINTEXT = "plaintext"


class Kind(StrEnum):
    FACT = "fact"
    PREFERENCE = "preference"
    EPISODE = "episode"
    PROCEDURE = "procedure"
    DOCUMENT = "document"


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (add, search, get, history, delete, context, migrate):
        app.command()(command)
    app.command("list")(list_memories)


def add(
    context: typer.Context,
    text: Annotated[str, typer.Argument(help="What to remember; - reads it from stdin.")],
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    role: Annotated[
        str | None, typer.Option(help="Add it as a message of this role, such as user.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The speaker's name (with --role).")] = None,
    time: Annotated[
        datetime | None, typer.Option(help="When it was said, in UTC (with --role).")
    ] = None,
    kind: Annotated[Kind | None, typer.Option(help="What sort of memory it is.")] = None,
    tag: Tags = None,
    metadata: Annotated[str | None, typer.Option(help="A JSON object.")] = None,
    ttl_s: Annotated[float | None, typer.Option(help="Forget it after so many seconds.")] = None,
    infer: Annotated[
        bool, typer.Option("--infer", help="Let the configured model take facts out of it.")
    ] = False,
    json: Json = False,
) -> None:
    """Remember a text.

    Examples:

      memcube add 'I am allergic to nuts' --user ann --tag health

      memcube add 'See you in Rome!' --user ann --run trip --role user --name Ann

      cat notes.txt | memcube add - --user ann
    """
    content = _stdin() if text == "-" else text
    if role is None and (name or time):
        raise typer.BadParameter("--name and --time belong to a message; give --role too")
    when = time.replace(tzinfo=UTC) if time else None
    message = Message(role=role, content=content, name=name, time=when) if role else None
    with context.obj.open() as client:
        answer = client.add(
            [message] if message else content,
            user_id=user,
            agent_id=agent,
            run_id=run,
            kind=kind,
            tags=tag or (),
            metadata=_json_object(metadata, "--metadata"),
            ttl_s=ttl_s,
            infer=infer,
        )
    if json:
        print_json(answer)
        return
    for added in answer.results:
        typer.echo(safe(f"{added.event} {added.id}  {_short(added.text)}"))
    if answer.fallback:
        typer.echo(safe(f"kept verbatim: {answer.fallback}"), err=True)


def search(
    context: typer.Context,
    query: Annotated[str, typer.Argument(help="What to look for.")],
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many at most.")] = 10,
    mode: Annotated[Mode, typer.Option(help="How to rank.")] = Mode.HYBRID,
    threshold: Annotated[float | None, typer.Option(help="Lowest score to show.")] = None,
    filters: Annotated[str | None, typer.Option(help="A filter as JSON, see docs/api.md.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show what each score is made of.")
    ] = False,
    json: Json = False,
) -> None:
    """Find the memories that fit a query best.

    Examples:

      memcube search 'what can Ann not eat?' --user ann

      memcube search 'rome' --user ann -k 3 --mode sparse --json
    """
    with context.obj.open() as client:
        found = client.search(
            query,
            user_id=user,
            agent_id=agent,
            run_id=run,
            filters=_json_object(filters, "--filters"),
            top_k=top_k,
            threshold=threshold,
            mode=mode,
            explain=explain,
        )
    if json:
        print_json(found)
        return
    for place, hit in enumerate(found, 1):
        print_cube(hit, before=f"{place}. {hit.score:.3f}")
        if hit.explain:
            parts = (f"{name} {value:.3g}" for name, value in hit.explain.items())
            typer.echo(safe("    " + "  ".join(parts)))
    if not found.results:
        typer.echo("nothing found", err=True)


def get(
    context: typer.Context,
    id: Id,
    version: Annotated[int | None, typer.Option(help="As it was in this version.")] = None,
    as_of: Annotated[datetime | None, typer.Option(help="As it was then, in UTC.")] = None,
    json: Json = False,
) -> None:
    """Show one memory.

    Example: memcube get 0197a1c2-… --version 1
    """
    when = as_of.replace(tzinfo=UTC) if as_of else None
    with context.obj.open() as client:
        cube = client.get(id, version=version, as_of=when)
    if json:
        print_json(cube)
        return
    print_cube(cube, before=f"v{cube.version} {cube.kind} {cube.state}")


def list_memories(
    context: typer.Context,
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    kind: Annotated[Kind | None, typer.Option(help="Of this sort only.")] = None,
    state: Annotated[
        str | None,
        typer.Option(help="In this state only: generated, activated, merged or archived."),
    ] = None,
    tag: Annotated[str | None, typer.Option(help="With this tag only.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many at most.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="Go on where another page ended.")] = None,
    json: Json = False,
) -> None:
    """List memories, newest first.

    Example: memcube list --user ann --limit 20
    """
    with context.obj.open() as client:
        page = client.list(
            user_id=user,
            agent_id=agent,
            run_id=run,
            kind=kind,
            state=state,
            tag=tag,
            limit=limit,
            cursor=cursor,
        )
    if json:
        print_json(page)
        return
    for cube in page.results:
        print_cube(cube)
    if page.next_cursor:
        typer.echo(f"more with: --cursor {page.next_cursor}", err=True)


def history(context: typer.Context, id: Id, json: Json = False) -> None:
    """Show all versions of a memory.

    Example: memcube history 0197a1c2-…
    """
    with context.obj.open() as client:
        told = client.history(id)
    if json:
        print_json(told)
        return
    for version in told.versions:
        when = version.created_at.isoformat(" ", "seconds") if version.created_at else ""
        about = "  ".join(part for part in (when, version.reason, version.author) if part)
        typer.echo(safe(f"v{version.version}  {about}\n    {version.text}"))


def delete(
    context: typer.Context,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of memories.")] = None,
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Forget memories by id, or all of a scope. They can't be brought back.

    Examples:

      memcube delete 0197a1c2-…

      memcube delete --user ann --run trip --yes
    """
    scope = {"user_id": user, "agent_id": agent, "run_id": run}
    named = ", ".join(f"{name} {value!r}" for name, value in scope.items() if value)
    if bool(ids) == bool(named):
        raise typer.BadParameter("give either ids or a scope (--user, --agent, --run)")
    with context.obj.open() as client:
        if ids:
            for id in ids:
                typer.echo(f"deleted {client.delete(id).id}")
            return
        if not yes:
            typer.confirm(f"Forget everything of {named}?", abort=True)
        typer.echo(f"deleted {client.delete_all(**scope)}")


def context(
    context: typer.Context,
    query: Annotated[str, typer.Argument(help="What the prompt is about.")],
    user: User = None,
    agent: Agent = None,
    run: Run = None,
    budget: Annotated[int, typer.Option(min=64, help="Tokens at most.")] = 1024,
    json: Json = False,
) -> None:
    """Print a block of fitting memories, ready for a prompt.

    Example: memcube context 'plan a dinner for Ann' --user ann --budget 300
    """
    with context.obj.open() as client:
        block = client.context(query, user_id=user, agent_id=agent, run_id=run, token_budget=budget)
    if json:
        print_json(block)
        return
    typer.echo(safe(block.context))
    typer.echo(f"{block.num_tokens} of {block.budget} tokens, {len(block.ids)} memories", err=True)


def migrate(
    context: typer.Context,
    id: Id,
    tier: Annotated[Tier, typer.Option(help="Where its payloads are to be.")],
    adapter: Annotated[str | None, typer.Option(help="For chats that name this adapter.")] = None,
    node: Annotated[
        str | None, typer.Option(help="Where: a node's name, or one of its labels.")
    ] = None,
    json: Json = False,
) -> None:
    """Build a memory's KV now (activation), or drop it (plaintext). The text stays in any case.

    Example: memcube migrate 0197a1c2-… --tier activation
    """
    with context.obj.open() as client:
        done = client.cubes.migrate(id, tier, adapter=adapter, node=node)
    if json:
        print_json(done)
        return
    if tier is Tier.PLAINTEXT:
        typer.echo(f"dropped {done.dropped_bytes:,} bytes of KV")
        return
    typer.echo(f"{done.tokens:,} tokens of {done.cubes:,} cubes, {done.built_tokens:,} built now")
    for place in done.residency:
        typer.echo(safe(f"    {place.size_bytes:,} bytes  {place.medium}  {place.location}"))


def _json_object(text: str | None, option: str) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json_text.loads(text)
    except ValueError as broken:
        raise typer.BadParameter(f"is no JSON: {broken}", param_hint=option) from None
    if not isinstance(value, dict):
        raise typer.BadParameter("expected a JSON object", param_hint=option)
    return value


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise typer.BadParameter("is not UTF-8", param_hint="stdin") from None


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:79] + "…"
