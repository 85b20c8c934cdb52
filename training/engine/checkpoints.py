"""Atomic, verified checkpoints.

Notable:
- A checkpoint appears under its name when all of it is on the disk, so a killed run leaves only complete ones.
- Reading verifies digests: if one byte differs, the checkpoint before it is used.
- Weights and optimizer state are safetensors, the rest is JSON: nothing in a checkpoint can run code. Tensors are full and
  named by parameter, so the number of processes and the sharding may differ when the run is resumed.
- The state of random number generators is not saved: it follows from the seed and the step (see `loop.py`), as the batches do.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict

from modeling_scratchgpt.atomic import atomic_directory, remove_abandoned
from training.engine.run_folder import explain_full_disk

WEIGHTS, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
TRAINED = replace(FULL, ignore_frozen_params=True)  # with LoRA only the adapter; the base is loaded from where it was


def save_checkpoint(
    directory: Path,
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: dict[str, Any],
    save_total_limit: int,
) -> None:
    """Write `directory/step-N`; then delete all but the last `save_total_limit` and the one with the lowest `eval_loss`.

    Every process calls it, since all of them gather a sharded model; the main one writes.

    Args:
        model, optimizers: without Accelerate's wrappers.
        state: JSON values, with `step` and `eval_loss` among them.
    """
    state_dicts: Any = get_state_dict(model, optimizers, options=TRAINED)
    weights, moments = state_dicts
    if accelerator.is_main_process:
        path = directory / f"step-{state['step']:08d}"
        directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(directory)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one, which the run has resumed before
        with explain_full_disk(directory), atomic_directory(path) as temporary:
            save_file(_without_ties(weights), temporary / WEIGHTS)
            flat = {f"{name}/{key}": value.contiguous() for name, own in moments["state"].items() for key, value in own.items()}
            save_file(flat, temporary / OPTIMIZER)
            (temporary / STATE).write_text(json.dumps({**state, "param_groups": moments["param_groups"]}))
            digests = {name: _digest(temporary / name) for name in (WEIGHTS, OPTIMIZER, STATE)}
            (temporary / MANIFEST).write_text(json.dumps(digests))
        paths = sorted(directory.glob("step-*"))
        best = min(paths, key=_eval_loss)  # the first of those saved since one evaluation: the weights that were evaluated
        for path in paths[:-save_total_limit]:
            if path != best:
                shutil.rmtree(path, ignore_errors=True)
    accelerator.wait_for_everyone()


def frozen_digest(model: nn.Module) -> str:
    """A digest of the parameters that are not trained, and so not saved, by the first numbers of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """All weights on the CPU, gathered from all processes if the model is sharded; every process calls it."""
    return get_model_state_dict(model, options=FULL)


def find_checkpoint(directory: Path, warn: Callable[[str], None], best: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The latest valid checkpoint, or that with the lowest `eval_loss`, and its state; damaged ones are reported to `warn`."""
    paths = sorted(directory.glob("step-*"), reverse=not best)
    for path in sorted(paths, key=_eval_loss) if best else paths:
        try:
            digests = json.loads((path / MANIFEST).read_text())
            damaged = [name for name in (WEIGHTS, OPTIMIZER, STATE) if _digest(path / name) != digests[name]]
            if not damaged:
                return path, json.loads((path / STATE).read_text())
            reason = f"the content of {', '.join(damaged)} has changed"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        warn(f"{path} is damaged ({reason}): trying another one.")
    return None


def load_checkpoint(path: Path, state: dict[str, Any], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Load the weights and the optimizer state of a verified checkpoint; every process calls it."""
    moments: dict[str, Any] = {}
    for name, tensor in load_file(path / OPTIMIZER).items():
        parameter, _, moment = name.rpartition("/")
        moments.setdefault(parameter, {})[moment] = tensor
    set_state_dict(
        model,
        optimizers,
        model_state_dict=dict(load_file(path / WEIGHTS)),
        optim_state_dict={"state": moments, "param_groups": state["param_groups"]},
        options=replace(TRAINED, strict=False),  # of tied tensors only the first name was saved
    )


def _without_ties(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor once, under the first of its names: safetensors refuses shared memory."""
    first = {tensor.data_ptr(): name for name, tensor in reversed(weights.items())}
    return {name: weights[name].contiguous() for name in weights if first[weights[name].data_ptr()] == name}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _eval_loss(path: Path) -> float:
    try:
        return json.loads((path / STATE).read_text())["eval_loss"]
    except (OSError, ValueError, KeyError):
        return float("inf")  # damaged
