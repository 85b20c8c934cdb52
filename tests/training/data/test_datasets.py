import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_scratchgpt import ScratchGPTTokenizer
from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from training.data.datasets import (
    PackedExamples,
    PaddedExamples,
    TokenizedExamples,
    Windows,
    collate_padded,
    evaluation_dataloader,
    pack_best_fit_decreasing,
    padded_dataloader,
    sort_by_length,
    train_dataloader,
)
from training.data.samplers import MixtureBatchSampler
from training.data.tokens import tokenize_texts
from training.errors import UserError


def document(length: int) -> TokenizedExamples:
    """Ids that count up from 10."""
    return TokenizedExamples(np.arange(10, 10 + length, dtype=np.uint16), np.array([0, length]))


def make_examples(ids: list[list[int]], loss_mask: list[list[int]] | None = None) -> TokenizedExamples:
    """Examples with these ids, and a loss on all of them by default."""
    mask = np.concatenate(loss_mask or [np.ones(len(row)) for row in ids]).astype(bool)
    return TokenizedExamples(np.concatenate(ids), np.cumsum([0, *map(len, ids)]), loss_mask=mask)


@settings(deadline=None)
@given(length=st.integers(2, 400), context_length=st.integers(1, 60), batch_size=st.integers(1, 9))
def test_every_token_but_the_first_is_predicted_once(length, context_length, batch_size):
    if length <= context_length:
        return
    windows = Windows(document(length), context_length, pad_token_id=2, split="test")
    predicted = []
    for batch in evaluation_dataloader(windows, batch_size):
        shape = (min(batch_size, len(windows)), context_length)
        assert batch["input_ids"].shape == batch["shift_labels"].shape == shape
        scored = batch["shift_labels"] != IGNORE_INDEX
        assert torch.equal(batch["input_ids"][scored] + 1, batch["shift_labels"][scored])
        assert (batch["input_ids"][~scored] == 2).all()
        predicted += batch["shift_labels"][scored].tolist()
    assert predicted == document(length).ids[1:].tolist()


@settings(deadline=None)
@given(length=st.integers(2, 200), context_length=st.integers(1, 30), batch_size=st.integers(1, 9), data=st.data())
def test_overlapping_windows_predict_each_token_once_with_the_promised_context(length, context_length, batch_size, data):
    if length <= context_length:
        return
    stride = data.draw(st.integers(1, context_length))
    windows = Windows(document(length), context_length, 2, "test", stride, once=True)
    predicted = []
    rows = (row for batch in evaluation_dataloader(windows, batch_size) for row in batch["shift_labels"])
    for number, row in enumerate(rows):
        positions = (row != IGNORE_INDEX).nonzero().flatten().tolist()
        assert number == 0 or not positions or positions[0] == context_length - stride
        predicted += row[positions].tolist()
    assert predicted == document(length).ids[1:].tolist()


def test_windows_by_hand():
    windows = Windows(TokenizedExamples(np.array([5, 6, 7, 8, 9, 10], dtype=np.uint16), np.array([0, 6])), 3, 2, split="test")
    assert len(windows) == 2
    assert [{name: tensor.tolist() for name, tensor in window.items()} for window in (windows[0], windows[1], windows[2])] == [
        {"input_ids": [5, 6, 7], "shift_labels": [6, 7, 8]},
        {"input_ids": [8, 9, 2], "shift_labels": [9, 10, IGNORE_INDEX]},
        {"input_ids": [2, 2, 2], "shift_labels": [IGNORE_INDEX] * 3},
    ]


def test_a_text_shorter_than_a_window_is_rejected():
    with pytest.raises(UserError, match="the training text has 8 tokens, fewer than one window of --context_length 8"):
        Windows(document(8), 8, 2, "training")


@settings(deadline=None)
@given(length=st.integers(2, 80), context_length=st.integers(1, 20), data=st.data())
def test_a_sliding_window_is_the_books(length, context_length, data):
    """Chapter 2's loop over a text, for every stride; the book drops the last window if it is not full."""
    if length <= context_length:
        return
    stride = data.draw(st.integers(1, context_length))
    ids = document(length).ids
    windows = Windows(document(length), context_length, 2, "test", stride)
    book = [
        (ids[start : start + context_length].tolist(), ids[start + 1 : start + context_length + 1].tolist())
        for start in range(0, length - context_length, stride)
    ]
    ours = [(windows[index]["input_ids"].tolist(), windows[index]["shift_labels"].tolist()) for index in range(len(windows))]
    assert ours[: len(book)] == book
    assert len(ours) - len(book) in (0, 1)
    predicted = {label for _, labels in ours for label in labels if label != IGNORE_INDEX}
    assert predicted == set(ids[1:].tolist())


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_puts_everything_into_rows_once(lengths):
    rows = pack_best_fit_decreasing(lengths, 20)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 20 for row in rows)
    # No two rows fit into one: they would have been merged.
    sums = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(sums) < 2 or sums[0] + sums[1] > 20


