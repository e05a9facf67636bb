"""Writers that are killed: what they said they had written must be there."""

import signal
import subprocess
import sys
import time

READY = "ready"


def acknowledged_until_killed(program: str, *given: str, after_s: float) -> set[str]:
    """The lines that a Python program printed before ``kill -9``, which comes ``after_s`` after
    it has printed ``READY``. It prints a line when what the line names is durable.

    Raises:
        RuntimeError: it ended by itself.
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", program, *given], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    try:
        if (first := writer.stdout.readline().rstrip("\n")) != READY:
            raise RuntimeError(f"the writer said {first!r} and not {READY!r}")
        time.sleep(after_s)
        if writer.poll() is not None:
            raise RuntimeError(f"the writer ended by itself, with {writer.returncode}")
    finally:
        writer.send_signal(signal.SIGKILL)
        told = writer.stdout.readlines()
        writer.wait()
    # A line that the kill cut short was not acknowledged.
    return {line.rstrip("\n") for line in told if line.endswith("\n")}
