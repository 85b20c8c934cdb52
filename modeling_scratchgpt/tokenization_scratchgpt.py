"""ScratchGPT's tokenizers: byte-level byte-pair encoding, and the other kinds that books compare it with.

Notable:
- Bytes are the alphabet of the two byte-level kinds (GPT-2, Radford et al., 2019), so nothing is unknown to them and every
  Unicode text comes back unchanged. The other kinds have a token for what they do not know.
- The beginning, the end and the padding of a text are three different tokens. One token for two of them is how models learn
  never to stop. None of them can be reached by spelling it out in a text of the corpus.
- It is a plain `tokenizer.json` underneath: `AutoTokenizer` reads a saved folder with or without this file.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, TokenizersBackend

TOKENIZERS = ("bpe", "bpe-gpt4", "word", "wordpiece", "unigram", "character")
BYTE_LEVEL = ("bpe", "bpe-gpt4")
MAX_VOCAB_SIZE = 2**24  # far above any in use; tokenizers reserves the memory for all of it
LONG_RUN = re.compile(r"(\S{512}|\s{512})")

# As GPT-4's split (tiktoken's cl100k) differs from GPT-2's: contractions whatever their case, digits by threes at most, ends of
# lines apart from what stands around them. Unlike it, a word takes nothing but a space in front, and keeps its accents.
GPT4_LIKE_SPLIT = (
    r"'(?i:ll|re|ve|[dmst])(?!\p{L})"  # 't of don't, not of 'twas
    r"| ?\p{L}[\p{L}\p{M}]*|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[\r\n]+"
    r"|[^\S\r\n]+(?!\S)|[^\S\r\n]+"  # an indentation, but for its last space: that one goes with the word
)


def special_tokens(kind: str) -> dict[str, str]:
    """The special tokens of a kind, as the keyword arguments of `ScratchGPTTokenizer`, in the order of their ids from 0."""
    names = ("bos", "eos", "pad") if kind in BYTE_LEVEL else ("bos", "eos", "pad", "unk")
    form = "[{}]" if kind in ("word", "wordpiece") else "<|{}|>"
    return {f"{name}_token": form.format(name.upper() if form == "[{}]" else name) for name in names}


def min_vocab_size(kind: str) -> int:
    """The fewest tokens a kind can do with: the special ones and every byte, or one character (alone and inside a word)."""
    return len(special_tokens(kind)) + (256 if kind in BYTE_LEVEL else 2 if kind == "wordpiece" else 1)


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Some damaged files make `tokenizers` panic, which is no `Exception` in Python: a `ValueError` instead."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"tokenizers panics: {error}") from error


class ScratchGPTTokenizer(TokenizersBackend):
    """
    A fast tokenizer like any other in transformers, with two ways to make one: `train` and `from_gpt2_files`.

    Example:

    ```python
    >>> tokenizer = ScratchGPTTokenizer.train(["to be or not to be"] * 9, vocab_size=270)
    >>> tokenizer.decode(tokenizer("to be, naïve 🙂")["input_ids"])
    'to be, naïve 🙂'
    ```
    """

    _auto_class = "AutoTokenizer"
    model_input_names = ["input_ids", "attention_mask"]

    @property
    def add_prefix_space(self) -> bool:
        """Whether a text's first word gets a space before it, as texts split into words want it. Only "bpe" has the choice."""
        return getattr(self.backend_tokenizer.pre_tokenizer, "add_prefix_space", False)

    @add_prefix_space.setter
    def add_prefix_space(self, value: bool) -> None:
        words = self.backend_tokenizer.pre_tokenizer
        if isinstance(words, pre_tokenizers.ByteLevel):
            words.add_prefix_space = value
            self.backend_tokenizer.pre_tokenizer = words

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, kind: str = "bpe", show_progress: bool = False) -> Self:
        """Learn a vocabulary from `texts`, which are read once and never held together.

        Args:
            texts: the training texts.
            vocab_size: number of tokens to reach, the special ones and the 256 bytes included. A small corpus may
                have too little in it to reach it; `len(tokenizer)` tells.
            kind: what the tokens are, and what `decode(encode(text))` loses:
                "bpe": merged bytes within GPT-2's words; nothing.
                "bpe-gpt4": the same within words as GPT-4 cuts them; nothing.
                "word": words and runs of punctuation; which white space stood between them, and rare words.
                "wordpiece": BERT's pieces of words, the later ones marked `##`; white space, and rare characters.
                "unigram": pieces of words from the likeliest split (Kudo, 2018); unseen characters, and `▁` for a space.
                "character": one character each; unseen characters.
            show_progress: whether `tokenizers` draws its own progress bars.

        Raises:
            TypeError: `texts` is one text; its letters would be taken for texts.
            ValueError: an unknown kind; `vocab_size` leaves no room for what the kind must hold (the bytes, or every
                character of the texts for "unigram" and "character"), or is beyond all measure.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list or an iterator of texts, got one text: put it in a list.")
        if kind not in TOKENIZERS:
            raise ValueError(f"kind must be one of {', '.join(TOKENIZERS)}, got {kind!r}.")
        if not min_vocab_size(kind) <= vocab_size <= MAX_VOCAB_SIZE:
            least = {"bpe": "256 bytes", "bpe-gpt4": "256 bytes", "wordpiece": "a character twice"}.get(kind, "one other")
            raise ValueError(
                f"vocab_size must be at least {min_vocab_size(kind)} ({least} and {len(special_tokens(kind))} special tokens) "
                f"and at most {MAX_VOCAB_SIZE}, got {vocab_size}."
            )
        tokenizer = _characters(texts, vocab_size) if kind == "character" else _trained(texts, vocab_size, kind, show_progress)
        return cls(tokenizer_object=tokenizer, **special_tokens(kind))

    @classmethod
    def from_gpt2_files(cls, vocab_file: str | Path, merges_file: str | Path) -> Self:
        """GPT-2's own tokenizer from the files OpenAI published, `encoder.json` and `vocab.bpe`.

        As GPT-2 was trained, `<|endoftext|>` both begins and ends a text; there is no padding token.

        Raises:
            OSError: a file is missing.
            ValueError: a file is not what it should be.
        """
        try:
            vocab = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
            lines = Path(merges_file).read_text(encoding="utf-8").splitlines()
            merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
            tokenizer = _untrained("bpe")
            with panics_as_errors():
                tokenizer.model = models.BPE(vocab=vocab, merges=merges)  # type: ignore[arg-type]  # pairs, or refused
        except OSError:
            raise
        except Exception as error:  # `tokenizers` raises bare exceptions
            raise ValueError(f"{vocab_file} and {merges_file} are not GPT-2's vocabulary and merges: {error}") from error
        return cls(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def _untrained(kind: str) -> Tokenizer:
    """An empty model with its split into words before and the way back to text after."""
    tokenizer, unknown = Tokenizer(models.BPE()), special_tokens(kind).get("unk_token", "")
    if kind in BYTE_LEVEL:
        words: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bpe")
        split = pre_tokenizers.Split(Regex(GPT4_LIKE_SPLIT), "isolated")
        tokenizer.pre_tokenizer = words if kind == "bpe" else pre_tokenizers.Sequence([split, words])
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "word":  # without a decoder, words are joined by spaces
        tokenizer.model = models.WordLevel(unk_token=unknown)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "wordpiece":
        tokenizer.model = models.WordPiece(unk_token=unknown)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
    elif kind == "unigram":
        tokenizer.model = models.Unigram()
        # Apart: line ends, which Metaspace takes for letters, and `<|`, or the likeliest split of a text that spells out a
        # special token would be that token.
        apart = pre_tokenizers.Split(Regex(r"<\||[^\S ]+"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([apart, pre_tokenizers.Metaspace(prepend_scheme="never")])
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return tokenizer


def _trained(texts: Iterable[str], vocab_size: int, kind: str, show_progress: bool) -> Tokenizer:
    tokenizer, special, seen = _untrained(kind), list(special_tokens(kind).values()), set[str]()
    shared: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": special, "show_progress": show_progress}
    if kind in BYTE_LEVEL:
        trainer: Any = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **shared)
    elif kind == "word":
        trainer = trainers.WordLevelTrainer(**shared)
    elif kind == "wordpiece":  # the commonest characters; each may come twice, alone and with ##
        trainer = trainers.WordPieceTrainer(limit_alphabet=max(1, (vocab_size - len(special)) // 4), **shared)
    else:
        trainer = trainers.UnigramTrainer(unk_token=special_tokens(kind)["unk_token"], **shared)

    def pieces() -> Iterator[str]:
        """Training takes the square of a word's length: a megabyte without a space would take days."""
        for text in texts:
            if kind == "unigram":
                seen.update(text.replace(" ", "▁"))
            yield from filter(None, LONG_RUN.split(text))

    try:
        tokenizer.train_from_iterator(pieces(), trainer)
    except Exception:  # bare ones; without room for the characters it says so, or goes beyond the size in silence
        _check_room(kind, len(seen), vocab_size)
        raise
    _check_room(kind, len(seen), vocab_size)
    return tokenizer


