"""One S3 server for this folder's tests."""

from collections.abc import Iterator

import pytest

from memcube.testing.s3 import NoS3, S3Server, s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    try:
        with s3_server() as server:
            yield server
    except NoS3 as none:
        pytest.skip(str(none))
