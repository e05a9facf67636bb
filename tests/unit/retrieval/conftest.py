"""A small synthetic memory for the ranker's tests."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from memcube.cube import Scope, slot
from memcube.embedding.contract import Purpose
from memcube.ids import CubeId, TenantId
from memcube.retrieval.passage import passage_text
from memcube.retrieval.ranker import Retriever
from memcube.retrieval.weights import RankerWeights
from memcube.testing.embedding import HashEmbedder
from memcube.tiers.memory import MemoryStore
from memcube.tiers.plaintext import IndexedCube, IndexSpec

NOW = datetime(2026, 3, 1, tzinfo=UTC)
TENANT = TenantId("acme")
SESSIONS: Sequence[Sequence[tuple[str, str]]] = (
    (
        ("Ann Lee", "Hey Bob! How have you been?"),
        ("Bob", "Busy with the garden. Tomatoes everywhere this year."),
        ("Ann Lee", "Lovely! What do you grow besides tomatoes?"),
        ("Bob", "Pumpkins and a bit of basil for the kitchen."),
    ),
    (
        ("Bob", "Did anything happen on your trip to Norway?"),
        ("Ann Lee", "Yes, we went kayaking in the fjord and saw two orcas."),
        ("Bob", "Wow. Were you scared?"),
        ("Ann Lee", "A little, the water was cold and grey."),
    ),
    (
        ("Ann Lee", "My sister visited last week, we painted the fence."),
        ("Bob", "What colour did you choose?"),
        ("Ann Lee", "A dark green, like the one at our grandmother's house."),
        ("Bob", "I painted mine yesterday in a dull brown."),
    ),
)
FACTS = (
    "The cat is called Miso.",
    "Allergic to peanuts.",
    "Works as a nurse in Leeds.",
    "Favourite colour is teal.",
    "Plays the cello on Sundays.",
    "Drives an old red van.",
    "Born in Lisbon in 1987.",
    "Is learning Finnish.",
)


class World:
    """A store, its retriever, and what is put into it."""

    tenant, now, sessions, facts = TENANT, NOW, SESSIONS, FACTS

    def __init__(self) -> None:
        self.embedder = HashEmbedder(dim=128)
        spec = IndexSpec(embedder=self.embedder.identity, dim=self.embedder.dim)
        self.store = MemoryStore(spec)
        self.retriever = Retriever(self.store, self.embedder, RankerWeights.load())
        self._num = 0

    async def put(
        self,
        text: str,
        *,
        tenant: TenantId = TENANT,
        speaker: str | None = None,
        thread: str | None = None,
        seq: int | None = None,
        event_time: datetime | None = None,
        user_id: str | None = None,
    ) -> CubeId:
        (vector,) = await self.embedder.embed(
            [passage_text(text, speaker=speaker)], Purpose.PASSAGE
        )
        self._num += 1
        id = CubeId(f"00000000-0000-7000-8000-{self._num:012d}")
        threaded = thread is not None and seq is not None
        cube = IndexedCube(
            id=id,
            tenant=tenant,
            version=1,
            text=text,
            vector=vector,
            kind="episode",
            state="generated",
            user_id=user_id,
            speaker=speaker,
            created_at=NOW,
            updated_at=NOW,
            event_time=event_time,
            slot=slot(thread, seq) if threaded else None,
            thread=thread,
            seq=seq,
        )
        await self.store.put([cube])
        return id

    async def put_conversation(self) -> None:
        for number, session in enumerate(SESSIONS, 1):
            thread = Scope(tenant=TENANT, user_id="ann", run_id=f"session-{number}").thread
            for seq, (speaker, text) in enumerate(session):
                await self.put(
                    text,
                    speaker=speaker,
                    thread=thread,
                    seq=seq,
                    user_id="ann",
                    event_time=NOW - timedelta(days=40 * (4 - number)),
                )

    async def texts(self, query: str, *, limit: int = 10, **how: object) -> list[str]:
        given = {"where": None, "now": NOW, "limit": limit} | how
        hits = await self.retriever.search(TENANT, query, **given)  # type: ignore[arg-type]
        return [hit.cube.text for hit in hits]


@pytest.fixture
def world() -> World:
    return World()
