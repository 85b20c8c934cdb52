"""Predict what a training run needs before it starts: parameters, FLOPs, memory and time.

    python training/plan.py
    python training/plan.py --model preset=124M --context_length 1024 --batch_size 8 --max_steps 20000
    accelerate launch --config_file training/configs/accelerate/one_gpu.yaml training/plan.py --config my_run.yaml

It takes the arguments of training/pretrain.py, reads no text and writes no files: it trains the model on random tokens for five
seconds, with the run's optimizer and training loop, and extrapolates.

Notable:
- Memory is measured on fake tensors, which have shapes but no data: a step of the real model and optimizer, before anything is
  allocated. A model that does not fit is reported, and not tried.
- It is the memory of one process that holds the whole model: FSDP takes less.
"""

import itertools
import math
import platform
import statistics
import weakref
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only_

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from modeling_scratchgpt.cross_entropy import chunk_rows, loss_and_gradients
from training.cli import parse_arguments, run_main
from training.engine.arguments import check_engine
from training.engine.flops import autocast_dtype, flops_per_token, measured_peak, parameters_by_part
from training.engine.launch import choose_compiler, start_accelerator
from training.engine.loop import training_steps
from training.engine.machine import available_memory
from training.engine.optimizers import build_optimizers
from training.engine.report import duration
from training.engine.train import enable_gradient_checkpointing
from training.errors import UserError
from training.pretrain import PretrainArguments, starting_point

MAPPED_BYTES = 2**25  # glibc requests larger blocks from the system, and returns them
PROBE_SECONDS = 5.0
CHINCHILLA = 20  # tokens per parameter that are optimal for a given number of FLOPs (Hoffmann et al., 2022)


class MemoryTracker(TorchDispatchMode):
    """Bytes of live tensors by kind ("temporary" at first): now, at the peak of their sum, and each kind's own maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[int, str] = {}  # by storage, which views share
        self.live, self.peak, self.maxima = Counter[str](), Counter[str](), Counter[str]()
        self.freed = 0  # temporary bytes, without the blocks that glibc returns to the system

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only_(torch.Tensor, self.mark, function(*args, **(kwargs or {})))

    def mark(self, tensor: torch.Tensor, kind: str = "temporary") -> None:
        """Count the storage of a tensor under its kind; the first kind other than "temporary" stays."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.kinds:
            weakref.finalize(storage, self._free, key, size)
        elif self.kinds[key] == "temporary":
            self.live["temporary"] -= size
        else:
            return
        self.kinds[key] = kind
        self.live[kind] += size
        self.maxima |= self.live
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _free(self, key: int, size: int) -> None:
        kind = self.kinds.pop(key)
        self.live[kind] -= size
        if kind == "temporary" and size < MAPPED_BYTES:
            self.freed += size


def build_run(config: ScratchGPTConfig, arguments: PretrainArguments) -> tuple[ScratchGPTForCausalLM, list]:
    """A new model in training mode, and its optimizers."""
    model = ScratchGPTForCausalLM(config).train()
    if arguments.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model, build_optimizers(arguments, model)


