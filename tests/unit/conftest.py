"""Unit tests run without Ray: whoever reaches for it fails at once. Their files lie in memory where there is room."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from memcube.testing.local import LocalSystem, migrated_catalog

MEMORY = Path("/dev/shm")
LEAST_BYTES = 2 << 30
"""A store of the embedded index takes 200 MB; a container's default of 64 MB is too little."""


@pytest.fixture(autouse=True, scope="session")
def _no_ray():
    import ray

    def refuse(*_: object, **__: object):
        raise AssertionError("a unit test must not start Ray")

    patch = pytest.MonkeyPatch()
    patch.setattr(ray, "init", refuse)
    yield
    patch.undo()


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the test's own. In memory, as fsync is what most of the tests would wait for: what they kill
    are processes, whose writes a file system keeps either way."""
    if not os.access(MEMORY, os.W_OK) or shutil.disk_usage(MEMORY).free < LEAST_BYTES:
        yield tmp_path_factory.mktemp("test")
        return
    with tempfile.TemporaryDirectory(
        prefix="memcube-test-", dir=MEMORY, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def catalog_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return migrated_catalog(tmp_path_factory.mktemp("template"))


@pytest.fixture
def system(tmp_path: Path, catalog_template: Path) -> Iterator[LocalSystem]:
    """A fresh system in this process."""
    opened = LocalSystem.open(tmp_path, template=catalog_template)
    yield opened
    opened.close()
