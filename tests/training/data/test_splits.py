import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.splits import SPLITS, drop_leakage, split_by_group


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
    made = split_by_group(texts, {"validation": validation, "test": test}, seed, labels if stratified else None)
    assert sorted(index for split in made.values() for index in split) == list(range(len(rows)))
    splits, copies = drop_leakage({name: [texts[index] for index in made[name]] for name in SPLITS}, str)
    train, middle, last = (set(splits[name]) for name in SPLITS)
    assert not (train & middle | train & last | middle & last)
    assert copies == {name: len(made[name]) - len(splits[name]) for name in SPLITS}
    assert train | middle | last == set(texts)
    if not stratified:  # nothing is in two splits from the start
        assert not any(copies.values())


@given(st.sets(st.integers(), min_size=20, max_size=200), st.integers(0, 3))
@settings(deadline=None)
def test_shares_hold(numbers, seed):
    made = split_by_group([str(number) for number in numbers], {"validation": 0.05, "test": 0.1}, seed)
    assert abs(len(made["test"]) - 0.1 * len(numbers)) <= 1
    assert abs(len(made["validation"]) - 0.05 * len(numbers)) <= 1


@pytest.mark.parametrize(("labels", "each"), [(200, 5), (300, 3), (100, 7), (500, 2)])
def test_many_rare_labels_are_split_in_the_shares_asked_for(labels, each):
    """Rounding the share of each label by itself would leave nothing to look at, or too much."""
    strata = [str(label) for label in range(labels) for _ in range(each)]
    splits = split_by_group([str(n) for n in range(len(strata))], {"validation": 0.1, "test": 0.2}, 0, strata)
    sizes = [len(splits[name]) / len(strata) for name in SPLITS]
    assert {strata[index] for index in splits["train"]} == set(strata)
    if each > 2:  # of two, one at least is learned from
        assert sizes == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
