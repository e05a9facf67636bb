"""``memcube serve`` and ``memcube join``: the whole system and its further nodes, from a checkout."""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

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
    options = {"--config": config, "--data": data or context.obj.given_data_dir, "--port": port}
    _become("cluster.up", options, overrides or [])


def join(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Argument(help="HOST:PORT of the system's Ray. (default: that of the data folder)"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What this node is called.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="The system's data folder, where it is on this machine."),
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; can be given again.")] = None,
    cpus: Annotated[int | None, typer.Option(min=0, help="For Ray to count with.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="For Ray to count with.")] = None,
    node_ip: Annotated[
        str | None, typer.Option(help="This machine's address, where Ray finds a wrong one.")
    ] = None,
    object_store_mb: Annotated[
        int | None, typer.Option(min=80, help="Of host memory for Ray's objects.")
    ] = None,
) -> None:
    """Let this machine be a node of a running system until Ctrl-C. From a checkout.

    It needs the system's Ray token: --data finds it on the same machine; on another one set
    RAY_AUTH_TOKEN_PATH to a copy of the system's ray.token. To leave without a gap, empty it first:
    memcube node drain NAME --wait.

    Examples:

      memcube join --data .memcube --name b

      RAY_AUTH_TOKEN_PATH=ray.token memcube join 10.0.0.1:6379 --name b --label zone=west
    """
    options: dict[str, Any] = {
        "--name": name,
        "--data": data or context.obj.given_data_dir,
        "--cpus": cpus,
        "--gpus": gpus,
        "--node-ip": node_ip,
        "--object-store-mb": object_store_mb,
    }
    given = [part for one in label or () for part in ("--label", one)]
    _become("cluster.join", options, [*given, *([address] if address else [])])


def _become(module: str, options: Mapping[str, Any], rest: Sequence[str]) -> None:
    root = Path(memcube.__file__).parents[1]
    command, environ = server_command(root, module, options, rest)
    sys.stdout.flush()
    os.execve(command[0], command, environ)


def server_command(
    root: Path, module: str, options: Mapping[str, Any], rest: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """The command line and environment of a program of the server; options that are None are left out.

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
    command = [sys.executable, "-m", module]
    for name, value in options.items():
        if value is not None:
            command += [name, str(value)]
    known = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(root), *([known] if known else [])])
    return [*command, *rest], {**os.environ, "PYTHONPATH": path}
