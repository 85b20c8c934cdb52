"""Texts, from wherever they come, as a `datasets.Dataset` with one document a row.

Notable:
- A source is `docs` (the docstrings of the installed libraries), text files, tables, folders or globs of them, or a dataset on
  the Hub.
- What is read is kept as an Arrow file in the cache of `datasets`, named by the content of its files: reused when nothing has
  changed, and never otherwise. It is memory-mapped; no step holds more than a few megabytes, or the longest document, at once.
- Documents are split before anything else happens to them, so no token of the held-out texts is seen in training.
- Which side a document falls on depends on its own text and the seed: the order of the corpus does not matter, and a corpus
  that grows moves but a few of the old ones.
"""

import array
import hashlib
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets, load_dataset, load_dataset_builder
from tqdm.auto import tqdm

from training.cli import option
from training.data.cache import atomic_file, cached
from training.data.docstrings import TEXT, read_docs
from training.data.files import check_columns, check_file, digest_of, find_files, get_text, read_file
from training.data.sources import check_sources, hub_errors, is_hub_id
from training.errors import UserError

BATCH_BYTES, BATCH_ROWS = 2**22, 1000  # of a record batch in the cache, where no single text is longer
NUM_PERMUTATIONS = 128  # of a MinHash; the share of equal minima estimates the Jaccard similarity within 4 %
SHINGLE = 5  # words


@dataclass
class CorpusArguments:
    """What can be asked of the texts of a run."""

    dataset: list[str] = option(
        ["docs"], "`docs`; .txt, .md, .jsonl, .parquet and .csv files, folders and globs of them; ids of datasets on the Hub."
    )
    text_column: str = option("text", "Column of the text where there are columns.")
    encoding_errors: str = option(
        "strict", "What to do about bytes that are not UTF-8: strict or replace.", choices=["strict", "replace"]
    )
    streaming: bool = option(False, "Download only what is read of a dataset on the Hub.")
    max_documents: int = option(0, "Most documents to read from each source; 0 for all.")
    near_duplicates: float = option(
        0.0, "Drop documents that share this much with an earlier one (Jaccard); 0 for copies only."
    )
    validation_fraction: float = option(0.01, "Share held out: whole documents, or the end of each if they are few.")
    test_fraction: float = option(0.0, "Share held out for one last look at the end.")


@dataclass(frozen=True)
class Corpus:
    """The documents of one source.

    Attributes:
        name: the file or folder without the folders above it, or the source as it was given.
        documents: a dataset with one column, `text`.
        copies: how many documents were dropped because the very same text came before, in this source or an earlier one.
        near_copies: how many were dropped because a similar text came before.
    """

    name: str
    documents: Dataset
    copies: int = 0
    near_copies: int = 0


@dataclass(frozen=True)
class Splits:
    """Three datasets with the column `text` that share no text; `test` may be empty."""

    train: Dataset
    validation: Dataset
    test: Dataset


def read_corpora(arguments: CorpusArguments) -> list[Corpus]:
    """The documents of every source, in order; blank ones and copies are dropped, and the first of each text stays.

    With `near_duplicates`, a document goes whose word 5-grams have at least this Jaccard similarity with those of one that was
    kept. Pairs are found by MinHash LSH (Broder, 1997; 99 of 100 that are at the threshold) and then compared. Takes about
    half a millisecond and 7 kB for a kilobyte.

    Raises:
        UserError: a source that does not exist or cannot be read, or has no text that was not there before.
    """
    if arguments.near_duplicates:
        _datasketch()
    sources = arguments.dataset
    shorts = [Path(source).name if os.path.exists(source) else source for source in sources]
    seen: set[int] = set()  # a 128-bit number takes 44 bytes, and its place in the set 27 to 54
    corpora = []
    for source, short in zip(sources, shorts, strict=True):
        documents = _read_source(source, arguments)
        kept, copies = array.array("q"), 0
        for index, text in enumerate(_encoded_texts(documents)):
            if _is_blank(text):
                continue
            digest = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
            if digest in seen:
                copies += 1
            else:
                seen.add(digest)
                kept.append(index)
        corpora.append(Corpus(short if shorts.count(short) == 1 else source, _selected(documents, kept), copies))
    if arguments.near_duplicates:
        corpora = _without_near_copies(corpora, arguments.near_duplicates)
    for source, corpus in zip(sources, corpora, strict=True):
        if len(corpus.documents) == 0:
            dropped = corpus.copies + corpus.near_copies
            what = "every text in it stands in a source before it: leave it out" if dropped else "there is no text in it"
            raise UserError(f"{source}: {what}.")
    return corpora


