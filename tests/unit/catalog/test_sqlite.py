"""The catalog's contract on SQLite."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from memcube.catalog import Catalog
from memcube.testing.catalog_contract import CatalogContract, explained


class TestSQLite(CatalogContract):
    @pytest.fixture
    def catalog(self, tmp_path: Path) -> Iterator[Catalog]:
        catalog = Catalog.open(f"sqlite:///{tmp_path}/catalog.db")
        yield catalog
        catalog.close()

    def _plans(self, catalog: Catalog) -> list[str]:
        return explained(catalog, "EXPLAIN QUERY PLAN ")
