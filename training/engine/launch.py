"""Starting Accelerate and its trackers, choosing precision and compiler, and ending with the launcher."""

import ctypes
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DynamoBackend, GradientAccumulationPlugin, broadcast_object_list, parse_flag_from_env
from transformers import PreTrainedModel

from training.engine.flops import measured_peak
from training.engine.machine import available_cores, device_name, has_fast_bfloat16, missing_compiler
from training.engine.run_folder import LOGS
from training.errors import UserError, explain_errors

RESUMABLE_TRACKERS = {"wandb": "id", "trackio": "name"}  # and the argument of their `init` that names a run
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # and their names in Accelerate
FLEX_HEADS = range(16, 129)  # dimensions, for its kernels; larger ones do not fit into the shared memory of many GPUs
SHORT = 256  # positions, with which the attention on CPUs was measured
COMPILE_SECONDS = 60  # of a graph for training and one for evaluation
COMPILE_SAVES = 0.2  # of the time of a step, about, in bfloat16 on a CPU; more on a GPU
UTILIZATION = 0.25  # of the device's peak, about, by a step that is not compiled
# For the others, while one process prepares the data or writes a checkpoint; a process that ends is noticed at once.
TIMEOUT = timedelta(hours=24)
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends


def start_accelerator(
    report_to: str = "none", output_dir: Path | None = None, precision: str = "auto", earlier: dict[str, str] | None = None
) -> Accelerator:
    """Accelerate, with each batch split over the processes, so that their number changes the speed and not the result.

    Args:
        report_to: the tracker that receives the metrics; `auto` is tensorboard if it is installed.
        output_dir: trackers that write files do so in its directory `logs`.
        precision: of the matrix products; see `choose_precision`.
        earlier: the `chosen_settings` of the run to resume.

    Raises:
        UserError: a tracker that is not installed; several processes where Accelerate sees one; see also `choose_precision`.
    """
    installed = [str(tracker) for tracker in get_available_trackers()]
    if report_to == "auto":
        report_to = "tensorboard" if "tensorboard" in installed else "none"
    if report_to not in ("none", *installed):
        known = f"installed: {', '.join(installed)}" if installed else "none is installed"
        raise UserError(f"--report_to {report_to}: pass auto, none, or a tracker of Accelerate that is installed ({known}).")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    is_configured = "ACCELERATE_MIXED_PRECISION" in os.environ  # by `accelerate launch`; torchrun and notebooks name no device
    device = torch.accelerator.current_accelerator(check_available=True)
    is_without_gpu = started > 1 and not is_configured and (device is None or device.type == "mps")  # of one process only
    cpu = is_without_gpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state()  # an earlier run in this process, such as a notebook, may have had another precision
    chosen_precision = [choose_precision(precision, PartialState(cpu, timeout=TIMEOUT).device.type, earlier)]
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=broadcast_object_list(chosen_precision)[0],  # a measurement may differ between processes
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # Without it, a number in an Accelerate config would divide the loss, although the batches are accumulated below.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=None if report_to == "none" else report_to,
        project_dir=output_dir / LOGS if output_dir else None,
    )
    keep_float32_sums(accelerator)
    if started > accelerator.num_processes:
        # Without GPUs, Accelerate treats each process as a run of its own: all would train the same, and write to one place.
        problem = f"{started} processes were started for GPUs that this machine does not have"
        raise UserError(f"{problem}: start one, or several on the CPU with `torchrun --nproc_per_node {started}`.")
    is_launched = is_configured or "LOCAL_WORLD_SIZE" in os.environ
    if is_launched:
        stop_with_launcher()
    # The launchers set one thread per process unless the user chose a number; divide all cores instead.
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if accelerator.device.type == "cpu" and (not chosen or (chosen == "1" and is_launched)):
        torch.set_num_threads(max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    return accelerator


def keep_float32_sums(accelerator: Accelerator) -> None:
    """Let FSDP2 sum gradients, and return the loss, in float32: Accelerate's policy takes the precision of the products."""
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp and fsdp.fsdp_version == 2 and (policy := fsdp.mixed_precision_policy):
        fsdp.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=torch.float32)


def chosen_settings(accelerator: Accelerator) -> dict[str, str]:
    """The device, and what was chosen for it: a run that is resumed on the same one chooses the same, whatever it measures."""
    return {
        "device": device_name(accelerator.device.type),
        "distribution": accelerator.distributed_type.value,
        "precision": accelerator.mixed_precision,
        "backend": accelerator.state.dynamo_plugin.backend.value,
    }


