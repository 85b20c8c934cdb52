import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

import training.data.examples
import training.data.sources
from tests.training.conftest import write_rows
from training.data.examples import (
    MULTI,
    REGRESSION,
    Example,
    ExampleArguments,
    as_numbers,
    check_examples,
    class_weights,
    read_examples,
)
from training.data.splits import SPLITS
from training.errors import UserError

ROWS = [{"text": f"text {number}, or so", "label": "even" if number % 2 == 0 else "odd"} for number in range(40)]


def read(path: Path, rows: list[dict], **changes):
    return read_examples(ExampleArguments(dataset=[write_rows(path, rows)], **changes))


def texts(split: list[Example]) -> set[str]:
    return {example.text for example in split}


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".csv"])
def test_every_file_format_gives_the_same_examples(tmp_path, ending):
    found = read(tmp_path / f"rows{ending}", ROWS)
    assert found == read(tmp_path / "other.jsonl", ROWS)
    assert found.names == ["even", "odd"]
    assert {name: Counter(example.label for example in split) for name, split in found.splits.items()} == {
        "train": {"even": 14, "odd": 14},
        "validation": {"even": 2, "odd": 2},
        "test": {"even": 4, "odd": 4},
    }


@pytest.mark.parametrize(("name", "separator"), [("rows.tsv", "\t"), ("Rows", "\t"), ("rows.csv", ";"), ("rows.csv", "\t")])
def test_a_table_without_a_header(tmp_path, name, separator):
    """Like the SMS Spam Collection: tabs, no column names, no extension; or what a spreadsheet calls .csv."""
    (tmp_path / name).write_text("".join(f"{row['text']}, or so{separator}{row['label']}\n" for row in ROWS))
    arguments = ExampleArguments(dataset=[str(tmp_path / name)], columns=["text", "label"])
    check_examples(arguments)
    found = read_examples(arguments)
    assert sum(map(len, found.splits.values())) == len(ROWS)


def test_the_seed_decides_the_splits_and_the_order_of_the_rows_does_not(tmp_path):
    test = texts(read(tmp_path / "one.jsonl", ROWS).splits["test"])
    assert texts(read(tmp_path / "two.jsonl", ROWS[::-1]).splits["test"]) == test
    assert texts(read(tmp_path / "one.jsonl", ROWS, split_seed=1).splits["test"]) != test


def test_duplicates_stay_in_one_split_and_the_fractions_hold(tmp_path):
    found = read(tmp_path / "rows.jsonl", [row for row in ROWS for _ in range(5)])
    assert found.duplicates == dict.fromkeys(SPLITS, 0)
    assert [len(found.splits[name]) for name in SPLITS] == [140, 20, 40]


def test_given_splits_lose_the_texts_of_later_ones(tmp_path):
    arguments = ExampleArguments(
        dataset=[write_rows(tmp_path / "train.jsonl", ROWS)],
        validation_dataset=[write_rows(tmp_path / "validation.jsonl", ROWS[:6])],
        test_dataset=[write_rows(tmp_path / "test.jsonl", [{**ROWS[0], "text": f" {ROWS[0]['text']}\n"}, *ROWS[4:10]])],
    )
    found = read_examples(arguments)
    assert found.duplicates == {"train": 10, "validation": 3, "test": 0}
    assert [len(found.splits[name]) for name in SPLITS] == [30, 3, 7]


def test_undersampling(tmp_path):
    rows = [{"text": f"text {number}", "label": "rare" if number % 10 == 0 else "common"} for number in range(100)]
    found = read(tmp_path / "rows.jsonl", rows, balance="undersample")
    assert found.undersampled == 80
    assert Counter(example.label for split in found.splits.values() for example in split) == {"rare": 10, "common": 10}


def test_class_weights_balance_the_classes():
    labels = np.eye(3)[[0, 0, 0, 0, 1, 1, 2, 2]]
    weights = class_weights(labels)
    np.testing.assert_allclose(weights, [8 / 12, 8 / 6, 8 / 6])  # N / (C x count)
    np.testing.assert_allclose(
        class_weights(np.eye(4)[[0, 0, 2]]), [3 / 8, 3 / 4, 3 / 4, 3 / 4]
    )  # absent classes as one example
    np.testing.assert_allclose((labels @ weights).mean(), 1)
    np.testing.assert_allclose((labels * weights).sum(0), 8 / 3)


