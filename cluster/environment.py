"""What Ray and Serve read from the environment, set before Ray is imported.

Serve's HAProxy ingress costs a seventh of the default proxy's CPU time a request (docs/adr/0003).
Its files and ports are machine-wide by default; each system gets its own, so that several systems,
and the tests, run beside each other.
"""

import hashlib
import os
import secrets
import tempfile
import time
from pathlib import Path

from memcube.errors import Conflict
from memcube.ports import free_ports, free_range, is_free

ROOT = Path(__file__).resolve().parents[1]
PORT_WAIT_S = 25.0
MAX_TMPDIR = 10
"""HAProxy's socket lies below it with a 56-character node id in its path, of 97 bytes at most."""


def temp_dir(data_dir: Path) -> Path:
    """Where Ray keeps its sockets and logs: short, since a socket's path has 107 bytes at most."""
    name = hashlib.sha256(str(data_dir).encode()).hexdigest()[:8]
    base = tempfile.gettempdir()
    if len(base) > MAX_TMPDIR:
        base = "/tmp"
    return Path(base) / f"memcube-{os.getuid()}-{name}"


def prepare(data_dir: Path) -> Path:
    """Set the environment for a local cluster; returns Ray's folder.

    The Ray token is 256 random bits in a file of the data folder that only its owner reads: without
    one, anybody who reaches Ray's ports can run code.
    """
    folder = temp_dir(data_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise Conflict(f"{folder} belongs to another user; remove it or set TMPDIR")
    haproxy = folder / "h"
    haproxy.mkdir(mode=0o700, exist_ok=True)
    metrics, stats, fallback, fallback_grpc = free_ports(4)
    replicas = free_range(40)
    prepare_node(_token(data_dir))
    values = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "s"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "state"),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replicas + 19),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(replicas + 20),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(replicas + 39),
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "5",
    }
    os.environ.update(values)
    for name, value in {
        # Serve looks around ten times a second by default, idle or not: 25 CPU-ms a second.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    }.items():
        os.environ.setdefault(name, value)
    return folder


def prepare_node(token: Path | None) -> None:
    """Set what Ray and the actors of any node need; Serve's proxy runs on the head alone. Without ``token``
    the environment names Ray's token itself."""
    values = {
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(
            part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part
        ),
    }
    if token is not None:
        values["RAY_AUTH_TOKEN_PATH"] = str(token)
    os.environ.update(values)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def token_path(data_dir: Path) -> Path:
    """Where the Ray token of a system lies."""
    return data_dir / "ray.token"


def _token(data_dir: Path) -> Path:
    path = token_path(data_dir)
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return path


def claim_port(host: str, port: int) -> int:
    """The port to serve on; 0 picks one. A taken one is waited for: after a kill -9 of a whole
    system its proxy lingers for some seconds.

    Raises:
        Conflict: still taken after PORT_WAIT_S.
    """
    if port == 0:
        return free_ports(1)[0]
    until = time.monotonic() + PORT_WAIT_S
    while not is_free(host, port):
        if time.monotonic() > until:
            raise Conflict(f"port {port} on {host} is taken; choose another with --port N (0: any)")
        time.sleep(0.2)
    return port
