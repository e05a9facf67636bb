"""Starts the whole system and stays until it is told to stop: ``python -m cluster.up --help``.

What it makes in the data folder: ``catalog.db`` (the truth), ``plaintext/`` (the index, which can be
rebuilt), ``models/``, ``config.yaml`` (as resolved), ``ray.token``, and ``serve.json`` with the URL
and the API key, readable by its owner alone, for the command line and the client.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster import environment
from memcube.catalog import Catalog, Role
from memcube.config import Config, load_config
from memcube.errors import Conflict, MemCubeError, NotFound, Unauthenticated

TENANT = "default"
READY_S = 360.0


def main(arguments: list[str] | None = None) -> int:
    """Run a system; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="memcube serve", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--config", type=Path, help="a YAML file; see configs/")
    parser.add_argument("--data", type=Path, help="the data folder (default: .memcube)")
    parser.add_argument("--port", type=int, help="the HTTP port; 0 picks a free one")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="such as http.host=0.0.0.0"
    )
    given = parser.parse_args(arguments)
    os.umask(0o077)  # what is remembered is for the owner of the data folder alone
    overrides = list(given.overrides)
    if given.data or os.environ.get("MEMCUBE_HOME"):
        overrides.append(f"data_dir={json.dumps(str(given.data or os.environ['MEMCUBE_HOME']))}")
    if given.port is not None:
        overrides.append(f"http.port={given.port}")
    try:
        config = load_config(given.config, overrides)
        config = config.model_copy(update={"data_dir": config.data_dir.absolute()})
        with _only_one(config.data_dir):
            _run(config)
    except MemCubeError as refused:
        print(f"memcube serve: {refused}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(data_dir / "serve.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another system serves {data_dir}; stop it, or give --data") from None
        yield


def _run(config: Config) -> None:
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {text}", flush=True)

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    http = config.http.model_copy(
        update={"port": environment.claim_port(config.http.host, config.http.port)}
    )
    config = config.model_copy(update={"http": http})
    say(f"data in {config.data_dir}")
    key = _bootstrap(config)
    (config.data_dir / "config.yaml").write_text(config.dump())
    url = f"http://{'127.0.0.1' if http.host == '0.0.0.0' else http.host}:{http.port}"
    with _ray(config) as ray_address:
        say("Ray is up")
        with _serving(config):
            if _until_ready(url, key, stop):
                _write_state(config, url=url, api_key=key, ray_address=ray_address)
                say("ready")
                print(
                    f"\n  URL      {url}\n  API key  {key}\n  data     {config.data_dir}\n"
                    f"  docs     {url}/docs\n  Ray      {ray_address} (memcube join)\n\nCtrl-C stops it.",
                    flush=True,
                )
                stop.wait()
            # From here a second Ctrl-C ends the process at once.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            print("\nstopping …", flush=True)
            (config.data_dir / "serve.json").unlink(missing_ok=True)
    say("stopped")


def _bootstrap(config: Config) -> str:
    """The default tenant, and an operator's key to it: that of the last run while it holds."""
    catalog = Catalog.open(config.catalog_url())
    now = datetime.now(UTC)
    path = config.data_dir / "operator.key"
    try:
        tenant = catalog.access.ensure_tenant(TENANT, shards=config.plaintext.shards, now=now)
        _check_shards(catalog, config)
        with contextlib.suppress(OSError, Unauthenticated):
            held = path.read_text().strip()
            catalog.access.authenticate(held, now=now)
            return held
        _, secret = catalog.access.create_key(
            tenant=tenant.id, name="bootstrap", role=Role.OPERATOR, expires_at=None, now=now
        )
        _write_private(path, secret + "\n")
        return secret
    except NotFound as gone:
        raise Conflict(f"the catalog changed while it was read: {gone}") from None
    finally:
        catalog.close()


def _check_shards(catalog: Catalog, config: Config) -> None:
    known = catalog.shards.numbers(config.plaintext.shards)
    lost = {tenant.shard for tenant in catalog.access.tenants()} - set(known)
    if lost:
        raise Conflict(
            f"tenants of this catalog lie in shards {sorted(lost)}, and plaintext.shards is "
            f"{config.plaintext.shards}; set it to {max(lost) + 1}"
        )


@contextlib.contextmanager
def _ray(config: Config) -> Iterator[str]:
    """A cluster, started or joined; the address by which nodes join it."""
    import logging

    if config.ray.address is None:
        folder = environment.prepare(config.data_dir)
        if config.ray.port:
            os.environ["RAY_GCS_SERVER_PORT"] = str(config.ray.port)
        for old in folder.glob("session_*"):
            if old.is_symlink():
                old.unlink()
            else:
                shutil.rmtree(old, ignore_errors=True)
        import ray

        logging.getLogger("ray").setLevel(logging.WARNING)
        ray.init(
            address="local",
            namespace="memcube",
            include_dashboard=config.ray.dashboard,
            object_store_memory=config.object_store_bytes(),
            _temp_dir=str(folder),
            _node_ip_address=config.ray.node_ip,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    else:
        os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")
        import ray

        ray.init(
            address=config.ray.address,
            namespace="memcube",
            runtime_env={
                "working_dir": str(environment.ROOT),
                "excludes": [".venv", ".git", ".memcube"],
            }
            if config.ray.ship_code
            else None,
            log_to_driver=False,
        )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _serving(config: Config) -> Iterator[None]:
    import logging

    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    from actors.system import ensure_system
    from serve.gateway import APP_NAME, gateway_app

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    catalog = Catalog.open(config.catalog_url())
    system = ensure_system(config, catalog.shards.homes)
    serve.start(
        proxy_location="HeadOnly",  # by default each node with a replica gets one, on the same ports
        http_options=HTTPOptions(host=config.http.host, port=config.http.port),
    )
    serve.run(gateway_app(config), name=APP_NAME, route_prefix="/", blocking=False)
    try:
        yield
    finally:
        # Serve's controller ends in the middle of its last call; Ray tells stdout that it failed.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            serve.shutdown()
            _close(ray, system, catalog.shards.numbers(config.plaintext.shards))
        catalog.close()


def _close(ray: Any, system: Any, shards: Sequence[int]) -> None:
    """Let the actors finish: the scheduler gives its lease back, shards and engines flush."""
    parts = [*(system.shards.handle(number) for number in shards), *system.engines]
    loops = [loop for loop in (system.scheduler, system.jobs) if loop is not None]
    calls = [*(loop.stop.remote() for loop in loops), *(part.close.remote() for part in parts)]
    _, late = ray.wait(calls, num_returns=len(calls), timeout=20)
    if late:
        print("some parts did not stop in time; nothing is lost", file=sys.stderr)
    for actor in (*loops, *parts, system.embedder):
        ray.kill(actor)


def _until_ready(url: str, key: str, stop: threading.Event) -> bool:
    """Whether the system answered, with all its parts, before it was told to stop. A running one is ready with
    fewer (``/readyz``), but at the start none is left out.

    Raises:
        Conflict: not ready after READY_S.
    """
    import httpx

    until = time.monotonic() + READY_S
    answer = "no answer"
    headers = {"Authorization": f"Bearer {key}"}
    while not stop.wait(0.1):
        try:
            response = httpx.get(f"{url}/v1/status", headers=headers, timeout=10)
            answer = _missing(response.json()) if response.status_code == 200 else response.text
            if not answer:
                return True
        except httpx.HTTPError as failed:
            answer = repr(failed)
        if time.monotonic() > until:
            raise Conflict(f"not ready after {READY_S:g} s: {answer[:500]}")
    return False


def _missing(status: Any) -> str:
    """What doesn't answer, by what ``GET /v1/status`` tells."""
    parts = [*status["shards"], status["scheduler"], *status["engines"]]
    return "; ".join(part["error"] for part in parts if part.get("error"))


def _write_state(config: Config, *, url: str, api_key: str, ray_address: str) -> None:
    state = {
        "url": url,
        "api_key": api_key,
        "pid": os.getpid(),
        "data_dir": str(config.data_dir),
        "ray_address": ray_address,
        "started_at": datetime.now(UTC).isoformat(),
    }
    _write_private(config.data_dir / "serve.json", json.dumps(state, indent=1) + "\n")


def _write_private(path: Path, text: str) -> None:
    """Replace a file that only its owner may read."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
