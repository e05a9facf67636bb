"""One PostgreSQL server for this folder's tests, and a schema of its own for each that asks."""

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from memcube.testing.postgres import NoPostgres, postgres_schema, postgres_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[sa.URL]:
    try:
        with postgres_server() as url:
            yield url
    except NoPostgres as none:
        pytest.skip(str(none))


@pytest.fixture
def postgres_url(postgres: sa.URL) -> Iterator[str]:
    with postgres_schema(postgres) as url:
        yield url
