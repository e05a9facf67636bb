"""A whole system in processes of its own, for integration tests and benchmarks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
START_S = 400.0


def processes_below(pid: int, title: str) -> list[psutil.Process]:
    """Descendants of a process whose command line begins with a title, such as ``ray::QdrantActor``."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except psutil.NoSuchProcess:
            continue  # it ended while the tree was read
    return found


class SystemProcess:
    """``python -m cluster.up`` on a free port over one data folder.

    It has no chat model (which takes a gigabyte and some seconds) unless ``chat`` is asked for, and
    runs no fidelity gate (which takes minutes of idle time) unless ``overrides`` say so.
    ``start`` returns when it is ready. Its whole process tree is known by the launcher's pid.
    """

    def __init__(
        self,
        data_dir: Path,
        overrides: Sequence[str] = (),
        *,
        port: int = 0,
        chat: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """``environ`` is what is added to this process's environment."""
        self.data_dir = data_dir
        self._overrides = [
            f"activation.actors={int(chat)}",
            "activation.composing=off",
            *overrides,
        ]
        self._port = port
        self._environ = {**os.environ, **(environ or {})}
        self._launcher: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.key = ""

    @property
    def log(self) -> Path:
        return self.data_dir / "launcher.log"

    @property
    def pid(self) -> int:
        assert self._launcher is not None
        return self._launcher.pid

    def start(self) -> "SystemProcess":
        """Start, and wait until it is ready.

        Raises:
            RuntimeError: it ended, or was not ready in time; with its log.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True)
        state = self.data_dir / "serve.json"
        state.unlink(missing_ok=True)
        command = [sys.executable, "-m", "cluster.up", "--data", str(self.data_dir)]
        with open(self.log, "ab") as log:
            self._launcher = subprocess.Popen(
                [*command, "--port", str(self._port), *self._overrides],
                cwd=ROOT,
                env=self._environ,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        until = time.monotonic() + START_S
        while not state.exists():
            if self._launcher.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"the system did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)
        told = json.loads(state.read_text())
        self.url, self.key = told["url"], told["api_key"]
        return self

    def stop(self) -> None:
        """End it as Ctrl-C does."""
        if self._launcher is None:
            return
        self._launcher.send_signal(signal.SIGINT)
        try:
            self._launcher.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.kill()
        self._launcher = None

    def processes(self, title: str) -> list[psutil.Process]:
        """Those of the tree; see ``processes_below``."""
        return processes_below(self.pid, title)

    def kill_one(self, title: str) -> int:
        """``kill -9`` the processes of a title; returns how many there were."""
        found = self.processes(title)
        for process in found:
            process.kill()
        return len(found)

    def kill(self) -> None:
        """``kill -9`` the launcher and every process that it made."""
        if self._launcher is None:
            return
        tree = [psutil.Process(self._launcher.pid)] if self._launcher.poll() is None else []
        tree += [child for process in tree for child in process.children(recursive=True)]
        for process in tree:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # its parent's end took it along
        self._launcher.wait()
        self._launcher = None

    def __enter__(self) -> "SystemProcess":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
