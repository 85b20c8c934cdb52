"""Labelled texts for classification: reading, balancing and splitting, without duplicates between the splits.

Notable:
- A label is the text in its column, and a name in the model's `id2label`. Several columns, or lists, are several labels; with
  `regression` the columns are numbers.
- Duplicates of a text stay in one split, and so do the built-in docstrings of a module. The splits are stratified by label.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Sequence
from sklearn.utils.class_weight import compute_class_weight

from training.cli import option
from training.data.docstrings import DOCSTRINGS_PER_LIBRARY, read_docstrings
from training.data.files import TABLE_ENDINGS, check_columns, find_files, get_text, read_rows, refuse_empty
from training.data.sources import hub_splits, is_dataset_id
from training.data.splits import (
    SplitArguments,
    check_splits,
    drop_leakage,
    fill_missing_splits,
    read_given,
    refuse_empty_splits,
    sample_per_class,
)
from training.errors import UserError

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"  # transformers' names
LARGEST = 1e6  # of the numbers to predict, so that squared errors stay finite
MIN_EXAMPLES = 20  # from which on there should be several examples per label


@dataclass
class ExampleArguments(SplitArguments):
    """Arguments about the labelled examples of a run."""

    dataset: list[str] = option(
        ["docs"],
        "`docs` (docstrings labelled by their library); .csv, .tsv, .jsonl and .parquet files, directories and globs of them; "
        "ids of datasets on the Hub",
    )
    text_column: str = option("text", "column with the text")
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


@dataclass(frozen=True)
class Examples:
    """The splits of a run.

    Attributes:
        splits: train, validation and test; the last may be empty.
        names: of the labels, or of the columns of numbers, in the order of their ids.
        duplicates: number of examples dropped from each split because their text is also in a later one.
        undersampled: number of examples dropped by undersampling.
    """

    splits: dict[str, list[Example]]
    names: list[str]
    duplicates: dict[str, int]
    undersampled: int

    def digest(self) -> str:
        """SHA-256 of all texts, labels and label names."""
        content = hashlib.sha256(repr(self.names).encode())
        for name, split in self.splits.items():
            content.update(repr([name, *((example.text, example.label) for example in split)]).encode())
        return content.hexdigest()


def check_examples(arguments: ExampleArguments) -> None:
    """Validate the arguments and the first row of every file before any long work, without network access.

    Raises:
        UserError: an invalid combination of arguments, or a source that cannot be read.
    """
    paths = check_splits(arguments, TABLE_ENDINGS)
    if not arguments.label_column:
        raise UserError("--label_column is empty: pass the column with the labels.")
    if len(set(arguments.label_column)) < len(arguments.label_column) or arguments.text_column in arguments.label_column:
        raise UserError(f"--label_column {' '.join(arguments.label_column)} and --text_column must be different columns.")
    if len(arguments.label_column) > 1 and arguments.problem_type == SINGLE:
        names = " ".join(arguments.label_column)
        raise UserError(f"--label_column {names}: several columns are for --problem_type {MULTI} or {REGRESSION}.")
    if arguments.balance != "none" and arguments.problem_type != SINGLE:
        raise UserError(f"--balance {arguments.balance} is for one label per text: leave it out with {arguments.problem_type}.")
    if "docs" in arguments.dataset and arguments.problem_type != SINGLE:
        raise UserError(f"--dataset docs has one label per text: it is not for --problem_type {arguments.problem_type}.")
    for path in paths:
        next(read_rows(path, _columns(arguments), arguments.encoding_errors, arguments.columns), None)


def read_examples(arguments: ExampleArguments, seed: int) -> Examples:
    """Read, balance and split the examples of a run.

    Raises:
        UserError: a source cannot be read; a text is empty; a label is invalid; there is only one label, or one that is not in
            the training split; a split would be empty.
    """
    given = read_given(arguments, lambda source: _read_source(source, arguments))
    train = given["train"]
    if arguments.problem_type == SINGLE:
        _check_names(train)
    if arguments.balance == "undersample":
        given["train"] = _sample_per_label(train, min(Counter(example.label for example in train).values()), seed)
    filled = fill_missing_splits(
        given, arguments, seed, lambda it: it.group, lambda it: it.label if arguments.problem_type == SINGLE else None
    )
    splits, duplicates = drop_leakage(filled, lambda it: it.text.strip())
    return Examples(splits, _label_names(splits, arguments), duplicates, len(train) - len(given["train"]))


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Weights (C,) by inverse class frequency, 1 on average over the examples (King and Zeng, 2001).

    Args:
        labels: one-hot (N, C). A class without examples gets the weight of one with a single example.
    """
    classes, num_classes = labels.argmax(1), labels.shape[1]
    present = np.unique(classes)
    weights = np.full(num_classes, len(labels) / num_classes)
    # scikit-learn knows only the classes that have examples.
    weights[present] = compute_class_weight("balanced", classes=present, y=classes) * len(present) / num_classes
    return weights


