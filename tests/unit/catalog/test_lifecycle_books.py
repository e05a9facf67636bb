"""The contract of the time machine, archives and proposals on SQLite and on a real PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from memcube.catalog import Catalog
from memcube.testing.lifecycle_contract import LifecycleContract


class TestLifecycleOnSQLite(LifecycleContract):
    @pytest.fixture
    def catalog(self, tmp_path: Path) -> Iterator[Catalog]:
        catalog = Catalog.open(f"sqlite:///{tmp_path}/catalog.db")
        yield catalog
        catalog.close()


class TestLifecycleOnPostgreSQL(LifecycleContract):
    @pytest.fixture
    def catalog(self, postgres_url: str) -> Iterator[Catalog]:
        catalog = Catalog.open(postgres_url)
        yield catalog
        catalog.close()
