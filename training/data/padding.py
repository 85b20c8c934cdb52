"""Rows of different lengths: batches of texts that are about as long as each other, padded to the longest among them.

Notable:
- A batch costs what its longest text costs. Texts are drawn at random, a pool of batches at a time, and sorted by length
  within the pool: what is left is a quarter of the padding, and nearly all of the randomness.
- Which texts make up batch n depends on the seed and on n alone, not on the number of processes or on what ran before. So does
  how their tokens vary: an index says which text, and goes on counting from epoch to epoch.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

POOL = 16  # batches


@dataclass(frozen=True)
class EncodedTexts(Dataset[dict[str, Any]]):
    """
    The ids of texts, one after another, and their labels if they have any.

    Attributes:
        ids: of all texts.
        starts: where each begins among them, and where the last ends.
        num_truncated: how many texts were longer than they may be.
        labels: float32 (N, C).
    """

    ids: np.ndarray
    starts: np.ndarray
    num_truncated: int
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text."""
        return np.diff(self.starts)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        index = draw % len(self)
        row: dict[str, Any] = {"input_ids": self.ids[self.starts[index] : self.starts[index + 1]].tolist()}
        return row if self.labels is None else {**row, "labels": self.labels[index].tolist()}


def encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, labels: np.ndarray | None = None
) -> EncodedTexts:
    """Texts as whoever uses the model gives them to it: with the tokens that the tokenizer puts around each.

    Args:
        tokenizer: a fast one.
        max_length: tokens; a longer text loses its end.
    """
    parts, lengths, num_truncated = [], [], 0
    for first in range(0, len(texts), 1000):
        encodings = tokenizer(
            list(texts[first : first + 1000]), truncation=True, max_length=max_length, padding=False
        ).encodings
        for encoding in encodings or []:
            parts.append(np.array(encoding.ids, dtype=np.int32))
            lengths.append(len(encoding.ids))
            num_truncated += bool(encoding.overflowing)
    return EncodedTexts(np.concatenate(parts), np.cumsum([0, *lengths]), num_truncated, labels)


class AugmentedTexts(Dataset[dict[str, Any]]):
    """
    Texts that are told in other tokens each time: between any two characters a token may have to end, and some are left out.

    A word is then known by its parts too, also one that was never seen; no single word decides; and few texts are not learned
    by heart so soon. Ends at random are a subword regularisation (Kudo, 2018) like BPE-dropout (Provilkov et al., 2020), for
    any kind of tokenizer and with random numbers that follow from the seed; leaving out is word dropout (Iyyer et al., 2015).

    Args:
        texts: as they were encoded.
        encoded: the same as they are, for their labels.
        tokenizer: a fast one.
        max_length: tokens; a longer text loses its end.
        subword_dropout: probability that a token has to end between two characters.
        token_dropout: probability that a token is left out; where none would stay, all do.
        seed: decides about both.
    """

    def __init__(
        self,
        texts: Sequence[str],
        encoded: EncodedTexts,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        subword_dropout: float,
        token_dropout: float,
        seed: int,
    ):
        self.texts, self.encoded, self.backend, self.seed = texts, encoded, tokenizer.backend_tokenizer, seed
        self.subword_dropout, self.token_dropout = subword_dropout, token_dropout
        self.before, self.after = _around(tokenizer)
        self.room = max_length - len(self.before) - len(self.after)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, draw: int) -> dict[str, Any]:
        text, generator = self.texts[draw % len(self)], np.random.default_rng((self.seed, draw))
        cuts = np.flatnonzero(generator.random(len(text) - 1) < self.subword_dropout) + 1
        edges = [0, *cuts.tolist(), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
        encodings = self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        ids = np.array([token for encoding in encodings for token in encoding.ids], dtype=np.int64)
        kept = generator.random(len(ids)) >= self.token_dropout
        ids = ids[kept] if kept.any() else ids
        return {**self.encoded[draw], "input_ids": [*self.before, *ids[: self.room].tolist(), *self.after]}


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before a text and after it."""
    alone = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer("a")["input_ids"]
    place = next(place for place in range(len(ids)) if ids[place : place + len(alone)] == alone)
    return ids[:place], ids[place + len(alone) :]


class LengthGroupedBatchSampler(Sampler[list[int]]):
    """
    The batches of a whole run, as indices that go on counting from epoch to epoch. Each text comes once an epoch, and all
    batches are full: those that are left over at the end of an epoch open the next.

    Args:
        lengths: of the texts, in tokens.
        batch_size: texts in a batch, over all processes.
        num_batches: batches in the run.
        seed: decides everything.
        start: batches to leave out, because they were trained on before.
    """

    drop_last = True  # asked by Accelerate

    def __init__(self, lengths: np.ndarray, batch_size: int, num_batches: int, seed: int, start: int = 0):
        self.lengths, self.batch_size, self.num_batches, self.seed, self.start = lengths, batch_size, num_batches, seed, start

    def __len__(self) -> int:
        return self.num_batches - self.start

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self._batches(), self.start, self.num_batches)

    def _batches(self) -> Iterator[list[int]]:
        generator, count, size = np.random.default_rng(self.seed), len(self.lengths), self.batch_size
        draws: list[int] = []
        for first in itertools.count(step=count):
            num_left = len(draws)
            draws += (generator.permutation(count) + first).tolist()
            if num_left and len(draws) >= size:
                yield draws[:size]
                draws = draws[size:]
            while len(draws) >= size:
                num_batches = min(POOL, len(draws) // size)
                pool, draws = draws[: num_batches * size], draws[num_batches * size :]
                pool.sort(key=lambda draw: self.lengths[draw % count])
                for place in generator.permutation(num_batches).tolist():
                    yield pool[place * size : (place + 1) * size]


def padded_loader(texts: Dataset[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **how: Any) -> DataLoader:
    """A loader of batches that are padded to their longest text; `how` says which, in the DataLoader's terms."""
    return DataLoader(texts, collate_fn=DataCollatorWithPadding(tokenizer), **how)


def in_order_of_length(lengths: np.ndarray) -> list[int]:
    """All texts, the longest first: so a batch that is too large for the memory shows at once."""
    return np.argsort(-lengths, kind="stable").tolist()
