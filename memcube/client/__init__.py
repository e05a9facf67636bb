"""The Python client: ``MemCubeClient`` and ``AsyncMemCubeClient``.

It needs httpx and nothing of the server. Errors are those of ``memcube.errors``; two more are made
here, for what only a client sees: ``Unreachable`` and ``OutcomeUnknown``.
"""

from memcube.client.address import Address, find_address
from memcube.client.aio import AsyncMemCubeClient
from memcube.client.problems import OutcomeUnknown, Unreachable
from memcube.client.retry import RetryPolicy
from memcube.client.sync import MemCubeClient
from memcube.client.types import (
    Added,
    AddResult,
    ApiKey,
    BatchResult,
    Context,
    Cube,
    Deleted,
    Edge,
    History,
    Hit,
    Item,
    Lineage,
    Message,
    Migrated,
    NewKey,
    Page,
    Parent,
    Residency,
    SearchResult,
    Source,
    Version,
)

__all__ = [
    "AddResult",
    "Added",
    "Address",
    "ApiKey",
    "AsyncMemCubeClient",
    "BatchResult",
    "Context",
    "Cube",
    "Deleted",
    "Edge",
    "History",
    "Hit",
    "Item",
    "Lineage",
    "MemCubeClient",
    "Message",
    "Migrated",
    "NewKey",
    "OutcomeUnknown",
    "Page",
    "Parent",
    "Residency",
    "RetryPolicy",
    "SearchResult",
    "Source",
    "Unreachable",
    "Version",
    "find_address",
]
