"""Corpora for pretraining: `datasets.Dataset` with one document a row, from any source.

Notable:
- Texts are cached as an Arrow file and memory-mapped. No step keeps more than a few megabytes or the longest document.
- Documents are split before anything else happens to them, so no held-out token is seen in training.
"""

import array
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, load_dataset, load_dataset_builder
from tqdm.auto import tqdm

from training.cli import option
from training.data.cache import BATCH_BYTES, BATCH_ROWS, cached_file, digest_texts, encode_texts
from training.data.docstrings import TEXT, read_docs
from training.data.files import check_columns, check_file, digest_of, find_files, get_text, read_file
from training.data.near_duplicates import drop_near_duplicates, import_datasketch
from training.data.sources import check_sources, hub_errors, is_dataset_id, parse_hub_id
from training.data.splits import SPLITS, split_indices
from training.errors import UserError


@dataclass
class CorpusArguments:
    """Arguments about the corpora of a run."""

    dataset: list[str] = option(
        ["docs"],
        "`docs`; .txt, .md, .jsonl, .parquet, .csv and .tsv files, directories and globs of them; ids of datasets on the Hub",
    )
    text_column: str = option("text", "column with the text, in tables and datasets")
    encoding_errors: str = option("strict", "invalid UTF-8: strict (an error) or replace", choices=["strict", "replace"])
    streaming: bool = option(False, "stream datasets from the Hub: download only what is read")
    max_documents: int = option(0, "maximum number of documents from each source; 0: all", minimum=0)
    near_duplicates: float = option(
        0.0,
        "drop documents with at least this Jaccard similarity to an earlier one; 0: exact duplicates only",
        minimum=0,
        maximum=1,
    )
    validation_fraction: float = option(
        0.01, "fraction held out for validation: whole documents, or the end of each if there are few", above=0, below=1
    )
    test_fraction: float = option(0.0, "fraction held out for the test, evaluated once, at the end", minimum=0, below=1)


@dataclass(frozen=True)
class Corpus:
    """The documents of one source.

    Attributes:
        name: the file or directory without its parents, or the source as it was given.
        documents: a dataset with one column, `text`.
        duplicates: number of documents dropped because the same text came earlier, in this source or another.
        near_duplicates: number of documents dropped because a similar text came earlier.
    """

    name: str
    documents: Dataset
    duplicates: int = 0
    near_duplicates: int = 0


@dataclass(frozen=True)
class Splits:
    """Three datasets with the column `text` that share no text; `test` may be empty."""

    train: Dataset
    validation: Dataset
    test: Dataset


def read_corpora(arguments: CorpusArguments) -> list[Corpus]:
    """Read the documents of every source in order. Blank documents and duplicates of earlier ones are dropped.

    Raises:
        UserError: a source does not exist, cannot be read, or has no text that earlier sources do not have.
    """
    if arguments.near_duplicates:
        import_datasketch()
    sources = arguments.dataset
    names = [Path(source).name if os.path.exists(source) else source for source in sources]
    seen: set[int] = set()  # 128-bit digests, of 71 to 98 bytes each with their place in the set
    corpora = []
    for source, name in zip(sources, names, strict=True):
        documents, duplicates = _drop_duplicates(_read_source(source, arguments), seen)
        corpora.append(Corpus(name if names.count(name) == 1 else source, documents, duplicates))
    if arguments.near_duplicates:
        thinned = drop_near_duplicates([corpus.documents for corpus in corpora], arguments.near_duplicates)
        corpora = [
            replace(corpus, documents=documents, near_duplicates=len(corpus.documents) - len(documents))
            for corpus, documents in zip(corpora, thinned, strict=True)
        ]
    for source, corpus in zip(sources, corpora, strict=True):
        if len(corpus.documents) == 0:
            dropped = corpus.duplicates + corpus.near_duplicates
            reason = "all of its texts are in earlier sources: leave it out" if dropped else "it has no text"
            raise UserError(f"{source}: {reason}.")
    return corpora


def split_corpora(arguments: CorpusArguments, corpora: list[Corpus], seed: int) -> list[Splits]:
    """Split each corpus of a run by its arguments: see `split_documents`."""
    fractions = arguments.validation_fraction, arguments.test_fraction
    return [split_documents(corpus.documents, *fractions, seed) for corpus in corpora]


def check_corpora(arguments: CorpusArguments) -> None:
    """Validate the arguments and the beginning of every file before any long work, without network access.

    Raises:
        UserError: the fractions leave nothing to train on; a source is missing, unreadable or without files; the beginning of a
            file is not what its extension promises, has no such column, or is not UTF-8.
    """
    if arguments.validation_fraction + arguments.test_fraction >= 1:
        raise UserError(
            f"--validation_fraction {arguments.validation_fraction} and --test_fraction {arguments.test_fraction} leave "
            "nothing to train on: together they must be below 1."
        )
    for path in check_sources(arguments.dataset):
        check_file(path, arguments.text_column, arguments.encoding_errors)


