"""Arguments that all recipes share."""

import math
import os
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from training.cli import option
from training.engine.launch import PRECISIONS
from training.engine.optimizers import OptimizerArguments
from training.errors import UserError


@dataclass
class EngineArguments(OptimizerArguments):
    """Arguments shared by all recipes."""

    WITHOUT_EFFECT: ClassVar[set[str]] = {  # on the weights
        *("config", "resume", "report_to", "save_steps", "save_minutes", "save_total_limit", "license", "language"),
        *("prepare_only", "output_dir"),
        "precision",  # by itself: its choice is compared as `mixed_precision`
    }
    # These may change on `--resume`: they affect only the steps to come, or (the data's path) are compared by content.
    RESUME_MAY_CHANGE: ClassVar[set[str]] = {
        *("dataset", "validation_dataset", "test_dataset", "encoding", "encoding_errors"),
        *("batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
        *("max_steps", "num_train_epochs", "eval_steps", "early_stopping_patience", "max_grad_norm", "weight_decay"),
        *("learning_rate", "muon_learning_rate", "lr_scheduler_type", "warmup_ratio", "decay_ratio", "min_lr_ratio"),
        *("eval_tokens", "torch_compile", "mixed_precision", "dynamo_backend", "distributed_type", "num_processes"),
    }
    typed = frozenset[str]()  # the options on the command line, see `parse_arguments`; without an annotation it is no field
    batch_size: int = option(8, "rows in a batch, over all processes", minimum=1)
    gradient_accumulation_steps: int = option(1, "batches per optimizer step", minimum=1)
    max_grad_norm: float = option(1.0, "maximum gradient norm", above=0)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    eval_steps: int = option(300, "evaluate every N optimizer steps", minimum=1)
    save_steps: int = option(300, "save a checkpoint every N optimizer steps", minimum=1)
    save_minutes: float = option(0.0, "also save a checkpoint N minutes after the last one; 0: never", minimum=0)
    save_total_limit: int = option(2, "checkpoints to keep, besides the best one", minimum=1)
    early_stopping_patience: int = option(
        0, "stop after N evaluations without a lower loss, and restore the model with the lowest; 0: never", minimum=0
    )
    precision: str = option(
        "auto", "of matrix products; auto: bfloat16 where the device is fast in it, else float32", choices=["auto", *PRECISIONS]
    )
    torch_compile: str = option("auto", "compile the model; auto: if that saves time", choices=["auto", "true", "false"])
    resume: bool = option(False, "resume the run in --output_dir from its latest valid checkpoint")
    prepare_only: bool = option(False, "prepare the data, print its report, and exit: the run finds it in the cache")
    report_to: str = option("auto", "a tracker of Accelerate, such as trackio or wandb; none; auto: tensorboard if installed")
    seed: int = option(0, "seed of the weights, the order of the data, and dropout", minimum=0, below=2**32)
    license: str = option("", "license of the model, for its card: an id of the Hub, such as apache-2.0 or mit")
    language: str = option("", "language of the texts, for the card: a two-letter code, such as en")
    output_dir: str = option("outputs/run", "new directory for the model")


@dataclass
class EpochArguments(EngineArguments):
    """The same for a run whose length is counted in epochs."""

    num_train_epochs: float = option(6.0, "epochs, if --max_steps is 0", above=0, maximum=1_000_000)
    max_steps: int = option(0, "optimizer steps; 0: --num_train_epochs", minimum=0)
    eval_steps: int = option(0, "evaluate every N optimizer steps; 0: every epoch", minimum=0)
    save_steps: int = option(0, "save a checkpoint every N optimizer steps; 0: every epoch", minimum=0)


Epochs = TypeVar("Epochs", bound=EpochArguments)


def check_engine(arguments: EngineArguments, num_processes: int) -> None:
    """Validate what also depends on the launcher: the number of processes, and its own accumulation of gradients."""
    launched = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if launched not in ("1", str(arguments.gradient_accumulation_steps)):
        problem = f"gradient_accumulation_steps is {launched} in the Accelerate config, which the recipes do not read"
        raise UserError(f"{problem}: pass --gradient_accumulation_steps {launched}.")
    if arguments.batch_size < num_processes:
        raise UserError(f"--batch_size {arguments.batch_size} must be at least the number of processes, {num_processes}.")


def resolve_epochs(arguments: Epochs, num_examples: int) -> Epochs:
    """Replace zeros in `max_steps`, `eval_steps` and `save_steps` by the steps of an epoch of `num_examples` examples."""
    steps_per_epoch = num_examples / (arguments.batch_size * arguments.gradient_accumulation_steps)
    return replace(
        arguments,
        max_steps=arguments.max_steps or math.ceil(arguments.num_train_epochs * steps_per_epoch),
        eval_steps=arguments.eval_steps or math.ceil(steps_per_epoch),
        save_steps=arguments.save_steps or math.ceil(steps_per_epoch),
    )
