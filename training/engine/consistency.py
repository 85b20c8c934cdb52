"""Checks that all processes of a run, and a run and the one that it resumes, are the same run."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from training.engine.arguments import EngineArguments
from training.engine.checkpoints import find_checkpoint
from training.engine.run_folder import RunFolder
from training.errors import UserError

LENGTH = {"max_steps", "num_train_epochs", "early_stopping_patience"}  # with others, a finished run continues
# May differ between machines: data and weights are compared by content.
PATHS = {"dataset", "validation_dataset", "test_dataset", "base_model"}


@dataclass(frozen=True)
class Start:
    """The beginning of a run: its first step, or a checkpoint."""

    settings: dict[str, Any]  # the arguments that determine the final weights, and what Accelerate's launcher has chosen
    checkpoint: tuple[Path, dict[str, Any]] | None = None  # its directory and state
    changes: list[str] = field(default_factory=list)  # the settings that differ from those of the checkpoint, as text
    chosen: dict[str, str] | None = None  # the `chosen_settings` of the run, unless another length is requested
    is_finished: bool = False  # True if the model is published, and no other length is requested


def find_start(accelerator: Accelerator, arguments: EngineArguments, run_folder: RunFolder) -> Start:
    """Find the checkpoint to resume from, and check that all processes and that run have the same settings and code.

    Raises:
        UserError: on every process: they differ, or there are fewer steps than are done.
    """
    names = {field.name for field in fields(arguments)} - arguments.WITHOUT_EFFECT
    settings = {name: getattr(arguments, name) for name in sorted(names)} | launcher_settings(accelerator)
    found = find_checkpoint(run_folder.checkpoints, accelerator.print) if arguments.resume else None
    step = f"step {found[1]['step']}" if found else "none"
    options = {f"--{name}": value for name, value in settings.items() if name not in PATHS}
    check_processes(accelerator, {"code": code_version(), "checkpoint to resume from": step, **options})
    model = run_folder.path / "config.json"
    if not found:
        if arguments.resume and not model.exists():
            accelerator.print(f"{run_folder.checkpoints} has no checkpoint: starting from the first step")
        return Start(settings, is_finished=arguments.resume and model.exists())
    path, state = found
    defaults = {name: value for name, value in vars(type(arguments)()).items() if name in names}
    saved = defaults | state["settings"]  # an earlier version may not have had all options
    changed = _compare_settings(settings, saved, state, run_folder.path, arguments.RESUME_MAY_CHANGE)
    # A run that was extended, and then killed, has checkpoints that are newer than its model.
    is_finished = model.exists() and model.stat().st_mtime > path.stat().st_mtime and not LENGTH & set(changed)
    values = ((name, *(_text(source[name]) for source in (saved, settings))) for name in changed)
    changes = [f"{name} {before} -> {now}" for name, before, now in values]
    return Start(settings, found, changes, None if LENGTH & set(changed) else state.get("chosen"), is_finished)


def launcher_settings(accelerator: Accelerator) -> dict[str, Any]:
    """Precision, compilation and distribution, as Accelerate's launcher has chosen them."""
    return {
        "mixed_precision": accelerator.mixed_precision,
        "dynamo_backend": accelerator.state.dynamo_plugin.backend.value.lower(),
        "distributed_type": accelerator.distributed_type.value.lower(),
        "num_processes": accelerator.num_processes,
    }


def _compare_settings(
    now: dict[str, Any], saved: dict[str, Any], state: dict[str, Any], path: Path, may_change: set[str]
) -> list[str]:
    """The names of the settings that differ from those of a checkpoint; those in `may_change` do not affect the steps done."""
    step = state["step"]
    if now.keys() != saved.keys() or "notes" not in state:
        problem = f"the run in {path} was started by another program, or by another version of this one"
        raise UserError(f"{problem}: resume it with that, or start a new run in another --output_dir.")
    changed = [name for name in sorted(now) if now[name] != saved[name]]
    for name in changed:
        if name not in may_change:
            value, started = (_text(settings[name], is_public=False) for settings in (now, saved))
            problem = f"--{name} is {value}, but the run in {path} was started with {started}"
            raise UserError(f"{problem}: resume it with that value, or start a new run in another --output_dir.")
    rows, saved_rows = (settings["batch_size"] * settings["gradient_accumulation_steps"] for settings in (now, saved))
    if rows != saved_rows:
        problem = f"--batch_size times --gradient_accumulation_steps is {rows}, but {saved_rows} in the run in {path}"
        raise UserError(f"{problem}: resume it with the same product.")
    if 0 < now["max_steps"] < step:
        raise UserError(f"--max_steps is {now['max_steps']}, but the run in {path} has done {step}: pass at least as many.")
    return changed


def _text(value: Any, is_public: bool = True) -> str:
    """The value for people; on the card, which is public, files without their directories."""
    items = value if isinstance(value, list) else [value]
    return " ".join(Path(str(item)).name if is_public and items is value else str(item) for item in items) or "nothing"


def check_processes(accelerator: Accelerator, facts: dict[str, Any]) -> None:
    """Refuse processes whose facts, by name, differ, such as machines with other data; every process calls it.

    Raises:
        UserError: on all processes; it names the first process that differs from process 0, and the fact.
    """
    first, *others = gather_object([facts])
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                values = f"({other[name]!s:.40} instead of {value!s:.40})"
                remedy = "all machines need the same code, data and models, and, to resume, the same --output_dir"
                raise UserError(f"process {rank} does not have the same {name} as process 0 {values}: {remedy}.")


def code_version() -> str:
    """A digest of the programs, and the version of torch."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for package in ("modeling_scratchgpt", "training") for path in (root / package).rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()}, torch {torch.__version__}"


def weights_digest(model: nn.Module, is_included: Callable[[nn.Parameter], bool] = lambda parameter: True) -> str:
    """A digest of the parameters: of each the sum of its bits as integers, which takes a moment, and its first numbers."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if is_included(parameter):
            values = parameter.detach().float().flatten()
            bits = values.view(torch.int32)
            digest.update(f"{name} {bits.sum().item()} {bits[:64].tolist()}".encode())
    return digest.hexdigest()
