"""ScratchGPT's tokenizers: byte-level BPE, and other kinds for comparison.

Notable:
- The byte-level kinds (GPT-2, Radford et al., 2019) need no unknown token, and decode every Unicode text unchanged.
- BOS, EOS and padding are three different tokens: a model whose EOS is also its padding never learns to stop. Text in the
  corpus that spells out a special token is not encoded as that token.
- `TokenizersBackend` loads a saved tokenizer without this file; `AutoTokenizer` needs it, or `trust_remote_code=True`.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, TokenizersBackend

TOKENIZERS = ("bpe", "bpe-gpt4", "word", "wordpiece", "unigram", "character")
BYTE_LEVEL = ("bpe", "bpe-gpt4")
MAX_VOCAB_SIZE = 2**24  # sanity limit: `tokenizers` allocates memory for all of it
LONG_RUN = re.compile(r"(\S{512}|\s{512})")
# A space before the first word, unless there is one: what ByteLevel has as an option.
PREFIX_SPACE = normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace(Regex(r"\A  "), " ")])

# Like GPT-4's split (tiktoken's cl100k), unlike GPT-2's: contractions in any case, at most three digits, line ends separate.
# Unlike GPT-4's: a word includes only a space before it, and keeps combining accents.
GPT4_LIKE_SPLIT = (
    r"'(?i:ll|re|ve|[dmst])(?!\p{L})"  # 't of don't, not of 'twas
    r"| ?\p{L}[\p{L}\p{M}]*|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[\r\n]+"
    r"|[^\S\r\n]+(?!\S)|[^\S\r\n]+"  # indentation except its last space, which belongs to the word
)


def special_tokens(kind: str) -> dict[str, str]:
    """Special tokens of a kind, as keyword arguments of `ScratchGPTTokenizer`, in the order of their ids from 0."""
    names = ("bos", "eos", "pad") if kind in BYTE_LEVEL else ("bos", "eos", "pad", "unk")
    is_bracketed = kind in ("word", "wordpiece")  # as BERT's
    return {f"{name}_token": f"[{name.upper()}]" if is_bracketed else f"<|{name}|>" for name in names}


def min_vocab_size(kind: str) -> int:
    """Smallest vocabulary of a kind: special tokens and all bytes, or one character (for WordPiece alone and inside a word)."""
    return len(special_tokens(kind)) + (256 if kind in BYTE_LEVEL else 2 if kind == "wordpiece" else 1)


def adds_prefix_space(backend: Tokenizer) -> bool:
    """Check if a tokenizer adds a space before the first word."""
    is_normalized = str(backend.normalizer) == str(PREFIX_SPACE)
    return is_normalized or getattr(backend.pre_tokenizer, "add_prefix_space", False)


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise panics of `tokenizers`, which some damaged files cause and which are not an `Exception`, as a `ValueError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"tokenizers panicked: {error}") from error


class ScratchGPTTokenizer(TokenizersBackend):
    """A fast tokenizer of transformers, with the constructors `train` and `from_gpt2_files`.

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
        """Add a space before the first word, as pre-tokenized texts need it."""
        return adds_prefix_space(self.backend_tokenizer)

    @add_prefix_space.setter
    def add_prefix_space(self, value: bool) -> None:
        if "add_prefix_space" not in self.init_kwargs:  # transformers assigns False first: tokenizer.json decides
            value = value or self.add_prefix_space
        self.init_kwargs["add_prefix_space"] = value
        if value == self.add_prefix_space:
            return
        backend = self.backend_tokenizer
        words = backend.pre_tokenizer
        if isinstance(words, pre_tokenizers.ByteLevel):
            words.add_prefix_space = value
            backend.pre_tokenizer = words
        elif value and backend.normalizer is not None:
            raise ValueError("add_prefix_space is not supported for a tokenizer with a normalizer: put spaces into the texts.")
        else:
            backend.normalizer = PREFIX_SPACE if value else None

    def _encode_plus(self, *args, **kwargs):
        try:
            return super()._encode_plus(*args, **kwargs)
        except Exception as error:  # `tokenizers` raises bare exceptions
            if "WordLevel error" not in str(error):
                raise
            raise ValueError("a text has characters or words outside the vocabulary, which has no unknown token.") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, kind: str = "bpe", show_progress: bool = False) -> Self:
        """Train a tokenizer on `texts`, which are streamed once.

        Args:
            vocab_size: number of tokens, including special tokens and the 256 bytes. A small corpus may yield fewer.
            kind: the algorithm, and what is lost by `decode(encode(text))`:
                "bpe": byte-level BPE with GPT-2's pre-tokenization; nothing.
                "bpe-gpt4": the same with GPT-4's pre-tokenization; nothing.
                "word": words and runs of punctuation; white space, and rare words.
                "wordpiece": BERT's WordPiece, with `##` for continuations; white space, and rare characters.
                "unigram": subwords by a unigram language model (Kudo, 2018); unseen characters, and `▁` becomes a space.
                "character": single characters; unseen characters.

        Raises:
            TypeError: `texts` is a single string.
            ValueError: an unknown kind; `vocab_size` is too large, or too small for the bytes or characters of the texts.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list or an iterator of strings, got one string: put it in a list.")
        if kind not in TOKENIZERS:
            raise ValueError(f"kind must be one of {', '.join(TOKENIZERS)}, got {kind!r}.")
        if not min_vocab_size(kind) <= vocab_size <= MAX_VOCAB_SIZE:
            least = {"bpe": "256 bytes", "bpe-gpt4": "256 bytes", "wordpiece": "a character twice"}.get(kind, "one other")
            needed = f"at least {min_vocab_size(kind)} ({least} and {len(special_tokens(kind))} special tokens)"
            raise ValueError(f"vocab_size must be {needed} and at most {MAX_VOCAB_SIZE}, got {vocab_size}.")
        is_character = kind == "character"
        tokenizer = _train_characters(texts, vocab_size) if is_character else _train(texts, vocab_size, kind, show_progress)
        return cls(tokenizer_object=tokenizer, **special_tokens(kind))

    @classmethod
    def from_gpt2_files(cls, vocab_file: str | Path, merges_file: str | Path) -> Self:
        """Load GPT-2's tokenizer from OpenAI's files `encoder.json` and `vocab.bpe`.

        As in GPT-2, `<|endoftext|>` is both BOS and EOS, and there is no padding token.

        Raises:
            OSError: a file is missing.
            ValueError: a file is invalid.
        """
        tokenizer, _ = _build("bpe")
        content, merges = (Path(file).read_bytes() for file in (vocab_file, merges_file))
        try:
            # Not by BPE.from_file, which drops ids that are not numbers and refuses blank lines.
            lines = merges.decode().splitlines()
            pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
            with panics_as_errors():
                tokenizer.model = models.BPE(vocab=json.loads(content), merges=pairs)  # type: ignore[arg-type]
        except Exception as error:  # `tokenizers` raises bare exceptions
            raise ValueError(f"{vocab_file} and {merges_file} are not GPT-2's vocabulary and merges: {error}") from error
        return cls(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def _build(kind: str, **training: Any) -> tuple[Tokenizer, Any]:
    """Build an empty model, with its pre-tokenizer and decoder, and its trainer."""
    special = special_tokens(kind)
    unknown, training["special_tokens"] = special.get("unk_token", ""), list(special.values())
    if kind in BYTE_LEVEL:
        tokenizer = Tokenizer(models.BPE())
        words: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bpe")
        split = pre_tokenizers.Split(Regex(GPT4_LIKE_SPLIT), "isolated")
        tokenizer.pre_tokenizer = words if kind == "bpe" else pre_tokenizers.Sequence([split, words])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **training)
    if kind == "word":  # without a decoder, tokens are joined with spaces
        tokenizer = Tokenizer(models.WordLevel(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return tokenizer, trainers.WordLevelTrainer(**training)
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        limit = max(1, (training["vocab_size"] - len(special)) // 4)  # a character may take two tokens, with and without ##
        return tokenizer, trainers.WordPieceTrainer(limit_alphabet=limit, **training)
    tokenizer = Tokenizer(models.Unigram())
    # Isolate line ends, which Metaspace treats as letters, and `<|`, so that a spelled-out special token does not become one.
    isolate = pre_tokenizers.Split(Regex(r"<\||[^\S ]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([isolate, pre_tokenizers.Metaspace(prepend_scheme="never")])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return tokenizer, trainers.UnigramTrainer(unk_token=unknown, **training)


def _train(texts: Iterable[str], vocab_size: int, kind: str, show_progress: bool) -> Tokenizer:
    tokenizer, trainer = _build(kind, vocab_size=vocab_size, show_progress=show_progress)
    seen = set[str]()

    def pieces() -> Iterator[str]:
        """Split long runs without spaces: training time is quadratic in the length of a word."""
        for text in texts:
            if kind == "unigram":
                seen.update(text.replace(" ", "▁"))
            yield from filter(None, LONG_RUN.split(text))

    try:
        tokenizer.train_from_iterator(pieces(), trainer)
    finally:  # some trainers raise a bare exception for too small a vocabulary, others exceed it
        _check_room(kind, len(seen), vocab_size)
    if kind == "unigram":
        model = json.loads(tokenizer.to_str())["model"]
        # Sums of multiples of 1/1024 have no rounding errors, which would choose among equally likely splits of a word, and
        # differently in other programs that read the file.
        scores = [(token, round(1024 * score) / 1024) for token, score in model["vocab"]]
        tokenizer.model = models.Unigram(scores, model["unk_id"], model["byte_fallback"])
    return tokenizer


def _check_room(kind: str, num_characters: int, vocab_size: int) -> None:
    min_size = len(special_tokens(kind)) + num_characters + (kind == "unigram")  # its trainer needs one more
    if min_size > vocab_size:
        found = f"the texts have {num_characters} different characters, and kind {kind!r} needs a token for each"
        raise ValueError(f"vocab_size must be at least {min_size}: {found}; got {vocab_size}.")


def _train_characters(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Build a character tokenizer: BPE without merges."""
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
    """Fit of a tokenizer to texts."""

    bytes_per_token: float  # UTF-8 bytes; higher means shorter sequences
    tokens_per_word: float  # fertility; words are separated by white space
    unknown_share: float  # share of unknown tokens, 0 to 1

    def __str__(self) -> str:
        unknown = f", {self.unknown_share:.2%} of them unknown" if self.unknown_share else ""
        return f"{self.bytes_per_token:.2f} bytes per token, {self.tokens_per_word:.2f} tokens per word{unknown}"


def tokenizer_report(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_texts: int = 1000) -> TokenizerReport:
    """Measure a fast tokenizer on the first `max_texts` texts, which are streamed.

    Raises:
        ValueError: the texts have no words.
    """
    num_bytes = num_words = num_tokens = num_unknown = 0
    for text in islice(texts, max_texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        num_bytes, num_words, num_tokens = num_bytes + len(text.encode()), num_words + len(text.split()), num_tokens + len(ids)
        num_unknown += ids.count(tokenizer.unk_token_id)
    if not num_words:
        raise ValueError(f"the first {max_texts} texts have no words to measure a tokenizer with.")
    return TokenizerReport(num_bytes / num_tokens, num_tokens / num_words, num_unknown / num_tokens)
