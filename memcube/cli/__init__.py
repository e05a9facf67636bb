"""The ``memcube`` command.

Exit codes: 0 done, 1 an error, 2 wrong usage, 3 no server reached. An error is one line on stderr
that says what to do.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Annotated

import httpx
import typer

from memcube.cli import evaluate, files, jobs, keys, lifecycle, memories, nodes, scheduler, serve
from memcube.cli.connection import Connection
from memcube.cli.output import as_lines, fail, print_json, safe
from memcube.client import Unreachable
from memcube.errors import MemCubeError

app = typer.Typer(
    name="memcube",
    help="Memory for language models: start a server, remember, search, measure.",
    epilog="Begin with: memcube serve   then: memcube add 'I like tea' --user ann",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("join")(serve.join)
memories.register(app)
files.register(app)
lifecycle.register(app)
jobs.register(app)
nodes.register(app)
app.add_typer(scheduler.app, name="scheduler")
app.add_typer(keys.app, name="keys")
app.add_typer(evaluate.app, name="eval")


@app.callback()
def _options(
    context: typer.Context,
    url: Annotated[
        str | None, typer.Option(help="The server. (default: MEMCUBE_URL, else serve.json)")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="The API key. (default: MEMCUBE_API_KEY, else serve.json)")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="The data folder. (default: MEMCUBE_HOME, else ./.memcube)"),
    ] = None,
) -> None:
    transport = context.obj
    context.obj = Connection(url=url, api_key=key, given_data_dir=data, transport=transport)


@app.command()
def status(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether the server is there and ready, and what it holds.

    Example: memcube status
    """
    with context.obj.open() as client:
        ready = client.ready()
        told = client.status()
        url = client.address.url
    if json:
        print_json({"url": url, "ready": ready, **told})
        return
    for line in as_lines({"url": url, "ready": ready, **told}):
        typer.echo(safe(line))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(package_version("memcube"))


def main(
    argv: Sequence[str] | None = None, *, transport: httpx.MockTransport | None = None
) -> None:
    """Run one command and exit. ``transport`` replaces the network, for tests."""
    try:
        app(args=argv, prog_name="memcube", obj=transport)
    except Unreachable as nowhere:
        fail(nowhere)
        sys.exit(3)
    except MemCubeError as error:
        fail(error)
        sys.exit(1)
    except OSError as refused:
        fail(f"{refused.filename or 'input or output'}: {refused.strerror or refused}")
        sys.exit(1)
