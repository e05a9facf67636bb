"""The short form of ``make chaos``: each part and the whole tree killed once under steady adds."""

import asyncio
from pathlib import Path

from benchmarks.chaos import TITLES, audit, run
from memcube.testing.process import SystemProcess


def test_nothing_acknowledged_is_lost_or_doubled_when_parts_are_killed(tmp_path: Path):
    system = SystemProcess(tmp_path / "data").start()
    try:
        ledger, back = asyncio.run(run(system, kills=len(TITLES) + 1, seed=7))
        lost, doubled, unfound = asyncio.run(audit(system, ledger))
    finally:
        system.stop()
    assert all(len(times) == 1 for times in back.values())
    assert ledger.acknowledged
    assert (lost, doubled, unfound, ledger.changed_ids) == (0, 0, 0, 0)
