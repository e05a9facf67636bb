"""``memcube keys``: make, list and end API keys. Needs an admin key."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import typer

from memcube.cli.connection import Json
from memcube.cli.output import print_json, safe

app = typer.Typer(help="Make, list and end API keys (needs an admin key).", no_args_is_help=True)


class Role(StrEnum):
    READER = "reader"
    WRITER = "writer"
    ADMIN = "admin"
    OPERATOR = "operator"


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    role: Annotated[Role, typer.Option(help="What it may do.")] = Role.WRITER,
    tenant: Annotated[
        str | None,
        typer.Option(help="For which tenant; another than yours takes an operator's key."),
    ] = None,
    expires_at: Annotated[datetime | None, typer.Option(help="When it ends, in UTC.")] = None,
    json: Json = False,
) -> None:
    """Make a key. It is printed this once and can't be shown again.

    Example: memcube keys create app --role writer
    """
    ends = expires_at.replace(tzinfo=UTC) if expires_at else None
    with context.obj.open() as client:
        made = client.keys.create(name, role=role, tenant=tenant, expires_at=ends)
    if json:
        print_json(made)
        return
    typer.echo(made.key)
    typer.echo(f"id {made.id}; keep the key now, it is not shown again", err=True)


@app.command("list")
def list_keys(context: typer.Context, json: Json = False) -> None:
    """List the tenant's keys, without their secrets.

    Example: memcube keys list
    """
    with context.obj.open() as client:
        keys = client.keys.list()
    if json:
        print_json(keys)
        return
    for key in keys:
        hint = f"…{key.hint}" if key.hint else ""
        state = "revoked" if key.revoked_at else ""
        about = (key.id, key.role, key.tenant or "", hint, state, key.name)
        typer.echo(safe("  ".join(part for part in about if part)))


@app.command()
def revoke(
    context: typer.Context, id: Annotated[str, typer.Argument(help="The id of a key.")]
) -> None:
    """End a key at once.

    Example: memcube keys revoke 0197a1c2-…
    """
    with context.obj.open() as client:
        client.keys.revoke(id)
    typer.echo(f"revoked {id}")
