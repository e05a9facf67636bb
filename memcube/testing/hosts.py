"""Hosts for tests: network namespaces of this machine, joined by a bridge, each with folders of its own.

What runs on a host has its own loopback and address, and some folders that no other host sees under their names.
The rest of the file system, the checkout among it, is all hosts'. Needs root and ``ip`` (iproute2).
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_NET = "10.77.0"
GATE = f"{_NET}.254"
"""This machine's own address on the bridge: servers for all hosts listen here."""


class NoHosts(Exception):
    """None can be made here; the text says why."""


class Host:
    """One namespace. ``own`` has, for each path that is private, the folder that it sees there."""

    def __init__(self, name: str, address: str, own: Mapping[Path, Path]) -> None:
        self.name = name
        self.address = address
        self.own = dict(own)

    def start(self, command: Sequence[str], **how: Any) -> subprocess.Popen[Any]:
        """Run a program there; ``how`` is what ``Popen`` takes."""
        mounts = [f'mount --bind "{own}" "{path}"' for path, own in self.own.items()]
        script = "; ".join([*mounts, 'exec "$@"'])
        inside = ["unshare", "--mount", "sh", "-ec", script, "sh"]
        return subprocess.Popen(["ip", "netns", "exec", self.name, *inside, *command], **how)

    def cut(self) -> None:
        """Take its cable out: it lives on, and reaches nobody."""
        _ip("link", "set", f"{self.name}-up", "down")

    def mend(self) -> None:
        """Put the cable back."""
        _ip("link", "set", f"{self.name}-up", "up")

    def kill(self) -> None:
        """``kill -9`` all that runs there."""
        until = time.monotonic() + 30
        while pids := _ip("netns", "pids", self.name).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            if time.monotonic() > until:
                raise TimeoutError(f"host {self.name} did not end")
            time.sleep(0.1)


@contextlib.contextmanager
def hosts(
    names: Sequence[str], *, private: Sequence[Path], folder: Path
) -> Iterator[dict[str, Host]]:
    """Some hosts, each of which has its own of the ``private`` folders, kept below ``folder``. The names are also
    those of their namespaces.

    Raises:
        NoHosts: this machine does not let us.
    """
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "mount"))):
        raise NoHosts("network namespaces need root, ip (iproute2), unshare and mount")
    for path in private:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    bridge = f"{names[0]}-br"
    made: dict[str, Host] = {}
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{GATE}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number, name in enumerate(names, start=1):
            own = {path: folder / name / str(n) for n, path in enumerate(private)}
            for place in own.values():
                place.mkdir(parents=True, mode=0o700)
            _ip("netns", "add", name)
            made[name] = Host(name, f"{_NET}.{number}", own)
            _ip("link", "add", f"{name}-up", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"{name}-up", "master", bridge, "up")
            inside = ("-n", name)
            _ip(*inside, "address", "add", f"{made[name].address}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "up")
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "route", "add", "default", "via", GATE)
        yield made
    finally:
        for host in made.values():
            host.kill()
            # The namespace itself may live on for a while, and its cable with it.
            for what in (("link", "delete", f"{host.name}-up"), ("netns", "delete", host.name)):
                with contextlib.suppress(NoHosts):
                    _ip(*what)
        with contextlib.suppress(NoHosts):
            _ip("link", "delete", bridge)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoHosts(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
