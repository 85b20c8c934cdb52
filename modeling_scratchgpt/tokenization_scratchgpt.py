"""ScratchGPT's tokenizer: byte-level byte-pair encoding, trained on any text and able to say any text.

Notable:
- Bytes are the alphabet (GPT-2, Radford et al., 2019), so nothing is unknown and every Unicode text comes back unchanged.
- The beginning, the end and the padding of a text are three different tokens. One token for two of them is how models learn
  never to stop.
- It is a plain `tokenizer.json` underneath: `AutoTokenizer` reads a saved folder with or without this file.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import TokenizersBackend

BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = [BOS_TOKEN, EOS_TOKEN, PAD_TOKEN]
MAX_VOCAB_SIZE = 2**24  # far above any in use; tokenizers reserves the memory for all of it
LONG_RUN = re.compile(r"(\S{512}|\s{512})")
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # the special tokens and every byte


def _byte_level(model: models.BPE) -> Tokenizer:
    """GPT-2's way around a BPE model: its split into words before, bytes to text after."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


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

    model_input_names = ["input_ids", "attention_mask"]

    @property
    def add_prefix_space(self) -> bool:
        """Whether a text's first word gets a space before it, like any other: wanted for texts that are split into words."""
        return getattr(self.backend_tokenizer.pre_tokenizer, "add_prefix_space", False)

    @add_prefix_space.setter
    def add_prefix_space(self, value: bool) -> None:
        words = self.backend_tokenizer.pre_tokenizer
        if isinstance(words, pre_tokenizers.ByteLevel):
            words.add_prefix_space = value
            self.backend_tokenizer.pre_tokenizer = words

    @classmethod
    def train(cls, texts: Iterable[str] | Iterator[str], vocab_size: int, show_progress: bool = False) -> "ScratchGPTTokenizer":
        """Learn the merges from `texts`, which are read once and never held together.

        Args:
            texts: the training texts.
            vocab_size: number of tokens to reach, the special ones and the 256 bytes included. A small corpus may
                have too few repeated pairs to reach it; `len(tokenizer)` tells.
            show_progress: whether `tokenizers` draws its own progress bars.

        Raises:
            TypeError: `texts` is one text; its letters would be taken for texts.
            ValueError: `vocab_size` leaves no room for the bytes, or is beyond all measure.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list or an iterator of texts, got one text: put it in a list.")
        if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} special tokens) and "
                f"at most {MAX_VOCAB_SIZE}, got {vocab_size}."
            )
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=show_progress,
        )
        # Training takes the square of a word's length: a megabyte without a space would take days.
        pieces = (piece for text in texts for piece in LONG_RUN.split(text) if piece)
        tokenizer.train_from_iterator(pieces, trainer)
        return cls(tokenizer_object=tokenizer, bos_token=BOS_TOKEN, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN)

    @classmethod
    def from_gpt2_files(cls, vocab_file: str | Path, merges_file: str | Path) -> "ScratchGPTTokenizer":
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
            tokenizer = _byte_level(models.BPE(vocab=vocab, merges=merges))  # type: ignore[arg-type]  # pairs, or refused
        except OSError:
            raise
        except Exception as error:  # `tokenizers` raises bare exceptions
            raise ValueError(f"{vocab_file} and {merges_file} are not GPT-2's vocabulary and merges: {error}") from error
        end = "<|endoftext|>"
        return cls(tokenizer_object=tokenizer, bos_token=end, eos_token=end)


__all__ = ["ScratchGPTTokenizer"]