def record_step(
    config: ScratchGPTConfig, arguments: PretrainArguments, ids: torch.Tensor, dtype: torch.dtype, tracker: MemoryTracker
) -> int:
    """Train two steps on fake ids, and return the temporary bytes that a forward pass frees; the tracker holds the second."""

    def save_activation(tensor: torch.Tensor) -> torch.Tensor:
        tracker.mark(tensor, "activations")
        return tensor

    model, optimizers = build_run(config, arguments)
    for tensor in (*model.parameters(), *model.buffers()):
        tracker.mark(tensor, "weights")
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: tracker.mark(parameter.grad, "gradients"))
    for micro_batches in (1, min(2, arguments.gradient_accumulation_steps)):
        tracker.peak, tracker.maxima = Counter(), Counter()
        for _ in range(micro_batches):
            tracker.freed = 0
            autocast = torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32)
            with autocast, torch.autograd.graph.saved_tensors_hooks(save_activation, lambda tensor: tensor):
                hidden_states = model.model(ids, use_cache=False).last_hidden_state
            freed = tracker.freed
            # Not by model(), which computes all logits unless its weights are plain parameters; fake ones are not. The operator
            # computes both gradients in the forward pass. Autograd uses them as they are, but would copy fake ones.
            weight, states = model.lm_head.weight, hidden_states.detach().flatten(0, 1).to(dtype)
            operands = states, weight.detach(), ids.flatten(), torch.ones(())
            # Allocated inside the operator, where nothing is recorded; two of them only if the dtype differs.
            logits = torch.empty(min(len(states), chunk_rows(weight)), len(weight))
            casts = logits.to(dtype), weight.detach().to(dtype)
            _, gradient, head_gradient = loss_and_gradients(*operands, True, True)
            del logits, casts
            if weight.grad is None:
                weight.grad = head_gradient
                tracker.mark(weight.grad, "gradients")
            hidden_states.backward(gradient.view_as(hidden_states).to(hidden_states.dtype))
            del hidden_states, states, operands, gradient, head_gradient
        for optimizer in optimizers:
            optimizer.step()
            tree_map_only_(torch.Tensor, partial(tracker.mark, kind="optimizer"), list(optimizer.state.values()))
            optimizer.zero_grad()
    return freed


def peak_memory(
    config: ScratchGPTConfig,
    arguments: PretrainArguments,
    rows: int,
    device: torch.device | str = "cpu",
    reuses: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, int]:
    """Bytes in use at the peak of a training step, by kind: weights, gradients, optimizer, activations, temporary.

    Args:
        rows: windows in a micro-batch of one process.
        reuses: whether freed memory serves later blocks of the same size. If not, what a forward pass frees stays in use until
            the backward pass, and the maxima of the kinds add up, although they are reached at different moments.
        dtype: of the matrix products, by autocast.
    """
    with FakeTensorMode(), torch.device(device), MemoryTracker() as tracker:
        ids = torch.zeros(rows, arguments.context_length, dtype=torch.long)
        freed = record_step(config, arguments, ids, dtype, tracker)
    if arguments.gradient_checkpointing:
        # Blocks reuse each other's memory; the forward pass, the recomputation and the gradients of a block do not.
        freed = 3 * freed // config.num_hidden_layers
    tracker.maxima["activations"] += freed
    memory = tracker.peak if reuses else tracker.maxima
    return {kind: memory[kind] for kind in ("weights", "gradients", "optimizer", "activations", "temporary")}


