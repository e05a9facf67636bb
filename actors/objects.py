"""The object store of a configuration, with its secrets from the environment."""

import os
from pathlib import Path

from memcube.config import Config
from memcube.errors import BadRequest
from memcube.objects import ObjectStore


async def open_objects(config: Config) -> ObjectStore:
    """The object store of a configuration.

    Raises:
        BadRequest: an S3 endpoint without its keys in the environment.
        Unavailable: the server does not answer.
    """
    objects = config.objects
    if objects.s3_endpoint is None:
        from memcube.objects.folder import FolderStore

        return FolderStore.open(objects.folder or Path(config.data_dir) / "objects")
    from memcube.objects.s3 import S3Settings, S3Store

    access, secret = (os.environ.get(f"MEMCUBE_S3_{name}_KEY") for name in ("ACCESS", "SECRET"))
    if not access or not secret:
        raise BadRequest(
            "set MEMCUBE_S3_ACCESS_KEY and MEMCUBE_S3_SECRET_KEY", "objects.s3_endpoint"
        )
    settings = S3Settings(
        endpoint=objects.s3_endpoint,
        bucket=objects.s3_bucket,
        access_key=access,
        secret_key=secret,
        secure=objects.s3_secure,
    )
    return await S3Store.open(settings, create_bucket=True)
