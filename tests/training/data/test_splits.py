import random
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.cli import validate
from training.data.conversations import ConversationArguments
from training.data.corpora import CorpusArguments
from training.data.examples import ExampleArguments
from training.data.splits import SPLITS, drop_leakage, split_indices
from training.errors import UserError


def split(groups, validation, test, seed=0, strata=None):
    indices = split_indices([group.encode() for group in groups], {"validation": validation, "test": test}, seed, strata)
    return {name: part.tolist() for name, part in indices.items()}


@given(
    rows=st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["a", "b", "c"])), max_size=60),
    validation=st.floats(0.0, 0.4),
    test=st.floats(0.0, 0.4),
    seed=st.integers(0, 3),
    stratified=st.booleans(),
)
@settings(deadline=None)
def test_no_text_is_in_two_splits_and_none_is_lost(rows, validation, test, seed, stratified):
    texts, labels = [f"text {number}" for number, _ in rows], [label for _, label in rows]
    made = split(texts, validation, test, seed, labels if stratified else None)
    assert sorted(index for part in made.values() for index in part) == list(range(len(rows)))
    assert all(part == sorted(part) for part in made.values())
    trained = {(labels[index] if stratified else "") for index in made["train"]}
    assert trained == set(labels if stratified else [""] if rows else [])
    splits, duplicates = drop_leakage({name: [texts[index] for index in made[name]] for name in SPLITS}, str)
    train, middle, last = (set(splits[name]) for name in SPLITS)
    assert not (train & middle | train & last | middle & last)
    assert duplicates == {name: len(made[name]) - len(splits[name]) for name in SPLITS}
    assert train | middle | last == set(texts)
    if not stratified:  # a group is in one split from the start
        assert not any(duplicates.values())


@pytest.mark.parametrize(("labels", "each"), [(1, 200), (200, 5), (300, 3), (100, 7), (500, 2)])
def test_many_rare_labels_are_split_by_the_fractions(labels, each):
    """Rounding the fraction of each label by itself would hold out nothing, or too much."""
    strata = [str(label) for label in range(labels) for _ in range(each)]
    splits = split(map(str, range(len(strata))), 0.1, 0.2, strata=strata)
    sizes = [len(splits[name]) / len(strata) for name in SPLITS]
    assert {strata[index] for index in splits["train"]} == set(strata)
    if each > 2:  # of two, at least one is for training
        assert sizes == pytest.approx([0.7, 0.1, 0.2], abs=0.03)


@pytest.mark.parametrize("stratified", [False, True])
def test_splits_depend_on_the_seed_and_the_groups_alone(stratified):
    texts = [f"document {number}" for number in range(1000)]

    def made(texts, validation, test, seed=3):
        strata = [text[-1] for text in texts] if stratified else None
        return {name: {texts[index] for index in part} for name, part in split(texts, validation, test, seed, strata).items()}

    splits = made(texts, 0.1, 0.05)
    assert made(random.Random(0).sample(texts, k=1000), 0.1, 0.05) == splits
    assert len(splits["validation"] & made(texts, 0.1, 0.05, seed=4)["validation"]) < 30  # 10 are expected
    assert made(texts, 0.3, 0.05)["test"] == splits["test"]
    assert made(texts, 0.1, 0.0)["validation"] == made(texts, 0.1, 0.4)["validation"] == splits["validation"]
    # Of a growing corpus, few move; in a new order, 81 of 90 would leave.
    assert len(made(texts[:900], 0.1, 0.05)["validation"] - splits["validation"]) < 20


def test_a_group_is_never_divided_and_one_is_left_to_train_on():
    assert split(["same"] * 5, 0.4, 0.4) == {"train": [0, 1, 2, 3, 4], "validation": [], "test": []}
    made = split([f"{number // 3}" for number in range(9)], 0.2, 0.2)
    assert sorted(map(len, made.values())) == [3, 3, 3]
    assert split([], 0.1, 0.2) == {name: [] for name in SPLITS}


def test_only_numbers_are_kept_of_each_document():
    """So that a corpus can have ten million of them."""
    tracemalloc.start()
    made = split_indices(
        (f"a document of some words, {n}".encode() * 9 for n in range(100_000)), {"validation": 0.1, "test": 0}, 0
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(made["train"]), len(made["validation"])) == (90_000, 10_000)
    assert peak < 100_000 * 8 * 8


@pytest.mark.parametrize("arguments", [CorpusArguments(), ExampleArguments(), ConversationArguments()])
def test_numbers_out_of_range_are_rejected(arguments):
    validate(arguments)
    above = "above" if isinstance(arguments, CorpusArguments) else "at least"
    wrong = [("validation_fraction", -0.1, f"{above} 0 and below 1"), ("test_fraction", -0.1, "at least 0 and below 1")]
    wrong += [(name, value, rule) for name, _, rule in wrong for value in (1.0, float("nan"))]
    if isinstance(arguments, CorpusArguments):
        wrong += [("near_duplicates", 1.01, "at least 0 and at most 1"), ("max_documents", -1, "at least 0")]
    for name, value, rule in wrong:
        with pytest.raises(UserError, match=f"--{name} must be {rule}, got {value}"):
            validate(replace(arguments, **{name: value}))
