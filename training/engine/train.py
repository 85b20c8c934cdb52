"""Training the model of a recipe: evaluate, train, log, save checkpoints, stop early or on a signal, resume."""

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from training.data.datasets import shard_dataloader
from training.engine.checkpoints import find_checkpoint, load_checkpoint, save_checkpoint
from training.engine.consistency import Start, weights_digest
from training.engine.flops import measured_peak
from training.engine.launch import chosen_settings, start_trackers
from training.engine.loop import GracefulShutdown, Step, training_steps
from training.engine.optimizers import build_optimizers
from training.engine.report import ProgressBar, duration
from training.engine.run_folder import METRICS, RunFolder
from training.errors import UserError, is_out_of_memory, one_line

Metrics = TypeVar("Metrics", bound=Any)  # a dataclass with a `loss`
WORSE = 1.01  # a final loss that is this many times the lowest is reported


class Task(ABC, Generic[Metrics]):
    """The part of a `Recipe` that `train` uses."""

    arguments: Any  # parsed, with the number of steps filled in once the data is known
    data_digest: str  # of the training and validation data; a run is resumed only with the same data
    flops_per_token: float  # forward and backward, for each token that `Step` counts
    eval_split: str = "validation"  # for evaluations during training; that of the final model is "validation"

    @abstractmethod
    def train_dataloader(self) -> DataLoader:
        """All batches of the run, in order; a resumed run skips the first ones."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str = "validation") -> Metrics:
        """Metrics of the model, as prepared by Accelerate, on a held-out split."""

    @abstractmethod
    def preview(self, model: Any) -> list[str]:
        """Examples of what the model does, as text for the terminal; the first one is shown at every evaluation."""

    @abstractmethod
    def save_model(self, model: PreTrainedModel, directory: Path, weights: dict[str, Any]) -> None:
        """Write a directory that `from_pretrained` loads; `weights` is the full state dict, since the model may be sharded."""


@dataclass(frozen=True)
class TrainResult(Generic[Metrics]):
    """The result of a run: metrics and previews before the first step and of the final model, and what the run took."""

    before: Metrics
    after: Metrics
    preview_before: list[str]
    preview_after: list[str]
    steps: int
    tokens: int
    seconds: float
    notes: list[str] = field(default_factory=list)  # what the card should say about the run

    def __str__(self) -> str:
        return f"{self.steps:,} steps, {self.tokens:,} tokens, {duration(self.seconds)} (excluding evaluation)"


def train(
    accelerator: Accelerator, task: Task[Metrics], model: PreTrainedModel, run_folder: RunFolder, start: Start
) -> TrainResult[Metrics]:
    """Train the model in place, from its first step or from a checkpoint.

    Args:
        model: with the weights that a new run starts from, not prepared by Accelerate.

    Raises:
        UserError: the run to resume had other data or another base model; the loss is not finite.
    """
    run = _Run(accelerator, task, model, run_folder, start)
    before, preview_before = run.resume_or_start()
    run.train_until_done()
    after, preview_after = run.restore_best()
    if task.eval_split != "validation":
        after = task.evaluate(run.prepared_model)
        run_folder.log_evaluation(run.step, after, "whole_eval_")
        accelerator.print(f"On all of the held-out data: {after}\n")
    rows = [row for row in run_folder.history if "loss" in row]
    tokens, seconds = (sum(row[name] for row in rows) for name in ("tokens", "seconds"))
    return TrainResult(before, after, preview_before, preview_after, run.step, tokens, seconds, run.notes)


class _Run(Generic[Metrics]):
    """The state of a run while it trains."""

    def __init__(
        self, accelerator: Accelerator, task: Task[Metrics], model: PreTrainedModel, run_folder: RunFolder, start: Start
    ):
        self.accelerator, self.task, self.model, self.run_folder, self.start = accelerator, task, model, run_folder, start
        self.arguments = task.arguments
        if self.arguments.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        self.optimizers = build_optimizers(self.arguments, model)
        self.frozen = weights_digest(model, lambda parameter: not parameter.requires_grad)
        self.prepared_model, *self.prepared_optimizers = accelerator.prepare(model, *self.optimizers)
        self.step = self.saved_step = 0
        self.saved_at = time.monotonic()
        self.losses: list[float] = []  # held-out, of each evaluation
        self.notes: list[str] = []  # for the card
        self.evaluated: tuple[Metrics, list[str]] | None = None  # metrics and preview of the current weights

    def resume_or_start(self) -> tuple[Metrics, list[str]]:
        """Evaluate the initial model, then load the checkpoint if the run is resumed, and open the run's directory."""
        arguments, run_folder, found = self.arguments, self.run_folder, self.start.checkpoint
        if found:
            self._check_content(found[1])
            self.accelerator.print(f"Resuming from step {found[1]['step']:,}: {found[0]}")
        before = self._evaluate()
        self.accelerator.print(f"\nBefore training: {before[0]}\n\n{_lines(before[1])}")
        if found:
            self._load(*found)
            if self.start.changes:
                self._note(f"from step {self.step:,} with {', '.join(self.start.changes)}")
        last_kept = self.step if found else -1  # of the metrics; without a checkpoint the evaluation of step 0 is repeated
        run_folder.open(last_kept if arguments.resume else None)
        if arguments.early_stopping_patience:
            self._check_shared_disk()
        start_trackers(self.accelerator, arguments.resume)
        for tracker in self.accelerator.trackers:
            tracker.store_init_configuration({name: str(value) for name, value in asdict(arguments).items()})
        if not found:
            run_folder.log_evaluation(0, before[0])
        return before

    def train_until_done(self) -> None:
        """Train to the last step, until early stopping, or until a signal, after which the process exits."""
        arguments = self.arguments
        if self._should_stop_early():
            return
        peak = measured_peak(self.accelerator)
        with (
            ProgressBar(arguments.max_steps, self.accelerator, self.task.flops_per_token, peak, self.step) as bar,
            GracefulShutdown(self.accelerator) as shutdown,
        ):
            stop_requested = False
            for step in self._steps(shutdown):
                self.step, self.evaluated = step.number, None
                bar.log(step)
                self.run_folder.log_step(step)
                stop_requested = shutdown.requested()
                if step.number == arguments.max_steps or step.number % arguments.eval_steps == 0:
                    metrics, preview = self._evaluate()
                    self.losses.append(metrics.loss)
                    self.run_folder.log_evaluation(step.number, metrics)
                is_last = step.number == arguments.max_steps or self._should_stop_early()
                if is_last or stop_requested or self._is_best() or step.number % arguments.save_steps == 0 or self._is_old():
                    self._save()
                if self.evaluated:  # after saving, since what reads the output may have ended
                    with shutdown.output():
                        bar.print(f"step {step.number}: {metrics}\n\n{_lines(preview if is_last else preview[:1])}")
                if is_last:
                    return
                if stop_requested:
                    break
            if not stop_requested and not shutdown.received:  # all steps were done before
                return
            if self.step > self.saved_step:
                self._save()
            with shutdown.output():
                bar.print(f"Stopped after step {self.step:,}. To continue, run the same command with --resume.")
            self.accelerator.end_training()
            sys.exit(130)

    def _steps(self, shutdown: GracefulShutdown) -> Iterator[Step]:
        """Steps after the current one, also until a signal ends the compiler of the next one.

        If a batch does not fit into memory, smaller ones are accumulated to the same step.
        """
        while True:
            arguments = self.task.arguments
            batches = shard_dataloader(self.accelerator, self.task.train_dataloader())
            batches = skip_first_batches(batches, self.step * arguments.gradient_accumulation_steps)
            prepared = self.prepared_model, self.prepared_optimizers
            try:
                yield from training_steps(self.accelerator, *prepared, batches, arguments, self.step + 1)
                return
            except RuntimeError as error:
                is_alone = self.accelerator.num_processes == 1  # else the other processes would wait for this one
                if is_alone and shutdown.received and isinstance(error, TorchDynamoException):
                    return  # Ctrl-C in a terminal also ends the compiler's processes
                if not is_alone or not is_out_of_memory(error):
                    raise
                if arguments.batch_size == 1:
                    remedy = "lower --context_length, pass --gradient_checkpointing, or choose a smaller model"
                    raise UserError(f"out of memory with one row at a time ({one_line(error)}): {remedy}.") from error
            rows = next(size for size in range(arguments.batch_size // 2, 0, -1) if arguments.batch_size % size == 0)
            accumulation = arguments.gradient_accumulation_steps * arguments.batch_size // rows
            self.task.arguments = replace(arguments, batch_size=rows, gradient_accumulation_steps=accumulation)
            self._note(f"out of memory: from step {self.step + 1:,} on, {accumulation} batches of {rows} rows per step")
            for optimizer in self.prepared_optimizers:
                optimizer.zero_grad()
            clear_device_cache(garbage_collection=True)

    def restore_best(self) -> tuple[Metrics, list[str]]:
        """With early stopping, load the checkpoint with the lowest held-out loss; return metrics and preview of the model."""
        if self.losses and (lowest := min(self.losses)) < (last := self.losses[-1]):
            best = find_checkpoint(self.run_folder.checkpoints, self.accelerator.print, best=True)
            if best and best[1]["eval_loss"] < last and self.arguments.early_stopping_patience:
                last_step = self.step
                self._load(*best)
                self._note(f"restored the model of step {self.step:,}, the saved one with the lowest held-out loss")
                self.step, self.evaluated = last_step, None
            elif WORSE * lowest < last:
                saved = f", whose model is in {best[0].name}" if best and best[1]["eval_loss"] == lowest else ""
                losses = f"the final model has a held-out loss of {last:.3f}; the lowest was {lowest:.3f}{saved}"
                self._note(f"{losses}: to keep the best model, pass --early_stopping_patience")
        return self._evaluate()

    def _evaluate(self) -> tuple[Metrics, list[str]]:
        """Metrics and preview of the current weights."""
        if self.evaluated is None:
            self.evaluated = self.task.evaluate(self.prepared_model, self.task.eval_split), self.task.preview(self.model)
        return self.evaluated

    def _is_best(self) -> bool:
        """True after an evaluation with the lowest loss so far, if early stopping needs that model."""
        is_candidate = self.arguments.early_stopping_patience > 0 and self.evaluated is not None
        return is_candidate and self.losses[-1] < min(self.losses[:-1], default=math.inf)

    def _should_stop_early(self) -> bool:
        """True if the last `early_stopping_patience` evaluations brought no new lowest loss."""
        patience = self.arguments.early_stopping_patience
        return patience > 0 and bool(self.losses) and len(self.losses) - 1 - self.losses.index(min(self.losses)) >= patience

    def _is_old(self) -> bool:
        """True if the last checkpoint is `save_minutes` old by the clock of any process; all processes must call it."""
        minutes = self.arguments.save_minutes
        is_old = minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        return minutes > 0 and bool(self.accelerator.reduce(torch.tensor(int(is_old), device=self.accelerator.device)))

    def _save(self) -> None:
        state = {
            "step": self.step,
            "eval_loss": self.losses[-1] if self.evaluated else math.inf,  # of these weights
            "eval_losses": self.losses,
            "settings": self.start.settings,
            "notes": self.notes,
            "frozen": self.frozen,
            "data": self.task.data_digest,
            "loss_scale": self.accelerator.scaler and self.accelerator.scaler.state_dict(),  # of float16
            "chosen": chosen_settings(self.accelerator),
        }
        directory, limit = self.run_folder.checkpoints, self.arguments.save_total_limit
        save_model = partial(self.task.save_model, self.model)
        save_checkpoint(directory, self.accelerator, self.model, self.optimizers, state, limit, save_model)
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def _load(self, path: Any, state: dict[str, Any]) -> None:
        load_checkpoint(path, state, self.model, self.optimizers)
        if self.accelerator.scaler and state.get("loss_scale"):  # none if the run had another precision
            self.accelerator.scaler.load_state_dict(state["loss_scale"])
        self.step = self.saved_step = state["step"]
        self.evaluated = None
        self.losses, self.notes = self.losses or state["eval_losses"], self.notes or state["notes"]

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.accelerator.print(text[0].upper() + text[1:])

    def _check_shared_disk(self) -> None:
        """Refuse an output directory that some machines do not see: the main process writes there, and all load from it."""
        self.accelerator.wait_for_everyone()  # it has just created the metrics file
        if not all(gather_object([(self.run_folder.path / METRICS).exists()])):
            problem = f"--output_dir {self.run_folder.path} is not on a disk that all machines share"
            raise UserError(f"{problem}, which --early_stopping_patience needs: pass another one, or leave that out.")

    def _check_content(self, state: dict[str, Any]) -> None:
        """Refuse a base model or data that differ from those of the run, and fewer epochs than are done."""
        path = self.run_folder.path
        if self.frozen != state["frozen"]:
            raise UserError(f"the base model of the run in {path} has changed since it was started: resume with that one.")
        if self.task.data_digest != state["data"]:
            raise UserError(f"the data of the run in {path} has changed since it was started: resume with that, or start anew.")
        if self.arguments.max_steps < state["step"]:  # without epochs, it has been refused before
            epochs = f"--num_train_epochs {self.arguments.num_train_epochs} is {self.arguments.max_steps} steps"
            raise UserError(f"{epochs}, but the run in {path} has done {state['step']}: pass at least as many.")


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    # Renamed in transformers 5.23; the oldest supported version has only the old name.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def _lines(preview: list[str]) -> str:
    return "\n\n".join(preview) + "\n"
