"""What a run leaves behind: checkpoints to go on from, and a model folder that is whole or not there.

Notable:
- A checkpoint appears under its name when all of it is on the disk: killing a run at any moment leaves good ones only.
- Reading verifies: one altered byte, and the one before it is taken.
- Weights and optimizer are safetensors, the rest is JSON: nothing in a checkpoint can run code. They are whole tensors under
  the parameters' names, so it does not matter how many processes wrote them or how the model was sharded.
- Random numbers need no saving: those of a step follow from the seed and the step (see `loop.py`), and so do its windows.
"""

import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict

from training.errors import UserError

fcntl: ModuleType | None
try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None

WEIGHTS, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
METRICS = "metrics.jsonl"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
TRAINED = replace(WHOLE, ignore_frozen_params=True)  # of adapters that is little; the rest is where it was read from


def check_output_folder(folder: Path, resume: bool = False) -> None:
    """Refuse a folder that holds something, so that no result is ever written over; with `resume`, only a finished model.

    Raises:
        UserError: the folder is not empty, is not a folder, or cannot be written; another run is writing there.
    """
    metrics = folder / METRICS
    try:
        str(folder).encode()
        is_there = folder.is_dir()
        in_use = is_there and any(folder.iterdir())
        if metrics.exists():
            locked(metrics).close()
        if not in_use:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            if not is_there:
                folder.rmdir()  # it comes back with the first result
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--output_dir {folder!s:.200} cannot be written ({reason}): give the name of a new folder.") from error
    if not in_use:
        return
    if (folder / "config.json").exists():
        raise UserError(
            f"--output_dir {folder} already holds a finished model: pass another --output_dir, or move that folder away."
        )
    if metrics.exists():
        if not resume:
            raise UserError(
                f"--output_dir {folder} already holds a run that did not finish: go on with it by --resume, or pass another "
                "--output_dir."
            )
    else:
        raise UserError(f"--output_dir {folder} already holds files: pass another --output_dir, or move that folder away.")


def locked(metrics: Path, mode: str = "r+b") -> BinaryIO:
    """The file that a run writes its metrics into, opened, and no other run's until it is closed, where there are such locks.

    Raises:
        UserError: it is another run's.
    """
    file: Any = open(metrics, mode)  # noqa: SIM115
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"--output_dir {metrics.parent}: another run is writing there. Wait for its end, or pass another folder."
        ) from error
    except OSError:  # a file system that knows no locks: then nothing is known of other runs
        pass
    return file


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when all of them are written, and vanish when one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(folder)
    with _temporary_folder(folder) as temporary:
        yield temporary
        # config.json is what makes a folder a model: it comes last.
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            if path.is_dir():  # a run that was killed here has moved it already
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)


def _clear_abandoned(folder: Path) -> None:
    """Drop what a run that was killed had begun to write."""
    for abandoned in folder.glob(".writing-*"):
        shutil.rmtree(abandoned, ignore_errors=True)


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=parent))
    try:
        yield temporary
    except SafetensorError as error:  # it wraps the system's errors into its own words
        raise UserError(f"{parent} cannot be written ({error}): make room there, then go on with --resume.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int,
) -> None:
    """Write `folder/step-…`; then delete all but the last `keep` and the one with the lowest `validation_loss`.

    Every process calls it, because a sharded model takes all of them to put together; the main one writes.

    Args:
        model, optimizers: the bare model, and the optimizers that hold its parameters.
        state: anything that JSON can hold, with `step` and `validation_loss` in it.
    """
    whole: Any = get_state_dict(model, [_bare(optimizer) for optimizer in optimizers], options=TRAINED)
    weights, moments = whole
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(folder)
        with _temporary_folder(folder) as temporary:
            save_file(_without_ties(weights), temporary / WEIGHTS)
            save_file(_flat(moments["state"]), temporary / OPTIMIZER)
            (temporary / STATE).write_text(json.dumps({**state, "param_groups": moments["param_groups"]}))
            digests = {name: _digest(temporary / name) for name in (WEIGHTS, OPTIMIZER, STATE)}
            (temporary / MANIFEST).write_text(json.dumps(digests))
            for path in (*temporary.iterdir(), temporary):
                _to_disk(path)
            whole = folder / f"step-{state['step']:08d}"
            shutil.rmtree(whole, ignore_errors=True)  # a damaged one, which the run has gone back behind
            os.replace(temporary, whole)
            _to_disk(folder)
            temporary.mkdir()  # for the clean-up
        _rotate(folder, keep)
    accelerator.wait_for_everyone()


