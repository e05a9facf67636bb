"""Unit tests run without Ray: whoever reaches for it fails at once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from memcube.testing.local import LocalSystem, migrated_catalog


@pytest.fixture(autouse=True, scope="session")
def _no_ray():
    import ray

    def refuse(*_: object, **__: object):
        raise AssertionError("a unit test must not start Ray")

    patch = pytest.MonkeyPatch()
    patch.setattr(ray, "init", refuse)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def catalog_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return migrated_catalog(tmp_path_factory.mktemp("template"))


@pytest.fixture
def system(tmp_path: Path, catalog_template: Path) -> Iterator[LocalSystem]:
    """A fresh system in this process."""
    opened = LocalSystem.open(tmp_path, template=catalog_template)
    yield opened
    opened.catalog.close()
