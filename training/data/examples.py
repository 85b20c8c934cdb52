"""Texts with their labels, for classification: read, balanced, split, and free of copies between the splits.

Notable:
- A label is what its column says, as text: names go into the model's `id2label`. Several columns, or lists, are several labels
  a text; with `regression` columns hold numbers.
- What stays in one split is a text with its copies or, of the embedded docstrings, a module. Within each label the splits have
  the shares that were asked for.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Sequence

from training.cli import option
from training.data.docstrings import read_docstrings
from training.data.files import TABLE_ENDINGS, check_columns, find_files, get_text, read_rows, refuse_empty
from training.data.sources import hub_splits, is_hub_id
from training.data.splits import (
    SplitArguments,
    check_splits,
    drawn,
    drop_leakage,
    fill_missing_splits,
    read_given,
    refuse_empty_splits,
)
from training.errors import UserError

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"  # transformers' names
LARGEST = 1e6  # a number to predict; the square of its error has to fit
DOCSTRINGS = 1000  # of each library
FEW = 20  # examples, of which every other may have a label of its own


@dataclass
class ExampleArguments(SplitArguments):
    """What can be asked of the examples of a run."""

    dataset: list[str] = option(
        ["docs"],
        "`docs` (which library does this docstring come from); .csv, .tsv, .jsonl and .parquet files, folders and globs of "
        "them; ids of datasets on the Hub.",
    )
    text_column: str = option("text", "Column of the text.")
    label_column: list[str] = option(["label"], "Column of the label or the number; several for several labels of 0 and 1.")
    columns: list[str] = option([], "Names of the columns, left to right, of .csv and .tsv files that begin without them.")
    problem_type: str = option(SINGLE, "What is to be told of a text.", choices=[SINGLE, MULTI, REGRESSION])
    balance: str = option(
        "none",
        "undersample: as many examples of each label as the rarest has; weights: the rarer a label, the more each of its "
        "examples counts; or none.",
        choices=["none", "undersample", "weights"],
    )


@dataclass(frozen=True)
class Example:
    """A text and what is to be told of it: a name, several names, or numbers."""

    text: str
    label: Any  # str, tuple[str, ...] or tuple[float, ...], by the problem type
    group: str  # what stays in one split


@dataclass(frozen=True)
class Examples:
    """The splits of a run.

    Attributes:
        splits: train, validation and test; the last may be empty.
        names: of the labels, or of the columns that hold numbers, in the order of their ids.
        copies: how many examples were dropped from a split because their text stands in a later one.
        left_out: how many were dropped by undersampling.
    """

    splits: dict[str, list[Example]]
    names: list[str]
    copies: dict[str, int]
    left_out: int

    def digest(self) -> str:
        """Tells apart what is trained on, and what is held out."""
        content = hashlib.sha256(repr(self.names).encode())
        for name, split in self.splits.items():
            content.update(repr([name, *((example.text, example.label) for example in split)]).encode())
        return content.hexdigest()


def check_examples(arguments: ExampleArguments) -> None:
    """Refuse nonsense, and sources that cannot be read, before any long work; looks at no network."""
    paths = check_splits(arguments, TABLE_ENDINGS)
    if not arguments.label_column:
        raise UserError("--label_column is empty: name the column of the labels.")
    if len(set(arguments.label_column)) < len(arguments.label_column) or arguments.text_column in arguments.label_column:
        raise UserError(f"--label_column {' '.join(arguments.label_column)} and --text_column must be different columns.")
    if len(arguments.label_column) > 1 and arguments.problem_type == SINGLE:
        names = " ".join(arguments.label_column)
        raise UserError(f"--label_column {names}: several columns are for --problem_type {MULTI} or {REGRESSION}.")
    if arguments.balance != "none" and arguments.problem_type != SINGLE:
        raise UserError(f"--balance {arguments.balance} is for one label a text: leave it out with {arguments.problem_type}.")
    if "docs" in arguments.dataset and arguments.problem_type != SINGLE:
        raise UserError(f"--dataset docs brings one label a text: it is not for --problem_type {arguments.problem_type}.")
    for path in paths:
        next(read_rows(path, _columns(arguments), arguments.encoding_errors, arguments.columns), None)


def read_examples(arguments: ExampleArguments, seed: int) -> Examples:
    """The examples of a run, as it was told.

    Raises:
        UserError: a source cannot be read; a text is empty; a label is none of its kind; there is one label only, or one that
            is not in the training split; a split would be empty.
    """
    given = read_given(arguments, lambda source: _read_source(source, arguments))
    train = given["train"]
    if arguments.problem_type == SINGLE:
        _check_names(train)
    if arguments.balance == "undersample":
        given["train"] = _most(train, min(Counter(example.label for example in train).values()), seed)
    splits, copies = drop_leakage(
        fill_missing_splits(given, arguments, seed, lambda example: example.group, _stratum),
        lambda example: example.text.strip(),
    )
    return Examples(splits, _names(splits, arguments), copies, len(train) - len(given["train"]))


def class_weights(labels: np.ndarray) -> np.ndarray:
    """What an example of each class counts so that all classes count alike, and an example 1 on average (King and Zeng, 2001).

    Args:
        labels: (N, C), 1 at the class of each example.
    """
    counts = labels.sum(0)
    return len(labels) / (len(counts) * np.maximum(counts, 1))


def as_numbers(examples: list[Example], names: list[str], problem_type: str) -> np.ndarray:
    """Labels as float32 (N, C): a 1 for each label that an example has, or the numbers themselves."""
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
    """The examples of a source by their split; all of them are `train` where it has none."""
    if source == "docs":
        return {"train": _docstrings()}
    if is_hub_id(source):
        splits = _hub_rows(source, arguments)
    else:
        paths = find_files(source, TABLE_ENDINGS)
        splits = {
            "train": (
                row
                for path in paths
                for row in read_rows(path, _columns(arguments), arguments.encoding_errors, arguments.columns)
            )
        }
    return {name: _examples(rows, arguments) for name, rows in splits.items()}


def _docstrings() -> list[Example]:
    """Which library a docstring comes from, a thousand of each; what several have word for word tells nothing, and is left
    out."""
    libraries = defaultdict(set)
    entries = read_docstrings()
    for entry in entries:
        libraries[entry["docstring"]].add(entry["library"])
    examples = [
        Example(entry["docstring"], entry["library"], entry["module"])
        for entry in entries
        if len(libraries.pop(entry["docstring"], ())) == 1
    ]
    return _most(examples, DOCSTRINGS, 0)


def _hub_rows(source: str, arguments: ExampleArguments) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    splits = hub_splits(source)
    for rows in splits.values():
        check_columns(source, _columns(arguments), rows.column_names)
    # By custom -1 stands for labels that are kept secret: such a test split is none.
    column = arguments.label_column[0]
    if "test" in splits and isinstance(splits["test"].features[column], ClassLabel) and -1 in splits["test"][:1][column]:
        del splits["test"]
    return {name: _named(rows, f"{source}: {name} row", arguments) for name, rows in splits.items()}


def _named(rows: Any, place: str, arguments: ExampleArguments) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with the names of their labels, where the dataset has numbers and says what they mean."""
    names: dict[str, Callable[[Any], Any]] = {}
    for column in arguments.label_column:
        feature = rows.features[column]
        of = feature.feature if isinstance(feature, Sequence) else feature
        if isinstance(of, ClassLabel):
            names[column] = of.int2str
    for number, row in enumerate(rows.select_columns([arguments.text_column, *arguments.label_column]), start=1):
        for column, name in names.items():
            row[column] = None if row[column] in (-1, None) else name(row[column])
        yield f"{place} {number}", row


