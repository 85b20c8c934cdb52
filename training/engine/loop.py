"""The training loop: one generator that every recipe iterates over.

Notable:
- The loss of a step is the sum over all scored items divided by their number, however they are split into micro-batches and
  processes: `num_items_in_batch` is counted before the first forward pass.
- There are no callbacks: the caller writes `for step in training_steps(...)` and does what it likes between the steps.
- The random numbers of a step (dropout) follow from the seed, the step and the process, so resuming does not change them.
"""

import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from training.engine.arguments import EngineArguments
from training.engine.optimizers import lr_factor, set_learning_rates
from training.errors import UserError, explain_out_of_memory


@dataclass(frozen=True)
class Step:
    """The result of one optimizer step."""

    number: int  # from 1
    loss: float  # nats per token or text, over all processes
    grad_norm: float  # before clipping
    tokens: int  # scored in this step; for a classifier read; over all processes
    seconds: float
    learning_rate: float | None = None  # of AdamW; None if Muon trains everything
    muon_learning_rate: float | None = None  # None without Muon


def training_steps(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    dataloader: Iterable[dict[str, torch.Tensor]],
    arguments: EngineArguments,
    first_step: int = 1,
) -> Iterator[Step]:
    """Train until the end of the dataloader; yield after each optimizer step.

    Args:
        accelerator, model, optimizers, dataloader: prepared by Accelerate.
        first_step: its number; above 1 for a resumed run, whose dataloader begins there.

    Raises:
        UserError: the loss or a gradient is not finite; the optimizers are out of memory, which smaller batches do not change.
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
        mean_loss = accelerator.reduce(step_loss, reduction="mean").item()
        check_finite(number, "loss", mean_loss)
        grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm))
        if not accelerator.scaler:  # which skips the step
            check_finite(number, "gradient norm", grad_norm)
        rates = set_learning_rates(optimizers, lr_factor(number - 1, arguments))
        with explain_out_of_memory("choose a smaller model, or divide it over several GPUs with FSDP2"):
            step_all(accelerator, optimizers)
        yield Step(number, mean_loss, grad_norm, int(tokens), time.perf_counter() - start, **rates)


def check_finite(number: int, name: str, value: float) -> None:
    """Raise `UserError` if the loss or the gradient norm of a step is not finite."""
    if not math.isfinite(value):
        remedy = "Lower --learning_rate and --muon_learning_rate, then --weight_decay."
        resume = "To resume it, delete the checkpoints of the steps with high losses."
        raise UserError(f"the {name} of step {number} is {value}: the run has diverged. {remedy} {resume}")


def step_all(accelerator: Accelerator, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Step all optimizers, and clear the gradients.

    With float16, Accelerate updates the loss scale after each optimizer, and so unscales the gradients of the next one twice.
    """
    scaler = accelerator.scaler
    for optimizer in optimizers:
        if scaler:
            scaler.step(getattr(optimizer, "optimizer", optimizer))
        else:
            optimizer.step()
        optimizer.zero_grad()
    if scaler:
        scaler.update()


def count_items(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The number of items that the loss is averaged over, and the number of tokens (2,): of a language model both are the
    labels that are not ignored; of a classifier the labels, and the tokens read."""
    if "shift_labels" in batch:
        return (batch["shift_labels"] != IGNORE_INDEX).sum().repeat(2)
    return torch.stack((torch.tensor(batch["labels"].numel(), device=batch["labels"].device), batch["attention_mask"].sum()))


class GracefulShutdown:
    """Within this context, SIGTERM and Ctrl-C request a stop instead of ending the process; a second Ctrl-C ends it.

    SIGHUP (a closed terminal) and SIGUSR1 (SLURM, before the time limit) do the same. A signal that is ignored stays so, such
    as SIGHUP under nohup. Only a main thread receives signals.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")  # Windows lacks the last two

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.received = accelerator, False
        self.previous: dict[int, Any] = {}  # handlers by the number of their signal

    def __enter__(self) -> "GracefulShutdown":
        numbers = [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]
        is_main = threading.current_thread() is threading.main_thread()
        for number in numbers if is_main else ():
            if (handler := signal.getsignal(number)) is not signal.SIG_IGN:
                self.previous[number] = handler
                signal.signal(number, self._receive)
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
        if signal.SIGINT in self.previous:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def output(self) -> Iterator[None]:
        """Within this context, errors are ignored after a signal, which may also have ended what reads the output."""
        try:
            yield
        except OSError:
            if not self.received:
                raise

    def requested(self) -> bool:
        """True if any process has received a signal; all processes must call it, and get the same answer."""
        return bool(self.accelerator.reduce(torch.tensor(int(self.received), device=self.accelerator.device)))
