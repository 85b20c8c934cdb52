"""From documents to what the model reads: token ids in one flat file, cut into windows, dealt out in batches.

Notable:
- The ids of a split stand one after another in a file that is memory-mapped: `<bos> document <eos> <bos> document <eos> ...`
  The file is named by the content of texts and tokenizer, so it is reused when nothing has changed and never otherwise.
- A window's labels are shifted here, once: `shift_labels[i]` is the id that comes after `input_ids[i]`. Neighbouring windows
  share one id, so every id of a split but the very first is predicted exactly once.
- Which windows make up step n depends on the seed and on n alone, not on the number of processes or on what ran before.
"""

import copy
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_scratchgpt import ScratchGPTTokenizer
from modeling_scratchgpt.tokenization_scratchgpt import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN
from training.arguments import UserError

IGNORED = -100  # the label that counts for nothing, everywhere in transformers


@dataclass(frozen=True)
class Tokens:
    """The token ids of one split, and the length of its text in UTF-8 bytes."""

    ids: np.ndarray
    num_bytes: int


def train_tokenizer(texts: datasets.Dataset, vocab_size: int, context_length: int) -> ScratchGPTTokenizer:
    """ScratchGPT's tokenizer for these texts, trained once and then read from the cache.

    Raises:
        UserError: the file in the cache is damaged.
    """
    path = _cached(texts, f"tokenizer {vocab_size}", "json")
    if not path.exists():
        passages = (text for batch in texts.iter(batch_size=100) for text in batch["text"])
        trained = ScratchGPTTokenizer.train(passages, vocab_size, show_progress=True)
        with _appearing_whole(path) as temporary:
            trained.backend_tokenizer.save(str(temporary))
    try:
        return ScratchGPTTokenizer(
            tokenizer_object=Tokenizer.from_file(str(path)),
            bos_token=BOS_TOKEN,
            eos_token=EOS_TOKEN,
            pad_token=PAD_TOKEN,
            model_max_length=context_length,
        )
    except Exception as error:  # `tokenizers` raises bare exceptions
        raise UserError(f"the cached tokenizer {path} is damaged ({error}): delete it.") from error


def tokenize(texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> Tokens:
    """The ids of all texts as one memory-mapped array, made once.

    Args:
        texts: a dataset with the column `text`.
        tokenizer: a fast tokenizer with `bos_token_id` and `eos_token_id`.
        name: what the progress bar calls the texts.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True  # one spelled out in a text is text: it must not end the document
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    path = _cached(texts, f"tokens {bos} {eos} {backend.to_str()}", dtype.name)
    if not _is_whole(path, dtype):
        count = 0
        bar = tqdm(total=len(texts), desc=f"Tokenizing {name}", unit=" documents")
        with _appearing_whole(path) as temporary, open(temporary, "wb") as file, bar:
            for batch in texts.iter(batch_size=100):
                for encoding in backend.encode_batch_fast(batch["text"], add_special_tokens=False):
                    file.write(np.array([bos, *encoding.ids, eos], dtype=dtype).tobytes())
                    count += len(encoding.ids) + 2
                bar.update(len(batch["text"]))
            file.write(np.uint64(count).tobytes())  # the last eight bytes tell whether the file is whole
    num_bytes = sum(len(text.encode()) for text in texts["text"])
    ids = np.memmap(path, dtype=dtype, mode="r", shape=((path.stat().st_size - 8) // dtype.itemsize,))
    return Tokens(ids, num_bytes)


def _is_whole(path: Path, dtype: np.dtype) -> bool:
    if not path.exists() or path.stat().st_size < 8:
        return False
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        count = int(np.frombuffer(file.read(), dtype=np.uint64)[0])
    return path.stat().st_size == count * dtype.itemsize + 8


def _cached(texts: datasets.Dataset, made_with: str, ending: str) -> Path:
    """Where the thing made from these texts in this way is kept, beside the cache of `datasets`."""
    content = hashlib.sha256(made_with.encode())
    for text in texts["text"]:
        content.update(hashlib.sha256(text.encode()).digest())
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "scratchgpt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{content.hexdigest()[:32]}.{ending}"


@contextmanager
def _appearing_whole(path: Path) -> Iterator[Path]:
    """A name to write a file under; it becomes `path` when it is complete, and vanishes if it never is."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Windows(torch.utils.data.Dataset):
    """
    Windows of `context_length` ids and, for each id, the one that follows.

    The last window is filled up with padding that no loss counts; so is any window past the end, which lets a batch
    always be full.

    Args:
        tokens: the ids of a split.
        context_length: ids in a window.
        pad_token_id: what the end is filled up with.

    Raises:
        UserError: there are fewer ids than one window needs.
    """

    def __init__(self, tokens: Tokens, context_length: int, pad_token_id: int, split: str):
        if len(tokens.ids) <= context_length:
            raise UserError(
                f"the {split} text has {len(tokens.ids)} tokens, fewer than one window of --context_length "
                f"{context_length} and the token after it: give more text, a shorter context or another "
                "--validation_fraction."
            )
        self.tokens, self.context_length, self.pad_token_id = tokens, context_length, pad_token_id

    def __len__(self) -> int:
        return -(-(len(self.tokens.ids) - 1) // self.context_length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self.context_length
        ids = torch.from_numpy(self.tokens.ids[start : start + self.context_length + 1].astype(np.int64))
        inputs = torch.full((self.context_length,), self.pad_token_id)
        labels = torch.full((self.context_length,), IGNORED)
        inputs[: max(len(ids) - 1, 0)] = ids[:-1]
        labels[: max(len(ids) - 1, 0)] = ids[1:]
        return {"input_ids": inputs, "shift_labels": labels}


class ShuffledBatches(Sampler[list[int]]):
    """
    The batches of a whole run: epoch after epoch, each in an order of its own.

    Args:
        num_windows: windows to draw from.
        batch_size: windows in a batch, over all processes.
        num_batches: batches in the run.
        seed: decides every order.
    """

    drop_last = True

    def __init__(self, num_windows: int, batch_size: int, num_batches: int, seed: int):
        self.num_windows, self.batch_size, self.num_batches, self.seed = num_windows, batch_size, num_batches, seed

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        indices = self._indices()
        for _ in range(self.num_batches):
            yield [next(indices) for _ in range(self.batch_size)]

    def _indices(self) -> Iterator[int]:
        epoch = 0
        while True:
            yield from np.random.default_rng((self.seed, epoch)).permutation(self.num_windows).tolist()
            epoch += 1


def training_loader(windows: Windows, batch_size: int, num_batches: int, seed: int) -> DataLoader:
    """Every batch of a run, in order."""
    return DataLoader(windows, batch_sampler=ShuffledBatches(len(windows), batch_size, num_batches, seed))


def evaluation_loader(windows: Windows, batch_size: int, num_processes: int = 1) -> DataLoader:
    """Every window once, in order, in full batches: the last one is filled up with empty windows."""
    batch_size = min(batch_size, num_processes * -(-len(windows) // num_processes))
    num_batches = -(-len(windows) // batch_size)
    return DataLoader(windows, batch_size=batch_size, sampler=range(num_batches * batch_size))
