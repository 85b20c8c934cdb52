"""Labelled texts for classification: reading, balancing and splitting, without duplicates between the splits.

Notable:
- A label is the text in its column, and a name in the model's `id2label`. Several columns, or lists, are several labels; with
  `regression` the columns are numbers. Lists of 0 and 1 that all have one length are multi-hot: the labels are "0", "1", ...
- Texts in several columns are joined by line ends, since a GPT has no token between the two texts of a pair.
- Duplicates of a text stay in one split, and so do the built-in docstrings of a module. The splits are stratified by label.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel
from sklearn.preprocessing import MultiLabelBinarizer

from training.cli import option
from training.data.docstrings import DOCSTRINGS_PER_LIBRARY, read_docstrings
from training.data.encoding import encoding_of
from training.data.files import (
    TABLE_ENDINGS,
    Rows,
    check_columns,
    get_text,
    join_texts,
    number_rows,
    read_rows,
    refuse_empty,
    stored_features,
)
from training.data.sources import find_splits, hub_splits, is_dataset
from training.data.splits import SPLITS, SplitArguments, Splits, check_splits, read_given, sample_per_class, split_items
from training.errors import UserError

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"  # transformers' names
LARGEST = 1e6  # of the numbers to predict, so that squared errors stay finite
INTEGER = re.compile(r"-?[0-9]+(\.0)?")
MIN_EXAMPLES = 20  # from which on there should be several examples per label


@dataclass
class ExampleArguments(SplitArguments):
    dataset: list[str] = option(
        ["docs"],
        "`docs` (docstrings labelled by their library); .csv, .tsv, .json, .jsonl and .parquet files, directories and globs of "
        "them; ids of datasets on the Hub",
    )
    text_column: list[str] = option(["text"], "column with the text; several columns are joined by line ends")
    label_column: list[str] = option(["label"], "column with the label or number; several columns for several labels (0 or 1)")
    columns: list[str] = option([], "column names of .csv and .tsv files without a header")
    problem_type: str = option(SINGLE, "one label, several labels or numbers per text", choices=[SINGLE, MULTI, REGRESSION])
    balance: str = option(
        "none",
        "class balance. undersample: drop examples of all labels but the rarest; weights: weight the loss by inverse class "
        "frequency; or none",
        choices=["none", "undersample", "weights"],
    )


@dataclass(frozen=True)
class Example:
    """A text and its target: a label, several labels, or numbers."""

    text: str
    label: Any  # str, tuple[str, ...] or tuple[float, ...], by the problem type
    group: str  # a group stays in one split

    @property
    def labels(self) -> tuple[str, ...]:
        """One label or several."""
        return (self.label,) if isinstance(self.label, str) else self.label


@dataclass(frozen=True)
class Examples:
    """The splits of a run."""

    splits: Splits[Example]  # the test split may be empty
    names: list[str]  # of the labels, or of the columns of numbers, in the order of their ids
    duplicates: dict[str, int]  # examples dropped from each split because their text is also in a later one
    undersampled: int  # examples dropped by undersampling

    def digest(self) -> str:
        """SHA-256 of all texts, labels and label names."""
        content = hashlib.sha256(repr(self.names).encode())
        for name, split in self.splits.items():
            content.update(repr([name, *((example.text, example.label) for example in split)]).encode())
        return content.hexdigest()


def check_examples(arguments: ExampleArguments) -> None:
    """Validate the arguments and the first row of every file before any long work, without network access."""
    paths, kind, columns = check_splits(arguments, TABLE_ENDINGS), arguments.problem_type, arguments.label_column
    names = " ".join(columns)
    if not columns:
        raise UserError("--label_column is empty: pass the column with the labels.")
    if not arguments.text_column or len({*arguments.text_column, *columns}) < len(arguments.text_column) + len(columns):
        raise UserError(f"--label_column {names} and --text_column must be different columns.")
    if len(columns) > 1 and kind == SINGLE:
        raise UserError(f"--label_column {names}: several columns are for --problem_type {MULTI} or {REGRESSION}.")
    if arguments.balance != "none" and kind != SINGLE:
        raise UserError(f"--balance {arguments.balance} is for one label per text: leave it out with {kind}.")
    if "docs" in arguments.dataset and kind != SINGLE:
        raise UserError(f"--dataset docs has one label per text: it is not for --problem_type {kind}.")
    for path in paths:
        next(read_rows(path, _columns(arguments), encoding_of(arguments), arguments.columns), None)


def read_examples(arguments: ExampleArguments) -> Examples:
    """Read, balance and split the examples of a run.

    Raises:
        UserError: a source cannot be read; a text is empty; a label is invalid; there is only one label, or one that is not in
            the training split; a split would be empty.
    """
    given = read_given(arguments, lambda source: _read_source(source, arguments))
    is_single = arguments.problem_type == SINGLE
    if is_single:
        given = _name_integers(given)
        _check_names(given["train"])
    train = given["train"]
    if arguments.balance == "undersample":
        rarest = min(Counter(example.label for example in train).values())
        given["train"] = _sample_per_label(train, rarest, arguments.split_seed)
    splits, duplicates = split_items(
        given, arguments, key=lambda it: it.text.strip(), stratum=lambda it: it.label if is_single else None
    )
    return Examples(splits, _label_names(splits, arguments), duplicates, len(train) - len(given["train"]))


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Weights (C,) of one-hot labels (N, C) by inverse class frequency, 1 on average over the examples (King and Zeng, 2001).

    A class without examples gets the weight of one with a single example.
    """
    return len(labels) / (labels.shape[1] * np.maximum(labels.sum(0, dtype=np.float64), 1))