def test_best_fit_by_hand():
    assert pack_best_fit_decreasing([5, 4, 3, 6, 2], 10) == [[3, 1], [0, 2, 4]]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=20),
    context_length=st.integers(1, 12),
    loss_mask=st.one_of(st.none(), st.lists(st.booleans(), min_size=600, max_size=600)),
)
def test_packing_predicts_each_token_after_the_first_of_its_document_once(lengths, context_length, loss_mask):
    offsets = np.cumsum([0, *lengths])
    ids = np.arange(10, 10 + sum(lengths), dtype=np.uint16)
    has_loss = np.array(loss_mask or [True] * 600)[: len(ids)]
    examples = TokenizedExamples(ids, offsets, loss_mask=has_loss if loss_mask else None)
    packed = PackedExamples(examples, context_length, pad_token_id=2)
    predicted = []
    for row in (packed[index] for index in range(len(packed))):
        scored = row["shift_labels"] != IGNORE_INDEX
        assert torch.equal(row["input_ids"][scored] + 1, row["shift_labels"][scored])
        predicted += row["shift_labels"][scored].tolist()
        # Positions go up by one within a document, and restart exactly where another begins.
        restarts = (row["position_ids"] == 0).nonzero().flatten().tolist()
        breaks = [place for place in range(1, context_length) if row["input_ids"][place] != row["input_ids"][place - 1] + 1]
        assert set(breaks) - set(restarts) <= set((row["input_ids"] == 2).nonzero().flatten().tolist())
    not_first = np.delete(np.arange(len(ids)), offsets[:-1])
    assert sorted(predicted) == ids[not_first][has_loss[not_first]].tolist()
    assert packed.efficiency == pytest.approx(len(not_first) / (len(packed) * context_length))


@torch.no_grad()
def test_a_packed_row_has_the_loss_of_its_documents(tiny_model):
    lengths = [9, 5, 14, 3]
    ids = np.random.default_rng(0).integers(3, 300, sum(lengths)).astype(np.uint16)
    offsets = np.cumsum([0, *lengths])
    packed = PackedExamples(TokenizedExamples(ids, offsets), 32, pad_token_id=2)
    (batch,) = train_dataloader([packed], MixtureBatchSampler([len(packed)], len(packed), 1, seed=0))
    together = tiny_model(**batch, num_items_in_batch=1, use_cache=False).loss
    alone = 0.0
    for start, length in zip(offsets, lengths, strict=False):
        single = torch.from_numpy(ids[start : start + length].astype(np.int64))[None]
        alone += tiny_model(single, labels=single, num_items_in_batch=1).loss
    torch.testing.assert_close(together, alone)


def test_batches_of_several_datasets():
    sources = [Windows(document(length), 4, 2, "training") for length in (20, 9)]
    batches = list(train_dataloader(sources, MixtureBatchSampler([5, 2], 7, 1, seed=0)))
    assert sorted(batches[0]["input_ids"][:, 0].tolist()) == [10, 10, 14, 14, 18, 22, 26]


def test_the_golden_case():
    """The batch of "Build a Large Language Model", chapter 7: pad and end of text are one token, and the first one is kept."""
    end = 50256
    rows = PaddedExamples(make_examples([[0, 1, 2, 3, 4, end], [5, 6, end], [7, 8, 9, end]]))
    batch = collate_padded([rows[0], rows[1], rows[2]], end)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4], [5, 6, end, end, end], [7, 8, 9, end, end]]
    assert batch["shift_labels"].tolist() == [[1, 2, 3, 4, 50256], [6, 50256, -100, -100, -100], [8, 9, 50256, -100, -100]]


def test_only_ids_with_a_loss_are_labels():
    rows = PaddedExamples(make_examples([[1, 2, 3, 4, 5], [6, 7, 8]], [[0, 0, 0, 1, 1], [0, 1, 1]]))
    assert rows[0]["shift_labels"].tolist() == [IGNORE_INDEX, IGNORE_INDEX, 4, 5]
    assert rows[3]["shift_labels"].tolist() == [7, 8]  # the index continues from epoch to epoch
    assert rows[-1] == {"input_ids": torch.tensor([0]), "shift_labels": torch.tensor([IGNORE_INDEX])}


def test_rows_are_padded_to_the_longest_of_the_batch():
    texts = ["to be or not to be", "that is the question", "whether 'tis nobler", "in the mind to suffer"]
    tokenizer = ScratchGPTTokenizer.train(texts * 9, 290)
    examples, _ = tokenize_texts(texts, tokenizer, max_length=64, labels=np.eye(4, dtype=np.float32))
    order = sort_by_length(examples.lengths)
    assert examples.lengths[order].tolist() == sorted(examples.lengths, reverse=True)
    first, second = padded_dataloader(PaddedExamples(examples), tokenizer.pad_token_id, batch_size=2, sampler=order)
    expected = tokenizer([texts[index] for index in order[:2]], padding=True, padding_side="right", return_tensors="pt")
    for name in ("input_ids", "attention_mask"):
        torch.testing.assert_close(first[name], expected[name])
    torch.testing.assert_close(second["labels"], torch.eye(4)[order[2:]])
    assert list(PaddedExamples(TokenizedExamples(np.arange(5), np.array([0, 2, 5])))[1]) == ["input_ids"]  # without labels
