"""The contract of the book of jobs on SQLite and on a real PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from memcube.catalog import Catalog
from memcube.testing.jobs_contract import JobsContract


class TestJobsOnSQLite(JobsContract):
    @pytest.fixture
    def catalog(self, tmp_path: Path) -> Iterator[Catalog]:
        catalog = Catalog.open(f"sqlite:///{tmp_path}/catalog.db")
        yield catalog
        catalog.close()


class TestJobsOnPostgreSQL(JobsContract):
    @pytest.fixture
    def catalog(self, postgres_url: str) -> Iterator[Catalog]:
        catalog = Catalog.open(postgres_url)
        yield catalog
        catalog.close()
