import os
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modeling_scratchgpt import ScratchGPTTokenizer
from modeling_scratchgpt.atomic import PREFIX
from modeling_scratchgpt.tokenization_scratchgpt import BYTE_LEVEL, TOKENIZERS
from training.data import tokens as tokens_module
from training.data.cache import ABANDONED
from training.data.corpora import CorpusArguments, read_corpora
from training.data.datasets import PaddedExamples
from training.data.tokens import cut_into_pieces, tokenize_documents, tokenize_texts, train_tokenizer

TEXTS = Dataset.from_dict({"text": ["to be or not to be", "that is the question", "größer 🙂"]})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The directory of cached files, new in each test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "scratchgpt"


def test_documents_are_between_bos_and_eos(cache, caplog):
    tokenizer = train_tokenizer(TEXTS, 270, "bpe", context_length=4)
    tokens = tokenize_documents(TEXTS, tokenizer, "test")
    assert not caplog.records  # such as a warning about texts that are longer than the context
    expected = []
    for text in TEXTS["text"]:
        expected += [tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert tokens.ids.tolist() == expected
    starts = [index for index, token in enumerate(expected) if token == tokenizer.bos_token_id]
    assert tokens.offsets.tolist() == [*starts, len(expected)]
    assert tokens.ids.dtype == np.uint16
    assert tokens.num_bytes == sum(len(text.encode()) for text in TEXTS["text"])
    assert tokenizer.model_max_length == 4
    assert not [path for path in cache.iterdir() if path.suffix not in (".json", ".uint16")]


def test_special_tokens_in_a_text_are_text():
    tokenizer = ScratchGPTTokenizer.train(["a"], 259)
    ids = tokenize_documents(Dataset.from_dict({"text": ["a<|eos|>b"]}), tokenizer, "test").ids.tolist()
    assert ids[1:-1].count(tokenizer.eos_token_id) == 0
    assert tokenizer.decode(ids[1:-1]) == "a<|eos|>b"
    assert tokenizer.eos_token_id in tokenizer("a<|eos|>b")["input_ids"]  # elsewhere it is a special token


def test_cached_files_are_reused_until_something_changes(cache):

    def files():
        return {path.name for path in cache.iterdir()}

    def make(texts, vocab_size):
        return tokenize_documents(texts, train_tokenizer(texts, vocab_size, "bpe", 16), "test")

    make(TEXTS, 270)
    first = files()
    make(TEXTS, 270)
    assert files() == first
    make(TEXTS, 265)
    make(Dataset.from_dict({"text": [*TEXTS["text"][:2], "größer 🙃"]}), 270)
    assert len(files()) == 3 * len(first)


DAMAGE = {
    "empty": lambda content: b"",
    "short": lambda content: content[:3],
    "truncated": lambda content: content[: len(content) // 2],
    "zeros": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "one bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_written_again(cache, tmp_path, capsys, damage):
    (tmp_path / "rows.csv").write_text("text\none\ntwo\n")

    def prepare():
        (corpus,) = read_corpora(CorpusArguments([str(tmp_path / "rows.csv")]))
        tokenizer = train_tokenizer(TEXTS, 270, "bpe", 16)
        return corpus.documents["text"][:], tokenizer("naïve"), tokenize_documents(TEXTS, tokenizer, "test").ids.tolist()

    expected = prepare()
    files = sorted(cache.glob("*"))
    assert [file.suffix for file in sorted(files, key=lambda file: file.suffix)] == [".arrow", ".json", ".uint16"]
    for file in files:
        content = file.read_bytes()
        file.write_bytes(DAMAGE[damage](content))
        capsys.readouterr()
        assert prepare() == expected
        assert capsys.readouterr().out == f"The cached file {file} is damaged: writing it again\n"
        assert file.read_bytes() == content


@pytest.mark.parametrize(("kind", "loses"), [(kind, kind in ("word", "wordpiece")) for kind in TOKENIZERS])
def test_text_that_a_tokenizer_loses(kind, loses):
    """Rare characters, or white space. What is lost is in no metric, so bits per byte would be too low."""
    texts = Dataset.from_dict({"text": ["to be,\n  or not to be", " that is the question"]})
    tokenizer = ScratchGPTTokenizer.train(texts["text"], 300, kind=kind)
    size = sum(len(text.encode()) for text in texts["text"])
    assert tokenize_documents(texts, tokenizer, "test").num_bytes == (None if loses else size)
    rare = Dataset.from_dict({"text": ["to be 🙂"]})
    assert tokenize_documents(rare, tokenizer, "test").num_bytes == (10 if kind in BYTE_LEVEL else None)


def test_leftovers_of_killed_preparations_are_removed(cache):
    train_tokenizer(TEXTS, 270, "bpe", 16)
    old, new = (cache / f"{PREFIX}{name}.json" for name in ("old", "new"))
    for path, age in ((old, 2 * ABANDONED), (new, 60)):
        path.write_text("")
        os.utime(path, (time.time() - age,) * 2)
    train_tokenizer(TEXTS, 271, "bpe", 16)
    assert new.exists()
    assert not old.exists()


def test_an_interrupted_run_leaves_no_file(cache, monkeypatch):
    tokenizer = ScratchGPTTokenizer.train(["a"], 259)

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "array", fail)
    with pytest.raises(KeyboardInterrupt):
        tokenize_documents(TEXTS, tokenizer, "test")
    assert not list(cache.iterdir())


@pytest.mark.parametrize("bos", ["<|bos|>", "<|eos|>"])
def test_an_interrupted_tokenization_is_continued(cache, monkeypatch, bos):
    """At the part that it has begun; the result is that of one part."""
    texts = Dataset.from_dict({"text": [f"text {number}" for number in range(20)]})
    tokenizer = ScratchGPTTokenizer.train(texts["text"], 300)
    tokenizer.bos_token = bos
    expected = tokenize_documents(texts, tokenizer, "test")
    (file,) = cache.iterdir()
    content = file.read_bytes()
    file.unlink()

    monkeypatch.setattr(tokens_module, "PART_BYTES", 40)  # of 150
    read, batches = [], tokens_module._batches_of_pieces

    def interrupted(rows):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.extend(rows["text"][:1])
        return batches(rows)

    monkeypatch.setattr(tokens_module, "_batches_of_pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize_documents(texts, tokenizer, "test")
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(tokens_module, "_batches_of_pieces", lambda rows: read.extend(rows["text"][:1]) or batches(rows))
    tokens = tokenize_documents(texts, tokenizer, "test")
    assert read == ["text 0", "text 5", "text 10", "text 15"]
    assert tokens.ids.tolist() == expected.ids.tolist()
    assert tokens.offsets.tolist() == expected.offsets.tolist()
    assert [path.read_bytes() for path in cache.iterdir()] == [content]


def test_a_long_document_is_tokenized_as_a_whole_piece_by_piece(monkeypatch):
    monkeypatch.setattr(tokens_module, "PIECE", 20)
    monkeypatch.setattr(tokens_module, "BATCH", 50)
    text = "It was 1984.  The clocks,\n\n  struck\tthirteen; naïve größer's 日本語 wasn't   here. " * 20
    texts = Dataset.from_dict({"text": ["short", text, "", text[5:]]})
    for kind in ("bpe", "bpe-gpt4"):
        tokenizer = ScratchGPTTokenizer.train([text], 400, kind=kind)
        tokens = tokenize_documents(texts, tokenizer, "test")
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        expected = [[bos, *tokenizer(row)["input_ids"], eos] for row in texts["text"]]
        assert tokens.ids.tolist() == [token for row in expected for token in row]
        assert tokens.lengths.tolist() == [len(row) for row in expected]


@settings(deadline=None)
@given(text=st.text(st.sampled_from("ab1 \n.,'ü"), max_size=300), size=st.integers(1, 30))
@example(text="x" * 100, size=3)
def test_pieces_add_up_to_the_text(text, size):
    original = tokens_module.PIECE, tokens_module.LONGEST_PIECE
    tokens_module.PIECE, tokens_module.LONGEST_PIECE = size, 4 * size
    try:
        pieces = cut_into_pieces(text)
    finally:
        tokens_module.PIECE, tokens_module.LONGEST_PIECE = original
    assert "".join(pieces) == text
    assert all(len(piece) <= 4 * size for piece in pieces)


def test_the_cached_tokenizer_is_the_trained_one():
    for kind in ("bpe", "word"):
        first, again = (train_tokenizer(TEXTS, 270, kind, 16) for _ in range(2))
        trained = ScratchGPTTokenizer.train(TEXTS["text"], 270, kind=kind)
        for loaded in (first, again):
            assert loaded.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()
            assert loaded.special_tokens_map == trained.special_tokens_map


def test_a_tokenizer_is_trained_on_pieces_from_all_of_a_long_text(monkeypatch):
    monkeypatch.setattr(tokens_module, "TRAINING_BYTES", 100)
    texts = Dataset.from_dict({"text": [f"{number} is {number * 7919}" for number in range(20)]})  # 220 bytes or so
    every = -(-sum(map(len, texts["text"])) // 100)
    assert every == 3
    trained = ScratchGPTTokenizer.train(texts["text"][::every], 280, kind="bpe")
    assert train_tokenizer(texts, 280, "bpe", 16).backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def test_texts_are_tokenized_as_by_users():
    """`pipeline` gives the model what it was trained on."""
    words = TEXTS["text"][:]
    tokenizer = ScratchGPTTokenizer.train(words * 9, 290)
    tokenizer.add_bos_token = tokenizer.add_eos_token = True
    examples, num_truncated = tokenize_texts(words, tokenizer, max_length=5, labels=np.eye(3, dtype=np.float32))
    for index, text in enumerate(words):
        row = PaddedExamples(examples)[index]
        assert row["input_ids"].tolist() == tokenizer(text, truncation=True, max_length=5)["input_ids"]
        assert row["input_ids"][0] == tokenizer.bos_token_id
        assert row["input_ids"][-1] == tokenizer.eos_token_id, "a truncated text still has its end"
        assert row["labels"].tolist() == np.eye(3)[index].tolist()
    lengths = [len(tokenizer(text)["input_ids"]) for text in words]
    assert num_truncated == sum(length > 5 for length in lengths) > 0
    assert examples.lengths.tolist() == [min(length, 5) for length in lengths]
    assert tokenize_texts(words, tokenizer, max_length=max(lengths))[1] == 0
