"""Augmentation of texts by random tokenization."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from training.data.datasets import PaddedExamples, Row, TokenizedExamples


class AugmentedTexts(Dataset[Row]):
    """Texts that are tokenized differently in every epoch: at random token boundaries, and without some of their tokens.

    The model then learns words by their parts as well, which helps with unseen words, and memorizes a small data set less fast.
    Random boundaries are subword regularization (Kudo, 2018), like BPE-dropout (Provilkov et al., 2020) but for any tokenizer
    and reproducible from the seed. Dropping tokens is word dropout (Iyyer et al., 2015).

    Args:
        examples: the same texts, for their labels.
        subword_dropout: probability of a forced token boundary between two characters.
        token_dropout: probability of dropping a token. If it would drop all of a text, none is dropped.
        seed: of the random numbers, with the index, which continues from epoch to epoch.
    """

    def __init__(
        self,
        texts: Sequence[str],
        examples: TokenizedExamples,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        subword_dropout: float,
        token_dropout: float,
        seed: int,
    ):
        self.texts, self.rows, self.backend, self.seed = texts, PaddedExamples(examples), tokenizer.backend_tokenizer, seed
        self.subword_dropout, self.token_dropout = subword_dropout, token_dropout
        text = self.backend.encode("a", add_special_tokens=False).ids
        ids = tokenizer("a")["input_ids"]
        start = next(start for start in range(len(ids)) if ids[start : start + len(text)] == text)
        self.prefix, self.suffix = ids[:start], ids[start + len(text) :]  # special tokens
        self.max_tokens = max_length - len(self.prefix) - len(self.suffix)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, draw: int) -> Row:
        text, generator = self.texts[draw % len(self)], np.random.default_rng((self.seed, draw))
        cuts = np.flatnonzero(generator.random(len(text) - 1) < self.subword_dropout) + 1
        pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts.tolist(), len(text)])]
        encodings = self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        ids = np.array([token for encoding in encodings for token in encoding.ids], dtype=np.int64)
        kept = generator.random(len(ids)) >= self.token_dropout
        ids = ids[kept] if kept.any() else ids
        return {**self.rows[draw], "input_ids": torch.tensor([*self.prefix, *ids[: self.max_tokens].tolist(), *self.suffix])}
