"""The contract of the book of adapters on SQLite and on a real PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from memcube.catalog import Catalog
from memcube.testing.adapters_contract import AdaptersContract


class TestAdaptersOnSQLite(AdaptersContract):
    @pytest.fixture
    def catalog(self, tmp_path: Path) -> Iterator[Catalog]:
        catalog = Catalog.open(f"sqlite:///{tmp_path}/catalog.db")
        yield catalog
        catalog.close()


class TestAdaptersOnPostgreSQL(AdaptersContract):
    @pytest.fixture
    def catalog(self, postgres_url: str) -> Iterator[Catalog]:
        catalog = Catalog.open(postgres_url)
        yield catalog
        catalog.close()
