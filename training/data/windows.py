"""From token ids to what the model reads: windows, and the batches of a whole run.

Notable:
- Labels are shifted here, once: `shift_labels[i]` is the id that comes after `input_ids[i]`.
- Plain windows run over documents and their marks. Neighbours share one id, so with a stride of the context length every id but
  the very first is predicted exactly once. With a smaller stride they overlap, as in "Build a Large Language Model".
- Packed rows hold whole documents beside each other; `position_ids` start again with each, which tells the model to keep its
  attention inside.
- Which windows make up batch n depends on the seed and on n alone, not on the number of processes or on what ran before.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from training.data.tokens import Tokens
from training.errors import UserError

Row = dict[str, torch.Tensor]


class Windows(Dataset[Row]):
    """
    Windows of `context_length` ids and, for each id, the one that follows.

    The last window is filled up with padding that no loss counts; so is any window past the end, which lets a batch
    always be full.

    Args:
        tokens: the ids of a split.
        context_length: ids in a window.
        pad_token_id: what the end is filled up with.
        split: what an error calls it.
        stride: ids from the beginning of a window to that of the next, 1 to `context_length`.
        once: whether windows that overlap label only what no window before them did, so that each id is predicted once.

    Raises:
        UserError: there are fewer ids than one window needs.
    """

    def __init__(
        self,
        tokens: Tokens,
        context_length: int,
        pad_token_id: int,
        split: str,
        stride: int | None = None,
        once: bool = False,
    ):
        if len(tokens.ids) <= context_length:
            raise UserError(
                f"the {split} text has {len(tokens.ids)} tokens, fewer than one window of --context_length "
                f"{context_length} and the token after it: give more text, a shorter context, or a "
                "larger share of it (--validation_fraction, --test_fraction)."
            )
        self.tokens, self.context_length, self.pad_token_id = tokens, context_length, pad_token_id
        self.stride, self.once = stride or context_length, once

    def __len__(self) -> int:
        return 1 + -(-(len(self.tokens.ids) - 1 - self.context_length) // self.stride)

    def __getitem__(self, index: int) -> Row:
        start = index * self.stride
        ids = torch.from_numpy(self.tokens.ids[start : start + self.context_length + 1].astype(np.int64))
        inputs = torch.full((self.context_length,), self.pad_token_id)
        labels = torch.full((self.context_length,), IGNORE_INDEX)
        inputs[: max(len(ids) - 1, 0)] = ids[:-1]
        labels[: max(len(ids) - 1, 0)] = ids[1:]
        if self.once and index > 0:
            labels[: self.context_length - self.stride] = IGNORE_INDEX
        return {"input_ids": inputs, "shift_labels": labels}


class PackedDocuments(Dataset[Row]):
    """
    Rows of `context_length` places that whole documents share, each seen by itself.

    A document that is longer than a row is cut into pieces that share one id, so nothing is lost.

    Args:
        tokens: the ids of a split.
        context_length: places in a row.
        pad_token_id: what is left over is filled up with.
        labels: what each id is as a label; itself, if not given.
    """

    def __init__(self, tokens: Tokens, context_length: int, pad_token_id: int, labels: np.ndarray | None = None):
        self.tokens, self.context_length, self.pad_token_id = tokens, context_length, pad_token_id
        self.labels = tokens.ids if labels is None else labels
        ends = np.append(tokens.starts[1:], len(tokens.ids))
        pieces = [
            (start, min(context_length, end - 1 - start))  # a piece of n places reads n ids and predicts the next ones
            for first, end in zip(tokens.starts.tolist(), ends.tolist(), strict=True)
            for start in range(first, end - 1, context_length)
        ]
        self.rows = pack_best_fit_decreasing([length for _, length in pieces], context_length)
        self.pieces = np.array(pieces, dtype=np.int64).reshape(-1, 2)
        self.efficiency = float(self.pieces[:, 1].sum() / max(1, len(self.rows) * context_length))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        inputs = torch.full((self.context_length,), self.pad_token_id)
        labels = torch.full((self.context_length,), IGNORE_INDEX)
        position_ids = torch.zeros(self.context_length, dtype=torch.long)
        place = 0
        for piece in self.rows[index]:
            start, length = self.pieces[piece].tolist()
            inputs[place : place + length] = torch.from_numpy(self.tokens.ids[start : start + length].astype(np.int64))
            labels[place : place + length] = torch.from_numpy(self.labels[start + 1 : start + length + 1].astype(np.int64))
            position_ids[place : place + length] = torch.arange(length)
            place += length
        position_ids[place:] = torch.arange(self.context_length - place)
        return {"input_ids": inputs, "shift_labels": labels, "position_ids": position_ids}


def pack_best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths add up to at most `capacity`: each, longest first, goes where the least room is left.

    Best-fit decreasing leaves at most 22 % more rows than the fewest possible (Johnson, 1974); on documents nearly none.
    """
    rows: list[list[int]] = []
    rows_with_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit n is set where a row has room for n more: the lowest fitting one is found at once
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        rows_with_room[room - length].append(row)
        if room > length:
            rooms |= 1 << (room - length)
    return rows


