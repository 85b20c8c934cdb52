"""Tokenized examples, the datasets of rows that are made of them, and their dataloaders.

Labels of language models are shifted here, once: `shift_labels[i]` is the id after `input_ids[i]`. Padding is on the right,
where a causal model needs no mask.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from training.data.samplers import ShardedBatchSampler
from training.errors import UserError

Row = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TokenizedExamples:
    """Token ids of E documents, texts or conversations, one after another."""

    ids: np.ndarray  # (N,), of all examples
    offsets: np.ndarray  # (E + 1,), example e is `ids[offsets[e] : offsets[e + 1]]`
    num_bytes: int | None = None  # length of the text in UTF-8, if the ids hold all of it
    digest: str = ""  # of the text and the tokenizer
    loss_mask: np.ndarray | None = None  # bool (N,), True for the ids to compute the loss on; all of them if None
    labels: np.ndarray | None = None  # float32 (E, C), of a classifier
    num_marks: int = 2  # tokens around each document: beginning and end; 1: neighbours share it; 0: none

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each example (E,)."""
        return np.diff(self.offsets)

    def inputs_and_labels(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids from `start` up to `end`, and for each the following one, or `IGNORE_INDEX` where the loss mask is False."""
        ids = torch.from_numpy(self.ids[start : end + 1].astype(np.int64))
        labels = ids[1:]
        if self.loss_mask is not None:
            labels = labels.masked_fill(torch.from_numpy(~self.loss_mask[start + 1 : end + 1]), IGNORE_INDEX)
        return ids[:-1], labels


class Windows(Dataset[Row]):
    """Windows of `context_length` ids and, for each id, the following one, across the boundaries of documents.

    Neighbours share one id, so with a stride of the context length every id but the first is predicted exactly once. With a
    smaller stride they overlap, as in "Build a Large Language Model". After the last id there is padding without a loss.

    Args:
        split: its name, for errors.
        stride: ids from the start of a window to the start of the next, 1 to `context_length` (the default).
        once: label in overlapping windows only the ids that no earlier window has predicted.

    Raises:
        UserError: there are too few ids for one window.
    """

    scores = "windows across documents"  # as evaluation data

    def __init__(
        self,
        examples: TokenizedExamples,
        context_length: int,
        pad_token_id: int,
        split: str,
        stride: int | None = None,
        once: bool = False,
    ):
        if len(examples.ids) <= context_length:
            raise UserError(
                f"the {split} text has {len(examples.ids)} tokens, fewer than one window of --context_length {context_length} "
                "and the token after it: pass more text or a shorter --context_length."
            )
        self.examples, self.context_length, self.pad_token_id = examples, context_length, pad_token_id
        self.stride, self.once = stride or context_length, once
        self.num_labels, self.num_bytes = len(examples.ids) - 1, examples.num_bytes  # scored, if each id is predicted once

    def __len__(self) -> int:
        return 1 + -(-(len(self.examples.ids) - 1 - self.context_length) // self.stride)

    def __getitem__(self, index: int) -> Row:
        start = index * self.stride
        ids, labels = self.examples.inputs_and_labels(start, start + self.context_length)
        missing = (0, self.context_length - len(ids))
        ids, labels = pad(ids, missing, value=self.pad_token_id), pad(labels, missing, value=IGNORE_INDEX)
        if self.once and index > 0:
            labels[: self.context_length - self.stride] = IGNORE_INDEX
        return {"input_ids": ids, "shift_labels": labels}


class PackedExamples(Dataset[Row]):
    """Rows of `context_length` tokens that hold several examples each; `efficiency` is the fraction that is not padding.

    `position_ids` restart with each example, which tells the model to keep attention inside it. An example that is longer than
    a row is cut into pieces that share one id and do not see each other, so every id but its first is predicted once. Rows
    after the last one are empty.
    """

    scores = "each document by itself"  # as evaluation data

    def __init__(self, examples: TokenizedExamples, context_length: int, pad_token_id: int):
        self.examples, self.context_length, self.pad_token_id = examples, context_length, pad_token_id
        starts = np.maximum(examples.offsets[:-1] - (examples.num_marks == 1), 0)  # a shared mark begins the next document, too
        pieces = [
            (start, min(context_length, end - 1 - start))  # a piece of n tokens reads n ids and predicts the following ones
            for first, end in zip(starts.tolist(), examples.offsets[1:].tolist(), strict=True)
            for start in range(first, end - 1, context_length)
        ]
        self.rows = pack_best_fit_decreasing([length for _, length in pieces], context_length)
        self.pieces = np.array(pieces, dtype=np.int64).reshape(-1, 2)
        self.num_labels = int(self.pieces[:, 1].sum())
        self.num_bytes = examples.num_bytes if examples.num_marks else None  # without marks, first tokens are not predicted
        self.efficiency = self.num_labels / max(1, len(self.rows) * context_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        pieces = self.pieces[self.rows[index]].tolist() if index < len(self) else [[0, 0]]
        parts = [self.examples.inputs_and_labels(start, start + length) for start, length in pieces]
        ids, labels = map(torch.cat, zip(*parts, strict=True))
        missing = self.context_length - len(ids)
        return {
            "input_ids": pad(ids, (0, missing), value=self.pad_token_id),
            "shift_labels": pad(labels, (0, missing), value=IGNORE_INDEX),
            "position_ids": torch.cat([torch.arange(length) for length in (*(length for _, length in pieces), missing)]),
        }


def pack_best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths add up to at most `capacity`. Each length, the longest first, is put where the least room
    is left.

    Best-fit decreasing needs at most 22 % more rows than the optimum (Johnson, 1974), for documents hardly any.
    """
    rows: list[list[int]] = []
    rows_with_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit n is set if a row has room for n more, so the smallest sufficient room is found without a search
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        sufficient = rooms >> length
        if sufficient:
            room = length + (sufficient & -sufficient).bit_length() - 1
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


class PaddedExamples(Dataset[Row]):
    """One example a row, to be padded by `collate_padded`. The index continues from epoch to epoch.

    Examples with a loss mask have `shift_labels`, and a negative index is an empty row, which the loss ignores; those of a
    classifier have `labels`.
    """

    def __init__(self, examples: TokenizedExamples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: int) -> Row:
        examples, index = self.examples, draw % len(self)
        start, end = examples.offsets[index : index + 2]
        if examples.loss_mask is not None:
            ids, labels = examples.inputs_and_labels(start, end - 1)
            if draw < 0:
                ids, labels = torch.zeros(1, dtype=torch.long), torch.full((1,), IGNORE_INDEX)
            return {"input_ids": ids, "shift_labels": labels}
        row = {"input_ids": torch.from_numpy(examples.ids[start:end].astype(np.int64))}
        return row if examples.labels is None else {**row, "labels": torch.from_numpy(examples.labels[index])}


def collate_padded(rows: Sequence[Row], pad_token_id: int) -> Row:
    """Pad rows on the right to the longest of them. Without `shift_labels`, an `attention_mask` is added."""
    batch = {"input_ids": pad_sequence([row["input_ids"] for row in rows], True, pad_token_id)}
    if "shift_labels" in rows[0]:
        return {**batch, "shift_labels": pad_sequence([row["shift_labels"] for row in rows], True, IGNORE_INDEX)}
    batch["attention_mask"] = pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], True)
    return batch if "labels" not in rows[0] else {**batch, "labels": torch.stack([row["labels"] for row in rows])}


