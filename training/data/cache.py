"""Where a run keeps what it makes from its texts: beside the cache of `datasets`, named by what it is made from."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets


def cached(made_from: str, ending: str) -> Path:
    """Where the thing made from this is kept, beside the cache of `datasets`."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "scratchgpt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(made_from.encode()).hexdigest()[:32]}.{ending}"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name to write a file under; it becomes `path` when it is complete, and vanishes if it never is."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
