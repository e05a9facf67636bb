"""The contract of the journal and the queue: in the simulation's double, on SQLite and on PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from memcube.catalog import Catalog
from memcube.testing.scheduling_contract import (
    ActionsContract,
    CatalogBooks,
    MemoryBooks,
    TasksContract,
)


class TestBooksInMemory(ActionsContract, TasksContract):
    @pytest.fixture
    def books(self) -> MemoryBooks:
        return MemoryBooks()


class TestBooksOnSQLite(ActionsContract, TasksContract):
    @pytest.fixture
    def books(self, tmp_path: Path) -> Iterator[CatalogBooks]:
        catalog = Catalog.open(f"sqlite:///{tmp_path}/catalog.db")
        yield CatalogBooks(catalog)
        catalog.close()


class TestBooksOnPostgreSQL(ActionsContract, TasksContract):
    @pytest.fixture
    def books(self, postgres_url: str) -> Iterator[CatalogBooks]:
        catalog = Catalog.open(postgres_url)
        yield CatalogBooks(catalog)
        catalog.close()
