"""Starting Accelerate and its trackers, and ending with the launcher."""

import ctypes
import os
import signal
import sys
import uuid
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, InitProcessGroupKwargs

from training.engine.machine import available_cores
from training.engine.run_folder import LOGS
from training.errors import UserError, explain_errors

RESUMABLE_TRACKERS = {"wandb": "id", "trackio": "name"}  # and the argument of their `init` that names a run
# For the others, while one process prepares the data or writes a checkpoint; a process that ends is noticed at once.
TIMEOUT = timedelta(hours=24)
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends


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
    started = int(os.environ.get("WORLD_SIZE", "1"))
    is_configured = "ACCELERATE_MIXED_PRECISION" in os.environ  # by `accelerate launch`; torchrun and notebooks name no device
    accelerator = Accelerator(
        cpu=started > 1 and not is_configured and not torch.accelerator.is_available(),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # Without it, a number in an Accelerate config would divide the loss, although the batches are accumulated below.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        log_with=None if report_to == "none" else report_to,
        project_dir=output_dir / LOGS if output_dir else None,
    )
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp and fsdp.fsdp_version == 2 and fsdp.mixed_precision_policy:
        # Accelerate's policy sums the gradients of all processes, and returns the loss, in the precision of the products.
        exact = replace(fsdp.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=torch.float32)
        fsdp.mixed_precision_policy = exact
    if started > accelerator.num_processes:
        # Without GPUs, Accelerate treats each process as a run of its own: all would train the same, and write to one place.
        raise UserError(
            f"{started} processes were started for GPUs that this machine does not have: start one, or several on the CPU with "
            f"`torchrun --nproc_per_node {started}`."
        )
    is_launched = is_configured or "LOCAL_WORLD_SIZE" in os.environ
    if is_launched:
        stop_with_launcher()
    # The launchers set one thread per process unless the user chose a number; divide all cores instead.
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if accelerator.device.type == "cpu" and (not chosen or (chosen == "1" and is_launched)):
        torch.set_num_threads(max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return accelerator


def start_trackers(accelerator: Accelerator, resume: bool, before_data: bool = False) -> None:
    """Start the trackers that have not been started; with `resume`, continue the run of the tracker where it is able to.

    Args:
        before_data: only those that need a login; the others create the output directory, where nothing is written so early.

    Raises:
        UserError: a tracker cannot be started.
    """
    name = next(map(str, accelerator.log_with), "")
    if accelerator.trackers or not name or (before_data and LOGGER_TYPE_TO_CLASS[name].requires_logging_directory):
        return
    file = Path(accelerator.logging_dir, f"{name}_run")
    run_id = file.read_text() if resume and file.exists() else uuid.uuid4().hex[:8]
    is_named = name in RESUMABLE_TRACKERS and "WANDB_RUN_ID" not in os.environ  # which names the run of a sweep
    options = {RESUMABLE_TRACKERS[name]: run_id, "resume": "allow"} if is_named else {}
    with explain_errors(f"--report_to {name} cannot be started", remedy=": log in to it, or pass --report_to none"):
        accelerator.init_trackers("scratchgpt", init_kwargs={name: options})
    if is_named and accelerator.is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(run_id)


def stop_with_launcher() -> None:
    """Get SIGTERM when the launcher ends (Linux only): `accelerate launch` of one process passes no signal on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1 and "LOCAL_WORLD_SIZE" not in os.environ:
            print(
                "Process 1 of a container ignores SIGTERM, and here it is `accelerate launch`: to save a checkpoint when the "
                "container is stopped, start the program with `python`.",
                file=sys.stderr,
            )
