"""Training a tokenizer on a corpus, and tokenizing documents and texts.

Notable:
- The ids of a split's documents are in one memory-mapped file: `<bos> document <eos> <bos> document <eos> ...`
- If a tokenizer has the same token for beginning and end, or only one of the two, that token is put once between two documents,
  and once at either end. So the first token that is predicted is the first of the text, unless there is neither token.
- Long documents are tokenized in pieces, to limit memory.
"""

import copy
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import datasets
import numpy as np
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_scratchgpt import ScratchGPTTokenizer
from training.data.cache import CHECKSUM_BYTES, cached_file, digest_texts
from training.data.datasets import TokenizedExamples
from training.errors import UserError, interruptible
from training.progress import bar_options, is_interactive

# White space after a letter or digit: GPT-2's and GPT-4's pre-tokenizers, and splitting on white space, all start a word there.
CUT = re.compile(r"(?<=[^\W_])(?=\s)")
PIECE, LONGEST_PIECE = 2**16, 2**20  # characters
TRAINING_BYTES = 2 * 10**9  # of text that a tokenizer is trained on: more changes hardly any token, and takes hours
PART_BYTES = 10**9  # of text: an interrupted tokenization continues at the part that it has begun
BATCH = 2**20  # characters that are tokenized at a time, on all cores


