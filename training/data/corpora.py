"""Corpora for pretraining: `datasets.Dataset` with one document a row, from any source.

Texts are cached as an Arrow file and memory-mapped. No step keeps more than a few megabytes or the longest document.
"""

import array
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, load_dataset_builder
from tqdm.auto import tqdm

from training.cli import option
from training.data import sources
from training.data.cache import BATCH_BYTES, BATCH_ROWS, cached_file, digest_texts, encode_texts
from training.data.docstrings import TEXT, read_docs
from training.data.encoding import encoding_errors_option, encoding_of, encoding_option
from training.data.files import check_columns, digest_of, ending, get_text, read_file
from training.data.near_duplicates import drop_near_duplicates, import_datasketch
from training.data.splits import SPLITS, check_fractions, split_indices, split_seed_option
from training.errors import UserError
from training.progress import bar_options

HEAD = 2**20  # bytes at the beginning of a text file that are checked before any long work


@dataclass
class CorpusArguments:
    dataset: list[str] = option(
        ["docs"],
        "`docs`; .txt, .md, .json, .jsonl, .parquet, .csv and .tsv files, also compressed, directories and globs of them; ids "
        "of datasets on the Hub, clones of them, and directories of `save_to_disk`; `-`: standard input",
    )
    text_column: str = option("text", "column with the text, in tables and datasets")
    encoding: str = encoding_option()
    encoding_errors: str = encoding_errors_option()
    streaming: bool = option(False, "stream datasets from the Hub: download only what is read")
    max_documents: int = option(0, "maximum number of documents from each source; 0: all", minimum=0)
    near_duplicates: float = option(
        0.0, "drop documents with at least this Jaccard similarity to an earlier one; 0: exact duplicates", minimum=0, maximum=1
    )
    validation_fraction: float = option(
        0.01, "fraction held out for validation: whole documents, or the end of each if there are few", above=0, below=1
    )
    test_fraction: float = option(0.0, "fraction held out for the test, evaluated once, at the end", minimum=0, below=1)
    split_seed: int = split_seed_option()


@dataclass(frozen=True)
class Corpus:
    """The documents of one source."""

    name: str  # the file or directory without its parents, or the source as it was given
    documents: Dataset  # with one column, `text`
    duplicates: int = 0  # documents dropped because the same text came earlier, in this source or another
    near_duplicates: int = 0  # documents dropped because a similar text came earlier


def read_corpora(arguments: CorpusArguments) -> list[Corpus]:
    """Read the documents of every source in order. Blank documents and duplicates of earlier ones are dropped.

    Raises:
        UserError: a source does not exist, cannot be read, or has no text that earlier sources do not have.
    """
    if arguments.near_duplicates:
        import_datasketch()
    names = [Path(source).name if os.path.exists(source) else source for source in arguments.dataset]
    seen: set[int] = set()  # 128-bit digests, of 71 to 98 bytes each with their place in the set
    unique = [_drop_duplicates(_read_source(source, arguments), seen) for source in arguments.dataset]
    documents = [documents for documents, _ in unique]
    kept = drop_near_duplicates(documents, arguments.near_duplicates) if arguments.near_duplicates else documents
    corpora = []
    for source, name, (whole, duplicates), rest in zip(arguments.dataset, names, unique, kept, strict=True):
        near_duplicates = len(whole) - len(rest)
        if not len(rest):
            known = "all of its texts are in earlier sources: leave it out"
            raise UserError(f"{source}: {known if duplicates + near_duplicates else 'it has no text'}.")
        corpora.append(Corpus(name if names.count(name) == 1 else source, rest, duplicates, near_duplicates))
    return corpora


