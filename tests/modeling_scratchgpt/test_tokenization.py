import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Tokenizer, TokenizersBackend

from modeling_scratchgpt import ScratchGPTTokenizer
from modeling_scratchgpt.tokenization_scratchgpt import TOKENIZERS, min_vocab_size, special_tokens, tokenizer_report
from tests.conftest import WITHOUT_THE_PACKAGE

TEXTS = ["to be, or not to be: that is the question.\n"] * 20 + ["naïve café – größer, 日本語 🙂 don't I'll we've 1234"] * 5


@pytest.fixture(scope="module")
def kinds() -> dict[str, ScratchGPTTokenizer]:
    return {kind: ScratchGPTTokenizer.train(iter(TEXTS), vocab_size=330, kind=kind) for kind in TOKENIZERS}


@pytest.fixture(scope="module")
def tokenizer(kinds) -> ScratchGPTTokenizer:
    return kinds["bpe"]


def test_training_reaches_the_size_and_learns_words(tokenizer):
    assert len(tokenizer) == 330
    assert len(tokenizer.tokenize("that is the question")) < len("that is the question") / 2


def test_training_is_repeatable():
    first, second = (ScratchGPTTokenizer.train(iter(TEXTS), vocab_size=300) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_add_prefix_space_is_kept(kind, kinds, tmp_path):
    spaced = ScratchGPTTokenizer(tokenizer_object=kinds[kind].backend_tokenizer, **special_tokens(kind))
    spaced.add_prefix_space = True
    spaced.save_pretrained(tmp_path / "set")
    kinds[kind].save_pretrained(tmp_path / "plain")
    passed = ScratchGPTTokenizer.from_pretrained(tmp_path / "plain", add_prefix_space=True)
    (tmp_path / "set" / "tokenizer_config.json").write_text("{}")  # tokenizer.json holds it too
    expected = kinds[kind](" that is the")["input_ids"]
    for loaded in (
        spaced,
        passed,
        *(cls.from_pretrained(tmp_path / "set") for cls in (ScratchGPTTokenizer, TokenizersBackend)),
    ):
        assert loaded("that is the")["input_ids"] == loaded(" that is the")["input_ids"] == expected
        assert loaded(["that", "is", "the"], is_split_into_words=True)["input_ids"] == expected
        assert loaded("")["input_ids"] == []
        assert loaded("  to")["input_ids"] == kinds[kind]("  to")["input_ids"]
    passed.add_prefix_space = False
    assert passed("that is the")["input_ids"] == kinds[kind]("that is the")["input_ids"]


@pytest.mark.parametrize("kind", ["bpe", "bpe-gpt4"])
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=150))
def test_any_text_is_decoded_unchanged(kinds, kind, text):
    ids = kinds[kind](text)["input_ids"]
    assert kinds[kind].decode(ids) == text
    assert all(0 <= token_id < len(kinds[kind]) for token_id in ids)


@settings(max_examples=100, deadline=None)
@given(start=st.integers(0, 0x10FFFF - 300))
def test_every_plane_of_unicode_is_decoded_unchanged(tokenizer, start):
    text = "".join(chr(code) for code in range(start, start + 300) if not 0xD800 <= code <= 0xDFFF)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("piece", ["a", " ", "\n", "🙂", "\u0301", "<|bos|>", "to be "])
