"""A node of a running system, until it is told to leave: ``python -m cluster.join --help``.

The node is Ray's; what runs on it is the scheduler's business (a shard of its own, tenants that are sent there).
It needs the same version of this checkout and its packages, and reaches what the head reaches: the catalog, the
object store, the other nodes.
"""

import argparse
import fcntl
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import environment
from memcube.errors import BadRequest, Conflict, MemCubeError, Unavailable
from memcube.scheduler.actions import shard_at

LOOK_EVERY_S = 1.0
_WORD = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
"""What Ray takes as a label's value, and as each part of its key."""
CONNECT_S, TURN_S = 10.0, 120.0
OBJECT_STORE_MB = 768
"""256, and the default of ``activation.host_mb``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a node; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="memcube join", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("address", nargs="?", help="HOST:PORT of the system's Ray")
    parser.add_argument("--name", required=True, help="what this node is called")
    parser.add_argument("--data", type=Path, help="the system's data folder, on this machine")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--cpus", type=int, help="for Ray to count with")
    parser.add_argument("--gpus", type=int, help="for Ray to count with")
    parser.add_argument("--node-ip", help="this machine's address, where Ray finds a wrong one")
    parser.add_argument("--object-store-mb", type=int, default=OBJECT_STORE_MB)
    given = parser.parse_args(arguments)
    os.umask(0o077)
    try:
        address, token = where(given.address, given.data, os.environ)
        environment.prepare_node(token)
        _run(address, given)
    except MemCubeError as refused:
        print(f"memcube join: {refused}", file=sys.stderr)
        return 1
    return 0


def where(
    address: str | None, data: Path | None, environ: Mapping[str, str]
) -> tuple[str, Path | None]:
    """The address of the system's Ray, and the file with its token; None where the environment names it.

    Raises:
        BadRequest: there is no address or no token. Unavailable: no system runs in the data folder.
    """
    if data is None:
        if address is None:
            raise BadRequest("give the address of the system's Ray, or its data folder (--data)")
        if not (environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH")):
            raise BadRequest(
                "set RAY_AUTH_TOKEN_PATH to a copy of ray.token of the system's data folder, or give "
                "that folder (--data)"
            )
        return address, None
    if address is None:
        state = data.absolute() / "serve.json"
        try:
            address = str(json.loads(state.read_text())["ray_address"])
        except FileNotFoundError:
            raise Unavailable(f"no system runs in {data} ({state.name} is missing)") from None
        except (ValueError, KeyError):
            raise BadRequest("names no ray_address; give the address", str(state)) from None
    token = environment.token_path(data.absolute())
    if not token.is_file():
        raise BadRequest("holds no ray.token; is it the system's data folder?", str(data))
    return address, token


def labels_of(name: str, given: Sequence[str]) -> dict[str, str]:
    """A node's labels as Ray takes them.

    Raises:
        BadRequest: one that is none.
    """
    from actors.nodes import NODE_LABEL

    if shard_at(name) is not None or name == "objects":
        raise BadRequest(
            f"{name!r} is what places of the system are called; choose another", "--name"
        )
    labels = {NODE_LABEL: name}
    for label in given:
        key, separator, value = label.partition("=")
        if not separator or not key or key in labels:
            raise BadRequest(f"KEY=VALUE such as zone=west, once each; got {label!r}", "label")
        labels[key] = value
    for key, value in labels.items():
        if not all(_WORD.fullmatch(part) for part in (*key.split("/", 1), value)):
            raise BadRequest(
                f"{value!r}: 1 to 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends",
                "name" if key == NODE_LABEL else f"label {key}",
            )
    return labels


def _run(address: str, given: argparse.Namespace) -> None:
    labels = labels_of(given.name, given.label)
    stop = threading.Event()
    with alone(Path(tempfile.gettempdir()) / f"memcube-join-{os.getuid()}.lock"):
        _check_name(address, given.name)
        node = _start(address, labels, given)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        print(f"joined {address} as {given.name}; Ctrl-C leaves it", flush=True)
        while not stop.wait(LOOK_EVERY_S):
            if node.dead_processes():
                raise Conflict(
                    f"Ray ended here: the system at {address} is gone; start it, and let this node join again"
                )
        print("leaving …", flush=True)
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
    print("left", flush=True)


def _check_name(address: str, name: str) -> None:
    """
    Raises:
        Unavailable: the system can't be reached. Conflict: another node has that name.
    """
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue] - it is C
    from ray.core.generated import gcs_pb2
    from ray.exceptions import RayError

    from actors.nodes import NODE_LABEL

    alive = gcs_pb2.GcsNodeInfo.GcsNodeState.Value("ALIVE")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=CONNECT_S)
    except (RayError, ValueError) as failed:
        raise Unavailable(
            f"no system is reached at {address} ({' '.join(str(failed).split())[:200]}); "
            "is that the ray_address of its serve.json, and is the token its own?"
        ) from None
    for node in nodes.values():
        if node.state == alive and node.labels.get(NODE_LABEL) == name:
            raise Conflict(f"a node called {name!r} is up already; choose another --name")


@contextmanager
def alone(path: Path, *, within_s: float = TURN_S) -> Iterator[None]:
    """One node at a time starts on this machine: two that start at once take the same names for Ray's sockets. A
    process that is killed lets the next one in.

    Raises:
        Unavailable: it was not this one's turn in time, or the file can't be used.
    """
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as failed:
        raise Unavailable(f"{path} can't be opened ({failed.strerror}); remove it") from None
    try:
        until = time.monotonic() + within_s
        while not _took(lock):
            if time.monotonic() > until:
                raise Unavailable(
                    f"another node has been starting here for {within_s:g} s; end it, or try again"
                )
            time.sleep(0.2)
        yield
    finally:
        os.close(lock)


def _took(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _start(address: str, labels: dict[str, str], given: argparse.Namespace) -> Any:
    """A node as ``ray start --address`` starts it, whose processes end with this one.

    Raises:
        Unavailable: it did not start.
    """
    from ray._private.node import Node
    from ray._private.parameter import RayParams
    from ray._private.services import get_node_ip_address

    wanted = RayParams(
        gcs_address=address,
        node_ip_address=given.node_ip or get_node_ip_address(address),
        labels=labels,
        num_cpus=given.cpus,
        num_gpus=given.gpus,
        object_store_memory=given.object_store_mb << 20,
    )
    try:
        return Node(wanted, head=False, shutdown_at_exit=False, spawn_reaper=True)
    except Exception as failed:  # Ray has no class for it
        raise Unavailable(
            f"Ray did not start here ({failed}); is this the Ray and Python of {address}, and does it "
            "reach this machine? raylet.err in Ray's log folder may say more"
        ) from failed


if __name__ == "__main__":
    sys.exit(main())
