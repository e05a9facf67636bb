"""``memcube serve``: the whole system, from a checkout."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import memcube
from memcube.errors import Unavailable


class NotInstalled(Unavailable):
    """``NotInstalled(what)``: a part that this installation doesn't have."""

    def __str__(self) -> str:
        return self.what


def serve(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings such as http.port=9000.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file with settings.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Where the data lies. (default: MEMCUBE_HOME, ./.memcube)")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="The HTTP port; 0 takes a free one.")
    ] = None,
) -> None:
    """Start the system here and run it until Ctrl-C. From a checkout: `make serve`.

    Examples:

      memcube serve

      memcube serve --data ~/memories --port 9000

      memcube serve plaintext.shards=2
    """
    root = Path(memcube.__file__).parents[1]
    folder = data or context.obj.given_data_dir
    command, environ = server_command(root, overrides or [], config=config, data=folder, port=port)
    sys.stdout.flush()
    os.execve(command[0], command, environ)


def server_command(
    root: Path,
    overrides: list[str],
    *,
    config: Path | None,
    data: Path | None,
    port: int | None,
) -> tuple[list[str], dict[str, str]]:
    """The server's command line and environment.

    Raises:
        NotInstalled: this is the client's wheel, or the server's extra is missing.
    """
    if not (root / "cluster" / "up.py").is_file():
        raise NotInstalled(
            "this installation holds the client and the command line, not the server; "
            "clone the repository and run `make serve` there"
        )
    if importlib.util.find_spec("ray") is None:
        raise NotInstalled(f"the server's packages are missing; run `make serve` in {root}")
    command = [sys.executable, "-m", "cluster.up"]
    if config is not None:
        command += ["--config", str(config)]
    if data is not None:
        command += ["--data", str(data)]
    if port is not None:
        command += ["--port", str(port)]
    known = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(root), *([known] if known else [])])
    return [*command, *overrides], {**os.environ, "PYTHONPATH": path}
