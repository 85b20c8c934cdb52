"""Overhead of the training loop over bare forward pass, backward pass and optimizer step, and time spent waiting for data.

    python benchmarks/loop.py

A step of the loop, with its dataloader, metrics file and progress bar, and a bare step on a fixed batch take turns, on one
model and its optimizers. The medians over all steps are printed.
"""

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from measuring import add_modes, make_parser
from torch import nn

from modeling_scratchgpt import ScratchGPTForCausalLM
from training.cli import model_config, parse_arguments
from training.data.datasets import TokenizedExamples, Windows, train_dataloader
from training.data.samplers import MixtureBatchSampler
from training.engine.flops import flops_per_token
from training.engine.launch import choose_attention, choose_compiler, start_accelerator
from training.engine.loop import training_steps
from training.engine.optimizers import build_optimizers
from training.engine.report import ProgressBar
from training.engine.run_folder import RunFolder
from training.pretrain import PretrainArguments

NUM_TOKENS = 5_000_000
SHAPES = {
    "the first run's, 8 x 256 tokens": "",
    "4 layers x 128, 12 x 64 tokens, vocabulary 512": "--model hidden_size=128 num_hidden_layers=4 --batch_size 12 "
    "--context_length 64 --vocab_size 512",
}


def timed(dataloader: Iterable[dict[str, torch.Tensor]], seconds: list[float]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batches, and record how long each is waited for."""
    start = time.perf_counter()
    for batch in dataloader:
        seconds.append(time.perf_counter() - start)
        yield batch
        start = time.perf_counter()


def random_windows(path: Path, vocab_size: int, context_length: int) -> Windows:
    """Windows of random tokens in a memory-mapped file."""
    np.random.default_rng(0).integers(0, vocab_size, NUM_TOKENS, dtype=np.uint16).tofile(path)
    ids = np.memmap(path, dtype=np.uint16, mode="r")
    return Windows(TokenizedExamples(ids, np.array([0, NUM_TOKENS])), context_length, 0, "training")


def measure(options: str, num_steps: int, directory: Path) -> list[float]:
    """Median seconds of a step of the loop, of a bare step, and of waiting for a batch."""
    arguments = parse_arguments(PretrainArguments, "", [*options.split(), "--max_steps", str(2 * num_steps)])
    accelerator = start_accelerator(precision=arguments.precision)
    choose_compiler(accelerator, arguments.torch_compile, 0)
    config = model_config(arguments.model, arguments.vocab_size, arguments.context_length)
    model = ScratchGPTForCausalLM(config)
    optimizers = build_optimizers(arguments, model)
    prepared_model, *prepared = accelerator.prepare(model, *optimizers)
    windows = random_windows(directory / "tokens", config.vocab_size, arguments.context_length)
    choose_attention(accelerator, model, windows[0])
    sampler = MixtureBatchSampler([len(windows)], arguments.batch_size, num_steps, seed=0)
    waiting = list[float]()
    dataloader = timed(accelerator.prepare(train_dataloader([windows], sampler)), waiting)
    rows = [windows[index] for index in range(arguments.batch_size)]
    batch = {name: torch.stack([row[name] for row in rows]).to(accelerator.device) for name in rows[0]}
    run_folder = RunFolder(directory / "run", accelerator)
    run_folder.open()

    def bare_step() -> None:
        loss = prepared_model(**batch, skip_logits=True, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss.item()

    steps = training_steps(accelerator, prepared_model, prepared, dataloader, arguments)
    loop, bare = [], []
    with ProgressBar(num_steps, accelerator, flops_per_token(config, arguments.context_length), 1e12) as bar:
        start = time.perf_counter()
        for step in steps:
            bar.log(step)
            run_folder.log_step(step)
            middle = time.perf_counter()
            bare_step()
            end = time.perf_counter()
            loop.append(middle - start)
            bare.append(end - middle)
            start = end
    return [statistics.median(seconds) for seconds in (loop, bare, waiting)]


def main() -> None:
    parser = make_parser(__doc__, steps=100)
    add_modes(parser)
    chosen = parser.parse_args()
    modes = f" --precision {chosen.precision} --torch_compile {chosen.compile}"
    print("| a step | loop | bare | overhead | waiting for data |\n|---|---|---|---|---|")
    for name, options in SHAPES.items():
        with tempfile.TemporaryDirectory() as directory:
            loop, bare, waiting = measure(options + modes, chosen.steps, Path(directory))
        numbers = f"{1e3 * loop:.1f} ms | {1e3 * bare:.1f} ms | {loop / bare - 1:+.1%} | {waiting / loop:.2%}"
        print(f"| {name} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
