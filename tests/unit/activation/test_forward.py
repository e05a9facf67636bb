import pytest
import torch

from memcube.activation.forward import BufferPool, KvBuffer, PackedModel, Row
from memcube.activation.layout import KvLayout
from tests.unit.activation.tiny import CONFIGS, EXACT_ONLY, Reference, some_ids

CLOSE = {"rtol": 0.0, "atol": 1e-4}


class World:
    def __init__(self, config):
        self.reference = Reference(config)
        self.packed = PackedModel(self.reference.loaded())

    def buffer(self, capacity=0):
        return KvBuffer(self.packed.layout, "cpu", capacity)

    def filled(self, ids):
        buffer = self.buffer()
        self.packed.forward([Row(buffer, ids)])
        return buffer

    def logits(self, *rows):
        return self.packed.forward(list(rows))

    def expected(self, ids):
        return self.reference.logits(ids)


@pytest.fixture(scope="module", params=[*CONFIGS, *EXACT_ONLY])
def world(request):
    return World((CONFIGS | EXACT_ONLY)[request.param])


@pytest.fixture(scope="module")
def llama():
    return World(CONFIGS["llama"])


def test_a_whole_prefill_equals_the_plain_forward(world):
    ids = some_ids(50)
    (found_TV,) = world.logits(Row(world.buffer(), ids, logits="all"))
    torch.testing.assert_close(found_TV, world.expected(ids), **CLOSE)


def test_a_prefill_in_chunks_equals_the_plain_forward(world):
    ids, buffer = some_ids(70), world.buffer()
    parts = [
        world.logits(Row(buffer, ids[start:end], logits="all"))[0]
        for start, end in [(0, 1), (1, 33), (33, 34), (34, 70)]
    ]
    torch.testing.assert_close(torch.cat(parts), world.expected(ids), **CLOSE)
    torch.testing.assert_close(buffer.view(), world.filled(ids).view(), **CLOSE)


def test_rows_of_any_length_decode_and_prefill_in_one_call(world):
    prompts = [some_ids(n, seed=n) for n in (40, 1, 33, 7)]
    buffers = [world.filled(ids) for ids in prompts[:3]] + [world.buffer()]
    rows = [
        Row(buffers[0], [11]),
        Row(buffers[1], [12, 13, 14], logits="all"),
        Row(buffers[2], [15], logits="none"),
        Row(buffers[3], prompts[3]),
    ]
    first, second, third, fourth = world.logits(*rows)
    torch.testing.assert_close(first, world.expected([*prompts[0], 11])[-1:], **CLOSE)
    torch.testing.assert_close(second, world.expected([*prompts[1], 12, 13, 14])[-3:], **CLOSE)
    assert third is None
    torch.testing.assert_close(fourth, world.expected(prompts[3])[-1:], **CLOSE)
    assert [buffer.length for buffer in buffers] == [41, 4, 34, 7]


def test_slots_in_the_middle_are_computed_again(world):
    ids, buffer = some_ids(60), world.buffer()
    world.logits(Row(buffer, ids, logits="none"))
    expected_L2HND = buffer.view().clone()
    again = [5, 6, 7, 20, 59]
    buffer.view()[:, :, :, again] = 9.0
    world.logits(Row(buffer, [ids[slot] for slot in again], again, logits="none"))
    torch.testing.assert_close(buffer.view(), expected_L2HND, **CLOSE)
    assert buffer.length == 60


def test_slots_computed_again_and_new_ones_go_together(llama):
    ids, buffer = some_ids(30), llama.filled(some_ids(30)[:24])
    buffer.view()[:, :, :, 10:14] = 9.0
    positions = [10, 11, 12, 13, *range(24, 30)]
    (found,) = llama.logits(Row(buffer, [ids[slot] for slot in positions], positions))
    torch.testing.assert_close(found, llama.expected(ids)[-1:], **CLOSE)


def test_a_token_in_the_middle_sees_nothing_behind_it(llama):
    ids, buffer = some_ids(30), llama.filled(some_ids(30))
    (found,) = llama.logits(Row(buffer, [ids[12]], [12]))
    torch.testing.assert_close(found, llama.expected(ids[:13])[-1:], **CLOSE)


def test_rows_cannot_see_each_other(llama):
    shared = llama.filled(some_ids(40))
    stored_L2HND = shared.view().clone()
    kept_L2HND = stored_L2HND.clone()
    buffers = [llama.buffer(), llama.buffer()]
    for buffer in buffers:
        buffer.load(stored_L2HND, 0)
    left, right = some_ids(9, seed=1), some_ids(12, seed=2)
    found_left, found_right = llama.logits(Row(buffers[0], left), Row(buffers[1], right))
    torch.testing.assert_close(found_left, llama.expected(some_ids(40) + left)[-1:], **CLOSE)
    torch.testing.assert_close(found_right, llama.expected(some_ids(40) + right)[-1:], **CLOSE)
    torch.testing.assert_close(stored_L2HND, kept_L2HND, rtol=0, atol=0)


