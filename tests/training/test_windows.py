import os

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_scratchgpt import ScratchGPTTokenizer
from training.arguments import UserError
from training.windows import IGNORED, ShuffledBatches, Tokens, Windows, evaluation_loader, tokenize, train_tokenizer

TEXTS = Dataset.from_dict({"text": ["to be or not to be", "that is the question", "größer 🙂"]})


@settings(deadline=None)
@given(length=st.integers(2, 400), context_length=st.integers(1, 60), batch_size=st.integers(1, 9))
def test_every_token_but_the_first_is_predicted_once(length, context_length, batch_size):
    if length <= context_length:
        return
    ids = np.arange(10, 10 + length, dtype=np.uint16)
    windows = Windows(Tokens(ids, 0), context_length, pad_token_id=2, split="test")
    predicted, batches = [], list(evaluation_loader(windows, batch_size))
    for batch in batches:
        shape = (min(batch_size, len(windows)), context_length)
        assert batch["input_ids"].shape == batch["shift_labels"].shape == shape
        scored = batch["shift_labels"] != IGNORED
        assert torch.equal(batch["input_ids"][scored] + 1, batch["shift_labels"][scored])
        assert (batch["input_ids"][~scored] == 2).all()
        predicted += batch["shift_labels"][scored].tolist()
    assert predicted == ids[1:].tolist()


def test_windows_by_hand():
    windows = Windows(Tokens(np.array([5, 6, 7, 8, 9, 10], dtype=np.uint16), 0), 3, pad_token_id=2, split="test")
    assert len(windows) == 2
    assert [{name: tensor.tolist() for name, tensor in window.items()} for window in (windows[0], windows[1], windows[2])] == [
        {"input_ids": [5, 6, 7], "shift_labels": [6, 7, 8]},
        {"input_ids": [8, 9, 2], "shift_labels": [9, 10, IGNORED]},
        {"input_ids": [2, 2, 2], "shift_labels": [IGNORED] * 3},
    ]


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match="the training text has 8 tokens, fewer than one window of --context_length 8"):
        Windows(Tokens(np.zeros(8, dtype=np.uint16), 0), 8, 2, "training")


@settings(deadline=None, max_examples=50)
@given(num_windows=st.integers(1, 50), batch_size=st.integers(1, 8), num_batches=st.integers(1, 40), seed=st.integers(0, 9))
def test_each_epoch_sees_every_window_once(num_windows, batch_size, num_batches, seed):
    batches = list(ShuffledBatches(num_windows, batch_size, num_batches, seed))
    assert [len(batch) for batch in batches] == [batch_size] * num_batches
    indices = [index for batch in batches for index in batch]
    for start in range(0, len(indices) - num_windows + 1, num_windows):
        assert sorted(indices[start : start + num_windows]) == list(range(num_windows))
    assert batches == list(ShuffledBatches(num_windows, batch_size, num_batches, seed))


def test_orders_differ_between_epochs_and_seeds():
    first, second = list(ShuffledBatches(50, 50, 2, 0))
    assert first != second
    assert [first, second] != list(ShuffledBatches(50, 50, 2, 1))


def test_token_file_holds_the_documents_between_their_marks(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    tokenizer = train_tokenizer(TEXTS, 270, context_length=16)
    tokens = tokenize(TEXTS, tokenizer, "test")
    expected = []
    for text in TEXTS["text"]:
        expected += [tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert tokens.ids.tolist() == expected
    assert tokens.ids.dtype == np.uint16
    assert tokens.num_bytes == sum(len(text.encode()) for text in TEXTS["text"])
    assert tokenizer.model_max_length == 16
    assert not [path for path in (tmp_path / "scratchgpt").iterdir() if path.suffix not in (".json", ".uint16")]


def test_special_tokens_in_a_text_are_text(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    tokenizer = ScratchGPTTokenizer.train(["a"], 259)
    ids = tokenize(Dataset.from_dict({"text": ["a<|eos|>b"]}), tokenizer, "test").ids.tolist()
    assert ids[1:-1].count(tokenizer.eos_token_id) == 0
    assert tokenizer.decode(ids[1:-1]) == "a<|eos|>b"
    assert tokenizer.eos_token_id in tokenizer("a<|eos|>b")["input_ids"]  # elsewhere it means what it says


def test_what_is_cached_is_reused_until_something_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)

    def files():
        return {path.name for path in (tmp_path / "scratchgpt").iterdir()}

    def make(texts, vocab_size):
        return tokenize(texts, train_tokenizer(texts, vocab_size, 16), "test")

    make(TEXTS, 270)
    first = files()
    make(TEXTS, 270)
    assert files() == first
    make(TEXTS, 265)
    make(Dataset.from_dict({"text": [*TEXTS["text"][:2], "größer 🙃"]}), 270)
    assert len(files()) == 3 * len(first)


@pytest.mark.parametrize("size", [0, 5, 40])
def test_a_truncated_token_file_is_made_again(tmp_path, monkeypatch, size):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    tokenizer = train_tokenizer(TEXTS, 270, 16)
    whole = tokenize(TEXTS, tokenizer, "test").ids.tolist()
    (file,) = (tmp_path / "scratchgpt").glob("*.uint16")
    os.truncate(file, size)
    assert tokenize(TEXTS, tokenizer, "test").ids.tolist() == whole


def test_a_damaged_tokenizer_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    train_tokenizer(TEXTS, 270, 16)
    (file,) = (tmp_path / "scratchgpt").glob("*.json")
    os.truncate(file, 100)
    with pytest.raises(UserError, match=r"the cached tokenizer .*\.json is damaged .*: delete it"):
        train_tokenizer(TEXTS, 270, 16)


def test_nothing_half_made_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    tokenizer = ScratchGPTTokenizer.train(["a"], 259)

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "array", fail)
    with pytest.raises(KeyboardInterrupt):
        tokenize(TEXTS, tokenizer, "test")
    assert not list((tmp_path / "scratchgpt").iterdir())