def _examples(rows: Iterable[tuple[str, dict[str, Any]]], arguments: ExampleArguments) -> list[Example]:
    read = {SINGLE: _one_name, MULTI: _several_names, REGRESSION: _numbers}[arguments.problem_type]
    examples, empty = [], []
    for place, row in rows:
        text = get_text(row, arguments.text_column, place, arguments.encoding_errors)
        if text.strip():
            values = {column: row[column] for column in arguments.label_column}
            examples.append(Example(text, read(values, place), text.strip()))
        else:
            empty.append(place)
    refuse_empty(empty, f"text under {arguments.text_column!r}")
    return examples


def _one_name(values: dict[str, Any], place: str) -> str:
    ((column, value),) = values.items()
    if isinstance(value, list):
        raise UserError(f"{place} has a list under {column!r}: several labels a text are for --problem_type {MULTI}.")
    if isinstance(value, float):
        raise UserError(f"{place} has the number {value} under {column!r}: give names, or --problem_type {REGRESSION}.")
    return _name(value, column, place)


def _name(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str | int) or not str(value).strip():
        raise UserError(f"{place} has no label under {column!r} but {value!r:.80}: give it one, or leave this row out.")
    if isinstance(value, str):
        get_text({column: value}, column, place)  # refuses half a character
    return str(value).strip()