def splits_of(arguments: CorpusArguments, corpora: list[Corpus], seed: int) -> list[Splits]:
    """Each corpus of a run, split as it was told: see `split_documents`."""
    fractions = arguments.validation_fraction, arguments.test_fraction
    return [split_documents(corpus.documents, *fractions, seed) for corpus in corpora]


def check_corpora(arguments: CorpusArguments) -> None:
    """Refuse nonsense, and sources that cannot be read, before any long work. Looks at the beginning of every file, and at no
    network.

    Raises:
        UserError: fractions that leave nothing; no source, a path that is not there or not readable, a folder or a glob without
            files to read, a file that is not what its ending says, or has no column of that name, or is not UTF-8 text, as far
            as its beginning shows.
    """
    if not 0 < arguments.validation_fraction < 1:
        raise UserError(f"--validation_fraction must be between 0 and 1, got {arguments.validation_fraction}.")
    if not 0 <= arguments.test_fraction < 1 - arguments.validation_fraction:
        raise UserError(
            f"--test_fraction must be zero or more, and leave something to train on beside --validation_fraction "
            f"{arguments.validation_fraction}; got {arguments.test_fraction}."
        )
    if not 0 <= arguments.near_duplicates <= 1:
        raise UserError(f"--near_duplicates must be between 0 and 1, got {arguments.near_duplicates}.")
    if arguments.max_documents < 0:
        raise UserError(f"--max_documents must be zero or more, got {arguments.max_documents}.")
    for path in check_sources(arguments.dataset):
        check_file(path, arguments.text_column, arguments.encoding_errors)


def split_documents(documents: Dataset, validation_fraction: float, test_fraction: float, seed: int) -> Splits:
    """Training, validation and test documents, in the order of the corpus; they share no text.

    Whole documents are held out. A corpus of too few documents for that (one book, say) gives the end of each instead: the
    validation text comes after the training text, the test text after that, cut between words.

    Args:
        documents: a dataset with the column `text`, without copies.
        validation_fraction: share of the documents to hold out, above 0.
        test_fraction: another share to hold out; 0 for none.
        seed: decides which documents are held out. Changing one fraction moves no document of the other side.

    Raises:
        UserError: a side would be empty.
    """
    if validation_fraction <= 0 or test_fraction < 0 or validation_fraction + test_fraction >= 1:
        raise UserError(
            f"--validation_fraction {validation_fraction} and --test_fraction {test_fraction} must leave something on every "
            "side: make the first positive, the second zero or more, and both together less than 1."
        )
    counts = [len(documents) * fraction for fraction in (validation_fraction, test_fraction)]
    if counts[0] < 1 or 0 < counts[1] < 1:
        return _ends_held_out(documents, validation_fraction, test_fraction)
    num_validation, num_test = (round(count) for count in counts)
    if num_validation + num_test >= len(documents):
        raise UserError(
            f"--validation_fraction {validation_fraction} and --test_fraction {test_fraction} of {len(documents)} documents "
            "leave none to train on: lower one of them."
        )
    key = hashlib.sha256(str(seed).encode()).digest()
    draws = (hashlib.blake2b(text, digest_size=8, key=key).digest() for text in _encoded_texts(documents))
    order = np.argsort(np.fromiter((int.from_bytes(draw, "little") for draw in draws), dtype=np.uint64), kind="stable")
    first_test = len(documents) - num_test  # validation from one end of the draw, test from the other
    sides = order[num_validation:first_test], order[:num_validation], order[first_test:]
    return Splits(*(documents.select(np.sort(side)) for side in sides))


