import pytest
import torch

from memcube.activation.compose import Composer, Place
from memcube.activation.forward import KvBuffer, PackedModel, Row
from memcube.activation.rope import Rope
from tests.unit.activation.tiny import CONFIGS, Reference, some_ids

CLOSE = {"rtol": 0.0, "atol": 1e-4}
PREFIX = some_ids(9, seed=1)
SEGMENTS = [some_ids(21, seed=2), some_ids(14, seed=3), some_ids(17, seed=4)]
QUERY = some_ids(6, seed=5)


class World:
    def __init__(self, config):
        self.reference = Reference(config)
        loaded = self.reference.loaded()
        self.packed = PackedModel(loaded)
        self.composer = Composer(self.packed, Rope(loaded.model))
        self.prefix = self.filled(PREFIX)
        self.segments = [self.composer.build(self.prefix, ids) for ids in SEGMENTS]

    def filled(self, ids):
        buffer = KvBuffer(self.packed.layout, "cpu")
        self.packed.forward([Row(buffer, ids, logits="none")])
        return buffer

    def attached(self, order):
        buffer = KvBuffer(self.packed.layout, "cpu")
        buffer.load(self.prefix.view(), 0)
        return buffer, self.composer.attach(buffer, [self.segments[i] for i in order])


@pytest.fixture(scope="module", params=CONFIGS)
def world(request):
    return World(CONFIGS[request.param])


@pytest.fixture(scope="module")
def llama():
    return World(CONFIGS["llama"])


def block_diagonal(order):
    """What a composition is: each segment sees the prefix and itself, at positions that restart
    behind the prefix; the query sees all, at the end."""
    lengths = [len(SEGMENTS[i]) for i in order]
    total = len(PREFIX) + sum(lengths) + len(QUERY)
    sees = torch.ones(total, total, dtype=torch.bool).tril()
    start = len(PREFIX)
    for length in lengths:
        sees[start : start + length, len(PREFIX) : start] = False
        start += length
    return torch.zeros(total, total).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0), (1, 2, 0)])
def test_a_composition_equals_one_pass_with_a_block_diagonal_mask(world, order):
    # RoPE attention depends on distances alone, so within a segment it doesn't matter where it
    # stands; between prefix and segment the pass must have the distances of the build. So the
    # segments' own outputs are checked with restarting positions, and the query's with keys moved.
    ids = [*PREFIX, *(token for i in order for token in SEGMENTS[i])]
    restarting = [*range(len(PREFIX))]
    for i in order:
        restarting += range(len(PREFIX), len(PREFIX) + len(SEGMENTS[i]))
    size = len(ids)
    mask = block_diagonal(order)[:, :, :size, :size]
    with torch.inference_mode():
        output = world.reference.model(
            torch.tensor([ids]),
            attention_mask=mask,
            position_ids=torch.tensor([restarting]),
            use_cache=True,
        )
    rope = Rope(world.reference.model)
    expected_L2HND = torch.stack(
        [torch.stack((layer.keys[0], layer.values[0])) for layer in output.cache.layers]
    )
    moved_L2HND = rope.rotate(rope.unrotate(expected_L2HND, restarting), range(size))

    buffer, _ = world.attached(order)
    torch.testing.assert_close(buffer.view(), moved_L2HND, **CLOSE)


def test_the_query_behind_a_composition_reads_what_is_attached(llama):
    buffer, composition = llama.attached((2, 0))
    kv_L2HND = buffer.view().clone()
    (found,) = llama.packed.forward([llama.composer.row(buffer, composition, [], QUERY)])
    plain = llama.filled(PREFIX)
    plain.load(kv_L2HND, 0)
    (expected,) = llama.packed.forward([Row(plain, QUERY)])
    torch.testing.assert_close(found, expected, **CLOSE)


def test_the_first_segment_is_exact_where_it_was_built(world):
    buffer, composition = world.attached((1, 0))
    assert composition.places == (Place(9, 23, True), Place(23, 44, False))
    exact = world.filled([*PREFIX, *SEGMENTS[1]])
    torch.testing.assert_close(buffer.view()[:, :, :, :23], exact.view(), **CLOSE)


def test_all_later_tokens_computed_again_equal_a_full_prefill(world):
    buffer, composition = world.attached((0, 2, 1))
    chosen = world.composer.choose(buffer, composition, QUERY, share=1.0)
    assert chosen == list(range(30, 61))
    row = world.composer.row(buffer, composition, chosen, QUERY)
    (found,) = world.packed.forward([row])
    ids = [*PREFIX, *SEGMENTS[0], *SEGMENTS[2], *SEGMENTS[1], *QUERY]
    torch.testing.assert_close(found, world.reference.logits(ids)[-1:], **CLOSE)
    torch.testing.assert_close(buffer.view(), world.filled(ids).view(), **CLOSE)


def test_chosen_are_first_tokens_and_what_the_query_takes_most_from(llama):
    buffer, composition = llama.attached((0, 1, 2))
    kept_L2HND = buffer.view().clone()
    chosen = llama.composer.choose(buffer, composition, QUERY, share=0.25, num_first=2)
    assert buffer.length == 61
    assert torch.equal(buffer.view(), kept_L2HND)
    assert len(chosen) == 13 == int(0.25 * 52)
    first = {30, 31, 44, 45}
    assert first < set(chosen)
    assert chosen == sorted(chosen)
    # The same by eager attention: weights times lengths of the values.
    taken_N = torch.zeros(61)
    for weights_AQN, values_HND in eager(llama.reference.model, buffer, QUERY):
        lengths_AN = values_HND.norm(dim=-1).repeat_interleave(2, 0)
        taken_N += (weights_AQN.sum(1)[:, :61] * lengths_AN).sum(0)
    worth = [(taken_N[slot], slot) for slot in range(30, 61) if slot not in first]
    assert set(chosen) - first == {slot for _, slot in sorted(worth, reverse=True)[:9]}


def eager(model, buffer, query):
    """Attention weights and values of each layer for a query behind a buffer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, kv_2HND in enumerate(buffer.view()):
        cache.update(kv_2HND[0][None].clone(), kv_2HND[1][None].clone(), layer)
    with torch.inference_mode():
        output = model(torch.tensor([query]), cache=cache, output_attentions=True)
    return [(a[0], kv_2HND[1]) for a, kv_2HND in zip(output.attentions, buffer.view(), strict=True)]


def test_nothing_is_chosen_where_nothing_is_to_be_mended(llama):
    buffer, composition = llama.attached((0,))
    assert llama.composer.choose(buffer, composition, QUERY) == []
    buffer, composition = llama.attached((0, 1))
    assert llama.composer.choose(buffer, composition, QUERY, share=0.0) == []
    assert llama.composer.choose(buffer, composition, QUERY, share=0.04) == [30]


def test_segments_and_prefix_stay_as_they_are(llama):
    kept = [segment.kv_L2HND.clone() for segment in llama.segments]
    prefix_L2HND = llama.prefix.view().clone()
    buffer, composition = llama.attached((1, 0))
    chosen = llama.composer.choose(buffer, composition, QUERY, share=0.5)
    llama.packed.forward([llama.composer.row(buffer, composition, chosen, QUERY)])
    assert all(torch.equal(a.kv_L2HND, b) for a, b in zip(llama.segments, kept, strict=True))
    assert torch.equal(llama.prefix.view(), prefix_L2HND)


def test_nothing_to_attach_is_an_error(llama):
    with pytest.raises(ValueError, match="nothing"):
        llama.composer.attach(llama.filled(PREFIX), [])
