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
        # Without statistics an index of all rows seems as good as one of the few that wait; and a
        # table of a few rows is read whole unless that is forbidden.
        catalog._database.write(lambda connection: connection.exec_driver_sql("ANALYZE cubes"))
        return explained(catalog, "EXPLAIN ", before="SET LOCAL enable_seqscan = off")