def test_labels_that_are_numbers_are_sorted_as_numbers(tmp_path):
    rows = [{"text": f"text {number}", "label": number % 11} for number in range(110)]
    found = read(tmp_path / "rows.jsonl", rows)
    assert found.names == [str(number) for number in range(11)]
    np.testing.assert_array_equal(as_numbers(found.splits["test"][:1], found.names, "single_label_classification").sum(), 1)


def test_several_labels_per_text(tmp_path):
    lists = [{"text": f"text {n}", "label": [name for name, k in (("two", 2), ("three", 3)) if n % k == 0]} for n in range(40)]
    columns = [{"text": f"text {n}", "three": int(n % 3 == 0), "two": n % 2 == 0} for n in range(40)]
    by_lists = read(tmp_path / "lists.jsonl", lists, problem_type=MULTI)
    by_columns = read(tmp_path / "rows.csv", columns, problem_type=MULTI, label_column=["three", "two"])
    assert by_lists.names == by_columns.names == ["three", "two"]
    for name in SPLITS:
        one, two = (as_numbers(found.splits[name], found.names, MULTI) for found in (by_lists, by_columns))
        np.testing.assert_array_equal(one, two)
        numbers = [int(example.text.split()[1]) for example in by_lists.splits[name]]
        np.testing.assert_array_equal(one, [[n % 3 == 0, n % 2 == 0] for n in numbers])


@pytest.mark.parametrize("flag", [int, bool, float])
def test_multi_hot_lists(tmp_path, flag):
    """As transformers' loss takes them: the labels are the positions. Lists of the names 0, 1 and 2 stay lists of names."""
    bits = [[n % 2 == 0, n % 3 == 0, n % 5 == 0] for n in range(40)]
    rows = [{"text": f"text {n}", "label": [flag(bit) for bit in row]} for n, row in enumerate(bits)]
    named = [{"text": f"text {n}", "label": [index for index in range(3) if row[index]]} for n, row in enumerate(bits)]
    found = read(tmp_path / "rows.jsonl", rows, problem_type=MULTI)
    assert found.names == ["0", "1", "2"]
    assert found == read(tmp_path / "named.jsonl", named, problem_type=MULTI)
    rows[5]["label"] += [flag(1)]
    with pytest.raises(UserError, match="--label_column has lists of 0 and 1 with 3 to 4 values: use one length"):
        read(tmp_path / "rows.jsonl", rows, problem_type=MULTI)


def test_texts_in_two_columns_and_labels_that_other_programs_write_as_floats(tmp_path):
    rows = [{"title": f"text {n}" if n % 4 else None, "body": f"body {n}", "label": float(n % 2)} for n in range(40)]
    files = tmp_path / "rows.ndjson.gz"
    files.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    arguments = ExampleArguments(dataset=[str(files)], text_column=["title", "body"])
    check_examples(arguments)
    found = read_examples(arguments)
    assert found.names == ["0", "1"]
    assert {"text 1\nbody 1", "body 4"} <= set().union(*(texts(split) for split in found.splits.values()))
    columns = [{"text": f"text {n}", "a": str(float(n % 2)), "b": float(n % 3 == 0)} for n in range(40)]
    flags = read(tmp_path / "flags.csv", columns, problem_type=MULTI, label_column=["a", "b"])
    assert flags == read(tmp_path / "flags.jsonl", columns, problem_type=MULTI, label_column=["a", "b"])


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_whole_numbers_with_a_fraction_of_zero(tmp_path, name):
    """As pandas writes them if a value was missing once; but not versions."""
    rows = [{"text": f"text {n}", "label": f"{n % 4}.0"} for n in range(40)]
    assert read(tmp_path / name, rows).names == ["0", "1", "2", "3"]
    mixed = [
        write_rows(tmp_path / f"{n}.jsonl", [{"text": f"{n} {m}", "label": label} for m, label in enumerate(labels * 5)])
        for n, labels in enumerate((["1.0", "2.0"], ["2.0", "other"]))
    ]
    assert read_examples(ExampleArguments(dataset=mixed)).names == ["1", "2.0", "other"]
    versions = [{"text": f"text {n}", "label": ("2.0", "2.0.1")[n % 2]} for n in range(40)]
    assert read(tmp_path / name, versions).names == ["2.0", "2.0.1"]