def split_documents(documents: Dataset, validation_fraction: float, test_fraction: float, seed: int) -> Splits:
    """Split documents into training, validation and test, in the order of the corpus.

    Whole documents are held out. If there are too few, as with a single book, the end of each is held out instead, cut between
    words: first the validation text, then the test text.

    Args:
        documents: a dataset with the column `text`, without duplicates.
        validation_fraction: of the documents, above 0.
        test_fraction: of the documents; 0 for no test split.
        seed: determines which documents are held out.

    Raises:
        UserError: a split would be empty.
    """
    fractions = {"validation": validation_fraction, "test": test_fraction}
    sizes = {name: len(documents) * fraction for name, fraction in fractions.items()}
    if sizes["validation"] < 1 or 0 < sizes["test"] < 1:
        return _split_ends(documents, validation_fraction, test_fraction)
    if sum(map(round, sizes.values())) >= len(documents):
        raise UserError(
            f"--validation_fraction {validation_fraction} and --test_fraction {test_fraction} of {len(documents)} documents "
            "leave none to train on: lower one of them."
        )
    indices = split_indices(encode_texts(documents), fractions, seed)
    return Splits(*(documents.select(indices[name]) for name in SPLITS))


def _split_ends(documents: Dataset, validation_fraction: float, test_fraction: float) -> Splits:
    """Hold out the end of every document."""

    def parts(split: int) -> Iterator[bytes]:
        for text in encode_texts(documents):
            first = _find_word_boundary(text, 0, round(len(text) * (1 - validation_fraction - test_fraction)))
            second = _find_word_boundary(text, first, round(len(text) * (1 - test_fraction))) if test_fraction else len(text)
            bounds = (0, first, second, len(text))
            part = text[bounds[split] : bounds[split + 1]]
            if not _is_blank(part):
                yield bytes(part)

    key = f"ends {validation_fraction} {test_fraction} {digest_texts(documents)[0]}"
    train, validation, test = (_store(f"{key} {split}", parts(split), "") for split in range(3))
    if len(train) == 0:
        raise UserError(
            f"--validation_fraction {validation_fraction} and --test_fraction {test_fraction} leave no text of this corpus to "
            "train on: pass more text or smaller fractions."
        )
    for name, fraction, held_out in (("validation", validation_fraction, validation), ("test", test_fraction, test)):
        if len(held_out) == 0 and (fraction or name == "validation"):
            raise UserError(f"--{name}_fraction {fraction} of this corpus has no text: pass more text or a larger fraction.")
    return Splits(train, validation, test)


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


# Sources ------------------------------------------------------------------------------------------------------------


def _read_source(source: str, arguments: CorpusArguments) -> Dataset:
    column, errors, limit = arguments.text_column, arguments.encoding_errors, arguments.max_documents
    if source == "docs":
        return _take(read_docs(), limit)
    if is_dataset_id(source):
        return _stream(source, column, limit) if arguments.streaming else _download(source, column, limit)
    files = find_files(source)
    digests = [(path.suffix.lower(), digest_of(path)) for path in files]
    texts = itertools.chain.from_iterable(read_file(path, column, errors) for path in files)
    key = f"files {column} {errors} {limit} {digests}"
    return _store(key, itertools.islice(texts, limit or None), f"Reading {source}")


def _take(documents: Dataset, max_documents: int) -> Dataset:
    return documents.take(max_documents) if max_documents else documents


def _download(source: str, text_column: str, max_documents: int) -> Dataset:
    with hub_errors(source):
        dataset = load_dataset(*parse_hub_id(source), split="train")
    check_columns(source, {text_column: "text_column"}, dataset.column_names)
    documents = dataset.select_columns(text_column)
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    dtype = getattr(documents.features["text"], "dtype", documents.features["text"])
    if dtype not in ("string", "large_string"):
        raise UserError(f"{source}: the column {text_column!r} has no text but {dtype}. Set --text_column.")
    documents = _take(documents, max_documents)
    return documents if documents.features == TEXT else documents.cast(TEXT)


def _stream(source: str, text_column: str, max_documents: int) -> Dataset:
    with hub_errors(source):
        builder = load_dataset_builder(*parse_hub_id(source))
        rows = builder.as_streaming_dataset(split="train")
    if rows.column_names:
        check_columns(source, {text_column: "text_column"}, rows.column_names)
        rows = rows.select_columns([text_column])

    def texts() -> Iterator[str]:
        with hub_errors(source):
            for number, row in enumerate(rows.take(max_documents) if max_documents else rows, start=1):
                location = f"{source}: row {number}"
                check_columns(location, {text_column: "text_column"}, row)
                yield get_text(row, text_column, location)

    # The builder's hash is that of the commit on the Hub.
    key = f"stream {source} {builder.hash} {text_column} {max_documents}"
    return _store(key, texts(), f"Downloading {source}")


def _store(key: str, texts: Iterable[str | bytes], description: str) -> Dataset:
    """Texts as a memory-mapped dataset, which is written once and then read from the cache."""
    path = cached_file(key, "arrow", partial(_write_texts, texts, description))
    try:
        return Dataset.from_file(str(path))
    except pa.ArrowException as error:
        raise UserError(f"the cached texts {path} are corrupt ({error}): delete the file.") from error


def _write_texts(texts: Iterable[str | bytes], description: str, path: Path) -> None:
    with pa.ipc.new_stream(str(path), TEXT.arrow_schema) as writer:
        batch: list[bytes] = []
        size = 0
        for text in tqdm(texts, desc=description, unit=" documents", disable=not description):
            encoded = text.encode() if isinstance(text, str) else text
            if size + len(encoded) > BATCH_BYTES or len(batch) == BATCH_ROWS:
                writer.write_batch(_record_batch(batch))
                batch, size = [], 0
            batch.append(encoded)
            size += len(encoded)
        writer.write_batch(_record_batch(batch))


def _record_batch(texts: list[bytes]) -> pa.RecordBatch:
    """The same as `pa.array` makes, but a single long text is not copied."""
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    column = pa.StringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))
    return pa.record_batch([column], schema=TEXT.arrow_schema)
