"""A file's adds cut into batches, each with an Idempotency-Key that a re-run makes again.

A plan has a few streams. A stream's batches go one after the other and the streams side by side;
all records of a lane are in one stream, so a conversation keeps its order.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memcube.client.calls import item_json
from memcube.client.types import Item
from memcube.ids import digest
from memcube.ingest.formats import Reading, Record

NUM_STREAMS = 4
BATCH_ITEMS = 200
BATCH_CHARS = 1_000_000
"""Of JSON; the server takes bodies of 16 MiB by default, and a character has at most 4 bytes."""

_PLAN_FORM = 1
"""Changes when the same file is cut in another way, so that old keys meet no other batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be sent. ``digest`` is of all that is in it and of its cut."""

    digest: str
    streams: tuple[tuple[tuple[Item, ...], ...], ...]

    @property
    def num_items(self) -> int:
        return sum(len(batch) for stream in self.streams for batch in stream)

    def key(self, stream: int, batch: int, *, salt: str, wait: str) -> str:
        """The Idempotency-Key of one batch; another salt makes another run of the same plan.

        ``wait`` is in it because the server takes a key with another body for a mistake.
        """
        return "ingest-" + digest("ingest", self.digest, salt, wait, stream, batch)[:48]


def make_plan(reading: Reading, *, num_streams: int = NUM_STREAMS) -> Plan:
    """The batches of a file. Equal content for an equal target gives an equal plan."""
    streams: list[list[Record]] = [[] for _ in range(num_streams)]
    lanes: dict[str, int] = {}
    for number, record in enumerate(reading.records):
        if record.lane is None:
            place = number // BATCH_ITEMS
        else:
            place = lanes.setdefault(record.lane, len(lanes))
        streams[place % num_streams].append(record)
    sizes = {id(r): len(_text(r.item)) for r in reading.records}
    cut = tuple(_batches(stream, [sizes[id(r)] for r in stream]) for stream in streams)
    content = [_text(item) for stream in cut for batch in stream for item in batch]
    shape = [len(batch) for stream in cut for batch in (*stream, ())]
    return Plan(digest=digest("plan", _PLAN_FORM, *shape, *content), streams=cut)


def journal_path(folder: Path, plan: Plan, *, url: str, api_key: str | None) -> Path:
    """Where this plan's progress is kept: one file for each server and key."""
    return folder / f"ingest-{digest('journal', plan.digest, url, api_key)[:24]}.json"


def _batches(records: Sequence[Record], sizes: Sequence[int]) -> tuple[tuple[Item, ...], ...]:
    batches: list[tuple[Item, ...]] = []
    batch: list[Item] = []
    num_chars = 0
    for record, size in zip(records, sizes, strict=True):
        if batch and (len(batch) == BATCH_ITEMS or num_chars + size > BATCH_CHARS):
            batches.append(tuple(batch))
            batch, num_chars = [], 0
        batch.append(record.item)
        num_chars += size
    if batch:
        batches.append(tuple(batch))
    return tuple(batches)


def _text(item: Item) -> str:
    return json.dumps(item_json(item), ensure_ascii=False, sort_keys=True)
