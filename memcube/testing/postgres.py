"""A real PostgreSQL for tests: a server started here, or the one that ``DATABASE_URL`` names.

Each test suite gets a schema of its own in it, so that suites don't see each other. The server
listens on a free loopback port only and keeps nothing: its folder goes when it stops.
"""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import sqlalchemy as sa

from memcube.ports import free_ports

START_TIMEOUT_S = 30.0
_USER = "memcube"


class NoPostgres(Exception):
    """Neither a server nor the programs to start one; the text says what was looked for."""


@contextlib.contextmanager
def postgres_server(host: str = "127.0.0.1") -> Iterator[sa.URL]:
    """The URL of a running server. On another address than loopback, all of its network are let in.

    Raises:
        NoPostgres: there is none and none can be started.
    """
    if host == "127.0.0.1" and (given := os.environ.get("DATABASE_URL")):
        yield sa.make_url(given).set(drivername="postgresql+psycopg")
        return
    programs = _programs()
    owner = _owner()
    folder = Path(tempfile.mkdtemp(prefix="memcube-postgres-"))
    try:
        if owner is not None:
            shutil.chown(folder, owner, owner)
        _run([programs / "initdb", "-D", folder / "data", "-U", _USER, *_INITDB], owner)
        if host != "127.0.0.1":
            with (folder / "data" / "pg_hba.conf").open("a") as rules:
                rules.write("host all all samenet trust\n")
        with _serving(programs, folder, owner, host) as port:
            yield sa.URL.create(
                "postgresql+psycopg", _USER, host=host, port=port, database="postgres"
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def postgres_schema(server: sa.URL) -> Iterator[str]:
    """The URL of an empty schema in the server, which is dropped afterwards."""
    name = f"test_{secrets.token_hex(6)}"
    address = server.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(address, autocommit=True) as admin:
        admin.execute(f'CREATE SCHEMA "{name}"'.encode())
        try:
            own = server.update_query_dict({"options": f"-csearch_path={name}"})
            yield own.render_as_string(hide_password=False)
        finally:
            admin.execute(f'DROP SCHEMA "{name}" CASCADE'.encode())


_INITDB = ("-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")


def _programs() -> Path:
    """The folder that holds ``initdb`` and ``postgres``."""
    places: list[Path] = []
    if pg_config := shutil.which("pg_config"):
        told = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        places.append(Path(told.stdout.strip()))
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if found := shutil.which("initdb"):
        places.append(Path(found).parent)
    for place in places:
        if (place / "initdb").exists() and (place / "postgres").exists():
            return place
    raise NoPostgres(
        "no PostgreSQL: DATABASE_URL is not set, and pg_config, /usr/lib/postgresql/*/bin and PATH "
        "hold no initdb (Debian: apt-get install postgresql)"
    )


def _owner() -> str | None:
    """The user to run as where we are root, since PostgreSQL refuses to be root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        raise NoPostgres("PostgreSQL can't run as root and there is no user 'postgres'") from None


def _run(command: list[str | Path], owner: str | None) -> None:
    done = subprocess.run(
        command, user=owner, group=owner, cwd="/", capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")


@contextlib.contextmanager
def _serving(programs: Path, folder: Path, owner: str | None, host: str) -> Iterator[int]:
    log = folder / "log"
    for _ in range(3):
        port = free_ports(1)[0]
        with log.open("wb") as out:
            server = subprocess.Popen(
                [
                    programs / "postgres",
                    *("-D", folder / "data", "-h", host, "-p", str(port)),
                    *("-c", "unix_socket_directories=", "-c", "fsync=off"),
                    *("-c", "max_connections=100", "-c", "log_min_messages=warning"),
                ],
                user=owner,
                group=owner,
                cwd="/",
                stdout=out,
                stderr=out,
            )
        try:
            if _answers(server, host, port):
                yield port
                return
        finally:
            _stop(server)
    raise RuntimeError(f"PostgreSQL did not start: {log.read_text(errors='replace')[-2000:]}")


def _answers(server: subprocess.Popen[bytes], host: str, port: int) -> bool:
    """Whether the server came up; False when it ended, as it does where the port was taken."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            psycopg.connect(
                host=host, port=port, user=_USER, dbname="postgres", connect_timeout=2
            ).close()
            return True
        except psycopg.OperationalError:
            time.sleep(0.05)
    return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.send_signal(signal.SIGINT)  # "fast": ends sessions, then itself
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
