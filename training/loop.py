"""The training loop: one generator that every recipe iterates over.

Notable:
- The loss of a step is the sum over all its tokens divided by their number, whatever the split into micro-batches and
  processes: `num_items_in_batch` is counted before the first forward pass.
- Nothing is called back. A recipe writes `for step in training_steps(...)` and does between steps what it likes.
"""

import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn

from training.arguments import UserError
from training.windows import IGNORED


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    number: int  # from 1
    loss: float  # nats a token, over all processes
    gradient_norm: float  # before clipping
    learning_rate: float
    tokens: int  # scored in this step, over all processes
    seconds: float


def start_accelerator() -> Accelerator:
    """Accelerate, with batches that are split over the processes: their number changes the speed and nothing else."""
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # The launchers ask for one thread a process when nobody said otherwise; share out all cores instead.
        cores = psutil.cpu_count(logical=False) or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return accelerator


def check_finite(loss: float, what: str) -> None:
    """Raise `UserError` when the loss is not a finite number: the weights have blown up, and no step will mend them."""
    if not math.isfinite(loss):
        raise UserError(f"{what} is {loss}: the weights have blown up. Lower --learning_rate, then --weight_decay.")


def training_steps(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loader: Iterable[dict[str, torch.Tensor]],
    gradient_accumulation_steps: int,
    max_grad_norm: float,
) -> Iterator[Step]:
    """Train on the loader to its end; yields after each optimizer step.

    Args:
        accelerator, model, optimizer, loader: prepared by Accelerate. `schedule` is not: it steps here, once a step.
        gradient_accumulation_steps: batches that make up one step.
        max_grad_norm: the gradient is scaled down to this norm when it is longer.

    Raises:
        UserError: the loss is no longer a finite number.
    """
    batches = iter(loader)
    for number in itertools.count(1):
        start = time.perf_counter()
        micro_batches = list(itertools.islice(batches, gradient_accumulation_steps))
        if not micro_batches:
            return
        model.train()
        scored = sum((batch["shift_labels"] != IGNORED).sum() for batch in micro_batches)
        tokens = accelerator.reduce(scored, reduction="sum")
        step_loss = torch.zeros((), device=accelerator.device)
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(model):
                # Gradients are averaged over processes: the factor turns that mean back into a sum.
                loss = model(**batch, num_items_in_batch=tokens, use_cache=False).loss * accelerator.num_processes
                accelerator.backward(loss)
            step_loss += loss.detach()
        gradient_norm = float(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm))
        learning_rate = float(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean_loss = accelerator.reduce(step_loss, reduction="mean").item()
        check_finite(mean_loss, f"the loss of step {number}")
        yield Step(number, mean_loss, gradient_norm, learning_rate, int(tokens), time.perf_counter() - start)
