import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from training.data.datasets import PaddedExamples, TokenizedExamples, padded_dataloader, shard_dataloader
from training.data.samplers import LengthGroupedBatchSampler, MixtureBatchSampler


@settings(deadline=None, max_examples=50)
@given(num_rows=st.integers(1, 50), batch_size=st.integers(1, 8), num_batches=st.integers(1, 40), seed=st.integers(0, 9))
def test_each_epoch_has_every_row_once(num_rows, batch_size, num_batches, seed):
    batches = list(MixtureBatchSampler([num_rows], batch_size, num_batches, seed))
    assert [len(batch) for batch in batches] == [batch_size] * num_batches
    indices = [index for batch in batches for index in batch]
    for start in range(0, len(indices) - num_rows + 1, num_rows):
        assert sorted(indices[start : start + num_rows]) == list(range(num_rows))
    assert batches == list(MixtureBatchSampler([num_rows], batch_size, num_batches, seed))


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    batch_size=st.integers(1, 9),
    num_batches=st.integers(1, 40),
    seed=st.integers(0, 9),
)
@settings(deadline=None)
def test_each_text_comes_once_an_epoch_in_full_batches(lengths, batch_size, num_batches, seed):
    sampler = LengthGroupedBatchSampler(np.array(lengths), batch_size, num_batches, seed)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [batch_size] * num_batches
    assert len(sampler) == num_batches
    drawn = list(itertools.chain.from_iterable(batches))
    assert len(set(drawn)) == len(drawn), "an index also identifies its epoch"
    for epochs in range(1, len(drawn) // len(lengths) + 1):
        enough = math.ceil(epochs * len(lengths) / batch_size)
        assert set(range(epochs * len(lengths))) <= set(itertools.chain.from_iterable(batches[:enough]))


def test_the_rows_of_a_step_do_not_depend_on_its_division():
    """So a resumed run may divide its steps into other batches: each example still comes once an epoch."""
    lengths = np.arange(23) % 7
    whole = list(LengthGroupedBatchSampler(lengths, 6, 20, 0))
    parts = list(LengthGroupedBatchSampler(lengths, 2, 60, 0, accumulation=3))
    assert [[*itertools.chain(*parts[start : start + 3])] for start in range(0, 60, 3)] == whole


@pytest.mark.parametrize(
    "make_sampler",
    [
        lambda seed: MixtureBatchSampler([50], 50, 2, seed),
        lambda seed: LengthGroupedBatchSampler(np.arange(1, 65), 32, 4, seed),
    ],
)
def test_batches_differ_between_epochs_and_seeds(make_sampler):
    batches = list(make_sampler(0))
    half = len(batches) // 2
    assert batches[:half] != batches[half:]
    assert batches != list(make_sampler(1))


@pytest.mark.parametrize("num_processes", [1, 2, 3])  # of batches of 4 rows
@pytest.mark.parametrize("skipped", [0, 1, 13, 30])
@pytest.mark.parametrize(
    "sampler",
    [
        MixtureBatchSampler([7, 5], 4, 30, 0),
        MixtureBatchSampler([7, 5], 4, 30, 0, probabilities=[0.2, 0.8]),
        MixtureBatchSampler([7, 5], 4, 30, 0, with_replacement=True),
        LengthGroupedBatchSampler(np.arange(2, 14), 4, 30, 0),
    ],
)
def test_skipped_batches_are_those_of_the_full_run(sampler, skipped, num_processes):
    """As a run is resumed, in one process and in each of several that split the batches."""
    ids = np.arange(90)
    rows = PaddedExamples(TokenizedExamples(ids, np.cumsum([0, *range(2, 14)]), loss_mask=ids > 0))
    loader = padded_dataloader(rows, 0, batch_sampler=sampler)
    labels = []
    for process in range(num_processes):
        accelerator = SimpleNamespace(num_processes=num_processes, process_index=process, device=torch.device("cpu"))
        prepared = shard_dataloader(accelerator, loader)
        everything, rest = list(prepared), skip_first_batches(prepared, skipped)
        labels += [label for batch in everything for label in batch["shift_labels"].flatten().tolist()]
        assert len(prepared) == 30
        assert len(rest) == 30 - skipped
        for expected, batch in zip(everything[skipped:], rest, strict=True):
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[name], expected[name]) for name in batch)
        if 4 % num_processes == 0:  # Accelerate refuses other numbers
            theirs = prepare_data_loader(loader, num_processes=num_processes, process_index=process, split_batches=True)
            for expected, batch in zip(theirs, everything, strict=True):
                assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert sum(label != IGNORE_INDEX for label in labels) == sum(
        int((batch["shift_labels"] != IGNORE_INDEX).sum()) for batch in loader
    )


def test_batches_have_little_padding():
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


def test_sources_are_mixed_by_their_probabilities():
    batches = list(MixtureBatchSampler([100, 10], 50, 200, seed=0, probabilities=[0.25, 0.75]))
    drawn = [index for batch in batches for index in batch]
    second = [index for index in drawn if index >= 100]
    assert len(second) / len(drawn) == pytest.approx(0.75, abs=0.01)
    counts = np.bincount(np.array(second) - 100)
    assert counts.max() - counts.min() <= 1  # each source is read epoch by epoch


def test_random_offsets_are_uniform():
    batches = MixtureBatchSampler([8], 100, 200, seed=0, with_replacement=True)
    drawn = np.array([index for batch in batches for index in batch])
    assert np.bincount(drawn, minlength=8) / len(drawn) == pytest.approx(np.full(8, 1 / 8), abs=0.01)
