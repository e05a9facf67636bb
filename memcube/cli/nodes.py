"""``memcube node`` and ``memcube migrate-tenant``: machines that come, are emptied and go, and who lies where."""

import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from memcube.cli.connection import Json
from memcube.cli.output import fail, print_json, safe
from memcube.client import Event, MemCubeClient

POLL_S = 0.5
WAIT_S = 30.0
"""How long one request waits for a task."""
Name = Annotated[str, typer.Argument(help="The name of a node.")]

app = typer.Typer(
    help="Nodes: which there are, which are emptied. Needs an operator's key.", no_args_is_help=True
)


def register(main: typer.Typer) -> None:
    """Add the commands to the application."""
    main.add_typer(app, name="node")
    main.command("migrate-tenant")(migrate_tenant)


@app.command("list")
def list_nodes(context: typer.Context, json: Json = False) -> None:
    """List the nodes.

    Example: memcube node list
    """
    with context.obj.open() as client:
        found = client.nodes.list()
    if json:
        print_json(found)
        return
    for node in found:
        _show(node)


@app.command()
def drain(
    context: typer.Context,
    name: Name,
    wait: Annotated[bool, typer.Option("--wait", help="Until it is drained.")] = False,
    json: Json = False,
) -> None:
    """Empty a node: it takes nothing new, and what lies there goes to others while it is served.

    A node that is drained may be stopped. Ctrl-C while it is waited for leaves it draining.

    Example: memcube node drain b --wait
    """
    with context.obj.open() as client:
        node = client.nodes.drain(name)
        if wait:
            node = _until_drained(client, node)
    _print(node, json=json)
    if wait and node["state"] != "drained":
        fail(f"node {name} is {node['state']}, and is not being drained")
        raise typer.Exit(1)


@app.command()
def undrain(context: typer.Context, name: Name, json: Json = False) -> None:
    """Let a node be used again.

    Example: memcube node undrain b
    """
    with context.obj.open() as client:
        _print(client.nodes.undrain(name), json=json)


@app.command()
def forget(context: typer.Context, name: Name) -> None:
    """Take a node off the list that is down and will not come back; its shards belong where they run.

    Example: memcube node forget b
    """
    with context.obj.open() as client:
        client.nodes.forget(name)
    typer.echo(safe(f"forgot {name}"))


def migrate_tenant(
    context: typer.Context,
    tenant: Annotated[str, typer.Argument(help="The tenant.")],
    to: Annotated[str, typer.Option("--to", help="A node's name, or one of its labels.")],
    wait: Annotated[bool, typer.Option("--wait", help="Until it lies there.")] = False,
    json: Json = False,
) -> None:
    """Send a tenant's memories to a node, while they are searched and written. Needs an operator's key.

    Of several words for one tenant the last one holds. Ctrl-C while it is waited for stops nothing.

    Examples:

      memcube migrate-tenant acme --to b --wait

      memcube migrate-tenant acme --to zone=west
    """
    with context.obj.open() as client:
        event = client.nodes.move_tenant(tenant, to=to)
        if wait:
            event = _until_ended(client, event)
    if json:
        print_json(event)
    else:
        typer.echo(safe(f"{event.id}  {event.tenant}  {event.state}  {event.reason}"))
    if wait and (event.state != "done" or (event.result or {}).get("outcome") == "superseded"):
        fail(f"{tenant} was not sent to {to}: {event.outcome or 'a later word took its place'}")
        raise typer.Exit(1)


def _until_drained(client: MemCubeClient, node: Mapping[str, Any]) -> Mapping[str, Any]:
    """The node when it is drained, or drains no more; tells how many tenants are left."""
    told = None
    while node["state"] == "draining":
        left = f"left there: {_tenants(node) if node['num_tenants'] else 'KV'}"
        if left != told:
            typer.echo(left, err=True)
            told = left
        time.sleep(POLL_S)
        node = client.nodes.get(node["name"])
    return node


def _until_ended(client: MemCubeClient, event: Event) -> Event:
    """The task when it has ended; tells what it waits for."""
    told = ""
    while not event.ended:
        if event.outcome != told:
            typer.echo(safe(event.outcome), err=True)
            told = event.outcome
        event = client.scheduler.wait(event.id, timeout_s=WAIT_S)
    return event


def _print(node: Mapping[str, Any], *, json: bool) -> None:
    if json:
        print_json(node)
        return
    _show(node)


def _show(node: Mapping[str, Any]) -> None:
    labels = [f"{key}={value}" for key, value in sorted(node["labels"].items())]
    about = [
        node["name"],
        node["state"],
        "head" if node["is_head"] else "",
        f"shards {_numbers(node['shards'])}",
        f"home of {_numbers(node['home_of'])}",
        _tenants(node),
        *labels,
    ]
    typer.echo(safe("  ".join(part for part in about if part)))


def _tenants(node: Mapping[str, Any]) -> str:
    num = node["num_tenants"]
    return f"{num} tenant" if num == 1 else f"{num} tenants"


def _numbers(shards: list[int]) -> str:
    return ",".join(map(str, shards)) or "none"
