"""Sources that `--dataset` can name: `docs`, local files and directories, datasets on the Hub, and those that were saved."""

import glob
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import yaml
from datasets import DatasetDict, config, load_dataset, load_dataset_builder, load_from_disk
from datasets.data_files import SPLIT_PATTERN_SHARDED
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub import metadata_load
from huggingface_hub.errors import HTTPError

from modeling_scratchgpt import hub
from training.data.files import FILE_ENDINGS, ending, find_files
from training.errors import UserError, one_line

STANDARD_INPUT = "-"
# Of a dataset that cannot be loaded, also by its metadata, a loading script, or the connection.
ERRORS = (OSError, HTTPError, ValueError, LookupError, TypeError, RuntimeError, yaml.YAMLError, DatasetsError)
OWN_DOCUMENTS = Path(__file__).parents[2] / "docs"
SPLITS = ("train", "validation", "test")


def check_sources(sources: list[str], endings: tuple[str, ...] = FILE_ENDINGS) -> list[Path]:
    """The local training files of all sources, with these extensions in directories. No network is needed.

    Raises:
        UserError: there is no source, or a local one does not exist.
    """
    if not sources or not all(source.strip() for source in sources):
        problem = "holds an empty name" if sources else "is empty"
        raise UserError(f"--dataset {problem}: pass `docs`, files, directories or the id of a dataset on the Hub.")
    if sources.count(STANDARD_INPUT) > (os.environ.get("WORLD_SIZE", "1") == "1"):
        raise UserError("--dataset -: standard input can be read only once, by one process: save it to a file.")
    is_ambiguous = os.path.isdir("docs") and Path("docs").resolve() != OWN_DOCUMENTS
    if "docs" in sources and is_ambiguous and os.environ.get("RANK", "0") == "0":
        print("--dataset docs is the built-in data: pass ./docs for the directory of that name", file=sys.stderr, flush=True)
    files = (source for source in sources if source not in ("docs", STANDARD_INPUT) and not is_dataset(source))
    return [path for source in files for path in find_splits(source, endings)["train"]]


def find_splits(source: str, endings: tuple[str, ...] = FILE_ENDINGS) -> dict[str, list[Path]]:
    """The local files of a source by split, at least `train`, with these extensions in directories.

    A directory, or `directory:configuration`, that is a clone of a dataset on the Hub has the splits of `load_dataset`: if its
    README.md describes them, or `push_to_hub` has named its files, or the names of all its files tell their splits. All files
    of another directory are for training.

    Raises:
        UserError: there is no such file, or no split `train`.
    """
    name, configuration = (source, None) if os.path.exists(os.path.expanduser(source)) else parse_hub_id(source)
    directory = Path(os.path.expanduser(name))
    if not os.path.isdir(directory):  # False for an invalid name, too
        return {"train": find_files(source, endings)}
    files, card = find_files(name, endings), directory / "README.md"
    metadata = None
    with suppress(ValueError, yaml.YAMLError):
        metadata = metadata_load(card) if card.is_file() else None
    is_pushed = any(directory.glob(SPLIT_PATTERN_SHARDED.format(split="train")))
    is_declared = configuration is not None or is_pushed or bool({"configs", "dataset_info"} & {*(metadata or ())})
    others = [path for path in files if path != card]
    if is_declared or any("train" in str(path.relative_to(directory)) for path in files):
        splits: dict[str, list[Path]] = {}
        with nullcontext() if is_declared else suppress(UserError), hub_errors(source):
            splits = _named_splits(directory, configuration, endings)
        if is_declared or ("train" in splits and {*others} == {path for paths in splits.values() for path in paths}):
            return _with_train(splits, source)
    return {"train": others if metadata and others else files}  # a card is no data


def _named_splits(directory: Path, configuration: str | None, endings: tuple[str, ...]) -> dict[str, list[Path]]:
    """The files of each split that `load_dataset` finds."""
    found = load_dataset_builder(os.path.abspath(directory), configuration).config.data_files or {}
    paths = {name: [directory / os.path.relpath(path, directory.resolve()) for path in found[name]] for name in found}
    return {name: kept for name in paths if (kept := [path for path in paths[name] if ending(path) in endings])}


def _with_train(splits: Any, source: str) -> Any:
    """The splits train, validation and test of a dataset; `UserError` if it has not at least the first."""
    if "train" not in splits:
        raise UserError(f"{source} has no split `train`; it has {', '.join(splits) or 'nothing'}.")
    return {name: splits[name] for name in SPLITS if name in splits}


def is_dataset(source: str) -> bool:
    """True for what `datasets` loads: an id on the Hub, or a directory of `save_to_disk`."""
    return is_saved(source) or is_dataset_id(source)


def is_saved(source: str) -> bool:
    """True for a directory of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    names = config.DATASET_STATE_JSON_FILENAME, config.DATASETDICT_JSON_FILENAME
    return any(os.path.isfile(Path(os.path.expanduser(source), name)) for name in names)


def is_dataset_id(source: str) -> bool:
    """True for `name`, `owner/name` or `owner/name:configuration`, except for local paths and extensions of data files."""
    is_file = source in ("docs", STANDARD_INPUT) or os.path.exists(source) or ending(Path(source)) in FILE_ENDINGS
    return not is_file and not glob.has_magic(source) and hub.is_hub_id(parse_hub_id(source)[0])


def parse_hub_id(source: str) -> tuple[str, str | None]:
    """Split `id:configuration` into the two arguments of `load_dataset`."""
    name, _, configuration = source.partition(":")
    return name, configuration or None


def short_name(source: str) -> str:
    """Name of a source for publication: a path without its parent directories."""
    if source == STANDARD_INPUT:
        return "standard input"
    return source if is_dataset_id(source) else Path(source).name


def hub_splits(source: str) -> DatasetDict:
    """Load the splits train, validation and test of a dataset on the Hub or a saved one; `UserError` without the first."""
    with hub_errors(source):
        loaded = load_from_disk(os.path.expanduser(source)) if is_saved(source) else load_dataset(*parse_hub_id(source))
    return DatasetDict(_with_train(loaded if isinstance(loaded, DatasetDict) else {"train": loaded}, source))


@contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Turn the errors of `datasets` that loads a source into a `UserError`."""
    try:
        yield
    except ERRORS as error:
        cause: Any = (type(error) is DatasetGenerationError and error.__cause__) or error  # that message says nothing
        is_local = os.path.exists(os.path.expanduser(parse_hub_id(source)[0]))
        problem = "no such local file or directory, and loading it from the Hub failed"
        advice = f": pass {source}:CONFIGURATION" if is_local and "Config name is missing" in str(error) else ""
        raise UserError(f"{source}: {'cannot be loaded' if is_local else problem} ({one_line(cause)}){advice}.") from error
