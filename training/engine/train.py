"""The engine of every recipe: what can be asked of a training run, and the run itself, which survives being stopped.

A recipe brings the model, the batches and a way to evaluate; the engine trains, shows progress, evaluates, saves, and goes on
where an earlier run had ended.
"""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from training.cli import option
from training.engine.checkpoints import (
    METRICS,
    GracefulShutdown,
    check_output_folder,
    find_checkpoint,
    frozen_digest,
    load_checkpoint,
    save_checkpoint,
)
from training.engine.flops import measured_peak
from training.engine.loop import start_accelerator, training_steps
from training.engine.metrics import MetricsFile
from training.engine.optimizers import OPTIMIZERS, SCHEDULES, make_optimizers, make_schedules
from training.engine.report import ProgressBar, duration
from training.errors import UserError

MOST_EPOCHS = 1_000_000
Metrics = TypeVar("Metrics", bound=Any)  # a dataclass with a `loss`


@dataclass
class EngineArguments:
    """What every recipe can be asked; what `RESUME_MAY_CHANGE` names may be asked otherwise when a run goes on."""

    RESUME_MAY_CHANGE: ClassVar[set[str]] = {
        "config",
        "resume",
        "report_to",
        "save_steps",
        "save_total_limit",
        "license",
        "language",
        "output_dir",
    }
    batch_size: int = option(8, "Rows in a batch, over all processes.")
    gradient_accumulation_steps: int = option(1, "Batches that make up one optimizer step.")
    max_steps: int = option(1000, "Optimizer steps.")
    optimizer: str = option(
        "adamw", "adamw, or muon: Muon for the matrices of the blocks and AdamW for the rest.", choices=OPTIMIZERS
    )
    learning_rate: float = option(1e-3, "Highest learning rate of AdamW.")
    muon_learning_rate: float = option(0.02, "Highest learning rate of Muon.")
    weight_decay: float = option(0.1, "Decay of the matrices.")
    lr_scheduler_type: str = option("cosine", "How the learning rate falls: cosine, linear, or wsd (late).", choices=SCHEDULES)
    warmup_ratio: float = option(0.05, "Share of the steps over which the learning rate rises.")
    decay_ratio: float = option(0.2, "Share of the steps over which wsd falls.")
    min_lr_ratio: float = option(0.1, "What is left of the learning rate at the end.")
    max_grad_norm: float = option(1.0, "Longest gradient; a longer one is scaled down to it.")
    gradient_checkpointing: bool = option(False, "Compute activations twice instead of keeping them: less memory, more time.")
    eval_steps: int = option(300, "Steps between looks at the held-out data.")
    save_steps: int = option(300, "Steps between checkpoints.")
    save_total_limit: int = option(2, "Checkpoints to keep, besides the best.")
    early_stopping_patience: int = option(
        0, "Stop after so many evaluations in a row without a new lowest loss, and take the model that had it; 0: never."
    )
    resume: bool = option(False, "Go on with the run in --output_dir from its latest good checkpoint.")
    report_to: str = option(
        "auto", "A tracker of Accelerate, such as trackio or wandb; none; or auto: tensorboard if installed."
    )
    seed: int = option(0, "Decides weights, held-out data, the order of the data and dropout.")
    license: str = option("", "Licence of the model, for its card: an id of the Hub's, such as apache-2.0 or mit.")
    language: str = option("", "Language of the texts, for the card: two letters, such as en.")
    output_dir: str = option("outputs/run", "New folder for the model.")


@dataclass
class EpochArguments(EngineArguments):
    """The same where a run is counted in epochs."""

    num_train_epochs: float = option(6.0, "How often each example is seen, if --max_steps does not say.")
    max_steps: int = option(0, "Optimizer steps; 0: as many as --num_train_epochs takes.")
    eval_steps: int = option(0, "Steps between looks at the held-out data; 0: an epoch.")
    save_steps: int = option(0, "Steps between checkpoints; 0: an epoch.")


Run = TypeVar("Run", bound=EngineArguments)
Epochs = TypeVar("Epochs", bound=EpochArguments)


