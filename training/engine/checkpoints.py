"""Atomic, verified checkpoints.

Notable:
- A checkpoint appears under its name when all of it is on the disk, so a killed run leaves only complete ones.
- Reading verifies digests: if one byte differs, the checkpoint before it is used.
- A checkpoint is a model directory, which `from_pretrained` loads, with the optimizer's state beside the model. With LoRA the
  adapters are merged in that model, and saved once more as they are, to resume from.
- Weights and optimizer state are safetensors, the rest is JSON: nothing in a checkpoint can run code.
- Tensors are full and named by parameter, so the number of processes and the sharding may differ when the run is resumed.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FSDPModule

from modeling_scratchgpt.atomic import atomic_directory, remove_abandoned
from modeling_scratchgpt.lora import lora_layers
from training.engine.run_folder import explain_full_disk

WEIGHTS, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
ADAPTERS = "trained.safetensors"
NAME = re.compile(r"step-\d{8}")  # others, such as the user's copies, are never deleted
FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
TRAINED = replace(FULL, ignore_frozen_params=True)


def save_checkpoint(
    directory: Path,
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: dict[str, Any],
    save_total_limit: int,
    save_model: Callable[[Path, dict[str, Any]], None],
) -> None:
    """Write `directory/step-N`; then delete all but the last `save_total_limit` and the one with the lowest `eval_loss`.

    Every process calls it, since all of them gather a sharded model; the main one writes.

    Args:
        model, optimizers: without Accelerate's wrappers.
        state: JSON values, with `step` and `eval_loss` among them: infinity if these weights were not evaluated.
        save_model: writes a model directory, given its path and the full state dict.
    """
    weights = full_state_dict(model)
    moments: Any = dcp.get_optimizer_state_dict(model, optimizers, options=TRAINED)
    if accelerator.is_main_process:
        path = directory / f"step-{state['step']:08d}"
        directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(directory)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one, which the run has resumed before
        with explain_full_disk(directory), atomic_directory(path) as temporary, ThreadPoolExecutor() as pool:
            save_model(temporary, weights)
            digests = _start_digests(temporary, pool, {})  # while the optimizer is written
            if lora_layers(model):
                # Tied parameters once, under the first of their names: safetensors refuses shared memory.
                trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
                save_file({name: weights[name].contiguous() for name in trained}, temporary / ADAPTERS)
            flat = {f"{name}/{key}": value.contiguous() for name, own in moments["state"].items() for key, value in own.items()}
            save_file(flat, temporary / OPTIMIZER)
            (temporary / STATE).write_text(json.dumps({**state, "param_groups": moments["param_groups"]}))
            digests = _start_digests(temporary, pool, digests)
            (temporary / MANIFEST).write_text(json.dumps({name: digest.result() for name, digest in digests.items()}))
        paths = [each for each in _checkpoints(directory) if each <= path]  # later ones are damaged
        best = min(paths, key=_eval_loss)
        for old in paths[:-save_total_limit]:
            if old != best or _eval_loss(old) == math.inf:
                shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """All weights on the CPU, gathered from all processes if the model is sharded; every process calls it."""
    return dcp.get_model_state_dict(model, options=FULL)


def find_checkpoint(directory: Path, warn: Callable[[str], None], best: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The latest valid checkpoint, or that with the lowest `eval_loss`, and its state; damaged ones are reported to `warn`."""
    paths = _checkpoints(directory)[:: 1 if best else -1]
    for path in sorted(paths, key=_eval_loss) if best else paths:
        try:
            digests = json.loads((path / MANIFEST).read_text())
            damaged = [name for name in {*digests, WEIGHTS, OPTIMIZER, STATE} if _digest(path / name) != digests[name]]
            if not damaged:
                return path, json.loads((path / STATE).read_text())
            reason = f"the content of {', '.join(damaged)} has changed"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        warn(f"{path} is damaged ({reason}): trying another one.")
    return None


def latest_state(directory: Path) -> dict[str, Any]:
    """The state of the latest checkpoint, which is not verified; empty if there is none, or it cannot be read."""
    with suppress(OSError, ValueError, IndexError):
        return json.loads((_checkpoints(directory)[-1] / STATE).read_text())
    return {}


def load_checkpoint(path: Path, state: dict[str, Any], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Load the weights and the optimizer state of a verified checkpoint; every process calls it.

    The optimizers keep their hyperparameters, such as the learning rate: they are those of the arguments.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):  # an evaluation has left the last one gathered
            module.reshard()
    own: Any = dcp.get_optimizer_state_dict(model, optimizers, options=dcp.StateDictOptions(ignore_frozen_params=True))
    moments: dict[str, Any] = {}
    for name, tensor in load_file(path / OPTIMIZER).items():
        parameter, _, moment = name.rpartition("/")
        moments.setdefault(parameter, {})[moment] = tensor
    dcp.set_state_dict(
        model,
        optimizers,
        model_state_dict=dict(load_file(path / (ADAPTERS if (path / ADAPTERS).exists() else WEIGHTS))),
        optim_state_dict={"state": moments, "param_groups": own["param_groups"]},
        options=replace(TRAINED, strict=False),  # of tied tensors only the first name was saved
    )


def _checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, by step."""
    return sorted(path for path in directory.glob("step-*") if NAME.fullmatch(path.name))


def _start_digests(directory: Path, pool: ThreadPoolExecutor, started: dict[str, Future[str]]) -> dict[str, Future[str]]:
    """The digests of all files in a directory, by their names; those of the new ones are computed in the background."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return started | {name: pool.submit(_digest, path) for name, path in files.items() if name not in started}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _eval_loss(path: Path) -> float:
    try:
        return json.loads((path / STATE).read_text())["eval_loss"]
    except (OSError, ValueError, KeyError):
        return math.inf  # damaged