@pytest.mark.parametrize(("yes", "no"), [("TRUE", "FALSE"), ("true", "false")])
def test_columns_of_flags_of_other_programs(tmp_path, yes, no):
    rows = [{"text": f"text {n}", "a": (yes, no)[n % 2], "b": (yes, no)[n // 2 % 2]} for n in range(40)]
    split = read(tmp_path / "rows.csv", rows, problem_type=MULTI, label_column=["a", "b"]).splits["train"]
    assert {example.label for example in split} == {("a", "b"), ("a",), ("b",), ()}


def test_a_spreadsheet_of_the_mac(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b'text,label\r"text, 0",a\rtext 1,b\r"text\r2",a\rtext 3,b\rtext 4,a\rtext 5,b')
    found = read_examples(ExampleArguments(dataset=[str(tmp_path / "rows.csv")], validation_fraction=0.3, test_fraction=0.3))
    assert set().union(*(texts(split) for split in found.splits.values())) == {"text, 0", "text\r2"} | {
        f"text {n}" for n in (1, 3, 4, 5)
    }


def test_a_carriage_return_in_a_tsv_is_part_of_a_text(tmp_path):
    (tmp_path / "rows.tsv").write_bytes(
        b"text\tlabel\n" + b"".join(b"a\rb %d\t%s\n" % (n, b"xy"[n % 2 : n % 2 + 1]) for n in range(40))
    )
    with pytest.raises(UserError, match="line 2 is not CSV"):
        read_examples(ExampleArguments(dataset=[str(tmp_path / "rows.tsv")]))
    mac = (tmp_path / "rows.tsv").read_bytes().replace(b"a\rb", b"ab").replace(b"\n", b"\r")
    (tmp_path / "mac.tsv").write_bytes(mac)
    assert read_examples(ExampleArguments(dataset=[str(tmp_path / "mac.tsv")])).names == ["x", "y"]


def test_quotes_in_a_tsv_of_pandas(tmp_path):
    """It quotes a text that has quotes, and doubles these; other quotes are those of the text."""
    values = ['say "hi"', '"a" and "b"', '"hi" she said', "it's", '"', '""']
    table = pd.DataFrame([{"text": f"{value}{n}{value}", "label": "ab"[n % 2]} for n, value in enumerate(values * 5)])
    table.to_csv(tmp_path / "rows.tsv", sep="\t", index=False)
    found = read_examples(ExampleArguments(dataset=[str(tmp_path / "rows.tsv")]))
    assert set().union(*(texts(split) for split in found.splits.values())) == {*table["text"]}


def test_numbers_to_predict(tmp_path):
    rows = [{"text": f"text {n}", "stars": n / 4, "likes": n} for n in range(40)]
    found = read(tmp_path / "rows.csv", rows, problem_type=REGRESSION, label_column=["stars", "likes"])
    numbers = as_numbers(found.splits["train"], found.names, REGRESSION)
    np.testing.assert_array_equal(numbers[:, 1], 4 * numbers[:, 0])
    assert len(numbers) == 28


def test_a_hub_dataset_has_its_own_splits_and_label_names(monkeypatch):
    features = Features({"sentence": Value("string"), "feeling": ClassLabel(names=["sad", "glad"])})
    parts = {
        name: Dataset.from_dict({"sentence": [f"{name} {n}" for n in range(10)], "feeling": [0, 1] * 5}, features=features)
        for name in ("train", "validation", "unsupervised")
    }
    # Labels that are not published are -1: such a split is ignored.
    parts["test"] = Dataset.from_dict({"sentence": ["a", "b"], "feeling": [-1, -1]}, features=features)
    monkeypatch.setattr(training.data.sources, "load_dataset", lambda *_: DatasetDict(parts))
    arguments = ExampleArguments(dataset=["someone/feelings"], text_column=["sentence"], label_column=["feeling"])
    found = read_examples(arguments)
    assert found.names == ["glad", "sad"]
    assert texts(found.splits["validation"]) == {f"validation {n}" for n in range(10)}
    assert [len(found.splits[name]) for name in SPLITS] == [8, 10, 2]
    with pytest.raises(UserError, match="someone/feelings has no 'text'; it has sentence, feeling. Set --text_column"):
        read_examples(replace(arguments, text_column=["text"]))


def test_a_clone_has_the_label_names_of_its_dataset(tmp_path):
    """They are in the Parquet files; labels that are not published are -1."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["sad", "glad"])})
    for split, labels in {"train": [0, 1] * 10, "validation": [1, 0], "test": [-1, -1]}.items():
        rows = {"text": [f"{split} {n}" for n in range(len(labels))], "label": labels}
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(path)
    found = read_examples(ExampleArguments(dataset=[str(tmp_path)]))
    assert found.names == ["glad", "sad"]
    assert [len(found.splits[name]) for name in SPLITS] == [16, 2, 4]
    stars = read_examples(ExampleArguments(dataset=[str(tmp_path)], problem_type=REGRESSION))
    assert {example.label for example in stars.splits["train"]} == {(0.0,), (1.0,)}
    path = tmp_path / "data" / "validation-00000-of-00001.parquet"
    Dataset.from_dict({"text": ["a", "b"], "label": [-1, 1]}, features=features).to_parquet(path)
    with pytest.raises(UserError, match="row 1 has no label under 'label' but None"):  # only a test split is ignored
        read_examples(ExampleArguments(dataset=[str(tmp_path)]))
    path.write_bytes(b"PAR1 damaged")
    with pytest.raises(UserError, match="validation-00000-of-00001.parquet: not a Parquet file"):
        read_examples(ExampleArguments(dataset=[str(tmp_path)]))


def test_docstrings_of_a_module_stay_in_one_split(monkeypatch):
    rows = [
        {"library": library, "module": f"{library}.{n // 10}", "signature": "", "docstring": f"What {library} says on {n}."}
        for library in ("numpy", "torch")
        for n in range(200)
    ]
    rows += [{**rows[0], "docstring": "What both say."}, {**rows[-1], "docstring": "What both say."}]
    monkeypatch.setattr(training.data.examples, "read_docstrings", lambda: Dataset.from_list(rows))
    found = read_examples(ExampleArguments())
    assert "What both say." not in set().union(*(texts(split) for split in found.splits.values()))
    groups = [{example.group for example in found.splits[name]} for name in SPLITS]
    assert not (groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2])
    assert [len(found.splits[name]) for name in SPLITS] == [280, 40, 80]


def rows_with(**changes) -> list[dict]:
    return [*ROWS[:5], {**ROWS[5], **changes}]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{**row, "label": "same"} for row in ROWS], {}, "every example of the training split has the label 'same'"),
        (rows_with(text="  "), {}, "rows.jsonl: line 6 has an empty text under 'text': leave this row out"),
        (rows_with(text=None), {}, "line 6 has an empty text"),
        ([*rows_with(text=""), {**ROWS[6], "text": ""}], {}, "line 6 has an empty text .*, and so have 1 more rows"),
        (rows_with(label=None), {}, "line 6 has no label under 'label' but None"),
        (rows_with(label=" "), {}, "line 6 has no label under 'label' but ' '"),
        (rows_with(label=0.5), {}, "line 6 has the number 0.5 under 'label': use names, or --problem_type regression"),
        (rows_with(label="\ud800"), {}, "line 6 has half of a character"),
        (rows_with(label=["a"]), {}, "line 6 has a list under 'label'.*--problem_type multi_label_classification"),
        (
            rows_with(label=float("nan"))[5:],
            {"problem_type": REGRESSION},
            "line 1 has no number under 'label' but nan: add one",
        ),
        (ROWS, {"text_column": ["body"]}, "line 1 has no 'body'; it has text, label. Set --text_column"),
        (ROWS, {"label_column": ["kind"]}, "line 1 has no 'kind'; it has text, label. Set --label_column"),
        (ROWS, {"problem_type": REGRESSION}, "line 1 has no number under 'label' but 'even'"),
        (rows_with(label=1e30)[5:], {"problem_type": REGRESSION}, r"1e\+30 under 'label', too large a number: scale them"),
        (rows_with(label=10**400)[5:], {"problem_type": REGRESSION}, "line 1 has no number under 'label' but 1000"),
        ([{**row, "label": []} for row in ROWS], {"problem_type": MULTI}, "no example of the training split has a label"),
        (ROWS, {"columns": ["text", "label"]}, "rows.jsonl has its own column names: leave out --columns"),
        (ROWS, {"problem_type": MULTI}, "line 1 has no list under 'label' but 'even'"),
        (ROWS[:3], {}, "the validation split is empty"),
        ([], {}, "has no examples"),
    ],
)
def test_invalid_rows_and_columns(tmp_path, rows, changes, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path / "rows.jsonl", rows, **changes)


def test_a_label_that_only_the_test_split_has(tmp_path):
    train = [{**row, "text": f"{row['text']}!"} for row in ROWS[:4] * 3]
    test = write_rows(tmp_path / "test.jsonl", [*ROWS[:5], {**ROWS[5], "label": "new"}])
    with pytest.raises(UserError, match="the test split has labels that the .* does not have: 'new'"):
        read(tmp_path / "train.jsonl", train, test_dataset=[test], validation_fraction=0.5)


def test_columns_are_named_once(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("text,label,label\na,b,c\n")
    with pytest.raises(UserError, match="rows.csv has two columns 'label': give each its own name"):
        check_examples(ExampleArguments(dataset=[str(table)]))
    table.write_text("text,label\n\na,b\n")
    check_examples(ExampleArguments(dataset=[str(table)]))  # an empty line is skipped
    with pytest.raises(UserError, match="line 1 has the names of the columns: leave out --columns"):
        check_examples(ExampleArguments(dataset=[str(table)], columns=["text", "label"]))


def test_a_table_that_begins_with_data_and_the_wrong_column(tmp_path):
    table = tmp_path / "rows.tsv"
    table.write_text("".join(f"{('even', 'odd')[n % 2]}\tThe number {n}\n" for n in range(40)))
    with pytest.raises(UserError, match="Set --text_column, or, if these are not names but the first row, .* with --columns"):
        check_examples(ExampleArguments(dataset=[str(table)]))
    with pytest.raises(UserError, match="--label_column has 40 different labels for 40 texts, such as 'The number 0'"):
        read_examples(ExampleArguments(dataset=[str(table)], columns=["text", "label"]))


def test_odd_numbers_as_labels(tmp_path):
    rows = [{"text": f"text {n}", "label": ("--5", "3", "²")[n % 3]} for n in range(60)]
    assert read(tmp_path / "rows.jsonl", rows).names == ["--5", "3", "²"]


def test_numbers_in_a_csv_are_not_label_names(tmp_path):
    rows = [{"text": f"text {n}", "label": n / 4} for n in range(40)]
    with pytest.raises(UserError, match=r"--label_column has numbers such as 0\.25: use names, or --problem_type"):
        read(tmp_path / "rows.csv", rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_fraction": 0.0}, "--validation_fraction 0 leaves nothing to validate with"),
        ({"test_fraction": 0.95}, "--validation_fraction 0.1 and --test_fraction 0.95 leave nothing to train on"),
        ({"label_column": []}, "--label_column is empty"),
        ({"label_column": ["text"]}, "--label_column text and --text_column must be different columns"),
        ({"label_column": ["a", "b"]}, "several columns are for --problem_type multi_label_classification or regression"),
        ({"balance": "weights", "problem_type": MULTI}, "--balance weights is for one label per text"),
        ({"dataset": []}, "--dataset is empty"),
        ({"dataset": ["docs", "x.csv"]}, "--dataset docs is split by modules and cannot be combined"),
        ({"problem_type": REGRESSION}, "--dataset docs has one label per text"),
        ({"dataset": ["missing.csv"]}, "missing.csv: no such file or directory"),
    ],
)
def test_invalid_arguments_are_rejected_before_anything_is_read(changes, message):
    with pytest.raises(UserError, match=message):
        check_examples(replace(ExampleArguments(), **changes))