def check_engine(arguments: EngineArguments, num_processes: int) -> None:
    """Refuse nonsense before any long work."""
    for name in ("batch_size", "gradient_accumulation_steps", "max_steps", "eval_steps", "save_steps", "save_total_limit"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    for name in ("warmup_ratio", "decay_ratio", "min_lr_ratio"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise UserError(f"--{name} must be between 0 and 1, got {getattr(arguments, name)}.")
    for name in ("learning_rate", "muon_learning_rate", "max_grad_norm"):
        if not 0 < getattr(arguments, name) < float("inf"):
            raise UserError(f"--{name} must be a positive number, got {getattr(arguments, name)}.")
    for name in ("weight_decay", "early_stopping_patience"):
        if not 0 <= getattr(arguments, name) < float("inf"):
            raise UserError(f"--{name} must be zero or more, got {getattr(arguments, name)}.")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed must be at least 0 and below 2^32, got {arguments.seed}.")
    if arguments.batch_size % num_processes:
        raise UserError(f"--batch_size {arguments.batch_size} must be a multiple of the number of processes, {num_processes}.")


def check_epochs(arguments: EpochArguments, num_processes: int) -> None:
    """The same where a run is counted in epochs."""
    if not 0 < arguments.num_train_epochs <= MOST_EPOCHS:
        raise UserError(f"--num_train_epochs must be above 0 and at most {MOST_EPOCHS:,}, got {arguments.num_train_epochs}.")
    check_engine(resolve_epochs(arguments, 1), num_processes)


def resolve_epochs(arguments: Epochs, num_rows: int) -> Epochs:
    """The arguments with what an epoch of so many rows decides filled in."""
    an_epoch = num_rows / max(1, arguments.batch_size * arguments.gradient_accumulation_steps)
    return replace(
        arguments,
        max_steps=arguments.max_steps or math.ceil(arguments.num_train_epochs * an_epoch),
        eval_steps=arguments.eval_steps or math.ceil(an_epoch),
        save_steps=arguments.save_steps or math.ceil(an_epoch),
    )


def start(arguments: Run, check: Callable[[Run, int], None]) -> tuple[Accelerator, Path]:
    """Accelerate and the output folder of a run, when nothing about it is to be refused.

    Args:
        check: refuses nonsense, given the arguments and the number of processes.
    """
    output_dir = Path(os.path.expanduser(arguments.output_dir))
    accelerator = start_accelerator(arguments.report_to, output_dir)
    check(arguments, accelerator.num_processes)
    if accelerator.is_main_process:
        check_output_folder(output_dir, arguments.resume)
    accelerator.wait_for_everyone()
    return accelerator, output_dir


def build_optimizers(
    arguments: EngineArguments, model: PreTrainedModel
) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LambdaLR]]:
    """The optimizers of a run and their schedules; the model is told how to keep its activations."""
    if arguments.gradient_checkpointing:
        # It was given a new name in the transformers that constraints.txt pins; the oldest that works has only the old one.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    optimizers = make_optimizers(
        model, arguments.optimizer, arguments.learning_rate, arguments.muon_learning_rate, arguments.weight_decay
    )
    schedules = make_schedules(
        optimizers,
        arguments.lr_scheduler_type,
        math.ceil(arguments.warmup_ratio * arguments.max_steps),
        arguments.max_steps,
        arguments.min_lr_ratio,
        arguments.decay_ratio,
    )
    return optimizers, schedules


@dataclass(frozen=True)
class TrainResult(Generic[Metrics]):
    """What a run has come to."""

    before: Metrics
    after: Metrics
    metrics: MetricsFile  # kept open, and so the folder this run's, until its model is there

    def __str__(self) -> str:
        rows = self.metrics.rows
        tokens, seconds = (sum(row.get(name, 0) for row in rows) for name in ("tokens", "seconds"))
        steps = max((row["step"] for row in rows), default=0)  # a process that only went on for the end has no rows
        return f"{steps:,} steps, {tokens:,} tokens, {duration(seconds)} (evaluations apart)"


