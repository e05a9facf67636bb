"""A chat model without a model: it says what it is told, and reports what it was asked."""

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Sequence

from memcube.activation.contract import FinishReason, Usage
from memcube.activation.stats import EngineStats, Histogram, KvStats, MediumStats
from memcube.chat.contract import (
    BuildRequest,
    ChatPiece,
    ChatPrompt,
    KvBytes,
    MemorySegment,
    SegmentUse,
)
from memcube.errors import MemCubeError, Unavailable

BYTES_PER_TOKEN = 100


class ScriptedModel:
    """Answers with ``pieces``; the KV of what it was asked before counts as attached.

    Words are its tokens. ``failing`` is raised before the piece of that number, ``down`` refuses
    all. ``on_build`` is called while KV is built: what happens there happens meanwhile.
    """

    def __init__(self, pieces: Sequence[str] = ("In ", "Oslo", ".")) -> None:
        self.pieces = list(pieces)
        self.prompts: list[ChatPrompt] = []
        self.failing: tuple[int, MemCubeError] | None = None
        self.closed_early = 0
        self.down = False
        self.waiting = 0
        self.on_build: Callable[[], None] | None = None
        self._kv: dict[tuple[str, str], tuple[str, ...]] = {}
        """The cubes of each segment read so far, by salt and text."""

    async def chat(self, prompt: ChatPrompt) -> AsyncGenerator[ChatPiece]:
        """The scripted answer."""
        self._reached()
        self.prompts.append(prompt)
        ended = False
        try:
            for number, text in enumerate(self.pieces):
                if self.failing is not None and self.failing[0] == number:
                    raise self.failing[1]
                yield ChatPiece(text=text)
            uses = []
            for segment in prompt.segments:
                tokens = len(segment.text.split())
                exact = tokens if (prompt.salt, segment.text) in self._kv else 0
                uses.append(SegmentUse(num_tokens=tokens, exact=exact, composed=0))
                self._kv[prompt.salt, segment.text] = segment.cubes
            said = sum(len(turn.content.split()) for turn in prompt.turns)
            attached = sum(use.exact for use in uses)
            total = said + sum(use.num_tokens for use in uses)
            usage = _usage(total, attached, completion_tokens=len(self.pieces))
            ended = True
            yield ChatPiece(text="", finish=FinishReason.STOP, usage=usage, uses=tuple(uses))
        finally:
            self.closed_early += not ended

    async def build(self, wanted: BuildRequest) -> Usage:
        """Read these segments."""
        self._reached()
        missing = [s for s in wanted.segments if (wanted.salt, s.text) not in self._kv]
        for segment in missing:
            self._kv[wanted.salt, segment.text] = segment.cubes
        if self.on_build is not None:
            meanwhile, self.on_build = self.on_build, None
            meanwhile()
        total = _num_tokens(wanted.segments)
        return _usage(total, total - _num_tokens(missing))

    async def forget(self, cubes: Collection[str], tenant: str | None) -> int:
        """Drop what holds these cubes, or is of this tenant."""
        self._reached()
        gone = [
            key
            for key, held in self._kv.items()
            if key[0] == tenant or not set(cubes).isdisjoint(held)
        ]
        for key in gone:
            del self._kv[key]
        return len(gone)

    async def residency(self, cubes: Collection[str]) -> list[KvBytes]:
        """All of it lies on the device."""
        self._reached()
        held = [text for (_, text), ids in self._kv.items() if not set(cubes).isdisjoint(ids)]
        size = sum(len(text.split()) for text in held) * BYTES_PER_TOKEN
        return [KvBytes(medium="device", node="node-1", num_bytes=size)] if size else []

    async def stats(self) -> KvStats:
        """Counts of what was read and attached; the rest is 0."""
        self._reached()
        by_tenant: Counter[str] = Counter()
        for salt, text in self._kv:
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
        return KvStats(engine=engine, media=[disk], node="node-1")

    def _reached(self) -> None:
        if self.down:
            raise Unavailable("the engine is not there now")


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
