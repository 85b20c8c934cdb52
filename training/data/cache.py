"""Cache for data that is derived from texts, beside the cache of `datasets`.

A file is named by a hash of all that it is made from: it is reused as long as nothing has changed, and never afterwards. It
ends with a checksum of its content, so that a damaged file is noticed and written again.
"""

import hashlib
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import datasets

from modeling_scratchgpt.atomic import PREFIX, atomic_file

BATCH_BYTES, BATCH_ROWS = 2**22, 1000  # of texts in memory at a time, unless a single one is longer
CHECKSUM_BYTES = 4
ABANDONED = 24 * 3600  # seconds without a write to a temporary file


def cached_file(made_from: str, suffix: str, write: Callable[[Path], None]) -> Path:
    """Path of the cached file for the inputs that `made_from` describes; `write` creates it if it is missing or damaged.

    Its last `CHECKSUM_BYTES` are not content.
    """
    directory = Path(datasets.config.HF_DATASETS_CACHE) / "scratchgpt"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{hashlib.sha256(made_from.encode()).hexdigest()[:32]}.{suffix}"
    if path.exists():
        content, checksum = _checksums(path, path.stat().st_size - CHECKSUM_BYTES)
        if content == checksum:
            return path
        print(f"The cached file {path} is damaged: writing it again", flush=True)
    for leftover in directory.glob(f"{PREFIX}*"):  # of a process that was killed
        with suppress(FileNotFoundError):  # another process has just removed or finished it
            if time.time() - leftover.stat().st_mtime > ABANDONED:
                leftover.unlink()
    with atomic_file(path) as temporary:
        write(temporary)
        checksum, _ = _checksums(temporary, temporary.stat().st_size)
        with open(temporary, "ab") as file:
            file.write(checksum)
    return path


def _checksums(path: Path, left: int) -> tuple[bytes, bytes]:
    """The CRC-32 of the first `left` bytes of a file, and the other bytes."""
    checksum = 0
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(BATCH_BYTES, left))):
            checksum = zlib.crc32(block, checksum)
            left -= len(block)
        return checksum.to_bytes(CHECKSUM_BYTES, "big"), file.read()


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
