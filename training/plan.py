"""What a run will take, before it is started: parameters, arithmetic, memory and time.

    python training/plan.py
    python training/plan.py --model preset=124M --context_length 1024 --batch_size 8 --max_steps 20000
    accelerate launch --config_file training/configs/accelerate/one_gpu.yaml training/plan.py --config my_run.yaml

It takes the arguments of training/pretrain.py, reads no text and writes nothing: it trains the very model on random tokens for
five seconds, with the very optimizer and loop, and works out the rest.

Notable:
- Memory is reasoned, not looked up: what autograd keeps of a block, counted from the config, at the worst of a step's moments.
- It is predicted before anything is allocated. What does not fit is said, and not tried.
- Memory is that of one process which holds the whole model in float32: with FSDP or bfloat16 it takes less.
"""

import math
import platform
import statistics
from collections.abc import Iterator

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from modeling_scratchgpt.cross_entropy import CHUNK_BYTES
from training.cli import parse_arguments, run_main
from training.engine.flops import flops_per_token, measured_peak, parameters_by_part, widths
from training.engine.loop import start_accelerator, training_steps
from training.engine.report import duration
from training.engine.train import build_optimizers
from training.errors import UserError
from training.pretrain import PretrainArguments, starting_point

FLOAT = 4  # bytes
MAPPED_BYTES = 2**25  # from here on glibc asks the system for each block, and gives it back
PROBE_SECONDS = 5.0
CHINCHILLA = 20  # tokens a parameter that make the best of a budget of FLOPs (Hoffmann et al., 2022)


def made_by_a_block(config: ScratchGPTConfig, context_length: int) -> tuple[int, int]:
    """How many float32 numbers the forward pass of a block makes for each token: those autograd keeps, and the others.

    Args:
        context_length: only counts with attention dropout, for which there is no kernel that keeps no scores.
    """
    width, (query, key, inner) = config.hidden_size, widths(config)
    rms, gated = config.norm_type == "rmsnorm", config.mlp_type == "gated"
    # A norm keeps what it reads and its scale, and what follows keeps its result; RMSNorm, written out, keeps one more step.
    kept = 2 * ((3 if rms else 2) * width + (1 if rms else 2))
    kept += 2 * query + 2 * key  # queries, keys and values; the output, which is what o_proj reads
    if config.attention_dropout:
        kept += 3 * config.num_attention_heads * context_length  # the weights, the mask, and their product
        kept += 2 * (query - key)  # keys and values, repeated for every query head
    else:
        kept += config.num_attention_heads  # the logarithm of softmax's sum: from it the kernel computes the weights again
    if config.qk_norm:
        kept += 2 * (query + key) + (query + key) // (query // config.num_attention_heads)
    kept += (4 if gated else 2) * inner  # the activation's input and its output; with a gate, both factors and the product
    kept += 2 * width if config.hidden_dropout else 0
    others = 2 * width + (2 * width if rms else 0)  # what is added to the residual stream; squares
    others += query + key if config.qk_norm else 0  # squares
    if config.position_embedding_type == "rotary":
        others += 9 * (query + key) // 2  # before the turn; times cosine; the half with the other sign; swapped; times sine
    return kept, others


def optimizer_floats(config: ScratchGPTConfig, optimizer: str) -> tuple[int, int]:
    """Numbers that the optimizer remembers between steps, and those it needs besides while it steps.

    Args:
        optimizer: `"adamw"` or `"muon"`, see training/engine/optimizers.py.
    """
    parameters = sum(parameters_by_part(config).values())
    if optimizer == "adamw":
        return 2 * parameters, 0  # the means of gradients and of their squares; the fused kernel has no temporaries
    width, layers, (query, key, inner) = config.hidden_size, config.num_hidden_layers, widths(config)
    gates = 2 if config.mlp_type == "gated" else 1
    by_shape: dict[tuple[int, int], int] = {}
    for shape, count in (
        ((query, width), 1),
        ((key, width), 2),
        ((width, query), 1),
        ((inner, width), gates),
        ((width, inner), 1),
    ):
        by_shape[shape] = by_shape.get(shape, 0) + count * layers
    matrices = sum(rows * columns * count for (rows, columns), count in by_shape.items())
    # Of the matrices of one shape: directions, their stack, the iterate and the next one, and two squares of the short side;
    # a little less where they are bfloat16.
    work = max(count * (4 * rows * columns + 2 * min(rows, columns) ** 2) for (rows, columns), count in by_shape.items())
    return 2 * parameters - matrices, work