def _check_room(kind: str, num_characters: int, vocab_size: int) -> None:
    least = len(special_tokens(kind)) + num_characters + (kind == "unigram")  # with room for them alone its trainer takes all
    if least > vocab_size:
        found = f"the texts have {num_characters} different characters, and kind {kind!r} needs a token for each"
        raise ValueError(f"vocab_size must be at least {least}: {found}; got {vocab_size}.")


def _characters(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """BPE without merges, over characters instead of bytes."""
    special, seen = special_tokens("character"), set[str]()
    for text in texts:
        seen.update(text)
    _check_room("character", len(seen), vocab_size)
    vocab = {token: index for index, token in enumerate([*special.values(), *sorted(seen)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=special["unk_token"], cache_capacity=0))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@dataclass(frozen=True)
class TokenizerReport:
    """How well a tokenizer fits texts."""

    bytes_per_token: float  # UTF-8 bytes of the texts; the more, the shorter the sequences
    tokens_per_word: float  # words are what white space parts (fertility)
    unknown_share: float  # tokens that stand for something unknown, 0 to 1

    def __str__(self) -> str:
        unknown = f", {self.unknown_share:.2%} of them unknown" if self.unknown_share else ""
        return f"{self.bytes_per_token:.2f} bytes a token, {self.tokens_per_word:.2f} tokens a word{unknown}"


def tokenizer_report(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_texts: int = 1000) -> TokenizerReport:
    """Measure a fast tokenizer on the first `max_texts` texts, read one by one.

    Raises:
        ValueError: there is no word in these texts.
    """
    num_bytes = num_words = num_tokens = num_unknown = 0
    for text in islice(texts, max_texts):
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        num_bytes, num_words, num_tokens = num_bytes + len(text.encode()), num_words + len(text.split()), num_tokens + len(ids)
        num_unknown += ids.count(tokenizer.unk_token_id)
    if not num_words:
        raise ValueError(f"there is no word in the first {max_texts} texts: nothing to measure a tokenizer by.")
    return TokenizerReport(num_bytes / num_tokens, num_tokens / num_words, num_unknown / num_tokens)


__all__ = ["ScratchGPTTokenizer"]
