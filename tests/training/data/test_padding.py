import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_scratchgpt import ScratchGPTTokenizer
from training.data.padding import (
    AugmentedTexts,
    EncodedTexts,
    LengthGroupedBatchSampler,
    encode,
    in_order_of_length,
    padded_loader,
)

WORDS = ["to be or not to be", "that is the question", "whether 'tis nobler", "in the mind to suffer"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = ScratchGPTTokenizer.train(WORDS * 9, 290)
    tokenizer.add_bos_token = tokenizer.add_eos_token = True
    return tokenizer


def test_texts_are_encoded_as_users_do_it(tokenizer):
    """What `pipeline` feeds the model is what it was trained on."""
    encoded = encode(WORDS, tokenizer, max_length=8, labels=np.eye(4, dtype=np.float32))
    for index, text in enumerate(WORDS):
        row = encoded[index]
        assert row["input_ids"] == tokenizer(text, truncation=True, max_length=8)["input_ids"]
        assert row["input_ids"][0] == tokenizer.bos_token_id
        assert row["input_ids"][-1] == tokenizer.eos_token_id, "a text that is cut still ends"
        assert row["labels"] == np.eye(4)[index].tolist()
    lengths = [len(tokenizer(text)["input_ids"]) for text in WORDS]
    assert encoded.num_truncated == sum(length > 8 for length in lengths) > 0
    assert encoded.lengths.tolist() == [min(length, 8) for length in lengths]
    assert encode(WORDS, tokenizer, max_length=max(lengths)).num_truncated == 0


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    batch_size=st.integers(1, 9),
    num_batches=st.integers(1, 40),
    seed=st.integers(0, 9),
    data=st.data(),
)
@settings(deadline=None)
def test_each_text_comes_once_an_epoch_in_full_batches(lengths, batch_size, num_batches, seed, data):
    start = data.draw(st.integers(0, num_batches))
    batches = list(LengthGroupedBatchSampler(np.array(lengths), batch_size, num_batches, seed))
    assert [len(batch) for batch in batches] == [batch_size] * num_batches
    assert list(LengthGroupedBatchSampler(np.array(lengths), batch_size, num_batches, seed, start)) == batches[start:]
    assert len(LengthGroupedBatchSampler(np.array(lengths), batch_size, num_batches, seed, start)) == num_batches - start
    drawn = list(itertools.chain.from_iterable(batches))
    assert len(set(drawn)) == len(drawn), "an index says which epoch it belongs to, too"
    for epochs in range(1, len(drawn) // len(lengths) + 1):
        enough = math.ceil(epochs * len(lengths) / batch_size)
        assert set(range(epochs * len(lengths))) <= set(itertools.chain.from_iterable(batches[:enough]))


def test_batches_hold_little_padding():
    lengths = np.random.default_rng(0).lognormal(3, 0.8, size=4992).astype(int) + 1
    waste = {}
    for name, batches in (
        ("by length", LengthGroupedBatchSampler(lengths, 16, 312, seed=0)),
        ("at random", np.random.default_rng(0).permutation(4992).reshape(-1, 16)),
    ):
        parts = [lengths[np.array(batch) % len(lengths)] for batch in batches]
        padded, real = (sum(map(of, parts)) for of in (lambda part: part.max() * 16, np.sum))
        waste[name] = 1 - real / padded
    assert waste["by length"] < 0.2 < 0.6 < waste["at random"]


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), draw=st.integers(0, 9), seed=st.integers(0, 3))
@settings(deadline=None)
def test_tokens_that_end_elsewhere_are_the_same_text(tokenizer, text, draw, seed):
    encoded = encode([text], tokenizer, 1000, np.ones((1, 2), dtype=np.float32))
    row = AugmentedTexts([text], encoded, tokenizer, 1000, 0.3, 0.0, seed)[draw]
    assert tokenizer.decode(row["input_ids"][1:-1]) == text
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    assert row["labels"] == [1.0, 1.0]
    assert AugmentedTexts([text], encoded, tokenizer, 1000, 0.3, 0.0, seed)[draw] == row
    assert AugmentedTexts([text], encoded, tokenizer, 1000, 0.0, 0.0, seed)[draw] == encoded[draw]


@given(words=st.lists(st.sampled_from(WORDS), min_size=1), draw=st.integers(0, 9), share=st.floats(0, 0.999))
@settings(deadline=None)
def test_what_is_left_of_a_text_is_in_its_order(tokenizer, words, draw, share):
    text = " ".join(words)
    encoded = encode([text], tokenizer, 10_000)
    texts = AugmentedTexts([text], encoded, tokenizer, 10_000, 0, share, seed=0)
    left, whole = texts[draw]["input_ids"], encoded[draw]["input_ids"]
    assert left[0] == whole[0]
    assert left[-1] == whole[-1]
    assert len(left) > 2
    following = iter(whole)
    assert all(token in following for token in left)


def test_the_share_of_tokens_that_is_left_out(tokenizer):
    text = " ".join(WORDS * 50)
    encoded = encode([text], tokenizer, 10_000)
    texts = AugmentedTexts([text], encoded, tokenizer, 10_000, 0, 0.2, seed=0)
    assert len(texts[0]["input_ids"]) / encoded.lengths[0] == pytest.approx(0.8, abs=0.03)
    assert texts[0] != texts[1]


def test_texts_vary_from_epoch_to_epoch_and_keep_to_the_limit(tokenizer):
    encoded = encode(WORDS, tokenizer, 12)
    texts = AugmentedTexts(WORDS, encoded, tokenizer, 12, 0.5, 0.1, seed=0)
    rows = [texts[1 + epoch * len(WORDS)]["input_ids"] for epoch in range(5)]
    assert len({tuple(row) for row in rows}) > 1
    assert all(len(row) <= 12 and row[-1] == tokenizer.eos_token_id for row in rows)
    whole = AugmentedTexts(WORDS, encode(WORDS, tokenizer, 100), tokenizer, 100, 0.99, 0, seed=0)
    assert len(whole[0]["input_ids"]) >= len(WORDS[0]), "nearly one token a character"


def test_batches_differ_between_epochs_and_seeds():
    lengths = np.arange(1, 65)
    one = list(LengthGroupedBatchSampler(lengths, 4, 32, seed=0))
    other = list(LengthGroupedBatchSampler(lengths, 4, 32, seed=1))
    assert one != other
    assert one[:16] != one[16:]


def test_rows_are_padded_to_the_longest_of_the_batch(tokenizer):
    encoded = encode(WORDS, tokenizer, max_length=64, labels=np.eye(4, dtype=np.float32))
    order = in_order_of_length(encoded.lengths)
    assert encoded.lengths[order].tolist() == sorted(encoded.lengths, reverse=True)
    first, second = padded_loader(encoded, tokenizer, batch_size=2, sampler=order)
    assert first["input_ids"].shape == (2, encoded.lengths.max())
    torch.testing.assert_close(first["attention_mask"].sum(1), torch.tensor(encoded.lengths[order[:2]]))
    assert (first["input_ids"] == tokenizer.pad_token_id).sum() == (first["attention_mask"] == 0).sum()
    torch.testing.assert_close(second["labels"], torch.eye(4)[order[2:]])


def test_texts_without_labels():
    assert EncodedTexts(np.arange(5), np.array([0, 2, 5]), 0)[1] == {"input_ids": [2, 3, 4]}
