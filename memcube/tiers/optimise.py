"""Builds the graphs of an engine folder: ``python optimise.py FOLDER PARENT_PID``.

A process of its own, because the engine holds the GIL for as long as it takes. Nobody else may have
the folder open. It ends with its parent: what it would leave, nobody would use.
"""

import ctypes
import os
import signal
import sys

import qdrant_edge as qe

_PR_SET_PDEATHSIG = 1


def main() -> None:
    folder, parent = sys.argv[1], int(sys.argv[2])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the process that asked for it is gone")
    os.nice(19)
    if (
        sys.platform == "linux"
    ):  # whoever is served goes first: Ray's workers are at a nice of 15 themselves
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    shard = qe.EdgeShard.load(folder)
    shard.optimize()
    shard.flush()
    shard.close()


if __name__ == "__main__":
    main()
