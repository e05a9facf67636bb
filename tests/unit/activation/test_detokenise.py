import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from memcube.activation.detokenise import TextStream


def byte_level():
    """Each byte is a token; two tokens end in the middle of a character."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    to_unicode = dict(zip(_bytes(), _symbols(), strict=True))
    return tokenizer, lambda text: [vocabulary[to_unicode[byte]] for byte in text.encode()]


def _bytes():
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return plain + [byte for byte in range(256) if byte not in plain]


def _symbols():
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in plain] + [chr(256 + index) for index in range(256 - len(plain))]


def sentencepiece():
    """Words with a leading mark, and single bytes where no word fits."""
    pieces = ["<unk>", "▁Hello", "▁world", "ing", "!"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    inner = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>")
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


BYTES, to_ids = byte_level()
PIECES = sentencepiece()


def stream(tokenizer, token_ids):
    text = TextStream(tokenizer)
    pieces = [text.push(token) for token in token_ids]
    return pieces, text.flush()


def whole(tokenizer, token_ids):
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_a_character_of_several_tokens_comes_with_its_last_one():
    pieces, rest = stream(BYTES, to_ids("é日😀"))
    assert pieces == ["", "é", "", "", "日", "", "", "", "😀"]
    assert rest == ""


def test_bytes_that_are_no_character_are_shown_when_it_is_sure_that_they_are_none():
    pieces, rest = stream(BYTES, [*to_ids("é")[:1], *to_ids("ab")])
    assert "".join(pieces) == "\ufffdab"
    assert rest == ""


def test_an_open_character_is_shown_as_lost_at_the_end():
    pieces, rest = stream(BYTES, to_ids("a日")[:-1])
    assert pieces == ["a", "", ""]
    assert rest == "\ufffd"


def test_special_tokens_have_no_text():
    end = BYTES.convert_tokens_to_ids("<end>")
    pieces, rest = stream(BYTES, [*to_ids("a"), end, *to_ids("b")])
    assert pieces == ["a", "", "b"]
    assert rest == ""


def test_the_space_before_a_word_is_kept():
    hello, world, ing = (PIECES.convert_tokens_to_ids(p) for p in ("▁Hello", "▁world", "ing"))
    pieces, _ = stream(PIECES, [hello, world, ing, world])
    assert pieces == ["Hello", " world", "ing", " world"]


def test_single_bytes_of_a_word_model_make_up_a_character():
    token_ids = [PIECES.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "日".encode()]
    pieces, rest = stream(PIECES, [1, *token_ids, 2])
    assert pieces == ["Hello", "", "", "日", " world"]
    assert rest == ""


@given(st.lists(st.integers(0, 255), max_size=40))
def test_any_bytes_give_what_the_tokenizer_makes_of_them_at_once(token_ids):
    pieces, rest = stream(BYTES, token_ids)
    assert "".join(pieces) + rest == whole(BYTES, token_ids)


def test_the_window_stays_short_however_long_the_text_is_open():
    class Counting:
        longest = 0

        def decode(self, token_ids, **_):
            self.longest = max(self.longest, len(token_ids))
            return "\ufffd" * len(token_ids)

    tokenizer = Counting()
    pieces, rest = stream(tokenizer, [0] * 1000)
    assert "".join(pieces) + rest == "\ufffd" * 1000
    assert tokenizer.longest <= 128


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 😀 ok", ""])
def test_text_comes_back_whole(text):
    pieces, rest = stream(BYTES, to_ids(text))
    assert "".join(pieces) + rest == text
