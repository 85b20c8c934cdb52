import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Tokenizer

from modeling_scratchgpt import ScratchGPTTokenizer

TEXTS = ["to be, or not to be: that is the question.\n"] * 20 + ["naïve café – größer, 日本語 🙂 don't I'll we've 1234"] * 5


@pytest.fixture(scope="module")
def tokenizer() -> ScratchGPTTokenizer:
    return ScratchGPTTokenizer.train(TEXTS, vocab_size=330)


def test_training_reaches_the_size_and_learns_words(tokenizer):
    assert len(tokenizer) == 330
    assert (
        tokenizer.tokenize("that is the question") == ["th", "at", "Ġis", "Ġthe", "Ġquestion"]
        or len(tokenizer.tokenize("that is the question")) < len("that is the question") / 2
    )


def test_training_is_repeatable():
    first, second = (ScratchGPTTokenizer.train(iter(TEXTS), vocab_size=300) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_special_tokens_are_three_and_come_first(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")


def test_words_that_are_split_already_can_get_their_space(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "plain")
    spaced = ScratchGPTTokenizer.from_pretrained(tmp_path / "plain", add_prefix_space=True)
    spaced.save_pretrained(tmp_path / "spaced")
    for loaded in (spaced, AutoTokenizer.from_pretrained(tmp_path / "spaced")):
        words = loaded(["that", "is", "the"], is_split_into_words=True)["input_ids"]
        assert words == tokenizer(" that is the")["input_ids"] == loaded("that is the")["input_ids"]


@settings(max_examples=500, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=200))
def test_any_text_comes_back_unchanged(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(0 <= token_id < len(tokenizer) for token_id in ids)


@settings(max_examples=100, deadline=None)
@given(start=st.integers(0, 0x10FFFF - 300))
def test_every_plane_of_unicode_comes_back_unchanged(tokenizer, start):
    text = "".join(chr(code) for code in range(start, start + 300) if not 0xD800 <= code <= 0xDFFF)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("text", ["", " ", "  two  spaces ", " .,!? n't 's", "\n\t\r\n", "a<|eos|>b", "\0"])
def test_spaces_and_marks_come_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is ScratchGPTTokenizer
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["auto_map"]["AutoTokenizer"]


@pytest.mark.parametrize("letter", ["x", " ", "7", "!"])
def test_a_text_without_spaces_is_no_harder(letter):
    """Training takes the square of a word's length; a megabyte of DNA must not take days."""
    tokenizer = ScratchGPTTokenizer.train([letter * 1_000_000], vocab_size=300)
    text = letter * 10_000
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_one_text_is_not_a_list_of_texts():
    with pytest.raises(TypeError, match="texts must be a list or an iterator of texts, got one text"):
        ScratchGPTTokenizer.train("to be or not to be", vocab_size=300)


def test_batches_are_padded_and_masked(tokenizer):
    texts = ["to be", "to be or not to be"]
    batch = tokenizer(texts, padding=True)
    assert batch["input_ids"][0][-1] == tokenizer.pad_token_id
    assert [sum(mask) for mask in batch["attention_mask"]] == [len(tokenizer(text)["input_ids"]) for text in texts]


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    for wrong in (258, 2**40):
        with pytest.raises(ValueError, match=f"vocab_size must be at least 259 .* got {wrong}"):
            ScratchGPTTokenizer.train(TEXTS, vocab_size=wrong)
    assert len(ScratchGPTTokenizer.train([], vocab_size=259)) == 259  # the bytes alone will do


@pytest.fixture(scope="module")
def gpt2_files(real_data):
    return real_data / "gpt2-tokenizer" / "encoder.json", real_data / "gpt2-tokenizer" / "vocab.bpe"


@pytest.fixture(scope="module")
def gpt2(gpt2_files):
    return ScratchGPTTokenizer.from_gpt2_files(*gpt2_files)


def test_gpt2_the_verdict(gpt2, real_data):
    text = (real_data / "the-verdict" / "the-verdict.txt").read_text(encoding="utf-8")
    ids = gpt2(text)["input_ids"]
    assert ids[:10] == [40, 367, 2885, 1464, 1807, 3619, 402, 271, 10899, 2138]
    assert len(ids) == 5145
    assert gpt2.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=100))
def test_gpt2_same_ids_as_transformers(gpt2, gpt2_files, text):
    theirs = GPT2Tokenizer(vocab=str(gpt2_files[0]), merges=str(gpt2_files[1]))
    assert gpt2(text)["input_ids"] == theirs(text)["input_ids"]


def test_gpt2_one_token_begins_and_ends(gpt2):
    assert len(gpt2) == 50257
    assert gpt2.bos_token_id == gpt2.eos_token_id == 50256
    assert gpt2("a<|endoftext|>b")["input_ids"] == [64, 50256, 65]


def test_gpt2_saved_and_loaded(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("Hello world")["input_ids"] == [15496, 995]


def test_gpt2_files_that_are_not_gpt2s_are_refused(gpt2_files, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("{not json")
    with pytest.raises(ValueError, match="are not GPT-2's vocabulary and merges"):
        ScratchGPTTokenizer.from_gpt2_files(broken, gpt2_files[1])
    with pytest.raises(ValueError, match="are not GPT-2's vocabulary and merges"):
        ScratchGPTTokenizer.from_gpt2_files(gpt2_files[0], gpt2_files[0])
    with pytest.raises(FileNotFoundError):
        ScratchGPTTokenizer.from_gpt2_files(tmp_path / "missing", gpt2_files[1])
