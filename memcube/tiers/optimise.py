"""Builds the graph of an engine folder: ``python -m memcube.tiers.optimise FOLDER``.

A process of its own, because the engine holds the GIL for as long as it takes. Nobody else may have
the folder open.
"""

import os
import sys

import qdrant_edge as qe


def main() -> None:
    os.nice(10)
    shard = qe.EdgeShard.load(sys.argv[1])
    shard.optimize()
    shard.flush()
    shard.close()


if __name__ == "__main__":
    main()