def test_a_line_of_a_megabyte_is_decoded_unchanged(tokenizer, piece):
    text = piece * (2**20 // len(piece.encode()))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("text", ["\ud800", "to \udfff be"])
def test_lone_surrogates_are_refused(tokenizer, text):
    with pytest.raises(TypeError, match="TextEncodeInput"):
        tokenizer(text)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        ScratchGPTTokenizer.train([text] * 9, vocab_size=300)


@pytest.mark.parametrize("text", ["", " ", "  two  spaces ", " .,!? n't 's", "\n\t\r\n", "a<|eos|>b", "\0"])
def test_spaces_and_punctuation_are_decoded_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("letter", ["x", " ", "7", "!"])
def test_training_on_a_long_text_without_spaces_is_fast(letter):
    """Training time is quadratic in the length of a word; a megabyte of DNA must not take days."""
    tokenizer = ScratchGPTTokenizer.train([letter * 1_000_000], vocab_size=300)
    text = letter * 10_000
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_one_text_is_not_a_list_of_texts():
    with pytest.raises(TypeError, match="texts must be a list or an iterator of strings, got one string"):
        ScratchGPTTokenizer.train("to be or not to be", vocab_size=300)


def test_batches_are_padded_and_masked(tokenizer):
    texts = ["to be", "to be or not to be"]
    batch = tokenizer(texts, padding=True)
    assert batch["input_ids"][0][-1] == tokenizer.pad_token_id
    assert [sum(mask) for mask in batch["attention_mask"]] == [len(tokenizer(text)["input_ids"]) for text in texts]


def test_the_default_kind_gives_the_same_ids_as_ever(tokenizer):
    assert tokenizer("to be, that is the café's 12 questions 🙂")["input_ids"] == [
        271, 261, 14, 279, 273, 278, 324, 9, 85, 308, 282, 85, 328
    ]  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_of_every_kind(kinds, kind):
    tokenizer = kinds[kind]
    special = list(special_tokens(kind).values())
    assert tokenizer.convert_tokens_to_ids(special) == list(range(len(special)))
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == special[:3]
    assert tokenizer.unk_token == (special[3] if len(special) == 4 else None)
    assert set(tokenizer.all_special_tokens) == set(special)
    assert 256 < len(tokenizer) <= 330 or kind not in ("bpe", "bpe-gpt4")
    ids = tokenizer("to be" + tokenizer.eos_token)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "to be"


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("around", ["", " ", "a"])
def test_a_special_token_spelled_out_in_a_text_is_text(kinds, kind, around):
    backend = type(kinds[kind].backend_tokenizer).from_str(kinds[kind].backend_tokenizer.to_str())
    backend.encode_special_tokens = True  # as when a corpus is tokenized
    for token in list(special_tokens(kind).values())[:3]:
        assert not {0, 1, 2} & set(backend.encode(around + token + around, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_kind_is_the_same_after_saving(kinds, kind, tmp_path):
    tokenizer = kinds[kind]
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["auto_map"]["AutoTokenizer"]
    text = "To be, that\n\n  is größer: 🙂 don't"
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), ScratchGPTTokenizer.from_pretrained(tmp_path)):
        assert type(loaded) is ScratchGPTTokenizer
        assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_every_kind_loads_without_this_package(kinds, tmp_path):
    """With the saved copy of the code, and with `tokenizer.json` only."""
    text, expected = "To be, that\n\n  is größer: 🙂 don't", {}
    for kind, tokenizer in kinds.items():
        tokenizer.save_pretrained(tmp_path / kind)
        ids = tokenizer(text)["input_ids"]
        expected[kind] = [[ids, tokenizer.decode(ids), tokenizer.eos_token_id, tokenizer.unk_token_id]] * 2
    program = (
        f"{WITHOUT_THE_PACKAGE}from transformers import AutoTokenizer, TokenizersBackend; found = {{}}\n"
        f"for kind in {TOKENIZERS}:\n"
        "    found[kind] = []\n"
        "    for loader in (AutoTokenizer, TokenizersBackend):\n"
        "        tokenizer = loader.from_pretrained(f'{sys.argv[1]}/{kind}', trust_remote_code=True)\n"
        f"        ids = tokenizer({text!r})['input_ids']\n"
        "        found[kind].append([ids, tokenizer.decode(ids), tokenizer.eos_token_id, tokenizer.unk_token_id])\n"
        "print(json.dumps(found))"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


KNOWN = "".join(sorted(set("".join(TEXTS))))


@settings(max_examples=200, deadline=None)
@given(text=st.text(KNOWN, max_size=60))
def test_known_characters_are_decoded_unchanged(kinds, text):
    for kind in ("character", "unigram"):
        ids = kinds[kind](text)["input_ids"]
        assert kinds[kind].decode(ids) == text
        assert kinds[kind].unk_token_id not in ids
    assert len(kinds["character"](text)["input_ids"]) == len(text)


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(["to", "be", "or", "not", "that", "is", "the", "question"]), max_size=20))
def test_known_words_are_decoded_joined_by_spaces(kinds, words):
    for kind in ("word", "wordpiece"):
        assert kinds[kind].decode(kinds[kind]("\n ".join(words))["input_ids"]) == " ".join(words)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("I'LL don't 'twas", ["I", "'LL", " don", "'t", " '", "twas"]),
        ("in 1234567 days", ["in", " ", "123", "456", "7", " days"]),
        ("a\n\n  b  \nc", ["a", "\n\n", " ", " b", "  ", "\n", "c"]),
        ("naïve (x) = y_1;", ["naïve", " (", "x", ")", " =", " y", "_", "1", ";"]),
        ("nai\u0308ve", ["nai\u0308ve"]),
    ],
)
def test_gpt4_like_split_by_hand(kinds, text, pieces):
    spans = kinds["bpe-gpt4"].backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in spans] == pieces


