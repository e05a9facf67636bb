"""One running system for a module: the real one, in processes of its own, on a free port."""

from collections.abc import Iterator

import pytest

from memcube.client import MemCubeClient
from memcube.testing.process import SystemProcess

SHARDS = 2


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemProcess]:
    overrides = [
        f"plaintext.shards={SHARDS}",
        "scheduler.interval_s=0.5",
        "scheduler.pending_grace_s=1",
    ]
    with SystemProcess(tmp_path_factory.mktemp("system") / "data", overrides) as running:
        yield running


@pytest.fixture
def client(system: SystemProcess) -> Iterator[MemCubeClient]:
    with MemCubeClient(system.url, system.key) as client:
        yield client
