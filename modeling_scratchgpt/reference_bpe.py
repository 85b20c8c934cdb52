"""Byte-level byte-pair encoding in plain Python, written to be read.

Training starts with one token per byte, and repeatedly merges the most frequent pair of neighbouring tokens into a new token
(Sennrich et al., 2016). Starting from the 256 bytes, no text has unknown tokens, and splitting the text into words first keeps
tokens from spanning words (Radford et al., 2019). `ScratchGPTTokenizer.train` does the same, many times faster.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from tokenizers import Regex, pre_tokenizers

from .tokenization_scratchgpt import special_tokens

Pair = tuple[int, int]  # the ids of two neighbouring tokens

# GPT-2's words: an English contraction; letters, digits, or other characters, each with the space before them; white space.
GPT2_WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_SPLIT = pre_tokenizers.Split(Regex(GPT2_WORD), "isolated")

# In `tokenizer.json` each byte is a printable character (a space is `Ġ`), so the ids begin with the bytes that are printable.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]  # in Latin-1
BYTES_BY_ID = [*PRINTABLE, *sorted(set(range(256)) - set(PRINTABLE))]


def split_into_words(text: str) -> list[bytes]:
    """Cut a text into words, which joined together are the text, and encode them as UTF-8."""
    return [word.encode() for word, _ in GPT2_SPLIT.pre_tokenize_str(text)]


def merge_pair(ids: list[int], pair: Pair, new_id: int) -> list[int]:
    """Replace each occurrence of the pair by the new id, from left to right."""
    merged: list[int] = []
    for token_id in ids:
        if merged and (merged[-1], token_id) == pair:
            merged[-1] = new_id  # the pair never contains the new id, so "aaa" becomes ("aa", "a")
        else:
            merged.append(token_id)
    return merged


@dataclass(frozen=True)
class ReferenceBPE:
    """A trained tokenizer: `ReferenceBPE.train(["low lower lowest"], vocab_size=262)`."""

    vocab: list[bytes]  # of each token, by id: the special tokens, the 256 bytes, then the merged tokens
    merges: dict[Pair, int]  # the id of the new token for each merged pair, in the order in which they were learned

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn merges until the vocabulary has `vocab_size` tokens or no word has two tokens left to merge."""
        vocab = [token.encode() for token in special_tokens("bpe").values()] + [bytes([byte]) for byte in BYTES_BY_ID]
        merges: dict[Pair, int] = {}
        byte_ids = _byte_ids(vocab)
        frequencies = Counter(word for text in texts for word in split_into_words(text))
        tokens = {word: [byte_ids[byte] for byte in word] for word in frequencies}  # each word as it is tokenized so far
        counts: Counter[Pair] = Counter()
        words_with: defaultdict[Pair, set[bytes]] = defaultdict(set)  # so that a merge only visits the words it changes

        def count_pairs(word: bytes, sign: int) -> None:
            for pair in pairwise(tokens[word]):
                counts[pair] += sign * frequencies[word]
                words_with[pair].add(word)

        for word in tokens:
            count_pairs(word, 1)
        while len(vocab) < vocab_size and (highest := max(counts.values(), default=0)):
            pair = min(pair for pair, count in counts.items() if count == highest)  # like `tokenizers`: the lowest ids
            merges[pair] = len(vocab)
            for word in words_with.pop(pair):
                count_pairs(word, -1)
                tokens[word] = merge_pair(tokens[word], pair, len(vocab))
                count_pairs(word, 1)
            vocab.append(vocab[pair[0]] + vocab[pair[1]])
        return cls(vocab, merges)

    def encode(self, text: str) -> list[int]:
        """The ids of a text: in each word, the merges are applied in the order in which they were learned."""
        byte_ids = _byte_ids(self.vocab)
        ids: list[int] = []
        for word in split_into_words(text):
            tokens = [byte_ids[byte] for byte in word]
            while pairs := self.merges.keys() & pairwise(tokens):
                first = min(pairs, key=self.merges.__getitem__)  # later merges have higher ids
                tokens = merge_pair(tokens, first, self.merges[first])
            ids += tokens
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a list of ids; bytes that are no UTF-8 become U+FFFD, as half an emoji does."""
        return b"".join(self.vocab[token_id] for token_id in ids).decode("utf-8", errors="replace")


def _byte_ids(vocab: list[bytes]) -> dict[int, int]:
    """The id of each byte."""
    return {token[0]: token_id for token_id, token in enumerate(vocab) if len(token) == 1}
