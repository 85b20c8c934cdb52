import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from training.data.tokens import Tokens
from training.data.windows import (
    Batches,
    PackedDocuments,
    Windows,
    evaluation_loader,
    pack_best_fit_decreasing,
    training_loader,
)
from training.errors import UserError

NO_STARTS = np.zeros(0, dtype=np.int64)


@settings(deadline=None)
@given(length=st.integers(2, 400), context_length=st.integers(1, 60), batch_size=st.integers(1, 9))
def test_every_token_but_the_first_is_predicted_once(length, context_length, batch_size):
    if length <= context_length:
        return
    ids = np.arange(10, 10 + length, dtype=np.uint16)
    windows = Windows(Tokens(ids, 0, NO_STARTS), context_length, pad_token_id=2, split="test")
    predicted, batches = [], list(evaluation_loader(windows, batch_size))
    for batch in batches:
        shape = (min(batch_size, len(windows)), context_length)
        assert batch["input_ids"].shape == batch["shift_labels"].shape == shape
        scored = batch["shift_labels"] != IGNORE_INDEX
        assert torch.equal(batch["input_ids"][scored] + 1, batch["shift_labels"][scored])
        assert (batch["input_ids"][~scored] == 2).all()
        predicted += batch["shift_labels"][scored].tolist()
    assert predicted == ids[1:].tolist()


@settings(deadline=None)
@given(length=st.integers(2, 200), context_length=st.integers(1, 30), batch_size=st.integers(1, 9), data=st.data())
def test_overlapping_windows_predict_each_token_once_from_the_context_promised(length, context_length, batch_size, data):
    if length <= context_length:
        return
    stride = data.draw(st.integers(1, context_length))
    ids = np.arange(10, 10 + length, dtype=np.uint16)
    windows = Windows(Tokens(ids, 0, NO_STARTS), context_length, 2, "test", stride, once=True)
    predicted = []
    for number, row in enumerate(row for batch in evaluation_loader(windows, batch_size) for row in batch["shift_labels"]):
        places = (row != IGNORE_INDEX).nonzero().flatten().tolist()
        assert number == 0 or not places or places[0] == context_length - stride
        predicted += row[places].tolist()
    assert predicted == ids[1:].tolist()


def test_windows_by_hand():
    windows = Windows(Tokens(np.array([5, 6, 7, 8, 9, 10], dtype=np.uint16), 0, NO_STARTS), 3, pad_token_id=2, split="test")
    assert len(windows) == 2
    assert [{name: tensor.tolist() for name, tensor in window.items()} for window in (windows[0], windows[1], windows[2])] == [
        {"input_ids": [5, 6, 7], "shift_labels": [6, 7, 8]},
        {"input_ids": [8, 9, 2], "shift_labels": [9, 10, IGNORE_INDEX]},
        {"input_ids": [2, 2, 2], "shift_labels": [IGNORE_INDEX] * 3},
    ]


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match="the training text has 8 tokens, fewer than one window of --context_length 8"):
        Windows(Tokens(np.zeros(8, dtype=np.uint16), 0, NO_STARTS), 8, 2, "training")


@settings(deadline=None, max_examples=50)
@given(num_windows=st.integers(1, 50), batch_size=st.integers(1, 8), num_batches=st.integers(1, 40), seed=st.integers(0, 9))
def test_each_epoch_sees_every_window_once(num_windows, batch_size, num_batches, seed):
    batches = list(Batches([num_windows], batch_size, num_batches, seed))
    assert [len(batch) for batch in batches] == [batch_size] * num_batches
    indices = [index for batch in batches for index in batch]
    for start in range(0, len(indices) - num_windows + 1, num_windows):
        assert sorted(indices[start : start + num_windows]) == list(range(num_windows))
    assert batches == list(Batches([num_windows], batch_size, num_batches, seed))


def test_orders_differ_between_epochs_and_seeds():
    first, second = list(Batches([50], 50, 2, 0))
    assert first != second
    assert [first, second] != list(Batches([50], 50, 2, 1))