def as_numbers(examples: list[Example], names: list[str], problem_type: str) -> np.ndarray:
    """Targets as float32 (N, C): one-hot or multi-hot labels, or the numbers."""
    if problem_type == REGRESSION:
        return np.array([example.label for example in examples], dtype=np.float32).reshape(-1, len(names))
    return MultiLabelBinarizer(classes=names).fit_transform([example.labels for example in examples]).astype(np.float32)


def _columns(arguments: ExampleArguments) -> dict[str, str]:
    return {**dict.fromkeys(arguments.text_column, "text_column"), **dict.fromkeys(arguments.label_column, "label_column")}


def _read_source(source: str, arguments: ExampleArguments) -> Splits[Example]:
    if source == "docs":
        return {"train": _docstrings()}
    if is_dataset(source):
        splits = _hub_rows(source, arguments)
    else:
        files = find_splits(source, TABLE_ENDINGS)
        rows = partial(_file_rows, arguments=arguments)
        splits = {name: chain.from_iterable(map(partial(rows, split=name), paths)) for name, paths in files.items()}
    return {name: _examples(rows, arguments) for name, rows in splits.items()}


def _docstrings() -> list[Example]:
    """Docstrings labelled by their library, without those that several libraries share."""
    libraries = defaultdict(set)
    entries = read_docstrings()
    for entry in entries:
        libraries[entry["docstring"]].add(entry["library"])
    firsts = (entry for entry in entries if len(libraries.pop(entry["docstring"], ())) == 1)
    examples = [Example(entry["docstring"], entry["library"], entry["module"]) for entry in firsts]
    return _sample_per_label(examples, DOCSTRINGS_PER_LIBRARY, 0)


def _hub_rows(source: str, arguments: ExampleArguments) -> dict[str, Rows]:
    splits = hub_splits(source)
    for rows in splits.values():
        check_columns(source, _columns(arguments), rows.column_names)
    found = {}
    for name, rows in splits.items():
        numbered = number_rows(rows.select_columns([*_columns(arguments)]), f"{source}: {name} row")
        found[name] = _with_label_names(numbered, name, rows.features, arguments)
    return found


