"""How good a model is, and the file that remembers it."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from training.arguments import UserError
from training.loop import check_finite
from training.windows import IGNORED


@dataclass(frozen=True)
class Evaluation:
    """A language model's loss on a text."""

    loss: float  # nats a token
    perplexity: float
    bits_per_byte: float  # of the text in UTF-8: comparable between tokenizers

    def __str__(self) -> str:
        return f"loss {self.loss:.3f}, perplexity {self.perplexity:,.1f}, {self.bits_per_byte:.3f} bits per byte"


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, loader: Iterable[dict[str, torch.Tensor]], num_bytes: int
) -> Evaluation:
    """Score every label of the loader once, weighted by tokens.

    Args:
        accelerator, model, loader: prepared by Accelerate.
        num_bytes: length in UTF-8 bytes of the text that the labels spell.

    Raises:
        UserError: the loss is not a finite number.
    """
    model.eval()
    nats, tokens = 0.0, 0
    bar = tqdm(loader, desc="Evaluating", unit=" batches", leave=False, disable=not accelerator.is_main_process)
    for batch in bar:
        nats += model(**batch, num_items_in_batch=1, use_cache=False).loss.item()  # divided by one: a sum
        tokens += int((batch["shift_labels"] != IGNORED).sum())
    nats, tokens = (sum(column) for column in zip(*gather_object([(nats, tokens)]), strict=True))
    loss = nats / tokens
    check_finite(loss, "the loss on the held-out text")
    return Evaluation(loss, math.exp(min(loss, 700)), nats / math.log(2) / num_bytes)


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, written as things happen, by the main process.

    Args:
        path: must not exist, unless the run goes on.
        accelerator: its trackers, if it has any, are told the same numbers.
        resumed_at: the step after which a run goes on; what the file tells of later ones is dropped. None for a new run.
    """

    def __init__(self, path: Path, accelerator: Accelerator, resumed_at: int | None = None):
        self.path, self.accelerator = path, accelerator
        self.rows: list[dict[str, Any]] = []
        if not accelerator.is_main_process:
            return
        if resumed_at is None:
            try:
                path.touch(exist_ok=False)
            except FileExistsError as error:
                raise UserError(f"--output_dir {path.parent}: another run has taken it meanwhile, pass another.") from error
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the run was killed while writing this line
                break
            if row["step"] <= resumed_at:
                self.rows.append(row)
        temporary = path.with_suffix(".writing")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(temporary, path)

    def write(self, step: int, values: Any) -> None:
        """Append a dataclass's values under the number of the step."""
        named = {name: value for name, value in asdict(values).items() if name != "number"}
        self.rows.append({"step": step, **named})
        part = "validation" if isinstance(values, Evaluation) else "training"
        self.accelerator.log({f"{part}/{name}": value for name, value in named.items()}, step=step)
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
