"""Sources that `--dataset` can name: `docs`, local files and directories, and datasets on the Hub."""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import DatasetDict, load_dataset
from huggingface_hub.errors import HTTPError

from modeling_scratchgpt import hub
from training.data.files import FILE_ENDINGS, ending, find_files
from training.errors import UserError, one_line


def check_sources(sources: list[str], endings: tuple[str, ...] = FILE_ENDINGS) -> list[Path]:
    """The local files of all sources, with these extensions in directories. Neither network nor the files' content is needed.

    Raises:
        UserError: there is no source, or a local one does not exist.
    """
    if not sources or not all(source.strip() for source in sources):
        problem = "holds an empty name" if sources else "is empty"
        raise UserError(f"--dataset {problem}: pass `docs`, files, directories or the id of a dataset on the Hub.")
    return [
        path for source in sources if source != "docs" and not is_dataset_id(source) for path in find_files(source, endings)
    ]


def is_dataset_id(source: str) -> bool:
    """True for `name`, `owner/name` or `owner/name:configuration`, except for local paths and extensions of data files."""
    is_file = source == "docs" or os.path.exists(source) or ending(Path(source)) in FILE_ENDINGS
    return not is_file and not glob.has_magic(source) and hub.is_hub_id(parse_hub_id(source)[0])


def parse_hub_id(source: str) -> tuple[str, str | None]:
    """Split `id:configuration` into the two arguments of `load_dataset`."""
    name, _, configuration = source.partition(":")
    return name, configuration or None


def short_name(source: str) -> str:
    """Name of a source for publication: a path without its parent directories."""
    return source if is_dataset_id(source) else Path(source).name


def hub_splits(source: str) -> DatasetDict:
    """Load the splits train, validation and test of a dataset on the Hub; `UserError` if it has not at least the first."""
    with hub_errors(source):
        loaded = load_dataset(*parse_hub_id(source))
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
    if "train" not in splits:
        raise UserError(f"{source} has no split `train`; it has {', '.join(splits)}.")
    return DatasetDict({split: splits[split] for split in ("train", "validation", "test") if split in splits})


@contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Turn the errors of loading a source from the Hub into a `UserError`."""
    try:
        yield
    except (OSError, HTTPError, ValueError) as error:  # the library's own errors are of these classes
        raise UserError(
            f"{source}: no such local file or directory, and loading it from the Hub failed ({one_line(error)})."
        ) from error
