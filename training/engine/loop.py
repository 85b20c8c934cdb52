"""The training loop: one generator that every recipe iterates over.

Notable:
- The loss of a step is the sum over all scored items divided by their number, however they are split into micro-batches and
  processes: `num_items_in_batch` is counted before the first forward pass.
- There are no callbacks: the caller writes `for step in training_steps(...)` and does what it likes between the steps.
- The random numbers of a step (dropout) follow from the seed, the step and the process, so a resumed run continues as if it had
  not been interrupted.
"""

import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from torch import nn

from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from training.engine.machine import available_cores
from training.engine.run_folder import LOGS
from training.errors import UserError


@dataclass(frozen=True)
class Step:
    """The result of one optimizer step."""

    number: int  # from 1
    loss: float  # nats per token or text, over all processes
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int  # scored in this step; for a classifier read; over all processes
    seconds: float


def start_accelerator(report_to: str = "none", output_dir: Path | None = None) -> Accelerator:
    """Accelerate, with each batch split over the processes, so that their number changes the speed and not the result.

    Args:
        report_to: the tracker that receives the metrics; `auto` is tensorboard if it is installed.
        output_dir: trackers that write files do so in its directory `logs`.

    Raises:
        UserError: an unknown tracker, or one that is not installed; several processes where Accelerate sees one.
    """
    installed = [str(tracker) for tracker in get_available_trackers()]
    if report_to == "auto":
        report_to = "tensorboard" if "tensorboard" in installed else "none"
    if report_to not in ("none", *installed):
        available = f"installed: {', '.join(installed)}" if installed else "none is installed"
        raise UserError(
            f"--report_to {report_to}: pass auto, none, or a tracker of Accelerate that is installed ({available})."
        )
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # Without it, a number in an Accelerate config would divide the loss, although the batches are accumulated below.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=None if report_to == "none" else report_to,
        project_dir=output_dir / LOGS if output_dir else None,
    )
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) > accelerator.num_processes:
        # Without GPUs, Accelerate treats each process as a run of its own: all would train the same, and write to one place.
        raise UserError(
            f"{started} processes were started for GPUs that this machine does not have: start one, or several on the CPU with "
            f"`ACCELERATE_USE_CPU=true torchrun --nproc_per_node {started}`."
        )
    # The launchers set one thread per process unless the user chose a number; divide all cores instead.
    is_launched = not os.environ.keys().isdisjoint(("ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"))
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if accelerator.device.type == "cpu" and (not chosen or (chosen == "1" and is_launched)):
        torch.set_num_threads(max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return accelerator


def training_steps(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    schedulers: Sequence[torch.optim.lr_scheduler.LRScheduler],
    dataloader: Iterable[dict[str, torch.Tensor]],
    arguments: Any,
    first_step: int = 1,
) -> Iterator[Step]:
    """Train until the end of the dataloader; yield after each optimizer step.

    Args:
        accelerator, model, optimizers, dataloader: prepared by Accelerate; `schedulers` are not, they advance once per step.
        arguments: with `gradient_accumulation_steps` (batches per step), `max_grad_norm` (for clipping) and `seed`.
        first_step: its number; above 1 for a resumed run, whose dataloader begins there.

    Raises:
        UserError: the loss is not finite.
    """
    batches = iter(dataloader)
    for number in itertools.count(first_step):
        start = time.perf_counter()
        micro_batches = list(itertools.islice(batches, arguments.gradient_accumulation_steps))
        if not micro_batches:
            return
        model.train()
        seed = np.random.SeedSequence((arguments.seed, number, accelerator.process_index)).generate_state(1)
        torch.manual_seed(int(seed[0]))
        items, tokens = accelerator.reduce(torch.stack([count_items(batch) for batch in micro_batches]).sum(0), reduction="sum")
        step_loss = torch.zeros((), device=accelerator.device)
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(model):
                # A language model computes its loss without materializing the logits.
                options = {"skip_logits": True} if "shift_labels" in batch else {}
                # Gradients are averaged over processes: the factor turns the mean into the sum.
                loss = model(**batch, num_items_in_batch=items, use_cache=False, **options).loss * accelerator.num_processes
                accelerator.backward(loss)
            step_loss += loss.detach()
        grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm))
        learning_rate = float(schedulers[0].get_last_lr()[0])
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        mean_loss = accelerator.reduce(step_loss, reduction="mean").item()
        if not math.isfinite(mean_loss):
            raise UserError(
                f"the loss of step {number} is {mean_loss}: the run has diverged. Lower --learning_rate and "
                "--muon_learning_rate, then --weight_decay."
            )
        yield Step(number, mean_loss, grad_norm, learning_rate, int(tokens), time.perf_counter() - start)


def count_items(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The number of items that the loss is averaged over, and the number of tokens (2,): of a language model both are the
    labels that are not ignored; of a classifier the labels, and the tokens read."""
    if "shift_labels" in batch:
        return (batch["shift_labels"] != IGNORE_INDEX).sum().repeat(2)
    return torch.stack((torch.tensor(batch["labels"].numel(), device=batch["labels"].device), batch["attention_mask"].sum()))


class GracefulShutdown:
    """Within this context, SIGTERM and Ctrl-C request a stop instead of ending the process; a second Ctrl-C ends it.

    SIGHUP (a closed terminal) and SIGUSR1 (SLURM, before the time limit) do the same. Only a main thread receives signals.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")  # Windows lacks the last two

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.received = accelerator, False

    def __enter__(self) -> "GracefulShutdown":
        numbers = [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]
        is_main = threading.current_thread() is threading.main_thread()
        self.previous = {number: signal.signal(number, self._receive) for number in (numbers if is_main else ())}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if not self.received and self.accelerator.is_main_process:
            # Not with print, which may be what is interrupted; and stderr may be closed.
            with suppress(OSError):
                os.write(2, b"\nStopping after this step and saving a checkpoint. Ctrl-C stops at once.\n")
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def requested(self) -> bool:
        """True if any process has received a signal; all processes must call it, and get the same answer."""
        return bool(self.accelerator.reduce(torch.tensor(int(self.received), device=self.accelerator.device)))