def frozen_digest(model: nn.Module) -> str:
    """Tells apart what a run does not train, and so does not save, by the first numbers of each parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights of a model on the CPU, however it is sharded; every process calls it."""
    weights: dict[str, Any] = get_model_state_dict(model, options=WHOLE)
    return weights


def find_checkpoint(folder: Path, say: Callable[[str], None], best: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The latest good checkpoint in the folder, or the one with the lowest `validation_loss`, and its state, if there is one;
    `say` hears of damaged ones."""
    paths = sorted(folder.glob("step-*"), reverse=not best)
    for path in sorted(paths, key=_validation_loss) if best else paths:
        try:
            digests = json.loads((path / MANIFEST).read_text())
            damaged = [name for name in (WEIGHTS, OPTIMIZER, STATE) if _digest(path / name) != digests[name]]
            if not damaged:
                return path, json.loads((path / STATE).read_text())
            reason = f"{', '.join(damaged)} is not what was written"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        say(f"{path} is damaged ({reason}): looking for another one.")
    return None


def load_checkpoint(path: Path, state: dict[str, Any], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put the weights and the optimizers' state of a verified checkpoint back; every process calls it."""
    weights: dict[str, Any] = dict(load_file(path / WEIGHTS))
    moments: dict[str, Any] = {}
    for name, tensor in load_file(path / OPTIMIZER).items():
        parameter, _, moment = name.rpartition("/")
        moments.setdefault(parameter, {})[moment] = tensor
    set_state_dict(
        model,
        [_bare(optimizer) for optimizer in optimizers],
        model_state_dict=weights,
        optim_state_dict={"state": moments, "param_groups": state["param_groups"]},
        options=replace(TRAINED, strict=False),  # of tied tensors only the first name was saved
    )


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def _without_ties(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor once, under the first of its names: safetensors holds no two names for one."""
    first = {tensor.data_ptr(): name for name, tensor in reversed(weights.items())}
    return {name: weights[name].contiguous() for name in weights if first[weights[name].data_ptr()] == name}


def _flat(moments: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{parameter}/{name}": tensor.contiguous() for parameter, own in moments.items() for name, tensor in own.items()}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until the file, or the folder's list of names, has reached the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens none, and writes such lists by itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rotate(folder: Path, keep: int) -> None:
    paths = sorted(folder.glob("step-*"))
    best = min(paths, key=_validation_loss)  # of those that were written since an evaluation the first, which it was made of
    for path in paths[:-keep]:
        if path != best:
            shutil.rmtree(path, ignore_errors=True)


def _validation_loss(path: Path) -> float:
    try:
        return json.loads((path / STATE).read_text())["validation_loss"]
    except (OSError, ValueError, KeyError):
        return float("inf")  # damaged


class GracefulShutdown:
    """Within this context, SIGTERM and Ctrl-C ask for a stop instead of ending the process; a second Ctrl-C ends it."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.received = accelerator, False

    def __enter__(self) -> "GracefulShutdown":
        self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if not self.received and self.accelerator.is_main_process:
            # Not by print, since what is interrupted may be printing; and whoever reads our output may have been stopped too.
            with suppress(OSError):
                os.write(2, b"\nStopping after this step, which is then saved. Ctrl-C ends it at once.\n")
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def requested(self) -> bool:
        """Whether any process has received one; the same answer in all, which must all ask."""
        if self.accelerator.num_processes == 1:
            return self.received
        return bool(self.accelerator.reduce(torch.tensor(int(self.received), device=self.accelerator.device)))
