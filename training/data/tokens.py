"""From documents to token ids: the tokenizer of a corpus, and its ids in one flat file.

Notable:
- The ids of a split stand one after another in a file that is memory-mapped: `<bos> document <eos> <bos> document <eos> ...`
- Where another model's tokenizer has one token for beginning and end, or only one of them, a single one stands between two
  documents, and one at each end. So the first token that is predicted is the first of the text, unless there is neither.
- Tokenizer and ids are named by the content that they are made from: reused when nothing has changed, and never otherwise.
- Long documents are encoded piece by piece, so memory does not grow with them. They are cut where no split into words sees it.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_scratchgpt import ScratchGPTTokenizer
from modeling_scratchgpt.tokenization_scratchgpt import panics_as_errors
from training.data.cache import atomic_file, cached
from training.errors import UserError

# Before white space after a letter or digit: GPT-2's and GPT-4's split, and those on white space, all begin a new word there.
CUT = re.compile(r"(?<=[^\W_])(?=\s)")
PIECE, LONGEST_PIECE = 2**16, 2**20  # characters
BATCH = 2**20  # characters that are encoded at once, on all cores


@dataclass(frozen=True)
class Tokens:
    """The token ids of one split, where its documents start among them, the length of its text in UTF-8 bytes, and a digest
    of text and tokenizer."""

    ids: np.ndarray
    num_bytes: int
    starts: np.ndarray
    digest: str = ""


def train_tokenizer(texts: datasets.Dataset, vocab_size: int, kind: str, context_length: int) -> ScratchGPTTokenizer:
    """ScratchGPT's tokenizer for these texts, trained once and then read from the cache.

    Raises:
        UserError: the vocabulary is too small for the corpus; the file in the cache is damaged.
    """
    digest, _ = _content(texts)
    path = cached(f"tokenizer {kind} {vocab_size} {digest}", "json")
    if not path.exists():
        passages = (text for batch in texts.iter(batch_size=100) for text in batch["text"])
        try:
            trained = ScratchGPTTokenizer.train(passages, vocab_size, kind=kind, show_progress=True)
        except ValueError as error:  # only the corpus tells how many characters it has
            raise UserError(f"--vocab_size {vocab_size} with --tokenizer {kind}: {error}") from error
        content = {"tokenizer": trained.backend_tokenizer.to_str(), "special_tokens": trained.special_tokens_map}
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(content))
    try:
        content = json.loads(path.read_text())
        with panics_as_errors():
            backend = Tokenizer.from_str(content["tokenizer"])
        return ScratchGPTTokenizer(tokenizer_object=backend, model_max_length=context_length, **content["special_tokens"])
    except Exception as error:  # `tokenizers` raises bare exceptions
        raise UserError(f"the cached tokenizer {path} is damaged ({error}): delete it.") from error


def tokenize(texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> Tokens:
    """The ids of all texts as one memory-mapped array, made once.

    Args:
        texts: a dataset with the column `text`.
        tokenizer: a fast tokenizer.
        name: what the progress bar calls the texts.
    """
    marks = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True  # one spelled out in a text is text: it must not end the document
    backend.no_truncation()
    backend.no_padding()
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    digest, num_bytes = _content(texts)
    path = cached(f"tokens {marks} {backend.to_str()} {digest}", dtype.name)
    if not _is_whole(path, dtype):
        lengths: list[int] = []
        length = 0
        bar = tqdm(total=num_bytes, desc=f"Tokenizing {name}", unit="B", unit_scale=True, disable=not num_bytes)
        with atomic_file(path) as temporary, open(temporary, "wb") as file, bar:
            for pieces in _batches_of_pieces(texts):
                encodings = backend.encode_batch_fast([text for text, _, _ in pieces], add_special_tokens=False)
                for (text, is_first, is_last), encoding in zip(pieces, encodings, strict=True):
                    begins = is_first and (len(set(marks)) == 2 or not lengths)
                    ids = marks[:1] * begins + encoding.ids + marks[-1:] * is_last
                    file.write(np.array(ids, dtype=dtype).tobytes())
                    length += len(ids)
                    if is_last:
                        lengths.append(length)
                        length = 0
                    bar.update(len(text.encode()))
            # After the ids, the lengths of the documents; the last sixteen bytes tell whether the file is whole.
            file.write(np.array([*lengths, len(lengths), sum(lengths)], dtype=np.uint64).tobytes())
    num_documents, num_ids = _counts(path)
    ids = np.memmap(path, dtype=dtype, mode="r", shape=(num_ids,))
    lengths_ = np.fromfile(path, dtype=np.uint64, count=num_documents, offset=num_ids * dtype.itemsize).astype(np.int64)
    return Tokens(ids, num_bytes, np.cumsum(lengths_) - lengths_, path.stem)


def _batches_of_pieces(texts: datasets.Dataset) -> Iterator[list[tuple[str, bool, bool]]]:
    """Every text in pieces, about a megabyte at once: (piece, whether its document begins, and ends, with it)."""
    batch, characters = [], 0
    for rows in texts.iter(batch_size=100):
        for text in rows["text"]:
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
    """The text in pieces of about 64,000 characters that are tokenized as the whole would be.

    Only where a million characters offer no fitting place (no letter or digit before white space) is it cut regardless.
    """
    pieces, start = [], 0
    while len(text) - start > PIECE:
        place = CUT.search(text, start + PIECE, start + LONGEST_PIECE)
        end = place.start() if place else min(start + LONGEST_PIECE, len(text))
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _content(texts: datasets.Dataset) -> tuple[str, int]:
    """A digest of all texts, and their length in UTF-8 bytes."""
    content, num_bytes = hashlib.sha256(), 0
    for batch in texts.iter(batch_size=100):
        for text in batch["text"]:
            encoded = text.encode()
            content.update(hashlib.sha256(encoded).digest())
            num_bytes += len(encoded)
    return content.hexdigest(), num_bytes


def _counts(path: Path) -> tuple[int, int]:
    """What the end of a token file says: how many documents and how many ids it holds."""
    with open(path, "rb") as file:
        file.seek(-16, os.SEEK_END)
        num_documents, num_ids = np.frombuffer(file.read(), dtype=np.uint64).tolist()
    return num_documents, num_ids


def _is_whole(path: Path, dtype: np.dtype) -> bool:
    if not path.exists() or path.stat().st_size < 16:
        return False
    num_documents, num_ids = _counts(path)
    return path.stat().st_size == num_ids * dtype.itemsize + (num_documents + 2) * 8