def as_numbers(examples: list[Example], names: list[str], problem_type: str) -> np.ndarray:
    """Targets as float32 (N, C): one-hot or multi-hot labels, or the numbers."""
    if problem_type == REGRESSION:
        return np.array([example.label for example in examples], dtype=np.float32).reshape(-1, len(names))
    ids = {name: index for index, name in enumerate(names)}
    numbers = np.zeros((len(examples), len(names)), dtype=np.float32)
    for row, example in enumerate(examples):
        for name in [example.label] if problem_type == SINGLE else example.label:
            numbers[row, ids[name]] = 1
    return numbers


# Sources ------------------------------------------------------------------------------------------------------------


def _columns(arguments: ExampleArguments) -> dict[str, str]:
    return {arguments.text_column: "text_column", **dict.fromkeys(arguments.label_column, "label_column")}


def _read_source(source: str, arguments: ExampleArguments) -> dict[str, list[Example]]:
    """The splits of a source; a source without splits is `train` as a whole."""
    if source == "docs":
        return {"train": _docstrings()}
    if is_dataset_id(source):
        splits = _hub_rows(source, arguments)
    else:
        options = _columns(arguments), arguments.encoding_errors, arguments.columns
        splits = {"train": (row for path in find_files(source, TABLE_ENDINGS) for row in read_rows(path, *options))}
    return {name: _examples(rows, arguments) for name, rows in splits.items()}


def _docstrings() -> list[Example]:
    """Docstrings labelled by their library, without those that several libraries share."""
    libraries = defaultdict(set)
    entries = read_docstrings()
    for entry in entries:
        libraries[entry["docstring"]].add(entry["library"])
    examples = [
        Example(entry["docstring"], entry["library"], entry["module"])
        for entry in entries
        if len(libraries.pop(entry["docstring"], ())) == 1
    ]
    return _sample_per_label(examples, DOCSTRINGS_PER_LIBRARY, 0)


def _hub_rows(source: str, arguments: ExampleArguments) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    splits = hub_splits(source)
    for rows in splits.values():
        check_columns(source, _columns(arguments), rows.column_names)
    # By convention -1 is a label that is not published: such a test split is useless.
    column = arguments.label_column[0]
    if "test" in splits and isinstance(splits["test"].features[column], ClassLabel) and -1 in splits["test"][:1][column]:
        del splits["test"]
    return {name: _with_label_names(rows, f"{source}: {name} row", arguments) for name, rows in splits.items()}


