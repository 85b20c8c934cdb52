"""What `--dataset` can name: `docs`, files and folders here, datasets on the Hub."""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from training.data.files import FILE_ENDINGS, find_files
from training.errors import UserError, one_line


def check_sources(sources: list[str], endings: tuple[str, ...] = FILE_ENDINGS) -> list[Path]:
    """Refuse sources that are not there; looks at no network.

    Args:
        endings: of the files that a folder stands for.

    Returns:
        The files, which nobody has looked into yet.

    Raises:
        UserError: there is no source, or no file where one names files.
    """
    if not sources or not all(source.strip() for source in sources):
        what = "holds an empty name" if sources else "is empty"
        raise UserError(f"--dataset {what}: give `docs`, files, folders or the id of a dataset on the Hub.")
    return [path for source in sources if source != "docs" and not is_hub_id(source) for path in find_files(source, endings)]


def is_hub_id(source: str) -> bool:
    """Whether it is shaped like an id, with nothing of that name here, nor a folder that it would lie in."""
    return (
        not os.path.exists(source)
        and not source.lower().endswith((*FILE_ENDINGS, ".json"))
        and not glob.has_magic(source)
        and source.count("/") <= 1
        and not os.path.isdir(os.path.dirname(source))
        and not source.startswith((".", "/", "~"))
    )


def short_name(source: str) -> str:
    """What a source is called where others read it: without the folders above it."""
    return source if is_hub_id(source) else Path(source).name


def hub_splits(source: str) -> DatasetDict:
    """The splits train, validation and test of a dataset, of which it has at least the first; `id:configuration` names one of
    several.

    Raises:
        UserError: it cannot be had, or has no such split.
    """
    name, _, configuration = source.partition(":")
    with hub_errors(source):
        loaded = load_dataset(name, configuration or None)
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
    if "train" not in splits:
        raise UserError(f"{source} has no split `train`; it has {', '.join(splits)}.")
    return DatasetDict({split: splits[split] for split in ("train", "validation", "test") if split in splits})


@contextmanager
def hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, DatasetNotFoundError, HfHubHTTPError, HFValidationError, HTTPError, ValueError) as error:
        raise UserError(f"{source}: no such file or folder here, and the Hub did not give it ({one_line(error)}).") from error