def probe(accelerator: Accelerator, arguments: PretrainArguments, config: ScratchGPTConfig, seconds: float) -> list[float]:
    """Train on random tokens for about `seconds`; returns the seconds of each step but the first, which loads libraries."""
    model, optimizers = build_run(config, arguments)
    prepared_model, *prepared = accelerator.prepare(model, *optimizers)
    rows = math.ceil(arguments.batch_size / accelerator.num_processes)
    ids = torch.randint(0, config.vocab_size, (rows, arguments.context_length + 1), device=accelerator.device)
    batches = itertools.repeat({"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]})
    taken: list[float] = []
    for step in training_steps(accelerator, prepared_model, prepared, batches, arguments):
        taken.append(step.seconds)
        # The main process decides, because all processes must take the same number of steps.
        if step.number > 2 and gather_object([sum(taken[1:])])[0] >= seconds:
            break
    return taken[1:]


def device_memory(device: torch.device) -> tuple[int, int, bool]:
    """Total bytes of the device; bytes in use by this process; whether freed blocks are reused for blocks of the same size.

    They are not on a CPU with glibc before 2.38: torch requests aligned blocks, for which these versions search for a larger
    hole than needed, so that a block never fits the hole that another one of its size has left.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1], torch.cuda.memory_allocated(device), True
    library, version = platform.libc_ver()
    is_old = library == "glibc" and tuple(map(int, version.split(".")[:2])) < (2, 38)
    return available_memory(), psutil.Process().memory_info().rss, not is_old


def table(title: str, parts: dict[str, str]) -> str:
    """A title, and below it a line with two columns for each part."""
    return "\n".join([title, *(f"    {name:<12}{value:>16}" for name, value in parts.items())])


def predict_memory(accelerator: Accelerator, arguments: PretrainArguments, config: ScratchGPTConfig) -> dict[str, int]:
    """Bytes of one process at the peak of a training step of the run, by kind."""
    _, libraries, reuses = device_memory(accelerator.device)  # measured first: fake tensors import more than a run does
    rows = math.ceil(arguments.batch_size / accelerator.num_processes)
    memory = peak_memory(config, arguments, rows, accelerator.device, reuses, autocast_dtype(accelerator))
    buckets = memory["weights"] if accelerator.num_processes > 1 else 0  # the copies of gradients that are sent
    return {"libraries": libraries, **memory, "DDP buckets": buckets}


def report_memory(accelerator: Accelerator, arguments: PretrainArguments, config: ScratchGPTConfig) -> None:
    """Print the peak memory by kind; refuse a run that does not fit."""
    kind, (total, _, _) = accelerator.device.type, device_memory(accelerator.device)
    memory = predict_memory(accelerator, arguments, config)
    peak, name = sum(memory.values()), str(autocast_dtype(accelerator)).removeprefix("torch.")
    title = f"Peak memory, predicted for {name}: {peak / 1e9:.2f} of {total / 1e9:.1f} GB ({kind})"
    accelerator.print(table(title, {name: f"{size / 1e6:,.0f} MB" for name, size in memory.items() if size}))
    if peak * (accelerator.num_processes if kind == "cpu" else 1) > total:
        raise UserError("it does not fit: lower --batch_size, pass --gradient_checkpointing, or choose a smaller model.")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(PretrainArguments, __doc__, argv)
    accelerator = start_accelerator(precision=arguments.precision)
    check_engine(arguments, accelerator.num_processes)
    if arguments.lora_r:
        raise UserError(f"--lora_r {arguments.lora_r}: plan.py predicts full training only; adapters take less.")
    config, _ = starting_point(arguments)
    parts, flops = parameters_by_part(config), flops_per_token(config, arguments.context_length)
    parameters = sum(parts.values())
    counts = {name: f"{count:,}" for name, count in parts.items() if count}
    accelerator.print(table(f"Parameters: {parameters:,} (with a vocabulary of {config.vocab_size:,})", counts))
    step_tokens = arguments.batch_size * arguments.gradient_accumulation_steps * arguments.context_length
    run_tokens = step_tokens * arguments.max_steps
    per_step = f"{flops * step_tokens / 1e9:,.1f} GFLOP per step of {step_tokens:,} tokens"
    accelerator.print(f"FLOPs: {flops / 1e6:,.1f} MFLOP per token, {per_step}")
    report_memory(accelerator, arguments, config)
    choose_compiler(accelerator, arguments.torch_compile, flops * run_tokens)
    seconds = statistics.median(probe(accelerator, arguments, config, PROBE_SECONDS))
    best, speed = measured_peak(accelerator), step_tokens / seconds
    run = f"{arguments.max_steps:,} steps of {seconds:.3g} s, {duration(seconds * arguments.max_steps)} in total"
    optimal = f"about {CHINCHILLA} (Chinchilla), after {duration(CHINCHILLA * parameters / speed)}"
    accelerator.print(
        f"Speed: {speed:,.0f} tokens/s, {flops * speed / best:.0%} of the {best / 1e9:,.0f} GFLOP/s of a large matrix product\n"
        f"Run: {run} (excluding evaluation); {run_tokens:,} tokens\n"
        f"Tokens per parameter: {run_tokens / parameters:.2g}. Compute-optimal would be {optimal}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
