import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_scratchgpt import ScratchGPTTokenizer
from training.data.augmentation import AugmentedTexts
from training.data.datasets import PaddedExamples
from training.data.tokens import tokenize_texts

WORDS = ["to be or not to be", "that is the question", "whether 'tis nobler", "in the mind to suffer"]


@pytest.fixture(scope="module")
def augment():
    """Makes the augmented rows of texts, their tokenizer and the plain rows."""
    tokenizer = ScratchGPTTokenizer.train(WORDS * 9, 290)
    tokenizer.add_bos_token = tokenizer.add_eos_token = True

    def make(texts, max_length, subword_dropout, token_dropout, seed=0):
        examples, _ = tokenize_texts(texts, tokenizer, max_length, np.ones((len(texts), 2), dtype=np.float32))
        rows = AugmentedTexts(texts, examples, tokenizer, max_length, subword_dropout, token_dropout, seed)
        return rows, tokenizer, PaddedExamples(examples)

    return make


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), draw=st.integers(0, 9), seed=st.integers(0, 3))
@settings(deadline=None)
def test_random_token_boundaries_keep_the_text(augment, text, draw, seed):
    rows, tokenizer, _ = augment([text], 1000, 0.3, 0.0, seed)
    ids = rows[draw]["input_ids"].tolist()
    assert tokenizer.decode(ids[1:-1]) == text
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert rows[draw]["labels"].tolist() == [1.0, 1.0]
    assert augment([text], 1000, 0.3, 0.0, seed)[0][draw]["input_ids"].tolist() == ids
    unchanged, _, plain = augment([text], 1000, 0.0, 0.0, seed)
    torch.testing.assert_close(unchanged[draw], plain[draw])


@given(words=st.lists(st.sampled_from(WORDS), min_size=1), draw=st.integers(0, 9), dropout=st.floats(0, 0.999))
@settings(deadline=None)
def test_the_remaining_tokens_are_in_order(augment, words, draw, dropout):
    rows, _, plain = augment([" ".join(words)], 10_000, 0, dropout)
    left, whole = rows[draw]["input_ids"].tolist(), plain[draw]["input_ids"].tolist()
    assert (left[0], left[-1]) == (whole[0], whole[-1])
    assert len(left) > 2
    following = iter(whole)
    assert all(token in following for token in left)


def test_token_dropout_is_the_fraction_of_dropped_tokens(augment):
    rows, _, plain = augment([" ".join(WORDS * 50)], 10_000, 0, 0.2)
    assert len(rows[0]["input_ids"]) / len(plain[0]["input_ids"]) == pytest.approx(0.8, abs=0.03)
    assert rows[0]["input_ids"].tolist() != rows[1]["input_ids"].tolist()


def test_texts_vary_between_epochs_and_are_truncated(augment):
    augmented, tokenizer, _ = augment(WORDS, 12, 0.5, 0.1)
    rows = [augmented[1 + epoch * len(WORDS)]["input_ids"].tolist() for epoch in range(5)]
    assert len({tuple(row) for row in rows}) > 1
    assert all(len(row) <= 12 and row[-1] == tokenizer.eos_token_id for row in rows)
    whole = augment(WORDS, 100, 0.99, 0)[0][0]
    assert len(whole["input_ids"]) >= len(WORDS[0]), "nearly one token a character"
