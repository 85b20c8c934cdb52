"""How good a model is, and the file that remembers it."""

import inspect
import json
import math
import os
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from training.engine.checkpoints import locked
from training.errors import UserError


@dataclass(frozen=True)
class LMMetrics:
    """A language model's loss on a text."""

    loss: float  # nats a token
    perplexity: float
    bits_per_byte: float  # of the text in UTF-8: comparable between tokenizers

    def __str__(self) -> str:
        return f"loss {self.loss:.3f}, perplexity {self.perplexity:,.1f}, {self.bits_per_byte:.3f} bits per byte"


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, loader: Collection[dict[str, torch.Tensor]], num_bytes: int
) -> LMMetrics:
    """Score every label of the loader once, weighted by tokens.

    Args:
        accelerator, model, loader: prepared by Accelerate; the model is any causal language model of transformers.
        num_bytes: length in UTF-8 bytes of the text that the labels spell.

    Raises:
        UserError: the loss is not a finite number.
    """
    model.eval()
    takes = inspect.signature(accelerator.unwrap_model(model).forward).parameters
    nats, tokens, start = 0.0, 0, time.perf_counter()
    with tqdm(loader, desc="Evaluating", unit=" batches", leave=False, disable=not accelerator.is_main_process) as bar:
        for batch in bar:
            if "skip_logits" in takes:  # ours: the loss straight from the hidden states
                nats += model(**batch, num_items_in_batch=1, skip_logits=True, use_cache=False).loss.item()  # / 1: a sum
            else:
                nats += _nats(model, batch["input_ids"], batch["shift_labels"], "logits_to_keep" in takes)
            tokens += int((batch["shift_labels"] != IGNORE_INDEX).sum())
            speed = tokens * accelerator.num_processes / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {nats / max(tokens, 1):.3f}, {speed:,.0f} tokens/s", refresh=False)
    nats, tokens = (sum(column) for column in zip(*gather_object([(nats, tokens)]), strict=True))
    loss = nats / tokens
    if not math.isfinite(loss):
        raise UserError(f"the loss on the text is {loss}: the model's weights have blown up, or are not all numbers.")
    return LMMetrics(loss, math.exp(min(loss, 700)), nats / math.log(2) / num_bytes)


def _nats(model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, keeps: bool) -> float:
    """Minus the log-probability that the model's logits give to all labels (B, T) that count.

    Args:
        keeps: whether the model takes `logits_to_keep`; what comes before the first label of all rows then costs no logits.
    """
    first = int((labels != IGNORE_INDEX).any(0).int().argmax())
    labels = labels[:, first:]
    logits = model(input_ids, use_cache=False, **({"logits_to_keep": labels.shape[1]} if keeps else {})).logits
    nats = 0.0
    for row, targets in zip(logits[:, -labels.shape[1] :], labels, strict=True):  # one at a time: float32 copies are large
        nats += functional.cross_entropy(row.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum").item()
    return nats


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, written as things happen, by the main process.

    The file is locked until this object is gone: no two runs write into one folder.

    Args:
        path: must not exist, unless the run goes on.
        accelerator: its trackers, if it has any, are told the same numbers.
        resumed_at: the step after which a run goes on; what the file tells of later ones is dropped. None for a new run.

    Raises:
        UserError: another run was there first.
    """

    def __init__(self, path: Path, accelerator: Accelerator, resumed_at: int | None = None):
        self.path, self.accelerator = path, accelerator
        self.rows: list[dict[str, Any]] = []
        size = 0  # of what stays
        if not accelerator.is_main_process:
            return
        try:
            self.locked = locked(path, "x+b" if resumed_at is None else "r+b")
        except FileExistsError as error:
            raise UserError(f"--output_dir {path.parent}: another run has taken it meanwhile, pass another.") from error
        for line in self.locked.read().splitlines(keepends=True):
            try:
                row = json.loads(line)
                is_later = row["step"] > resumed_at
            except (ValueError, TypeError, LookupError):  # the run was killed while writing this line
                break
            if is_later or not line.endswith(b"\n"):
                break
            self.rows.append(row)
            size += len(line)
        os.truncate(path, size)

    def write(self, step: int, values: Any) -> None:
        """Append a dataclass's values under the number of the step."""
        named = {name: value for name, value in asdict(values).items() if name != "number"}
        self.rows.append({"step": step, **named})
        part = "training" if "learning_rate" in named else "validation"
        self.accelerator.log({f"{part}/{name}": value for name, value in named.items()}, step=step)
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