def check_corpora(arguments: CorpusArguments) -> None:
    """Validate the arguments and the beginning of every file before any long work, without network access.

    Raises:
        UserError: the fractions leave nothing to train on; a source is missing; the beginning of a file is invalid.
    """
    check_fractions({"validation": arguments.validation_fraction, "test": arguments.test_fraction})
    encoding = encoding_of(arguments)
    for path in sources.check_sources(arguments.dataset):
        next(read_file(path, arguments.text_column, encoding, HEAD), None)


def split_documents(documents: Dataset, arguments: CorpusArguments) -> dict[str, Dataset]:
    """Split documents without duplicates into train, validation and test, in the order of the corpus; test may be empty.

    Whole documents are held out. If there are too few, as with a single book, the end of each is held out instead, cut between
    words: first the validation text, then the test text.

    Raises:
        UserError: a split would be empty, except for the test split if its fraction is 0.
    """
    fractions = {"validation": arguments.validation_fraction, "test": arguments.test_fraction}
    sizes = {name: len(documents) * fraction for name, fraction in fractions.items()}
    if sizes["validation"] < 1 or 0 < sizes["test"] < 1:
        return _split_ends(documents, arguments.validation_fraction, arguments.test_fraction)
    if sum(map(round, sizes.values())) >= len(documents):
        given = f"--validation_fraction {arguments.validation_fraction} and --test_fraction {arguments.test_fraction}"
        raise UserError(f"{given} of {len(documents)} documents leave none to train on: lower one of them.")
    indices = split_indices(encode_texts(documents), fractions, arguments.split_seed)
    return {name: documents.select(indices[name]) for name in SPLITS}


def _split_ends(documents: Dataset, validation_fraction: float, test_fraction: float) -> dict[str, Dataset]:
    def parts(split: int) -> Iterator[bytes]:
        for text in encode_texts(documents):
            first = _find_word_boundary(text, 0, round(len(text) * (1 - validation_fraction - test_fraction)))
            second = _find_word_boundary(text, first, round(len(text) * (1 - test_fraction))) if test_fraction else len(text)
            bounds = (0, first, second, len(text))
            part = text[bounds[split] : bounds[split + 1]]
            if not _is_blank(part):
                yield bytes(part)

    key = f"ends {validation_fraction} {test_fraction} {digest_texts(documents)[0]}"
    splits = {name: _store(f"{key} {number}", parts(number), "") for number, name in enumerate(SPLITS)}
    if not len(splits["train"]):
        given = f"--validation_fraction {validation_fraction} and --test_fraction {test_fraction}"
        raise UserError(f"{given} leave no text of this corpus to train on: pass more text or smaller fractions.")
    for name, fraction in (("validation", validation_fraction), ("test", test_fraction)):
        if fraction and not len(splits[name]):
            raise UserError(f"--{name}_fraction {fraction} of this corpus has no text: pass more text or a larger fraction.")
    return splits


def _find_word_boundary(text: memoryview, start: int, end: int) -> int:
    """Position after a space or line end, after `start` and at most 200 bytes before `end`; else about `end`."""
    nearby = max(start, end - 200)
    window = bytes(text[nearby:end])
    if boundary := max(window.rfind(b"\n"), window.rfind(b" ")) + 1:
        return nearby + boundary
    while start < end < len(text) and text[end] & 0xC0 == 0x80:  # inside a UTF-8 character
        end -= 1
    return end


def _drop_duplicates(documents: Dataset, seen: set[int]) -> tuple[Dataset, int]:
    """Drop blank documents and those with a digest in `seen`, which is updated; returns the number of the latter, too."""
    kept, duplicates = array.array("q"), 0
    for index, text in enumerate(encode_texts(documents)):
        if _is_blank(text):
            continue
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
        if digest in seen:
            duplicates += 1
        else:
            seen.add(digest)
            kept.append(index)
    return documents if len(kept) == len(documents) else documents.select(np.asarray(kept)), duplicates


def _is_blank(text: Any) -> bool:
    return not str(text[:64], "utf-8", "ignore").strip() and not str(text, "utf-8").strip()


