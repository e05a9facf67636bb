"""Packed rows compute what rows of their own would."""

import pytest
import torch

from memcube.parametric.dataset import Example
from memcube.parametric.packed_attention import attending
from memcube.parametric.packing import Encoder, pack
from memcube.testing.tiny_lm import tiny_model
from tests.unit.parametric.small import TEMPLATE, small_model


@pytest.mark.parametrize("in_blocks", [False, True])
@torch.inference_mode()
def test_each_segment_of_a_row_has_the_logits_of_a_row_of_its_own(in_blocks):
    loaded = small_model()
    encoder = Encoder(loaded.tokenizer, system="Be kind.")
    segments = [
        encoder.segment(Example(question="Who is Ada?", answer="Nobody.")),
        encoder.segment(Example(question=None, answer="Some plain text.")),
        encoder.segment(Example(question="And Bob?", answer="A baker.")),
    ]
    packed = pack(encoder.prefix, segments, torch.device("cpu"))
    with attending(loaded.model, in_blocks=in_blocks):
        together = _logits(loaded.model, packed)
    start = 0
    for segment in segments:
        prefix = encoder.prefix if segment.is_chat else ()
        ids = [*prefix, *segment.ids]
        alone = loaded.model(torch.tensor([ids])).logits[0]
        learned = alone[len(prefix) + segment.first - 1 : -1]
        found = together[start : start + segment.num_learned]
        torch.testing.assert_close(found, learned, atol=1e-4, rtol=1e-4)
        start += segment.num_learned
    assert start == len(together) == len(packed.targets_K)


def test_the_prefix_is_all_that_questions_share():
    encoder = Encoder(small_model().tokenizer, system="Be kind.")
    text = small_model().tokenizer.decode(list(encoder.prefix))
    assert text == "<system>Be kind.\n<user>"
    assert encoder.prompt("Why?")[: len(encoder.prefix)] == encoder.prefix


def test_an_answer_ends_with_the_token_that_ends_answers():
    loaded = tiny_model()
    loaded.tokenizer.chat_template = TEMPLATE
    segment = Encoder(loaded.tokenizer, system="").segment(Example(question="a", answer="b"))
    assert segment.ids[-1] in loaded.eos_ids


def _logits(model, row):
    return model(
        input_ids=row.ids_1T,
        position_ids=row.positions_1T,
        attention_mask=row.mask_11TT,
        logits_to_keep=row.keep_K,
        use_cache=False,
        memcube_blocks=row.blocks,
    ).logits[0]


def test_attention_in_blocks_has_the_gradients_of_attention_with_a_mask():
    grads = []
    for in_blocks in (False, True):
        loaded = small_model()
        encoder = Encoder(loaded.tokenizer, system="Be kind.")
        segments = [
            encoder.segment(Example(question="Who is Ada?", answer="Nobody.")),
            encoder.segment(Example(question=None, answer="Some plain text that is longer. " * 4)),
        ]
        row = pack(encoder.prefix, segments, torch.device("cpu"))
        weight = loaded.model.model.layers[0].self_attn.k_proj.weight.requires_grad_()
        with attending(loaded.model, in_blocks=in_blocks):
            torch.nn.functional.cross_entropy(_logits(loaded.model, row), row.targets_K).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-3)


def test_a_model_attends_as_before_when_blocks_are_no_longer_wanted():
    model = small_model().model
    before = model.config._attn_implementation
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    expected = model(ids, attention_mask=mask).logits
    with attending(model, in_blocks=True):
        # A call without blocks, as the checks while training make it.
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)
    assert model.config._attn_implementation == before


def test_with_its_memories_an_example_has_the_same_answer_behind_the_chats_own_prompt():
    loaded = small_model()
    encoder = Encoder(loaded.tokenizer, system="Be kind.")
    example = Example(question="Who is Ada?", answer="A sailor.", memories="- Ada sails.\n")
    told, own = encoder.told(example), encoder.segment(example)
    assert told is not None
    assert told.ids[told.first :] == own.ids[own.first :]
    text = loaded.tokenizer.decode(told.ids)
    assert text.index("- Ada sails.") < text.index("Who is Ada?") < text.index("A sailor.")
    assert encoder.told(Example(question="Who is Ada?", answer="A sailor.")) is None
