"""No two things share a key: the key builders on pairs that were made to collide."""

from itertools import product
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from memcube.activation.contract import AdapterRef
from memcube.activation.keys import KvIdentity, block_keys, segment_key

# Parts that join to the same text, look the same, or are nothing in one place and something in another.
MODELS = ["", "a", "ab", "a\x00", "e\u0301", "\u00e9", "None"]
TOKENIZERS = ["", "b", "bc", "\x00b"]
ADAPTERS = [
    None,
    *(AdapterRef(*pair) for pair in [("", ""), ("c", "d"), ("cd", ""), ("None", "None")]),
]
SALTS = ["c", "cd", "d", "%2f", "/"]
TOKENS = [[1, 2], [2, 1], [1, 2, 0], [0, 1, 2], [258], [1, 2, 3, 4], [1 << 31]]


def all_keys(
    model: str, tokenizer: str, dtype: str, adapter: AdapterRef | None, salt: str, tokens: list[int]
) -> list[tuple[Any, str]]:
    """Every key that these parts give, with what it should stand for."""
    identity = KvIdentity(model=model, tokenizer=tokenizer, dtype=dtype)
    given_: dict[str, Any] = {"salt": salt, "adapter": adapter}
    about = (model, tokenizer, dtype, adapter, salt)
    found: list[tuple[Any, str]] = []
    for block_tokens in (1, 2):
        chain = block_keys(identity, **given_, token_ids=tokens, block_tokens=block_tokens)
        for number, key in enumerate(chain, 1):
            cut = [
                tuple(tokens[i : i + block_tokens])
                for i in range(0, number * block_tokens, block_tokens)
            ]
            found.append(((*about, "block", tuple(cut)), key))
    for split in range(len(tokens) + 1):
        key = segment_key(identity, **given_, prefix_ids=tokens[:split], token_ids=tokens[split:])
        found.append(((*about, "segment", tuple(tokens[:split]), tuple(tokens[split:])), key))
    return found


def test_a_million_pairs_that_were_made_to_collide_do_not():
    about_of: dict[str, Any] = {}
    for parts in product(MODELS, TOKENIZERS, ["float32", "bfloat16"], ADAPTERS, SALTS, TOKENS[:3]):
        for about, key in all_keys(*parts):
            assert about_of.setdefault(key, about) == about
    assert len(about_of) ** 2 // 2 > 10**6
    assert len(set(about_of.values())) == len(about_of)


_WORDS = st.one_of(
    st.sampled_from([*MODELS, *TOKENIZERS, *SALTS]),
    st.text(st.one_of(st.sampled_from("a\x00/,:|é"), st.characters()), max_size=6),
)
_PARTS = st.tuples(
    _WORDS,
    _WORDS,
    st.sampled_from(["float32", "bfloat16"]),
    st.one_of(st.none(), st.builds(AdapterRef, _WORDS, _WORDS)),
    _WORDS.filter(bool),
    st.one_of(st.sampled_from(TOKENS), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4)),
)


@settings(max_examples=400, deadline=None)
@given(_PARTS, _PARTS, st.lists(st.booleans(), min_size=6, max_size=6))
def test_two_keys_are_the_same_only_where_all_their_parts_are(one, other, shared):
    # Most parts alike: what differs is then seldom more than one.
    other = tuple(a if same else b for a, b, same in zip(one, other, shared, strict=True))
    about_of: dict[str, Any] = {}
    for about, key in [*all_keys(*one), *all_keys(*other)]:
        assert about_of.setdefault(key, about) == about
