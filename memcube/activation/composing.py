"""How runs use segments that were built apart; see ``compose`` for what that means and loses.

On the device a segment lies as it was computed, rotated to the slots behind its prefix, and is turned
on to the slots where it is attached. Its key holds the prefix, so it is never put behind another.
"""

from collections.abc import Sequence

from memcube.activation.blocks import Block
from memcube.activation.compose import BLEND_SHARE, Composer, Composition, Place
from memcube.activation.contract import GenerateRequest, Mode, SegmentRef
from memcube.activation.forward import KvBuffer, PackedModel
from memcube.activation.keys import KvIdentity, segment_key
from memcube.activation.models import LoadedModel
from memcube.activation.rope import Rope


class Composing:
    """Composed reuse for one model. ``modes`` are those that its fidelity gate passed."""

    def __init__(self, model: PackedModel, loaded: LoadedModel, identity: KvIdentity) -> None:
        """The model must support it."""
        self._rope = Rope(loaded.model)
        self._composer = Composer(model, self._rope)
        self._identity = identity
        self.modes: frozenset[Mode] = frozenset()

    def applies(self, request: GenerateRequest) -> bool:
        """Whether the request is to be composed. Else it is served exactly: so is one with an
        adapter, as the fidelity gate measured the model without."""
        return bool(request.segments) and request.mode in self.modes and request.adapter is None

    def keys(self, request: GenerateRequest) -> tuple[str, ...]:
        """The keys of the request's segments."""
        prefix_ids = request.prompt_ids[: request.segments[0].start]
        return tuple(
            segment_key(
                self._identity,
                salt=request.salt,
                adapter=request.adapter,
                prefix_ids=prefix_ids,
                token_ids=request.prompt_ids[segment.start : segment.end],
            )
            for segment in request.segments
        )

    def attach(self, buffer: KvBuffer, block: Block, segment: SegmentRef) -> Place:
        """Copy a stored segment to its place, which are the next slots."""
        shift = segment.start - block.start
        kv_L2HND = block.kv_L2HND
        if shift:
            kv_L2HND = self._rope.rotate(kv_L2HND, [shift] * block.num_tokens)
        buffer.load(kv_L2HND, segment.start)
        return Place(segment.start, segment.end, not shift)

    def choose(
        self, buffer: KvBuffer, request: GenerateRequest, places: Sequence[Place]
    ) -> list[int]:
        """The slots to compute again: as many as the fidelity gate does, of the ``places`` where
        segments were attached. The buffer ends with the last segment, the rest of the prompt asks.
        """
        moved = sum(place.end - place.start for place in places if not place.exact)
        if not moved:
            return []
        start, end = request.segments[0].start, buffer.length
        ids = request.prompt_ids
        composition = Composition(token_ids=ids[start:end], places=tuple(places))
        # In the gate's cases the first segment alone stands where it was built, so that of the
        # others it is twice the share at most. Here more of them may be exact.
        share = BLEND_SHARE * min(1.0, 2 * moved / (end - start))
        return self._composer.choose(buffer, composition, ids[end:], share)
