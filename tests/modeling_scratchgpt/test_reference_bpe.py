"""The readable BPE learns and encodes exactly what `tokenizers` does."""

import json
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modeling_scratchgpt import ScratchGPTTokenizer
from modeling_scratchgpt.reference_bpe import ReferenceBPE, split_into_words

TO_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
CORPORA = {
    "english": ["To be, or not to be: that is the question.\n", "Whether 'tis nobler in the mind to suffer, we'll see. " * 3],
    "code": ["def f(x):\n    return [y for y in x if y > 0x1F]\n\n\n\tpass  \n", textwrap.__doc__, textwrap.dedent.__doc__],
    "emoji": ["🙂🙂🙃 👩‍👩‍👧 naïve café 🙂", "☃☃☃☃☃ 🙃🙂"],
    "cjk": ["今日は良い天気です。明日も良い天気です。", "天気が良い日は、公園へ行きます。"],
    "repeats": ["aaaaaaa aaaa aaa", "abababab babababa", " " * 9, "\n\n\n\t\t"],
    "nothing": ["", " "],
}


def from_tokenizers(tokenizer: ScratchGPTTokenizer) -> ReferenceBPE:
    """Vocabulary and merges as `tokenizers` has learned them, as bytes and ids."""
    special = set(tokenizer.all_special_tokens)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    vocab = [token.encode() if token in special else bytes(TO_BYTES[character] for character in token) for token in tokens]
    merges = {tuple(model["vocab"][token] for token in pair): model["vocab"]["".join(pair)] for pair in model["merges"]}
    return ReferenceBPE(vocab, merges)


def assert_equal_to_tokenizers(texts: list[str], vocab_size: int, unseen: str) -> None:
    peer, reference = ScratchGPTTokenizer.train(texts, vocab_size), ReferenceBPE.train(texts, vocab_size)
    expected = from_tokenizers(peer)
    assert reference.vocab == expected.vocab
    assert list(reference.merges.items()) == list(expected.merges.items())
    for text in (*texts, unseen):
        ids = reference.encode(text)
        assert ids == peer(text)["input_ids"]
        assert reference.decode(ids) == text


@pytest.mark.parametrize("vocab_size", [259, 260, 275, 320, 1000])
@pytest.mark.parametrize("name", CORPORA)
def test_same_vocabulary_merges_and_ids(name, vocab_size):
    assert_equal_to_tokenizers(CORPORA[name], vocab_size, "".join(map("".join, CORPORA.values())))


# Few letters make many ties and overlapping pairs; all of Unicode makes bytes that are no characters.
FEW_LETTERS, ALL_LETTERS = st.text("ab ", max_size=30), st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(FEW_LETTERS | ALL_LETTERS, max_size=8), unseen=FEW_LETTERS | ALL_LETTERS, num_merges=st.integers(0, 60))
def test_same_on_random_corpora(texts, unseen, num_merges):
    assert_equal_to_tokenizers(texts, 259 + num_merges, unseen)


def test_same_on_a_book(real_data):
    text = (real_data / "the-verdict" / "the-verdict.txt").read_text(encoding="utf-8")
    assert_equal_to_tokenizers([text], 2000, text[::-1])


def test_gpt2s_own_merges_give_gpt2s_ids(real_data):
    files = real_data / "gpt2-tokenizer" / "encoder.json", real_data / "gpt2-tokenizer" / "vocab.bpe"
    gpt2 = ScratchGPTTokenizer.from_gpt2_files(*files)
    text = (real_data / "the-verdict" / "the-verdict.txt").read_text(encoding="utf-8")
    assert from_tokenizers(gpt2).encode(text) == gpt2(text)["input_ids"]


def test_first_merges_by_hand():
    """Ties go to the lower ids: (l, o) before (o, w), and (" ", low) before (low, e)."""
    bpe = ReferenceBPE.train(["low lower lowest"], vocab_size=263)
    merged = [(bpe.vocab[left], bpe.vocab[right]) for left, right in bpe.merges]
    assert merged == [(b"l", b"o"), (b"lo", b"w"), (b" ", b"low"), (b" low", b"e")]


def test_words_of_gpt2_by_hand():
    assert split_into_words("It's 3 o'clock,  no") == [b"It", b"'s", b" 3", b" o", b"'", b"clock", b",", b" ", b" no"]


def test_a_part_of_a_character_is_replaced():
    bpe = ReferenceBPE.train([], vocab_size=259)
    ids = bpe.encode("a🙂")
    assert (len(ids), bpe.decode(ids), bpe.decode(ids[:-1])) == (5, "a🙂", "a\ufffd")