@settings(deadline=None)
@given(length=st.integers(2, 80), context_length=st.integers(1, 20), data=st.data())
def test_a_sliding_window_is_the_books(length, context_length, data):
    """Chapter 2's loop over a text, for every stride; the book drops the last window when it is not full."""
    if length <= context_length:
        return
    stride = data.draw(st.integers(1, context_length))
    ids = np.arange(10, 10 + length, dtype=np.uint16)
    windows = Windows(Tokens(ids, 0, NO_STARTS), context_length, 2, "test", stride)
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
def test_best_fit_fills_rows_with_everything_once(lengths):
    rows = pack_best_fit_decreasing(lengths, 20)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 20 for row in rows)
    # No two rows have room for each other: together they would have been one.
    sums = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(sums) < 2 or sums[0] + sums[1] > 20


def test_best_fit_by_hand():
    assert pack_best_fit_decreasing([5, 4, 3, 6, 2], 10) == [[3, 1], [0, 2, 4]]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=20), context_length=st.integers(1, 12))
def test_packing_predicts_each_token_after_the_first_of_its_document_once(lengths, context_length):
    starts = np.cumsum([0, *lengths[:-1]])
    ids = np.arange(10, 10 + sum(lengths), dtype=np.uint16)
    packed = PackedDocuments(Tokens(ids, 0, starts), context_length, pad_token_id=2)
    predicted = []
    for index in range(len(packed)):
        row = packed[index]
        scored = row["shift_labels"] != IGNORE_INDEX
        assert torch.equal(row["input_ids"][scored] + 1, row["shift_labels"][scored])
        assert (row["input_ids"][~scored] == 2).all()
        predicted += row["shift_labels"][scored].tolist()
        # Positions go up by one within a document, and begin again exactly where another begins.
        begins = (row["position_ids"] == 0).nonzero().flatten().tolist()
        follows = [place for place in range(1, context_length) if row["input_ids"][place] != row["input_ids"][place - 1] + 1]
        assert set(follows) - set(begins) <= set((~scored).nonzero().flatten().tolist())
    expected = np.delete(ids, starts).tolist()
    assert sorted(predicted) == sorted(expected)
    assert packed.efficiency == pytest.approx(len(expected) / (len(packed) * context_length))


@torch.no_grad()
def test_a_packed_row_has_the_loss_of_its_documents(tiny_model):
    """What a row of several documents costs is what each of them costs alone."""
    lengths = [9, 5, 14, 3]
    ids = np.random.default_rng(0).integers(3, 300, sum(lengths)).astype(np.uint16)
    starts = np.cumsum([0, *lengths[:-1]])
    packed = PackedDocuments(Tokens(ids, 0, starts), 32, pad_token_id=2)
    (batch,) = training_loader([packed], Batches([len(packed)], len(packed), 1, seed=0))
    together = tiny_model(**batch, num_items_in_batch=1, use_cache=False).loss
    alone = 0.0
    for start, length in zip(starts, lengths, strict=True):
        document = torch.from_numpy(ids[start : start + length].astype(np.int64))[None]
        alone += tiny_model(document, labels=document, num_items_in_batch=1).loss
    torch.testing.assert_close(together, alone)


@settings(deadline=None, max_examples=50)
@given(start=st.integers(0, 30), seed=st.integers(0, 9), mixed=st.booleans(), with_replacement=st.booleans())
def test_batches_go_on_where_they_were_left(start, seed, mixed, with_replacement):
    options = {"probabilities": [0.2, 0.8] if mixed else None, "with_replacement": with_replacement}
    everything = list(Batches([7, 5], 4, 30, seed, **options))
    rest = Batches([7, 5], 4, 30, seed, start=start, **options)
    assert list(rest) == everything[start:]
    assert len(rest) == 30 - start


def test_sources_are_mixed_as_asked():
    batches = list(Batches([100, 10], 50, 200, seed=0, probabilities=[0.25, 0.75]))
    drawn = [index for batch in batches for index in batch]
    second = [index for index in drawn if index >= 100]
    assert len(second) / len(drawn) == pytest.approx(0.75, abs=0.01)
    counts = np.bincount(np.array(second) - 100)
    assert counts.max() - counts.min() <= 1  # each source goes through its windows, epoch after epoch


def test_random_offsets_are_uniform():
    drawn = np.array([index for batch in Batches([8], 100, 200, seed=0, with_replacement=True) for index in batch])
    assert np.bincount(drawn, minlength=8) / len(drawn) == pytest.approx(np.full(8, 1 / 8), abs=0.01)
