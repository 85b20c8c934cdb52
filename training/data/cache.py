"""Cache for data that is derived from texts, beside the cache of `datasets`.

A file is named by a hash of all that it is made from: it is reused as long as nothing has changed, and never afterwards.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets

from modeling_scratchgpt.atomic import atomic_file

BATCH_BYTES, BATCH_ROWS = 2**22, 1000  # of texts in memory at a time, unless a single one is longer


def cached_file(
    made_from: str, suffix: str, write: Callable[[Path], None], is_complete: Callable[[Path], bool] = Path.exists
) -> Path:
    """Path of the cached file for the inputs that `made_from` describes; `write` creates it if it is missing or incomplete."""
    directory = Path(datasets.config.HF_DATASETS_CACHE) / "scratchgpt"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{hashlib.sha256(made_from.encode()).hexdigest()[:32]}.{suffix}"
    if not is_complete(path):
        with atomic_file(path) as temporary:
            write(temporary)
    return path


def encode_texts(documents: datasets.Dataset) -> Iterator[memoryview]:
    """Yield every text in UTF-8, with a few megabytes in memory at a time."""
    mean = documents.data.nbytes // max(1, documents.data.num_rows)
    rows = documents.with_format("arrow").iter(batch_size=max(1, min(BATCH_ROWS, BATCH_BYTES // (mean + 1))))
    return (memoryview(value.as_buffer() or b"") for table in rows for value in table.column("text"))


def digest_texts(documents: datasets.Dataset) -> tuple[str, int]:
    """SHA-256 of all texts in their order, and their length in UTF-8 bytes."""
    digest, num_bytes = hashlib.sha256(), 0
    for text in encode_texts(documents):
        digest.update(hashlib.sha256(text).digest())
        num_bytes += len(text)
    return digest.hexdigest(), num_bytes