def train(
    accelerator: Accelerator,
    arguments: EngineArguments,
    model: PreTrainedModel,
    training_loader: Callable[[int], DataLoader],
    data: str,
    evaluate: Callable[[nn.Module], Metrics],
    show: Callable[[], str],
    flops_per_token: float,
) -> TrainResult[Metrics]:
    """Train the model in place, or go on doing so.

    Args:
        model: with the weights that a new run starts from.
        training_loader: gives the run's batches without the first so many.
        data: a digest of what they are made from; a run goes on with the same alone.
        evaluate: scores the prepared model on held-out data.
        show: something the model does, as text for people: looked at before the first step and after each evaluation.

    Raises:
        UserError: the settings are not those of the run to go on with; the loss is no longer a number.
    """
    output_dir = Path(os.path.expanduser(arguments.output_dir))
    checkpoints = output_dir / "checkpoints"
    optimizers, schedules = build_optimizers(arguments, model)
    frozen = frozen_digest(model)
    prepared_model, *prepared_optimizers = accelerator.prepare(model, *optimizers)
    found = find_checkpoint(checkpoints, accelerator.print) if arguments.resume else None
    if found:
        path, state = found
        _check_settings(arguments, state["settings"], path)
        if frozen != state.get("frozen", frozen):
            raise UserError(f"the model that the run in {output_dir} started from has changed since: go on from that one.")
        if data != state["data"]:
            raise UserError(f"the data of the run in {output_dir} has changed since: go on with that, or start a new run.")
    before = evaluate(prepared_model)
    accelerator.print(f"\nBefore training: {before}.\n\n{show()}")

    done = 0
    losses: list[float] = []  # on the held-out data, at each evaluation
    if found:
        load_checkpoint(path, state, model, prepared_optimizers)
        for schedule, saved in zip(schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        done, losses = state["step"], state["validation_losses"]
        accelerator.print(f"Going on after step {done:,}, from {path}")
    elif arguments.resume:
        accelerator.print(f"There is no checkpoint in {checkpoints}: beginning with the first step")
    batches = accelerator.prepare(training_loader(done * arguments.gradient_accumulation_steps))

    output_dir.mkdir(parents=True, exist_ok=True)
    is_new = not (arguments.resume and (output_dir / METRICS).exists())
    metrics = MetricsFile(output_dir / METRICS, accelerator, None if is_new else done if found else -1)
    accelerator.init_trackers("scratchgpt", {name: str(value) for name, value in asdict(arguments).items()})
    if not found:
        metrics.write(0, before)

    after, is_enough = None, should_stop_early(losses, arguments.early_stopping_patience)
    peak = measured_peak(accelerator.device, torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32)
    with (
        ProgressBar(arguments.max_steps, accelerator, flops_per_token, peak * accelerator.num_processes, done) as bar,
        GracefulShutdown(accelerator) as stop,
    ):
        for step in training_steps(
            accelerator,
            prepared_model,
            prepared_optimizers,
            schedules,
            [] if is_enough else batches,
            arguments.gradient_accumulation_steps,
            arguments.max_grad_norm,
            arguments.seed,
            done + 1,
        ):
            bar.update(step)
            metrics.write(step.number, step)
            is_last, is_asked, is_best = step.number == arguments.max_steps, stop.requested(), False
            if is_last or step.number % arguments.eval_steps == 0:
                after = evaluate(prepared_model)
                is_best = arguments.early_stopping_patience > 0 and after.loss < min(losses, default=math.inf)
                losses.append(after.loss)
                metrics.write(step.number, after)
                bar.say(f"Step {step.number:,}: {after}\n\n{show()}")
                is_enough = should_stop_early(losses, arguments.early_stopping_patience)
                is_last |= is_enough
            if is_last or is_asked or is_best or step.number % arguments.save_steps == 0:
                state = {
                    "step": step.number,
                    "validation_loss": losses[-1] if losses else math.inf,
                    "validation_losses": losses,
                    "settings": _settings(arguments),
                    "frozen": frozen,
                    "data": data,
                    "schedules": [schedule.state_dict() for schedule in schedules],
                }
                save_checkpoint(checkpoints, accelerator, model, prepared_optimizers, state, arguments.save_total_limit)
            if is_asked and not is_last:
                bar.say(f"Stopped after step {step.number:,}. The same command with --resume goes on from there.")
                accelerator.end_training()
                sys.exit(130)
            if is_last:
                break
    if arguments.early_stopping_patience and losses and min(losses) < losses[-1]:
        best = find_checkpoint(checkpoints, accelerator.print, best=True)
        if best:
            path, state = best
            load_checkpoint(path, state, model, prepared_optimizers)
            accelerator.print(f"Taking the model of step {state['step']:,}: no good checkpoint has a lower held-out loss")
            after = None
    if after is None:  # other weights than those of the last evaluation, or it was stopped between its last step and its end
        after = evaluate(prepared_model)
        show()
    return TrainResult(before, after, metrics)


def should_stop_early(losses: list[float], patience: int) -> bool:
    """Whether the lowest loss lies as many evaluations back as there is patience for; there is no end to that of 0."""
    return bool(patience and losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


def _settings(arguments: EngineArguments) -> dict[str, Any]:
    """What decides the weights that a run ends with."""
    names = {field.name for field in fields(arguments)} - arguments.RESUME_MAY_CHANGE
    return {name: getattr(arguments, name) for name in sorted(names)}


def _check_settings(arguments: EngineArguments, saved: dict[str, Any], path: Path) -> None:
    now, longer = _settings(arguments), ", from the finished model, by --base_model"
    for name in sorted(now.keys() | saved.keys()):
        if now.get(name) != saved.get(name):
            raise UserError(
                f"--{name} is {now.get(name)}, but the run in {path.parents[1]} was started with {saved.get(name)}: "
                f"go on with that, or start a new run in another --output_dir{longer if name == 'max_steps' else ''}."
            )