def peak_memory(
    config: ScratchGPTConfig,
    arguments: PretrainArguments,
    rows: int,
    libraries: int = 0,
    reuses: bool = True,
) -> dict[str, int]:
    """Bytes in use at the worst moment of a training step in float32, by what they are for.

    One of four: the loss, when all activations are there and a chunk of logits; the backward pass of the last block; its end,
    when all gradients are there; the optimizer's step.

    Args:
        rows: windows in a micro-batch of one process.
        libraries: bytes in use before there is a model: Python and what it has imported, on a CPU.
        reuses: whether memory that was freed serves for the next block of its size. If not, all that the forward pass makes
            counts, whether it is kept or not, and what different moments need adds up.
    """
    tokens, width, head = rows * arguments.context_length, config.hidden_size, config.vocab_size * config.hidden_size
    layers, parameters = config.num_hidden_layers, sum(parameters_by_part(config).values())
    state, optimizer_work = optimizer_floats(config, arguments.optimizer)
    kept, others = (tokens * count for count in made_by_a_block(config, arguments.context_length))
    if FLOAT * tokens * width >= MAPPED_BYTES:
        others = 0  # so large that the system takes them back
    # Before the head: what the last norm reads and makes, and the gradient that the loss finds along with its value.
    end = tokens * width * (4 if config.norm_type == "rmsnorm" else 3)
    embedding = tokens * width if config.embedding_dropout else 0
    chunk = min(tokens, max(1, CHUNK_BYTES // (FLOAT * config.vocab_size))) * config.vocab_size
    # The gradients that are alive inside the MLP; or, reusing nothing, one for all that the forward pass has made.
    block_work = tokens * widths(config)[2] * (3 if config.mlp_type == "gated" else 2) if reuses else kept + others
    if arguments.gradient_checkpointing:
        activations = end + embedding + layers * tokens * width
        block_work += kept if reuses else 2 * (kept + others)  # the block again; or the first pass and the second
    else:
        activations = end + embedding + layers * (kept + (0 if reuses else others))
    before = parameters if arguments.gradient_accumulation_steps > 1 else 0
    # (activations, gradients, work); the loss makes the head's gradient, which is not yet among the others.
    moments = [
        (activations, before, head + chunk),
        (activations, before, head + block_work),
        # A tied matrix has two gradients, the head's and the embedding's, before they are one.
        (embedding, parameters, head if config.tie_word_embeddings else 0),
        (0, parameters, optimizer_work),
    ]
    at_once = (max(column) for column in zip(*moments, strict=True))
    activations, gradients, work = max(moments, key=sum) if reuses else at_once
    floats = {"weights": parameters, "gradients": gradients, "optimizer": state, "activations": activations, "temporary": work}
    return {"libraries": libraries, **{name: FLOAT * count for name, count in floats.items()}}


def random_batches(vocab_size: int, rows: int, context_length: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Batches that look like those of a run."""
    while True:
        ids = torch.randint(0, vocab_size, (rows, context_length + 1), device=device)
        yield {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}


def probe(accelerator: Accelerator, arguments: PretrainArguments, config: ScratchGPTConfig, seconds: float) -> list[float]:
    """Train on random tokens for about so many seconds; how long each step took, but the first, which wakes everything up."""
    model = ScratchGPTForCausalLM(config)
    optimizers, schedules = build_optimizers(arguments, model)
    prepared_model, *prepared = accelerator.prepare(model, *optimizers)
    rows = arguments.batch_size // accelerator.num_processes
    batches = random_batches(config.vocab_size, rows, arguments.context_length, accelerator.device)
    taken: list[float] = []
    wanted = 2
    for step in training_steps(
        accelerator,
        prepared_model,
        prepared,
        schedules,
        batches,
        arguments.gradient_accumulation_steps,
        arguments.max_grad_norm,
    ):
        taken.append(step.seconds)
        if step.number == 2:  # all processes must take as many steps
            wanted += gather_object([math.ceil(seconds / step.seconds)])[0]
        if step.number >= max(3, wanted):
            break
    return taken[1:]


def check(arguments: PretrainArguments, num_processes: int) -> None:
    """Refuse what cannot be planned; what it would read or write does not matter here."""
    if arguments.lora_r:
        raise UserError(f"--lora_r {arguments.lora_r}: plan.py knows what training a whole model takes; adapters take less.")
    for name in ("context_length", "batch_size", "gradient_accumulation_steps", "max_steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    if arguments.batch_size % num_processes:
        raise UserError(f"--batch_size {arguments.batch_size} must be a multiple of the number of processes, {num_processes}.")


def device_memory(device: torch.device) -> tuple[int, int, bool]:
    """Bytes of memory of the device; how many of them this process holds; whether freed blocks serve for others of their size.

    They do not on a CPU with glibc before 2.38: torch asks for aligned blocks, and these versions look for a block that is
    larger than what was asked for, so that no hole fits what had left it.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1], torch.cuda.memory_allocated(device), True
    library, version = platform.libc_ver()
    is_old = library == "glibc" and tuple(map(int, version.split(".")[:2])) < (2, 38)
    return psutil.virtual_memory().total, psutil.Process().memory_info().rss, not is_old


def table(title: str, parts: dict[str, str]) -> str:
    """A title, and below it a line for each part, set in two columns."""
    return "\n".join([title, *(f"    {name:<12}{value:>16}" for name, value in parts.items())])


def main() -> None:
    arguments = parse_arguments(PretrainArguments, __doc__)
    accelerator = start_accelerator()
    check(arguments, accelerator.num_processes)
    config, _ = starting_point(arguments)
    processes, device = accelerator.num_processes, accelerator.device

    parts = parameters_by_part(config)
    parameters = sum(parts.values())
    shown = {name: f"{count:,}" for name, count in parts.items() if count}
    accelerator.print(table(f"Parameters: {parameters:,} (with a vocabulary of {config.vocab_size:,})", shown))
    flops = flops_per_token(config, arguments.context_length)
    step_tokens = arguments.batch_size * arguments.gradient_accumulation_steps * arguments.context_length
    accelerator.print(
        f"Arithmetic: {flops / 1e6:,.1f} MFLOP a token, {flops * step_tokens / 1e9:,.1f} GFLOP a step of {step_tokens:,} tokens"
    )

    total, libraries, reuses = device_memory(device)
    memory = peak_memory(config, arguments, arguments.batch_size // processes, libraries, reuses)
    if processes > 1:
        memory["DDP buckets"] = FLOAT * parameters  # from which gradients are sent
    peak = sum(memory.values())
    title = f"Memory at the peak, predicted for float32: {peak / 1e9:.2f} GB of this {device.type}'s {total / 1e9:.1f} GB"
    accelerator.print(table(title, {name: f"{size / 1e6:,.0f} MB" for name, size in memory.items() if size}))
    if peak * (processes if device.type == "cpu" else 1) > total:
        raise UserError("it does not fit: lower --batch_size or pass --gradient_checkpointing; or take a smaller model.")

    seconds = statistics.median(probe(accelerator, arguments, config, PROBE_SECONDS))
    best = processes * measured_peak(device, torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32)
    speed, run_tokens = step_tokens / seconds, step_tokens * arguments.max_steps
    accelerator.print(
        f"Speed: {speed:,.0f} tokens/s, {flops * speed / best:.0%} of the {best / 1e9:,.0f} GFLOP/s of a large matrix product\n"
        f"The run: {arguments.max_steps:,} steps of {seconds:.3g} s, {duration(seconds * arguments.max_steps)} in all, besides "
        f"evaluations; {run_tokens:,} tokens\n"
        f"Tokens a parameter: {run_tokens / parameters:.2g}. Compute-optimal would be about {CHINCHILLA} (Chinchilla), after "
        f"{duration(CHINCHILLA * parameters / speed)}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