def choose_precision(asked: str, device_type: str, earlier: dict[str, str] | None = None) -> str:
    """Accelerate's name of the precision: of an Accelerate config, of `--precision`, or with `auto` bfloat16 where it is fast.

    Raises:
        UserError: the option contradicts the config; float16 on a CPU.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # the launcher exports `no` if nobody chose
    if asked != "auto" and launched not in ("no", PRECISIONS[asked]):
        chosen = f"Accelerate's config or command line has chosen {launched}"
        raise UserError(f"--precision {asked}: {chosen}: change it, or pass auto.")
    precision = PRECISIONS.get(asked, launched)
    if precision == "fp16" and device_type == "cpu":
        raise UserError("float16 needs a GPU, and this run uses the CPU: pass --precision auto, float32 or bfloat16.")
    is_open = asked == "auto" and launched == "no" and "ACCELERATE_USE_DEEPSPEED" not in os.environ  # it has its own setting
    if is_open and earlier and earlier["device"] == device_name(device_type):
        return earlier["precision"]
    return "bf16" if is_open and has_fast_bfloat16(device_type) else precision


def choose_attention(accelerator: Accelerator, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    """Choose another attention than SDPA where it is faster, once the compiler is chosen.

    - Packed rows on a GPU: flex attention skips the blocks of other documents, which a mask would have computed.
    - Short rows on a CPU, compiled in bfloat16: SDPA's backward pass takes six times as long as its forward pass, while the
      compiler fuses plain products with what is between them.
    """
    device, config = accelerator.device.type, model.config
    is_compiled = accelerator.state.dynamo_plugin.backend == DynamoBackend.INDUCTOR
    has_kernels = config.attention_dropout == 0 and config.head_dim in FLEX_HEADS
    if device == "cuda" and "position_ids" in batch and has_kernels and not missing_compiler(device):
        model.set_attn_implementation("flex_attention")
    if device == "cpu" and is_compiled and accelerator.mixed_precision == "bf16" and config.max_position_embeddings <= SHORT:
        model.set_attn_implementation("eager")


@contextmanager
def sdpa_attention(model: Any) -> Iterator[None]:
    """Generate with SDPA, whatever was chosen for training: flex attention would be compiled for each length of the text."""
    chosen = model.config._attn_implementation
    if chosen in ("eager", "flex_attention"):
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if chosen in ("eager", "flex_attention"):
            model.set_attn_implementation(chosen)


def choose_compiler(accelerator: Accelerator, asked: str, run_flops: float, earlier: dict[str, str] | None = None) -> None:
    """Let Accelerate compile the model: if its config says so, with `--torch_compile true`, or with `auto` if it saves time.

    Args:
        run_flops: of the run, for each graph that would be compiled.
        earlier: the `chosen_settings` of the run to resume.

    Raises:
        UserError: the option contradicts the config.
    """
    plugin = accelerator.state.dynamo_plugin
    is_open = plugin.backend == DynamoBackend.NO
    is_same = {**(earlier or {}), "backend": "NO"} == chosen_settings(accelerator)
    if earlier and is_open and asked == "auto" and broadcast_object_list([is_same])[0]:  # processes may have different devices
        plugin.backend = DynamoBackend(earlier["backend"])
    elif is_open and (asked == "true" or (asked == "auto" and compiling_pays(accelerator, run_flops))):
        plugin.backend = DynamoBackend.INDUCTOR
    elif not is_open and asked == "false":
        chosen = f"Accelerate's config or command line has chosen dynamo_backend {plugin.backend.value}"
        raise UserError(f"--torch_compile false: {chosen}: change it, or pass --torch_compile auto.")
    if plugin.backend == DynamoBackend.INDUCTOR and (missing := missing_compiler(accelerator.device.type)):
        accelerator.print(f"The model is not compiled, since {missing} is missing")
        plugin.backend = DynamoBackend.NO


def compiling_pays(accelerator: Accelerator, flops: float) -> bool:
    """Estimate whether a compiled run of this many FLOPs ends earlier. Sharded models, and on MPS all, only on request."""
    kind = accelerator.device.type
    is_sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    # In float32 on a CPU matrix products take most of a step, and compiling does not make them faster.
    if is_sharded or kind not in ("cuda", "cpu") or (kind == "cpu" and accelerator.mixed_precision == "no"):
        return False
    seconds = flops / (UTILIZATION * measured_peak(accelerator))
    return broadcast_object_list([COMPILE_SAVES * seconds > COMPILE_SECONDS])[0]


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
            problem = "Process 1 of a container ignores SIGTERM, and here it is `accelerate launch`"
            remedy = "to save a checkpoint when the container is stopped, start the program with `python`"
            print(f"{problem}: {remedy}.", file=sys.stderr)