class Batches(Sampler[list[int]]):
    """
    The batches of a whole run, as indices into the sources laid end to end.

    Args:
        sizes: the number of windows in each source.
        batch_size: windows in a batch, over all processes.
        num_batches: batches in the run.
        seed: decides everything.
        probabilities: how often each source is drawn from; without them the sources are one, and each of their windows comes
            once an epoch.
        with_replacement: draw any window at any time, as nanoGPT does, instead of each once an epoch.
        start: batches to leave out, because they were trained on before.
    """

    drop_last = True  # asked by Accelerate

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        num_batches: int,
        seed: int,
        probabilities: Sequence[float] | None = None,
        with_replacement: bool = False,
        start: int = 0,
    ):
        self.sizes = list(sizes) if probabilities is not None else [sum(sizes)]
        self.batch_size, self.num_batches, self.seed = batch_size, num_batches, seed
        self.probabilities, self.with_replacement, self.start = probabilities, with_replacement, start

    def __len__(self) -> int:
        return self.num_batches - self.start

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self._batches(), self.start, None)

    def _batches(self) -> Iterator[list[int]]:
        streams = [self._stream(source, size) for source, size in enumerate(self.sizes)]
        offsets = np.cumsum([0, *self.sizes]).tolist()
        generator = np.random.default_rng((self.seed, 2**32))
        for _ in range(self.num_batches):
            sources = [0] * self.batch_size
            if self.probabilities is not None:
                sources = generator.choice(len(self.sizes), size=self.batch_size, p=self.probabilities).tolist()
            yield [offsets[source] + next(streams[source]) for source in sources]

    def _stream(self, source: int, size: int) -> Iterator[int]:
        """The windows of one source in the order in which they are drawn, without end."""
        for epoch in itertools.count():
            generator = np.random.default_rng((self.seed, epoch, source) if source else (self.seed, epoch))
            indices = generator.integers(size, size=4096) if self.with_replacement else generator.permutation(size)
            for part in np.array_split(indices, max(1, len(indices) // 4096)):
                yield from part.tolist()


def training_loader(sources: Sequence[Dataset[Row]], batches: Batches) -> DataLoader:
    """The batches of a run, in order."""
    return DataLoader(ConcatDataset(sources), batch_sampler=batches)


def evaluation_loader(windows: Windows, batch_size: int, num_processes: int = 1) -> DataLoader:
    """Every window once, in order, in full batches: the last one is filled up with empty windows."""
    batch_size = min(batch_size, num_processes * -(-len(windows) // num_processes))
    num_batches = -(-len(windows) // batch_size)
    return DataLoader(windows, batch_size=batch_size, sampler=range(num_batches * batch_size))