def _several_names(values: dict[str, Any], place: str) -> tuple[str, ...]:
    if len(values) > 1:
        for column, value in values.items():
            if str(value) not in ("0", "1", "True", "False"):
                raise UserError(f"{place} has {value!r} under {column!r}: of several columns each must hold 0 or 1.")
        return tuple(column for column, value in values.items() if str(value) in ("1", "True"))
    ((column, value),) = values.items()
    if not isinstance(value, list):
        raise UserError(
            f"{place} has no list under {column!r} but {value!r}: give lists (in .jsonl or .parquet), or several columns of 0 "
            "and 1 by --label_column."
        )
    return tuple(dict.fromkeys(_name(item, column, place) for item in value))


def _numbers(values: dict[str, Any], place: str) -> tuple[float, ...]:
    numbers = []
    for column, value in values.items():
        number = _as_number(value)
        if number is None:
            raise UserError(f"{place} has no number under {column!r} but {value!r:.80}: give one, or leave this row out.")
        if not abs(number) < LARGEST:
            raise UserError(f"{place} has {value!r:.80} under {column!r}, too large to be told: scale the numbers to about 1.")
        numbers.append(number)
    return tuple(numbers)


def _as_number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _check_names(examples: list[Example]) -> None:
    """Refuse columns of numbers, which a file of text holds as text, and of what are no labels."""
    labels = dict.fromkeys(example.label for example in examples)
    fractions = [label for label in labels if (_as_number(label) or 0) % 1]
    if fractions and all(_as_number(label) is not None for label in labels):
        raise UserError(f"--label_column holds numbers such as {fractions[0]}: give names, or --problem_type {REGRESSION}.")
    if len(examples) >= FEW and len(labels) > len(examples) / 2:
        raise UserError(
            f"--label_column holds {len(labels):,} different labels for {len(examples):,} texts, such as "
            f"{next(iter(labels))!r:.80}: name the right column (and --text_column)."
        )


def _stratum(example: Example) -> str | None:
    """What has the same share in each split, as far as that can be."""
    return example.label if isinstance(example.label, str) else None


def _most(examples: list[Example], count: int, seed: int) -> list[Example]:
    """At most so many examples of each label, drawn at random, in the order they had."""
    taken, kept = Counter[str](), []
    for index in drawn([example.text for example in examples], seed, "balance"):
        taken[examples[index].label] += 1
        if taken[examples[index].label] <= count:
            kept.append(index)
    return [examples[index] for index in sorted(kept)]


def _names(splits: dict[str, list[Example]], arguments: ExampleArguments) -> list[str]:
    """What the model is to tell apart, from the training split; the others may not know more."""
    refuse_empty_splits(splits, arguments)
    for name, examples in splits.items():
        if len(examples) == 1 and name != "train" and arguments.problem_type == REGRESSION:
            raise UserError(f"the {name} split has a single example, of which nothing can be said: give more.")
    if arguments.problem_type == REGRESSION:
        return arguments.label_column
    found = {name: dict.fromkeys(_labels(examples)) for name, examples in splits.items()}
    names = list(found["train"])
    numbers = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names)
    names.sort(key=lambda name: (int(name), name) if numbers else name)
    if len(names) < 2 and arguments.problem_type == SINGLE:
        raise UserError(f"every example of the training split has the label {names[0]!r:.80}: there is nothing to tell apart.")
    if not names:
        raise UserError("no example of the training split has a label: there is nothing to learn.")
    if len(arguments.label_column) > 1:
        return arguments.label_column
    for name in ("validation", "test"):
        if unseen := [label for label in found[name] if label not in found["train"]]:
            few = ", ".join(map(repr, unseen[:5]))
            raise UserError(f"the {name} split has labels that the training split has not: {few:.200}. Add examples of them.")
    return names


def _labels(examples: Iterable[Example]) -> Iterator[str]:
    for example in examples:
        yield from [example.label] if isinstance(example.label, str) else example.label