def test_stored_kv_is_copied_and_never_written(llama):
    stored_L2HND = llama.filled(some_ids(20)).view().clone()
    kept_L2HND = stored_L2HND.clone()
    buffer = llama.buffer()
    buffer.load(stored_L2HND, 0)
    llama.logits(Row(buffer, [4] * 20, range(20)), Row(llama.buffer(), [5]))
    llama.logits(Row(buffer, [6]))
    assert not torch.equal(buffer.view()[:, :, :, :20], stored_L2HND)
    assert torch.equal(stored_L2HND, kept_L2HND)


def test_a_buffer_that_grew_in_a_forward_can_be_loaded_and_cut(llama):
    ids = some_ids(25)
    buffer = llama.filled(ids)
    tail_L2HND = buffer.view()[:, :, :, 20:].clone()
    buffer.truncate(20)
    buffer.load(tail_L2HND, 20)
    buffer.load(tail_L2HND, 20)
    (found,) = llama.logits(Row(buffer, [8]))
    torch.testing.assert_close(found, llama.expected([*ids, 8])[-1:], **CLOSE)
    assert buffer.capacity >= 26


def test_the_first_layers_alone_give_their_keys_and_values(llama):
    ids = some_ids(20)
    full = llama.filled(ids)
    buffer = llama.buffer()
    llama.packed.first_layers(Row(buffer, ids), 2)
    assert buffer.length == 20
    torch.testing.assert_close(buffer.view()[:2], full.view()[:2], **CLOSE)


@pytest.mark.parametrize(
    ("ids", "positions"),
    [([], None), ([3, 4], [9, 8]), ([3], [11]), ([3, 4], [9, 11]), ([3], [-1]), ([3, 4], [9])],
)
def test_positions_that_leave_a_gap_are_refused(llama, ids, positions):
    buffer = llama.filled(some_ids(10))
    with pytest.raises(ValueError, match="position"):
        llama.logits(Row(buffer, ids, positions))
    assert buffer.length == 10


def test_kv_of_another_shape_or_behind_a_gap_is_refused(llama):
    buffer, kv_L2HND = llama.filled(some_ids(10)), llama.filled(some_ids(4)).view()
    with pytest.raises(ValueError, match="gap"):
        buffer.load(kv_L2HND, 11)
    with pytest.raises(ValueError, match="shape"):
        buffer.load(kv_L2HND[:2], 10)


def test_a_model_that_was_taken_over_says_so():
    reference = Reference(CONFIGS["llama"])
    loaded = reference.loaded()
    PackedModel(loaded)
    PackedModel(loaded)  # a second one is as good
    with pytest.raises(RuntimeError, match="PackedModel"):
        loaded.model(torch.tensor([[1, 2]]))


def test_a_pool_hands_out_the_smallest_buffer_that_fits_empty():
    layout = KvLayout(1, 1, 4, "float32")
    pool = BufferPool(layout, "cpu", 3000 * layout.bytes_per_token)
    small, large = pool.take(10), pool.take(1500)
    assert (small.capacity, large.capacity) == (512, 1536)
    small.load(torch.ones(layout.shape(4)), 0)
    pool.give(large)
    pool.give(small)
    assert pool.take(100) is small
    assert small.length == 0
    assert pool.take(100) is large
    assert pool.take(100).capacity == 512


def test_a_pool_keeps_no_more_than_it_may():
    layout = KvLayout(1, 1, 4, "float32")
    pool = BufferPool(layout, "cpu", 1100 * layout.bytes_per_token)
    buffers = [pool.take(1) for _ in range(3)]
    for buffer in buffers:
        pool.give(buffer)
    assert pool.num_bytes == 1024 * layout.bytes_per_token
    assert pool.take(1) is buffers[1]


def test_bfloat16_is_near_float32():
    reference = Reference(CONFIGS["llama"])
    loaded = reference.loaded("bfloat16")
    packed, ids = PackedModel(loaded), some_ids(60)
    buffer = KvBuffer(packed.layout, "cpu")
    packed.forward([Row(buffer, ids[:20])])
    (found_TV,) = packed.forward([Row(buffer, ids[20:], logits="all")])
    expected_TV = reference.logits(ids)[20:]
    off = (found_TV - expected_TV).abs().mean() / expected_TV.abs().mean()
    assert found_TV.dtype == torch.float32
    assert off < 0.05