def train_tokenizer(texts: datasets.Dataset, vocab_size: int, kind: str, context_length: int) -> ScratchGPTTokenizer:
    """Train a tokenizer on the column `text`, on pieces from all of it if it is long, or load it from the cache.

    Raises:
        UserError: the vocabulary is too small for the corpus.
    """
    digest, num_bytes = digest_texts(texts)
    every = -(-num_bytes // TRAINING_BYTES)

    def write(path: Path) -> None:
        passages: Iterator[str] = (text for batch in texts.iter(batch_size=100) for text in batch["text"])
        if every > 1:
            passages = itertools.islice((piece for text in passages for piece in cut_into_pieces(text)), 0, None, every)
        try:
            with interruptible():
                trained = ScratchGPTTokenizer.train(passages, vocab_size, kind=kind, show_progress=is_interactive())
        except ValueError as error:  # how many characters there are is not known before
            raise UserError(f"--vocab_size {vocab_size} with --tokenizer {kind}: {error}") from error
        content = {"tokenizer": trained.backend_tokenizer.to_str(), "special_tokens": trained.special_tokens_map}
        path.write_text(json.dumps(content))

    path = cached_file(f"tokenizer {kind} {vocab_size} {digest}{f' 1/{every}' if every > 1 else ''}", "json", write)
    content = json.loads(path.read_bytes()[:-CHECKSUM_BYTES])
    backend = Tokenizer.from_str(content["tokenizer"])
    return ScratchGPTTokenizer(tokenizer_object=backend, model_max_length=context_length, **content["special_tokens"])


def tokenize_documents(texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> TokenizedExamples:
    """Tokenize the column `text` into a memory-mapped file, or open the cached one; `name` is for the progress bar."""
    marks = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True  # a special token that is spelled out in a text must not end the document
    backend.no_truncation()
    backend.no_padding()
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    digest, num_bytes = digest_texts(texts)
    made_from = f"tokens {marks} {backend.to_str()} {digest}"
    bar = tqdm(total=num_bytes, desc=f"Tokenizing {name}", unit="B", unit_scale=True, **bar_options(hidden=not num_bytes))
    parts: list[Path] = []

    def write_rows(path: Path, first: int, last: int) -> None:
        lengths: list[int] = []
        with open(path, "wb") as file:
            for pieces in _batches_of_pieces(texts.select(range(first, last))):
                encodings = backend.encode_batch_fast([text for text, _, _ in pieces], add_special_tokens=False)
                for (text, is_first, is_last), encoding in zip(pieces, encodings, strict=True):
                    begins = is_first and (len(set(marks)) == 2 or not (first or lengths))
                    ids = marks[:1] * begins + encoding.ids + marks[-1:] * is_last
                    file.write(np.array(ids, dtype=dtype).tobytes())
                    lengths += [0] * is_first
                    lengths[-1] += len(ids)
                    bar.update(len(text.encode()))
            _write_lengths(file, lengths)

    def write(path: Path) -> None:
        count = min(len(texts), -(-num_bytes // PART_BYTES))
        if count <= 1:
            return write_rows(path, 0, len(texts))
        for first, last in itertools.pairwise(len(texts) * index // count for index in range(count + 1)):
            rows = functools.partial(write_rows, first=first, last=last)
            parts.append(cached_file(f"{made_from} {first}-{last}", dtype.name, rows))
            bar.update(num_bytes * last // len(texts) - bar.n)  # if it was in the cache
        joined = [_read_tokens(part, dtype) for part in parts]
        with open(path, "wb") as file:
            for ids, _ in joined:
                ids.tofile(file)
            _write_lengths(file, np.concatenate([lengths for _, lengths in joined]))

    with bar:
        path = cached_file(made_from, dtype.name, write)
    for part in parts:
        part.unlink(missing_ok=True)
    ids, lengths = _read_tokens(path, dtype)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    kept = None if loses_text(tokenizer, ids, texts["text"][:20]) else num_bytes
    return TokenizedExamples(ids, offsets, kept, path.stem, num_marks=len(set(marks)))


def _write_lengths(file: BinaryIO, lengths: Sequence[int] | np.ndarray) -> None:
    """The lengths of the documents follow the ids, and then the numbers of both."""
    file.write(np.array([*lengths, len(lengths), sum(lengths)], dtype=np.uint64).tobytes())


def _read_tokens(path: Path, dtype: np.dtype) -> tuple[np.memmap, np.ndarray]:
    """The ids, and the lengths of the documents, in a cached file."""
    num_documents, num_ids = np.fromfile(path, np.uint64, count=2, offset=path.stat().st_size - CHECKSUM_BYTES - 16).tolist()
    ids = np.memmap(path, dtype=dtype, mode="r", shape=(num_ids,))
    return ids, np.fromfile(path, dtype=np.uint64, count=num_documents, offset=num_ids * dtype.itemsize)


def first_tokens(examples: TokenizedExamples, tokenizer: PreTrainedTokenizerBase, count: int) -> TokenizedExamples:
    """The first `count` ids of some documents, and the length of their text."""
    offsets = np.append(examples.offsets[: np.searchsorted(examples.offsets, count)], count)
    ids, num_bytes = examples.ids[:count], examples.num_bytes
    if num_bytes is not None:
        texts = (tokenizer.decode(ids[start:end], skip_special_tokens=True) for start, end in itertools.pairwise(offsets))
        num_bytes = sum(len(str(text).encode()) for text in texts)
    return replace(examples, ids=ids, offsets=offsets, num_bytes=num_bytes)


def loses_text(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, texts: Sequence[str]) -> bool:
    """True if ids are unknown or, judged by the beginnings of some texts, decoding changes more than their ends.

    Bits per byte would then leave out what is lost, and could not be compared with those of other tokenizers.
    """
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    parts = (ids[start : start + BATCH] for start in range(0, len(ids), BATCH) if unknown)
    if any(np.isin(part, list(unknown)).any() for part in parts):
        return True
    beginnings = [text[:500] for text in texts]
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in beginnings]
    decoded = tokenizer.batch_decode(encoded, clean_up_tokenization_spaces=False)
    return [text.strip() for text in decoded] != [text.strip() for text in beginnings]


def tokenize_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, labels: np.ndarray | None = None
) -> tuple[TokenizedExamples, int]:
    """Tokenize texts as `pipeline` does, with the special tokens that the tokenizer adds to each.

    Texts of more than `max_length` tokens are truncated; their number is returned with the examples.
    """
    parts, num_truncated = [], 0
    for first in range(0, len(texts), 1000):
        batch = list(texts[first : first + 1000])
        for encoding in tokenizer(batch, truncation=True, max_length=max_length, padding=False).encodings or []:
            parts.append(np.array(encoding.ids, dtype=np.int32))
            num_truncated += bool(encoding.overflowing)
    return TokenizedExamples(np.concatenate(parts), np.cumsum([0, *map(len, parts)]), labels=labels), num_truncated


def _batches_of_pieces(texts: datasets.Dataset) -> Iterator[list[tuple[str, bool, bool]]]:
    """Yield all texts in pieces, about a megabyte at a time: (piece, is the document's first, is its last)."""
    batch, characters = [], 0
    for text in (text for rows in texts.iter(batch_size=100) for text in rows["text"]):
        pieces = cut_into_pieces(text)
        for index, piece in enumerate(pieces):
            batch.append((piece, index == 0, index == len(pieces) - 1))
            characters += len(piece)
            if characters >= BATCH:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def cut_into_pieces(text: str) -> list[str]:
    """Cut a text into pieces of about 64,000 characters that have the same tokens as the whole.

    Only if a million characters have no suitable position (white space after a letter or digit) is it cut anywhere.
    """
    pieces, start = [], 0
    while len(text) - start > PIECE:
        found = CUT.search(text, start + PIECE, start + LONGEST_PIECE)
        end = found.start() if found else min(start + LONGEST_PIECE, len(text))
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]