def test_kinds_by_hand(kinds):
    words = ["to", "be", ",", "or", "not", "[UNK]", "the", "[UNK]", "[UNK]"]
    assert kinds["word"].tokenize("to be, or not!\nthe crown?") == words
    assert kinds["wordpiece"].tokenize("question, be") == ["question", ",", "be"]
    ids = kinds["wordpiece"]("tonot").input_ids
    assert len(ids) > 1
    assert kinds["wordpiece"].decode(ids) == "tonot"
    assert kinds["character"].tokenize("to ß☃\n") == ["t", "o", " ", "ß", "<|unk|>", "\n"]
    assert kinds["unigram"].unk_token_id in kinds["unigram"]("☃").input_ids


def test_unigram_learns_stems():
    words = [stem + end for stem in ("walk", "talk", "jump", "climb", "play") for end in ("", "s", "ed", "ing", "er")]
    tokenizer = ScratchGPTTokenizer.train([" ".join(words)] * 20, 60, kind="unigram")
    assert tokenizer.tokenize(" walking talk") == ["▁walk", "i", "n", "g", "▁talk"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_training_texts_are_streamed(kind):
    """Only a buffer of texts is in memory at once."""

    class Text(str):
        alive, most = 0, 0

        def __init__(self, _):
            Text.alive += 1
            Text.most = max(Text.most, Text.alive)

        def __del__(self):
            Text.alive -= 1

    def texts():
        for number in range(3000):
            yield Text(f"the question {number % 10} is")

    ScratchGPTTokenizer.train(texts(), vocab_size=300, kind=kind)
    assert Text.most < 1000


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_vocabulary_too_small_for_the_kind_is_refused(kind):
    least = min_vocab_size(kind)
    for wrong in (least - 1, 2**40):
        with pytest.raises(ValueError, match=f"vocab_size must be at least {least} .* got {wrong}"):
            ScratchGPTTokenizer.train(TEXTS, wrong, kind=kind)
    assert len(ScratchGPTTokenizer.train([], least, kind=kind)) <= least  # a check before any text is read


@pytest.mark.parametrize(("kind", "least"), [("unigram", 5 + len(KNOWN)), ("character", 4 + len(KNOWN))])
def test_the_vocabulary_must_hold_every_character(kind, least):
    with pytest.raises(ValueError, match=f"vocab_size must be at least {least}: the texts have {len(KNOWN)} different"):
        ScratchGPTTokenizer.train(TEXTS, least - 1, kind=kind)
    assert len(ScratchGPTTokenizer.train(TEXTS, least, kind=kind)) == least


@settings(max_examples=50, deadline=None)
@given(vocab_size=st.integers(6, 60), kind=st.sampled_from(["word", "wordpiece"]))
def test_the_vocabulary_is_never_larger_than_asked_for(vocab_size, kind):
    assert len(ScratchGPTTokenizer.train(TEXTS, vocab_size, kind=kind)) <= vocab_size


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of bpe, bpe-gpt4, word, .* got 'sentencepiece'"):
        ScratchGPTTokenizer.train(TEXTS, 300, kind="sentencepiece")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_error_in_the_texts_is_raised(kind):
    def texts():
        yield "one"
        raise KeyError("the reader's own")

    with pytest.raises(KeyError, match="the reader's own"):
        ScratchGPTTokenizer.train(texts(), 300, kind=kind)


# Report


def test_report_by_hand(kinds):
    """Nine characters in twelve bytes, four words; the corpus contains é but no snowman."""
    report = tokenizer_report(kinds["character"], ["to be", " ☃ é"])
    assert (report.bytes_per_token, report.tokens_per_word, report.unknown_share) == (12 / 9, 9 / 4, 1 / 9)
    report = tokenizer_report(kinds["word"], ["to be or, unheard", "of"], max_texts=1)
    assert (report.bytes_per_token, report.tokens_per_word, report.unknown_share) == (17 / 5, 5 / 4, 1 / 5)
    report = tokenizer_report(kinds["bpe"], iter(["\x00 \x01"]))
    assert (report.bytes_per_token, report.tokens_per_word, report.unknown_share) == (1, 3 / 2, 0)
    kinds["bpe"](["a b"], truncation=True, max_length=1)  # which sets the state that the next calls begin with
    assert tokenizer_report(kinds["bpe"], iter(["\x00 \x01"])).bytes_per_token == 1
    with pytest.raises(ValueError, match="the first 1000 texts have no words"):
        tokenizer_report(kinds["bpe"], ["", " \n"])


# GPT-2's tokenizer


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


@pytest.fixture(scope="module")
def gpt2_of_transformers(gpt2_files):
    return GPT2Tokenizer(vocab=str(gpt2_files[0]), merges=str(gpt2_files[1]))


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=100))
def test_gpt2_same_ids_as_transformers(gpt2, gpt2_of_transformers, text):
    assert gpt2(text)["input_ids"] == gpt2_of_transformers(text)["input_ids"]


