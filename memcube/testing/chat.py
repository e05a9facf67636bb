"""A chat model without a model: it says what it is told, and reports what it was asked."""

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Sequence

from memcube.activation.contract import FinishReason, Usage
from memcube.activation.stats import (
    AdapterStats,
    EngineStats,
    Histogram,
    KvStats,
    MediumStats,
)
from memcube.chat.contract import (
    BuildRequest,
    ChatPiece,
    ChatPrompt,
    EngineFacts,
    KvBytes,
    MemorySegment,
    SegmentUse,
)
from memcube.errors import AdapterUnusable, MemCubeError, Unavailable
from memcube.scheduler.leader_fence import LeaderFence

BYTES_PER_TOKEN = 100


class ScriptedModel:
    """Answers with ``pieces``; the KV of what it was asked before counts as attached.

    Words are its tokens. ``failing`` is raised before the piece of that number, ``down`` refuses
    all, ``unusable`` is why it can't use any adapter. ``on_build`` is called while KV is built: what happens there happens meanwhile.
    """

    def __init__(self, pieces: Sequence[str] = ("In ", "Oslo", ".")) -> None:
        self.pieces = list(pieces)
        self.prompts: list[ChatPrompt] = []
        self.failing: tuple[int, MemCubeError] | None = None
        self.unusable: MemCubeError | None = None
        self.closed_early = 0
        self.down = False
        self.waiting = 0
        self.on_build: Callable[[], None] | None = None
        self.fence = LeaderFence()
        self.node = "node-1"
        self.device_bytes = 1_000_000
        self._kv: dict[tuple[str, str, str], tuple[str, ...]] = {}
        """What each segment read so far holds, by salt, adapter and text."""

    async def chat(self, prompt: ChatPrompt) -> AsyncGenerator[ChatPiece]:
        """The scripted answer."""
        self._reached()
        self.prompts.append(prompt)
        if prompt.adapter is not None and self.unusable is not None:
            raise AdapterUnusable(prompt.adapter.id, self.unusable)
        ended = False
        try:
            for number, text in enumerate(self.pieces):
                if self.failing is not None and self.failing[0] == number:
                    raise self.failing[1]
                yield ChatPiece(text=text)
            uses = []
            for segment in prompt.segments:
                tokens = len(segment.text.split())
                adapter = "" if prompt.adapter is None else prompt.adapter.name
                key = prompt.salt, adapter, segment.text
                exact = tokens if key in self._kv else 0
                uses.append(SegmentUse(num_tokens=tokens, exact=exact, composed=0))
                self._kv[key] = (*segment.cubes, adapter)
            said = sum(len(turn.content.split()) for turn in prompt.turns)
            attached = sum(use.exact for use in uses)
            total = said + sum(use.num_tokens for use in uses)
            usage = _usage(total, attached, completion_tokens=len(self.pieces))
            ended = True
            yield ChatPiece(text="", finish=FinishReason.STOP, usage=usage, uses=tuple(uses))
        finally:
            self.closed_early += not ended

    async def facts(self) -> EngineFacts | None:
        """A word is a token."""
        self._reached()
        return EngineFacts(
            node=self.node,
            device_bytes=self.device_bytes,
            bytes_per_token=BYTES_PER_TOKEN,
            least_tokens=1,
            most_tokens=10_000,
        )

    async def build(self, wanted: BuildRequest, *, leader: int | None = None) -> Usage:
        """Read these segments."""
        self._reached(leader)
        if wanted.adapter is not None and self.unusable is not None:
            raise AdapterUnusable(wanted.adapter.id, self.unusable)
        adapter = "" if wanted.adapter is None else wanted.adapter.name
        missing = [s for s in wanted.segments if (wanted.salt, adapter, s.text) not in self._kv]
        for segment in missing:
            self._kv[wanted.salt, adapter, segment.text] = (*segment.cubes, adapter)
        if self.on_build is not None:
            meanwhile, self.on_build = self.on_build, None
            meanwhile()
        total = _num_tokens(wanted.segments)
        return _usage(total, total - _num_tokens(missing))

    async def forget(
        self, cubes: Collection[str], tenant: str | None, *, leader: int | None = None
    ) -> int:
        """Drop what holds these cubes, or is of this tenant."""
        self._reached(leader)
        gone = [
            key
            for key, held in self._kv.items()
            if key[0] == tenant or not set(cubes).isdisjoint(held)
        ]
        for key in gone:
            del self._kv[key]
        return len(gone)

    async def held(self, cubes: Collection[str], *, leader: int) -> set[str]:
        """Those of these cubes that were read and not forgotten."""
        self._reached(leader)
        return {id for ids in self._kv.values() for id in ids}.intersection(cubes)

    async def residency(self, cubes: Collection[str]) -> list[KvBytes]:
        """All of it lies on the device."""
        self._reached()
        held = [text for (*_, text), ids in self._kv.items() if not set(cubes).isdisjoint(ids)]
        size = sum(len(text.split()) for text in held) * BYTES_PER_TOKEN
        return [KvBytes(medium="device", node=self.node, num_bytes=size)] if size else []

    async def stats(self) -> KvStats:
        """Counts of what was read and attached; the rest is 0."""
        self._reached()
        by_tenant: Counter[str] = Counter()
        for salt, _, text in self._kv:
            by_tenant[salt] += len(text.split()) * BYTES_PER_TOKEN
        ttft = Histogram()
        ttft.observe(0.01)
        engine = EngineStats(
            running=0,
            waiting=self.waiting,
            background=0,
            tokens_per_s=2.5,
            prefill_tokens_per_s=300.0,
            steps=0,
            step_s=0.0,
            failed_steps=0,
            prefilled_tokens=30,
            generated_tokens=len(self.prompts) * len(self.pieces),
            attached_tokens={"exact": 60, "composed": 10},
            buffer_bytes=0,
            pool_bytes=by_tenant.total(),
            pool_blocks=len(self._kv),
            bytes_by_tenant=by_tenant,
            evictions={"capacity": 3, "refused: worth less than what it displaces": 2},
            finished={"stop": len(self.prompts)},
            ttft_s={"exact": ttft.shown()},
            queue_s=ttft.shown(),
        )
        disk = MediumStats(
            name="disk",
            num_payloads=1,
            used_bytes=700,
            bytes_by_tenant={"acme": 700},
            hits=5,
            hit_tokens=320,
            misses=1,
            events={"evicted: tenant's budget": 4, "lost": 1},
            load_s_per_mb=0.001,
        )
        adapters = AdapterStats(
            resident=2,
            resident_bytes=500,
            loads=3,
            load_s=0.3,
            evictions=1,
            refused={"corrupt": 4},
            wait_s={"resident": ttft.shown()},
        )
        return KvStats(engine=engine, media=[disk], node=self.node, adapters=adapters)

    def _reached(self, leader: int | None = None) -> None:
        if self.down:
            raise Unavailable("the engine is not there now")
        if leader is not None:
            self.fence.check(leader)


def _num_tokens(segments: Sequence[MemorySegment]) -> int:
    return sum(len(segment.text.split()) for segment in segments)


def _usage(total: int, attached: int, *, completion_tokens: int = 0) -> Usage:
    return Usage(
        prompt_tokens=total,
        completion_tokens=completion_tokens,
        attached_exact=attached,
        attached_composed=0,
        recomputed=0,
        prefilled=total - attached,
        queue_s=0.0,
        ttft_s=0.01,
    )