def _with_label_names(rows: Any, location: str, arguments: ExampleArguments) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows in which the ids of `ClassLabel` columns are replaced by their names."""
    names: dict[str, Callable[[Any], Any]] = {}
    for column in arguments.label_column:
        feature = rows.features[column]
        item = feature.feature if isinstance(feature, Sequence) else feature
        if isinstance(item, ClassLabel):
            names[column] = item.int2str
    for number, row in enumerate(rows.select_columns([arguments.text_column, *arguments.label_column]), start=1):
        for column, name in names.items():
            row[column] = None if row[column] in (-1, None) else name(row[column])
        yield f"{location} {number}", row


def _examples(rows: Iterable[tuple[str, dict[str, Any]]], arguments: ExampleArguments) -> list[Example]:
    read = {SINGLE: _read_label, MULTI: _read_labels, REGRESSION: _read_numbers}[arguments.problem_type]
    examples, empty = [], []
    for location, row in rows:
        text = get_text(row, arguments.text_column, location, arguments.encoding_errors)
        if text.strip():
            values = {column: row[column] for column in arguments.label_column}
            examples.append(Example(text, read(values, location), text.strip()))
        else:
            empty.append(location)
    refuse_empty(empty, f"text under {arguments.text_column!r}")
    return examples


def _read_label(values: dict[str, Any], location: str) -> str:
    ((column, value),) = values.items()
    if isinstance(value, list):
        raise UserError(f"{location} has a list under {column!r}: several labels per text are for --problem_type {MULTI}.")
    if isinstance(value, float):
        raise UserError(f"{location} has the number {value} under {column!r}: use names, or --problem_type {REGRESSION}.")
    return _label_name(value, column, location)


def _label_name(value: Any, column: str, location: str) -> str:
    if not isinstance(value, str | int) or not str(value).strip():
        raise UserError(f"{location} has no label under {column!r} but {value!r:.80}: add one, or leave this row out.")
    if isinstance(value, str):
        get_text({column: value}, column, location)  # must be valid Unicode
    return str(value).strip()


def _read_labels(values: dict[str, Any], location: str) -> tuple[str, ...]:
    if len(values) > 1:
        for column, value in values.items():
            if str(value) not in ("0", "1", "True", "False"):
                raise UserError(f"{location} has {value!r} under {column!r}: with several label columns each must be 0 or 1.")
        return tuple(column for column, value in values.items() if str(value) in ("1", "True"))
    ((column, value),) = values.items()
    if not isinstance(value, list):
        raise UserError(
            f"{location} has no list under {column!r} but {value!r}: use lists (in .jsonl or .parquet), or several columns of "
            "0 and 1 as --label_column."
        )
    return tuple(dict.fromkeys(_label_name(item, column, location) for item in value))


def _read_numbers(values: dict[str, Any], location: str) -> tuple[float, ...]:
    numbers = []
    for column, value in values.items():
        number = _as_number(value)
        if number is None:
            raise UserError(f"{location} has no number under {column!r} but {value!r:.80}: add one, or leave this row out.")
        if not abs(number) < LARGEST:
            raise UserError(f"{location} has {value!r:.80} under {column!r}, too large a number: scale them to about 1.")
        numbers.append(number)
    return tuple(numbers)


def _as_number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _check_names(examples: list[Example]) -> None:
    """Reject a label column of fractional numbers, which CSV files have as text, and one of mostly unique values."""
    labels = dict.fromkeys(example.label for example in examples)
    fractions = [label for label in labels if (_as_number(label) or 0) % 1]
    if fractions and all(_as_number(label) is not None for label in labels):
        raise UserError(f"--label_column has numbers such as {fractions[0]}: use names, or --problem_type {REGRESSION}.")
    if len(examples) >= MIN_EXAMPLES and len(labels) > len(examples) / 2:
        raise UserError(
            f"--label_column has {len(labels):,} different labels for {len(examples):,} texts, such as "
            f"{next(iter(labels))!r:.80}: pass the right column (and --text_column)."
        )


def _sample_per_label(examples: list[Example], count: int, seed: int) -> list[Example]:
    """At most `count` pseudo-random examples of each label, in their order."""
    texts, labels = [example.text for example in examples], [example.label for example in examples]
    return [examples[index] for index in sample_per_class(texts, labels, count, seed, "balance")]


def _label_names(splits: dict[str, list[Example]], arguments: ExampleArguments) -> list[str]:
    """The labels of the training split, sorted; the other splits must not have more."""
    refuse_empty_splits(splits, arguments)
    for name, examples in splits.items():
        if len(examples) == 1 and name != "train" and arguments.problem_type == REGRESSION:
            raise UserError(f"the {name} split has a single example, too few for regression metrics: pass more.")
    if arguments.problem_type == REGRESSION:
        return arguments.label_column
    found = {name: dict.fromkeys(_labels(examples)) for name, examples in splits.items()}
    names = list(found["train"])
    numbers = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names)
    names.sort(key=lambda name: (int(name), name) if numbers else name)
    if len(names) < 2 and arguments.problem_type == SINGLE:
        raise UserError(
            f"every example of the training split has the label {names[0]!r:.80}: there must be two labels at least."
        )
    if not names:
        raise UserError("no example of the training split has a label.")
    if len(arguments.label_column) > 1:
        return arguments.label_column
    for name in ("validation", "test"):
        if unseen := [label for label in found[name] if label not in found["train"]]:
            few = ", ".join(map(repr, unseen[:5]))
            raise UserError(
                f"the {name} split has labels that the training split does not have: {few:.200}. Add examples of them."
            )
    return names


def _labels(examples: Iterable[Example]) -> Iterator[str]:
    for example in examples:
        yield from [example.label] if isinstance(example.label, str) else example.label
