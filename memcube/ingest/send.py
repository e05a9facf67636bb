"""Sends what a plan holds and its journal lacks."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from memcube.client import AsyncMemCubeClient
from memcube.ingest.journal import Journal
from memcube.ingest.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingested:
    """What one run did. ``skipped`` items were acknowledged by an earlier run."""

    added: int
    repeated: int
    skipped: int


async def ingest(
    client: AsyncMemCubeClient,
    plan: Plan,
    journal: Journal,
    *,
    wait: str = "indexed",
    progress: Callable[[int], None] = lambda num_items: None,
) -> Ingested:
    """Send the batches that were not acknowledged before, streams side by side.

    Run again after any failure, it goes on where it stopped. ``progress`` is told the number of
    items that are newly done, first those of earlier runs.

    Raises:
        MemCubeError: the first failure; what was acknowledged before it is in the journal.
    """
    skipped = sum(
        len(batch)
        for number, stream in enumerate(plan.streams)
        for batch in stream[: journal.done(number)]
    )
    progress(skipped)
    events = {"added": 0, "repeated": 0}

    async def send(number: int) -> None:
        batches = plan.streams[number]
        for index in range(journal.done(number), len(batches)):
            key = plan.key(number, index, salt=journal.salt, wait=wait)
            answer = await client.add_batch(batches[index], wait=wait, idempotency_key=key)
            journal.record(number)
            for result in answer.results:
                for added in result.results:
                    events[added.event] = events.get(added.event, 0) + 1
            progress(len(batches[index]))

    try:
        async with asyncio.TaskGroup() as tasks:
            for number in range(len(plan.streams)):
                tasks.create_task(send(number))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return Ingested(added=events["added"], repeated=events["repeated"], skipped=skipped)