def _file_rows(path: Path, split: str, arguments: ExampleArguments) -> Rows:
    rows = read_rows(path, _columns(arguments), encoding_of(arguments), arguments.columns)
    return _with_label_names(rows, split, stored_features(path), arguments)


def _with_label_names(rows: Rows, split: str, features: dict[str, Any], arguments: ExampleArguments) -> Rows:
    """Yield rows in which the ids of a `ClassLabel` column, or of lists of them, are replaced by their names."""
    if arguments.problem_type == REGRESSION or len(arguments.label_column) > 1:  # takes numbers
        features = {}
    classes = {name: getattr(features[name], "feature", features[name]) for name in arguments.label_column if name in features}
    classes = {column: feature for column, feature in classes.items() if isinstance(feature, ClassLabel)}
    for index, (location, row) in enumerate(rows):
        if index == 0 and split == "test" and any(row[column] == -1 for column in classes):
            return  # by convention these labels are not published: such a test split is useless
        for column, feature in classes.items():
            row[column] = _class_name(row[column], feature)
        yield location, row


def _class_name(value: Any, feature: ClassLabel) -> Any:
    if isinstance(value, list):
        return [_class_name(item, feature) for item in value]
    if value in (-1, None):
        return None
    return feature.int2str(value) if value in range(feature.num_classes) else value


def _examples(rows: Rows, arguments: ExampleArguments) -> list[Example]:
    read = {SINGLE: _read_label, MULTI: _read_labels, REGRESSION: _read_numbers}[arguments.problem_type]
    examples, empty = [], []
    for location, row in rows:
        text = join_texts(row, arguments.text_column, location, arguments.encoding_errors)
        if text.strip():
            values = {column: row[column] for column in arguments.label_column}
            examples.append(Example(text, read(values, location), text.strip()))
        else:
            empty.append(location)
    refuse_empty(empty, f"text under {' and '.join(map(repr, arguments.text_column))}")
    return _name_multi_hot(examples) if arguments.problem_type == MULTI and len(arguments.label_column) == 1 else examples


def _name_integers(splits: Splits[Example]) -> Splits[Example]:
    """Drop the fraction .0, which pandas writes if a value was missing once, if all labels are whole numbers."""
    if not all(INTEGER.fullmatch(it.label) for split in splits.values() for it in split):
        return splits
    return {name: [replace(it, label=it.label.removesuffix(".0")) for it in split] for name, split in splits.items()}