def train_dataloader(datasets: Sequence[Dataset[Row]], batch_sampler: Sampler[list[int]]) -> DataLoader:
    """The batches of a run, of rows of one length. The sampler's indices refer to the concatenation of the datasets."""
    return DataLoader(ConcatDataset(datasets), batch_sampler=batch_sampler)


def shard_dataloader(accelerator: Accelerator, dataloader: DataLoader) -> DataLoader:
    """The part of each training batch that this process reads, on its device."""
    shards = ShardedBatchSampler(dataloader.batch_sampler, accelerator.num_processes, accelerator.process_index)
    part = DataLoader(dataloader.dataset, batch_sampler=shards, collate_fn=dataloader.collate_fn)
    return prepare_data_loader(part, accelerator.device, num_processes=1, process_index=0, put_on_device=True)


def evaluation_rows(
    examples: TokenizedExamples, windows: str, context_length: int, pad_token_id: int, stride: int = 0
) -> Windows | PackedExamples:
    """Rows that label each id of a text of any length once: documents by themselves if `windows` is "packed", as in training.

    Raises:
        UserError: there is nothing to predict.
    """
    rows: Windows | PackedExamples | None = None
    if windows == "packed":
        rows = PackedExamples(examples, context_length, pad_token_id)
    elif (length := min(context_length, len(examples.ids) - 1)) > 0:
        rows = Windows(examples, length, pad_token_id, "given", min(stride or length, length), once=True)
    if not rows:
        raise UserError("the text is empty: there is nothing to predict.")
    return rows


def evaluation_dataloader(rows: Windows | PackedExamples, batch_size: int, num_processes: int = 1) -> DataLoader:
    """Every row once, in order. All batches are full: the last one is filled with empty rows."""
    batch_size = num_processes * -(-min(batch_size, len(rows)) // num_processes)
    num_batches = -(-len(rows) // batch_size)
    return DataLoader(rows, batch_size=batch_size, sampler=range(num_batches * batch_size))


def padded_dataloader(dataset: Dataset[Row], pad_token_id: int, **dataloader_options: Any) -> DataLoader:
    """A dataloader of padded batches; the other arguments are those of `DataLoader`."""
    return DataLoader(dataset, collate_fn=partial(collate_padded, pad_token_id=pad_token_id), **dataloader_options)


def sort_by_length(lengths: np.ndarray) -> list[int]:
    """Indices of all examples, the longest first, so that a batch that does not fit into memory fails at once."""
    return np.argsort(-lengths, kind="stable").tolist()
