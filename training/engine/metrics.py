"""The metrics of a language model: loss, perplexity, bits per byte."""

import inspect
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from training.errors import UserError
from training.progress import bar_options


@dataclass(frozen=True)
class LMMetrics:
    """Metrics of a language model on held-out text."""

    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float | None  # of the text in UTF-8: comparable across tokenizers that lose nothing of it

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.3f} bits per byte"
        return f"loss {self.loss:.3f}, perplexity {readable(self.perplexity)}{bits}"


def readable(perplexity: float) -> str:
    """The number for people: that of a model that has diverged has 300 digits."""
    return f"{perplexity:,.1f}" if perplexity < 1e6 else f"{perplexity:.1e}"


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, dataloader: Iterable[dict[str, torch.Tensor]], num_bytes: int | None
) -> LMMetrics:
    """Score every label of the dataloader once; all tokens count equally.

    Args:
        accelerator, model, dataloader: prepared by Accelerate; the model is any causal language model of transformers.
        num_bytes: length of the scored text in UTF-8 bytes; None if the tokenizer loses some of it.

    Raises:
        UserError: the loss is not finite.
    """
    model.eval()
    parameters = inspect.signature(accelerator.unwrap_model(model, keep_torch_compile=False).forward).parameters
    nats, tokens, start = 0.0, 0, time.perf_counter()
    options = bar_options(hidden=not accelerator.is_main_process)
    with tqdm(dataloader, desc="Evaluating", unit=" batches", leave=False, **options) as bar:
        for batch in bar:
            if "skip_logits" in parameters:  # a ScratchGPT computes the loss without materializing the logits
                nats += model(**batch, num_items_in_batch=1, skip_logits=True, use_cache=False).loss.item()  # / 1: the sum
            else:
                nats += _sum_nats(model, dict(batch), "logits_to_keep" in parameters)
            tokens += int((batch["shift_labels"] != IGNORE_INDEX).sum())
            speed = tokens * accelerator.num_processes / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {nats / max(tokens, 1):.3f}, {speed:,.0f} tokens/s", refresh=False)
    nats, tokens = (sum(column) for column in zip(*gather_object([(nats, tokens)]), strict=True))
    loss = nats / tokens
    if not math.isfinite(loss):
        raise UserError(f"the held-out loss is {loss}: the run has diverged, or the model has weights that are not finite.")
    bits_per_byte = None if num_bytes is None else nats / math.log(2) / num_bytes
    return LMMetrics(loss, math.exp(min(loss, 700)), bits_per_byte)


@torch.no_grad()
def keeps_documents_apart(model: nn.Module) -> bool:
    """True if restarting `position_ids` keep the documents of a row apart, as in most models of transformers."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    ids = torch.tensor([[0, 2], [1, 2]], device=next(model.parameters()).device)
    first, second = model(ids, position_ids=torch.zeros_like(ids), use_cache=False).logits[:, 1]
    return torch.allclose(first, second, equal_nan=True)


def _sum_nats(model: nn.Module, batch: dict[str, torch.Tensor], has_logits_to_keep: bool) -> float:
    """Sum the negative log-likelihoods of the `shift_labels` (B, T); `logits_to_keep` skips the columns before the first."""
    labels = batch.pop("shift_labels")
    first = int((labels != IGNORE_INDEX).any(0).int().argmax())
    labels = labels[:, first:]
    options = {"logits_to_keep": labels.shape[1]} if has_logits_to_keep else {}
    logits = model(**batch, use_cache=False, **options).logits
    nats = 0.0
    for row, targets in zip(logits[:, -labels.shape[1] :], labels, strict=True):  # one row at a time: float32 copies are large
        nats += functional.cross_entropy(row.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum").item()
    return nats