def _read_source(source: str, arguments: CorpusArguments) -> Dataset:
    column, encoding, limit = arguments.text_column, encoding_of(arguments), arguments.max_documents
    if source == "docs":
        documents = read_docs()
        return documents.take(limit or len(documents))
    if sources.is_dataset(source):
        is_streamed = arguments.streaming and not sources.is_saved(source)
        return _stream(source, column, limit) if is_streamed else _download(source, column, limit)
    with _standard_input() if source == sources.STANDARD_INPUT else nullcontext(sources.find_splits(source)["train"]) as files:
        digests = [(ending(path), path.suffix, digest_of(path)) for path in files]
        texts = itertools.chain.from_iterable(read_file(path, column, encoding) for path in files)
        key = f"files {column} {encoding} {limit} {digests}"
        return _store(key, itertools.islice(texts, limit or None), f"Reading {sources.short_name(source)}")


@contextmanager
def _standard_input() -> Iterator[list[Path]]:
    """Standard input in a temporary file: JSON lines if the first line is an object, otherwise a plain text."""
    first, extension = sys.stdin.buffer.readline(), ".txt"
    with suppress(ValueError):
        extension = ".jsonl" if isinstance(json.loads(first), dict) else ".txt"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, f"standard_input{extension}")
        with open(path, "wb") as file:
            file.write(first)
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield [path]


def _download(source: str, text_column: str, max_documents: int) -> Dataset:
    dataset = sources.hub_splits(source)["train"]
    check_columns(source, {text_column: "text_column"}, dataset.column_names)
    documents = dataset.select_columns(text_column).rename_columns({text_column: "text"})
    documents = documents.take(max_documents or len(documents))
    dtype = getattr(documents.features["text"], "dtype", documents.features["text"])
    if dtype not in ("string", "large_string"):
        raise UserError(f"{source}: the column {text_column!r} has no text but {dtype}. Set --text_column.")
    return documents if documents.features == TEXT else documents.cast(TEXT)


def _stream(source: str, text_column: str, max_documents: int) -> Dataset:
    with sources.hub_errors(source):
        builder = load_dataset_builder(*sources.parse_hub_id(source))
        rows = builder.as_streaming_dataset(split="train")
    if rows.column_names:
        check_columns(source, {text_column: "text_column"}, rows.column_names)
        rows = rows.select_columns([text_column])

    def texts() -> Iterator[str]:
        with sources.hub_errors(source):
            for number, row in enumerate(itertools.islice(rows, max_documents or None), start=1):
                location = f"{source}: row {number}"
                check_columns(location, {text_column: "text_column"}, row)
                yield get_text(row, text_column, location)

    # The builder's hash is that of the commit on the Hub.
    key = f"stream {source} {builder.hash} {text_column} {max_documents}"
    return _store(key, texts(), f"Downloading {source}")


def _store(key: str, texts: Iterable[str | bytes], description: str) -> Dataset:
    """Texts as a memory-mapped dataset, which is written once and then read from the cache."""

    def write(path: Path) -> None:
        batch: list[bytes] = []
        size = 0
        with pa.ipc.new_stream(str(path), TEXT.arrow_schema) as writer:
            for text in tqdm(texts, desc=description, unit=" documents", **bar_options(hidden=not description)):
                encoded = text.encode() if isinstance(text, str) else text
                if size + len(encoded) > BATCH_BYTES or len(batch) == BATCH_ROWS:
                    writer.write_batch(_record_batch(batch))
                    batch, size = [], 0
                batch.append(encoded)
                size += len(encoded)
            writer.write_batch(_record_batch(batch))

    return Dataset.from_file(str(cached_file(key, "arrow", write)))


def _record_batch(texts: list[bytes]) -> pa.RecordBatch:
    """The same as `pa.array` makes, but a single long text is not copied."""
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    column = pa.StringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))
    return pa.record_batch([column], schema=TEXT.arrow_schema)