def test_gpt2_has_one_token_for_bos_and_eos_and_can_be_saved(gpt2, tmp_path):
    assert len(gpt2) == 50257
    assert gpt2.bos_token_id == gpt2.eos_token_id == 50256
    assert gpt2("a<|endoftext|>b")["input_ids"] == [64, 50256, 65]
    gpt2.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("Hello world")["input_ids"] == [15496, 995]


def test_files_other_than_gpt2s_are_refused(gpt2_files, tmp_path):
    vocab, merges = tmp_path / "vocab", tmp_path / "merges"
    for content in ("{not json", '{"a": 0, "b": "1", "ab": 2}'):
        vocab.write_text(content)
        merges.write_text("#version: 0.2\na b\n\n")
        with pytest.raises(ValueError, match="are not GPT-2's vocabulary and merges"):
            ScratchGPTTokenizer.from_gpt2_files(vocab, merges)
    vocab.write_text('{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}')
    assert ScratchGPTTokenizer.from_gpt2_files(vocab, merges)("ab")["input_ids"] == [2]
    with pytest.raises(ValueError, match="are not GPT-2's vocabulary and merges"):
        ScratchGPTTokenizer.from_gpt2_files(gpt2_files[0], gpt2_files[0])
    with pytest.raises(FileNotFoundError):
        ScratchGPTTokenizer.from_gpt2_files(tmp_path / "missing", gpt2_files[1])