def _ends_held_out(documents: Dataset, validation_fraction: float, test_fraction: float) -> Splits:
    digest = hashlib.sha256()
    for text in _encoded_texts(documents):
        digest.update(hashlib.sha256(text).digest())

    def parts(side: int) -> Iterator[bytes]:
        for text in _encoded_texts(documents):
            first = _between_words(text, 0, round(len(text) * (1 - validation_fraction - test_fraction)))
            second = _between_words(text, first, round(len(text) * (1 - test_fraction))) if test_fraction else len(text)
            bounds = (0, first, second, len(text))
            part = text[bounds[side] : bounds[side + 1]]
            if not _is_blank(part):
                yield bytes(part)

    key = f"ends {validation_fraction} {test_fraction} {digest.hexdigest()}"
    splits = [_stored(f"{key} {side}", parts(side), "") for side in range(3)]
    too_small = "is no text at all: give more text or a larger fraction."
    if len(splits[0]) == 0:
        raise UserError(
            f"--validation_fraction {validation_fraction} and --test_fraction {test_fraction} leave no text of this corpus to "
            "train on: give more text or smaller fractions."
        )
    if len(splits[1]) == 0:
        raise UserError(f"--validation_fraction {validation_fraction} of this corpus {too_small}")
    if test_fraction and len(splits[2]) == 0:
        raise UserError(f"--test_fraction {test_fraction} of this corpus {too_small}")
    return Splits(*splits)


def _between_words(text: memoryview, start: int, place: int) -> int:
    """Where a space or a line end has just passed, after `start` and at most 200 bytes before `place`; else about `place`."""
    nearby = max(start, place - 200)
    window = bytes(text[nearby:place])
    if passed := max(window.rfind(b"\n"), window.rfind(b" ")) + 1:
        return nearby + passed
    while start < place < len(text) and text[place] & 0xC0 == 0x80:  # within a character
        place -= 1
    return place


# Sources ------------------------------------------------------------------------------------------------------------


def _read_source(source: str, arguments: CorpusArguments) -> Dataset:
    column, errors, most = arguments.text_column, arguments.encoding_errors, arguments.max_documents
    if source == "docs":
        return _first(read_docs(), most)
    if is_hub_id(source):
        return _streamed(source, column, most) if arguments.streaming else _downloaded(source, column, most)
    files = find_files(source)
    digests = [(path.suffix.lower(), digest_of(path)) for path in files]
    texts = itertools.chain.from_iterable(read_file(path, column, errors) for path in files)
    key = f"files {column} {errors} {most} {digests}"
    return _stored(key, itertools.islice(texts, most or None), f"Reading {source}")


def _first(documents: Dataset, max_documents: int) -> Dataset:
    return documents.take(max_documents) if max_documents else documents


def _downloaded(source: str, text_column: str, max_documents: int) -> Dataset:
    name, _, configuration = source.partition(":")
    with hub_errors(source):
        dataset = load_dataset(name, configuration or None, split="train")
    check_columns(source, {text_column: "text_column"}, dataset.column_names)
    documents = dataset.select_columns(text_column)
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    kind = getattr(documents.features["text"], "dtype", documents.features["text"])
    if kind not in ("string", "large_string"):
        raise UserError(f"{source}: the column {text_column!r} holds no text but {kind}. Set --text_column.")
    documents = _first(documents, max_documents)
    return documents if documents.features == TEXT else documents.cast(TEXT)


def _streamed(source: str, text_column: str, max_documents: int) -> Dataset:
    name, _, configuration = source.partition(":")
    with hub_errors(source):
        builder = load_dataset_builder(name, configuration or None)
        rows = builder.as_streaming_dataset(split="train")
    if rows.column_names:
        check_columns(source, {text_column: "text_column"}, rows.column_names)
        rows = rows.select_columns([text_column])

    def texts() -> Iterator[str]:
        with hub_errors(source):
            for number, row in enumerate(rows.take(max_documents) if max_documents else rows, start=1):
                place = f"{source}: row {number}"
                check_columns(place, {text_column: "text_column"}, row)
                yield get_text(row, text_column, place)

    # The builder's hash is that of the commit on the Hub.
    key = f"stream {source} {builder.hash} {text_column} {max_documents}"
    return _stored(key, texts(), f"Downloading {source}")


# Copies -------------------------------------------------------------------------------------------------------------


