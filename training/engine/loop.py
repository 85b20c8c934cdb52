"""The training loop: one generator that every recipe iterates over.

Notable:
- The loss of a step is the sum over all that is scored divided by its number, whatever the split into micro-batches and
  processes: `num_items_in_batch` is counted before the first forward pass.
- Nothing is called back. A recipe writes `for step in training_steps(...)` and does between steps what it likes.
- The random numbers of a step (dropout) follow from the seed, the step and the process, so a run that is resumed at any step
  goes on as if it had never stopped.
"""

import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from torch import nn

from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from training.errors import UserError


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    number: int  # from 1
    loss: float  # nats a token or a text, over all processes
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int  # scored in this step, or read where texts are scored, over all processes
    seconds: float


def start_accelerator(report_to: str = "none", output_dir: Path | None = None) -> Accelerator:
    """Accelerate, with batches that are split over the processes: their number changes the speed and nothing else.

    Args:
        report_to: the tracker that is told the metrics; `auto` is tensorboard if it is installed.
        output_dir: trackers that write files do so in its folder `logs`.

    Raises:
        UserError: there is no such tracker, or it is not installed; several processes were started where Accelerate sees one.
    """
    installed = [str(tracker) for tracker in get_available_trackers()]
    if report_to not in ("auto", "none", *installed):
        here = f"installed here: {', '.join(installed)}" if installed else "none is installed here"
        raise UserError(f"--report_to {report_to}: give auto, none, or a tracker of Accelerate that is installed ({here}).")
    trackers = (
        [report_to] if report_to in installed else ["tensorboard"] if {report_to, *installed} >= {"auto", "tensorboard"} else []
    )
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=trackers or None,
        project_config=ProjectConfiguration(logging_dir=str(output_dir / "logs") if output_dir else None),
    )
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) > accelerator.num_processes:
        # Without GPUs, Accelerate takes each of them for one that is alone: all would train the same, and write to one place.
        raise UserError(
            f"{started} processes were started for GPUs that are not here: start one, or, on the CPU, several by "
            f"`ACCELERATE_USE_CPU=true torchrun --nproc_per_node {started}`."
        )
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # The launchers ask for one thread a process when nobody said otherwise; share out all cores instead.
        cores = psutil.cpu_count(logical=False) or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return accelerator


def check_finite(loss: float, what: str) -> None:
    """Raise `UserError` when the loss is not a finite number: the weights have blown up, and no step will mend them."""
    if not math.isfinite(loss):
        raise UserError(
            f"{what} is {loss}: the weights have blown up. Lower --learning_rate and --muon_learning_rate, then --weight_decay."
        )


def training_steps(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    schedules: Sequence[torch.optim.lr_scheduler.LRScheduler],
    loader: Iterable[dict[str, torch.Tensor]],
    gradient_accumulation_steps: int,
    max_grad_norm: float,
    seed: int = 0,
    first_step: int = 1,
) -> Iterator[Step]:
    """Train on the loader to its end; yields after each optimizer step.

    Args:
        accelerator, model, optimizers, loader: prepared by Accelerate. `schedules` are not: they step here, once a step.
        gradient_accumulation_steps: batches that make up one step.
        max_grad_norm: the gradient is scaled down to this norm when it is longer.
        seed: decides the random numbers of every step.
        first_step: its number; above 1 for a run that is resumed, whose loader begins there.

    Raises:
        UserError: the loss is no longer a finite number.
    """
    batches = iter(loader)
    for number in itertools.count(first_step):
        start = time.perf_counter()
        micro_batches = list(itertools.islice(batches, gradient_accumulation_steps))
        if not micro_batches:
            return
        model.train()
        torch.manual_seed(int(np.random.SeedSequence((seed, number, accelerator.process_index)).generate_state(1)[0]))
        items, tokens = accelerator.reduce(torch.stack([_sizes(batch) for batch in micro_batches]).sum(0), reduction="sum")
        step_loss = torch.zeros((), device=accelerator.device)
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(model):
                # Gradients are averaged over processes: the factor turns that mean back into a sum.
                loss = model(**batch, num_items_in_batch=items, use_cache=False).loss * accelerator.num_processes
                accelerator.backward(loss)
            step_loss += loss.detach()
        grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm))
        learning_rate = float(schedules[0].get_last_lr()[0])
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        mean_loss = accelerator.reduce(step_loss, reduction="mean").item()
        check_finite(mean_loss, f"the loss of step {number}")
        yield Step(number, mean_loss, grad_norm, learning_rate, int(tokens), time.perf_counter() - start)


def _sizes(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the loss of a batch is the mean over, and its tokens: the labels that count; or the labels, and the tokens read."""
    if "shift_labels" in batch:
        return (batch["shift_labels"] != IGNORE_INDEX).sum().repeat(2)
    return torch.stack((torch.tensor(batch["labels"].numel(), device=batch["labels"].device), batch["attention_mask"].sum()))
