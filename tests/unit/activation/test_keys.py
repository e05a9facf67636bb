from dataclasses import replace

import pytest

from memcube.activation.contract import AdapterRef
from memcube.activation.keys import KvIdentity, block_keys, segment_key

IDENTITY = KvIdentity(model="m", tokenizer="t", dtype="float32")
TOKENS = list(range(10))


def keys(identity=IDENTITY, salt="s", adapter=None, tokens=TOKENS, block=4):
    return block_keys(identity, salt=salt, adapter=adapter, token_ids=tokens, block_tokens=block)


def test_full_blocks_alone_have_keys_and_share_them_with_any_continuation():
    assert len(keys()) == 2
    assert keys(tokens=TOKENS[:3]) == ()
    assert keys(tokens=[*TOKENS, 1, 2])[:2] == keys()


def test_a_key_depends_on_all_tokens_before_it():
    other = keys(tokens=[99, *TOKENS[1:]])
    assert not set(other) & set(keys())
    late = keys(tokens=[*TOKENS[:7], 99, *TOKENS[8:]])
    assert late[0] == keys()[0]
    assert late[1] != keys()[1]


def test_every_part_of_the_identity_makes_another_key():
    others = [
        keys(),
        keys(replace(IDENTITY, model="m2")),
        keys(replace(IDENTITY, tokenizer="t2")),
        keys(replace(IDENTITY, dtype="bfloat16")),
        keys(salt="s2"),
        keys(adapter=AdapterRef("a", "1")),
        keys(adapter=AdapterRef("a", "2")),
        keys(adapter=AdapterRef("a1", "")),
        keys(adapter=AdapterRef("", "a1")),
        keys(salt="sa1"),
        keys(replace(IDENTITY, model="mt", tokenizer="")),
    ]
    firsts = [chain[0] for chain in others]
    assert len(set(firsts)) == len(others)


def test_a_segments_key_is_no_blocks_key_and_holds_its_prefix():
    def key(prefix, tokens):
        return segment_key(IDENTITY, salt="s", adapter=None, prefix_ids=prefix, token_ids=tokens)

    made = {key([], TOKENS[:4]), key([0], TOKENS[:4]), key([], [0, *TOKENS[:4]]), keys()[0]}
    assert len(made) == 4


def test_tokens_without_a_salt_have_no_key():
    with pytest.raises(ValueError, match="salt"):
        keys(salt="")