def _encoded_texts(documents: Dataset) -> Iterator[memoryview]:
    """Every text in UTF-8, a few megabytes in memory at a time."""
    mean = documents.data.nbytes // max(1, documents.data.num_rows)
    rows = documents.with_format("arrow").iter(batch_size=max(1, min(BATCH_ROWS, BATCH_BYTES // (mean + 1))))
    return (memoryview(value.as_buffer() or b"") for table in rows for value in table.column("text"))


def _is_blank(text: Any) -> bool:
    return not str(text[:64], "utf-8", "ignore").strip() and not str(text, "utf-8").strip()


def _selected(documents: Dataset, kept: Any) -> Dataset:
    return documents if len(kept) == len(documents) else documents.select(np.asarray(kept))


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise UserError("--near_duplicates needs another package: pip install datasketch") from error
    return datasketch


def _without_near_copies(corpora: list[Corpus], threshold: float) -> list[Corpus]:
    texts = concatenate_datasets([corpus.documents for corpus in corpora])
    digest = hashlib.sha256(f"{threshold}".encode())
    for text in _encoded_texts(texts):
        digest.update(hashlib.sha256(text).digest())
    path = cached(f"near {digest.hexdigest()}", "npy")
    if not path.exists():
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.fromiter(_first_of_each_kind(texts, threshold), dtype=np.int64))
    kept, start, thinned = np.load(path), 0, []
    for corpus in corpora:
        count = len(corpus.documents)
        mine = kept[(kept >= start) & (kept < start + count)] - start
        thinned.append(replace(corpus, documents=_selected(corpus.documents, mine), near_copies=count - len(mine)))
        start += count
    return thinned


def _first_of_each_kind(texts: Dataset, threshold: float) -> Iterator[int]:
    """The index of every text that is not similar to one that came before and was kept."""
    # As many rows a band as still bring 99 of 100 pairs at the threshold together in one of the bands.
    bands = ((NUM_PERMUTATIONS // rows, rows) for rows in range(NUM_PERMUTATIONS // 2, 0, -1))
    params = next(((b, rows) for b, rows in bands if (1 - threshold**rows) ** b <= 0.01), (NUM_PERMUTATIONS, 1))
    index = _datasketch().MinHashLSH(threshold, NUM_PERMUTATIONS, params=params)
    empty = _datasketch().MinHash(NUM_PERMUTATIONS, hashfunc=int)
    for number, text in enumerate(tqdm(texts["text"], desc="Looking for near copies", unit=" documents")):
        shingles, sketch = _shingles(text), empty.copy()
        for start in range(0, len(shingles), 10_000):
            sketch.update_batch(shingles[start : start + 10_000].tolist())
        if not any(_jaccard(shingles, _shingles(texts[other]["text"])) >= threshold for other in index.query(sketch)):
            index.insert(number, sketch)
            yield number


def _shingles(text: str) -> np.ndarray:
    """The different runs of five words, each as a 32-bit number, sorted; of a shorter text the whole."""
    words = text.split()
    runs = (" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1)))
    return np.unique(np.fromiter((zlib.crc32(run.encode()) for run in runs), dtype=np.uint32))


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


# The cache ----------------------------------------------------------------------------------------------------------


def _stored(key: str, texts: Iterable[str | bytes], description: str) -> Dataset:
    """The texts as a memory-mapped dataset: written once, then read from the cache."""
    path = cached(key, "arrow")
    if not path.exists():
        bar = tqdm(texts, desc=description, unit=" documents", disable=not description)
        with atomic_file(path) as temporary, pa.ipc.new_stream(str(temporary), TEXT.arrow_schema) as writer:
            batch: list[bytes] = []
            size = 0
            for text in bar:
                encoded = text.encode() if isinstance(text, str) else text
                if size + len(encoded) > BATCH_BYTES or len(batch) == BATCH_ROWS:
                    writer.write_batch(_record_batch(batch))
                    batch, size = [], 0
                batch.append(encoded)
                size += len(encoded)
            writer.write_batch(_record_batch(batch))
    try:
        return Dataset.from_file(str(path))
    except pa.ArrowException as error:
        raise UserError(f"the cached texts {path} are damaged ({error}): delete the file.") from error


def _record_batch(texts: list[bytes]) -> pa.RecordBatch:
    """As `pa.array` would make it, but without a copy of a single long text."""
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    column = pa.StringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))
    return pa.record_batch([column], schema=TEXT.arrow_schema)