def _as_integer(value: Any) -> Any:
    """A label without the fraction .0, which other programs write, in particular for 0 and 1."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip()[0] if isinstance(value, str) and value.strip() in ("0.0", "1.0") else value


def _name_multi_hot(examples: list[Example]) -> list[Example]:
    """Replace multi-hot lists by the positions of their ones; in other lists, a label that is repeated counts once."""
    lengths, values = {len(it.label) for it in examples}, {value for it in examples for value in it.label}
    if values <= {"0", "1", "True", "False"} and any(len({*it.label}) < len(it.label) for it in examples):
        if len(lengths) > 1:
            found = f"{min(lengths)} to {max(lengths)} values"
            raise UserError(f"--label_column has lists of 0 and 1 with {found}: use one length.")
    elif lengths != {2} or values not in ({"0", "1"}, {"True", "False"}):
        return [replace(it, label=tuple(dict.fromkeys(it.label))) for it in examples]
    ones = ([str(index) for index, value in enumerate(it.label) if value in ("1", "True")] for it in examples)
    return [replace(it, label=tuple(names)) for it, names in zip(examples, ones, strict=True)]


def _read_label(values: dict[str, Any], location: str) -> str:
    ((column, value),) = values.items()
    if isinstance(value, list):
        raise UserError(f"{location} has a list under {column!r}: several labels per text are for --problem_type {MULTI}.")
    if isinstance(value, float) and not value.is_integer():
        raise UserError(f"{location} has the number {value} under {column!r}: use names, or --problem_type {REGRESSION}.")
    return _label_name(value, column, location)


def _label_name(value: Any, column: str, location: str) -> str:
    value = _as_integer(value)
    if not isinstance(value, str | int) or not str(value).strip():
        raise UserError(f"{location} has no label under {column!r} but {value!r:.80}: add one, or leave this row out.")
    if isinstance(value, str):
        get_text({column: value}, column, location)  # must be valid Unicode
    return str(value).strip()


def _read_labels(values: dict[str, Any], location: str) -> tuple[str, ...]:
    if len(values) > 1:
        values = {column: _as_integer(value) for column, value in values.items()}
        for column, value in values.items():
            if str(value).capitalize() not in ("0", "1", "True", "False"):
                raise UserError(f"{location} has {value!r} under {column!r}: with several label columns each must be 0 or 1.")
        return tuple(column for column, value in values.items() if str(value).capitalize() in ("1", "True"))
    ((column, value),) = values.items()
    if not isinstance(value, list):
        advice = "use lists (in .jsonl or .parquet), or several columns of 0 and 1 as --label_column"
        raise UserError(f"{location} has no list under {column!r} but {value!r}: {advice}.")
    return tuple(_label_name(item, column, location) for item in value)


def _read_numbers(values: dict[str, Any], location: str) -> tuple[float, ...]:
    numbers = []
    for column, value in values.items():
        if (number := _as_number(value)) is None:
            raise UserError(f"{location} has no number under {column!r} but {value!r:.80}: add one, or leave this row out.")
        if not abs(number) < LARGEST:
            raise UserError(f"{location} has {value!r:.80} under {column!r}, too large a number: scale them to about 1.")
        numbers.append(number)
    return tuple(numbers)


def _as_number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) or math.isnan(number := float(value)) else number
    except (TypeError, ValueError, OverflowError):
        return None


def _check_names(examples: list[Example]) -> None:
    """Reject a label column of fractional numbers, which CSV files have as text, and one of mostly unique values."""
    labels = dict.fromkeys(example.label for example in examples)
    fractions = [label for label in labels if (_as_number(label) or 0) % 1]
    if fractions and all(_as_number(label) is not None for label in labels):
        raise UserError(f"--label_column has numbers such as {fractions[0]}: use names, or --problem_type {REGRESSION}.")
    if len(examples) >= MIN_EXAMPLES and len(labels) > len(examples) / 2:
        found = f"{len(labels):,} different labels for {len(examples):,} texts, such as {next(iter(labels))!r:.80}"
        raise UserError(f"--label_column has {found}: pass the right column (and --text_column).")


def _sample_per_label(examples: list[Example], count: int, seed: int) -> list[Example]:
    texts, labels = [example.text for example in examples], [example.label for example in examples]
    return [examples[index] for index in sample_per_class(texts, labels, count, seed, "balance")]


def _label_names(splits: dict[str, list[Example]], arguments: ExampleArguments) -> list[str]:
    """The labels of the training split, sorted; the other splits must not have more."""
    if arguments.problem_type == REGRESSION:
        for name in SPLITS[1:]:
            if len(splits[name]) == 1:
                raise UserError(f"the {name} split has a single example, too few for regression metrics: pass more.")
        return arguments.label_column
    found = {name: dict.fromkeys(chain.from_iterable(it.labels for it in split)) for name, split in splits.items()}
    numbers = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in found["train"])
    names = sorted(found["train"], key=lambda name: (int(name), name) if numbers else name)
    if len(names) < 2 and arguments.problem_type == SINGLE:
        raise UserError(f"every example of the training split has the label {names[0]!r:.80}: there must be at least two.")
    if not names:
        raise UserError("no example of the training split has a label.")
    if len(arguments.label_column) > 1:
        return arguments.label_column
    for name in SPLITS[1:]:
        if unseen := [label for label in found[name] if label not in found["train"]]:
            few = ", ".join(map(repr, unseen[:5]))[:200]
            raise UserError(f"the {name} split has labels that the training split does not have: {few}. Add examples of them.")
    return names
