"""The catalog's contract on a real PostgreSQL."""

from collections.abc import Iterator

import pytest

from memcube.catalog import Catalog
from memcube.testing.catalog_contract import CatalogContract, explained


class TestPostgreSQL(CatalogContract):
    @pytest.fixture
    def catalog(self, postgres_url: str) -> Iterator[Catalog]:
        catalog = Catalog.open(postgres_url)
        yield catalog
        catalog.close()

    def _plans(self, catalog: Catalog) -> list[str]:
        # A table of a few rows is read whole unless that is forbidden.
        return explained(catalog, "EXPLAIN ", before="SET LOCAL enable_seqscan = off")
