"""What the training loop costs beside the bare forward pass, backward pass and optimizer step, and how long it waits for data.

    python benchmarks/loop.py

A step of the loop, with its loader, metrics file and progress bar, and a bare step on a batch that is already there take
turns, on one model and its optimizers. Medians over all steps.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from modeling_scratchgpt import ScratchGPTForCausalLM
from training.cli import model_config, parse_arguments
from training.data.tokens import Tokens
from training.data.windows import Batches, Windows, training_loader
from training.engine.flops import flops_per_token
from training.engine.loop import start_accelerator, training_steps
from training.engine.metrics import MetricsFile
from training.engine.report import ProgressBar
from training.engine.train import build_optimizers
from training.pretrain import PretrainArguments

SHAPES = {
    "the first run's, 8 x 256 tokens": "",
    "4 layers x 128, 12 x 64 tokens, vocabulary 512": "--model hidden_size=128 num_hidden_layers=4 --batch_size 12 "
    "--context_length 64 --vocab_size 512",
}


class Waiting:
    """A loader that counts the seconds that it keeps others waiting."""

    def __init__(self, loader: Iterable[dict[str, torch.Tensor]]):
        self.loader, self.seconds = loader, []

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds.append(time.perf_counter() - start)
            if batch is None:
                return
            yield batch


def measure(words: str, num_steps: int, folder: Path) -> tuple[float, float, float]:
    """Median seconds of a step of the loop and of a bare one, and of waiting for a batch."""
    arguments = parse_arguments(PretrainArguments, "", [*words.split(), "--max_steps", str(2 * num_steps)])
    accelerator = start_accelerator()
    config = model_config(arguments.model, arguments.vocab_size, arguments.context_length)
    model = ScratchGPTForCausalLM(config)
    optimizers, schedules = build_optimizers(arguments, model)
    prepared_model, *prepared = accelerator.prepare(model, *optimizers)

    np.random.default_rng(0).integers(0, config.vocab_size, 5_000_000, dtype=np.uint16).tofile(folder / "tokens")
    tokens = Tokens(np.memmap(folder / "tokens", dtype=np.uint16, mode="r"), 0, np.zeros(1, dtype=np.int64))
    windows = Windows(tokens, arguments.context_length, 0, "training")
    loader = training_loader([windows], Batches([len(windows)], arguments.batch_size, num_steps, seed=0))
    waiting = Waiting(accelerator.prepare(loader))
    rows = [windows[index] for index in range(arguments.batch_size)]
    batch = {name: torch.stack([row[name] for row in rows]).to(accelerator.device) for name in rows[0]}

    metrics = MetricsFile(folder / "metrics.jsonl", accelerator)
    steps = training_steps(accelerator, prepared_model, prepared, schedules, waiting, 1, arguments.max_grad_norm)
    loop, bare = [], []
    with ProgressBar(num_steps, accelerator, flops_per_token(config, arguments.context_length), 1e12) as bar:
        while True:
            start = time.perf_counter()
            step = next(steps, None)
            if step is None:
                break
            bar.update(step)
            metrics.write(step.number, step)
            middle = time.perf_counter()
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            loss.item()
            loop.append(middle - start)
            bare.append(time.perf_counter() - middle)
    return statistics.median(loop), statistics.median(bare), statistics.median(waiting.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    num_steps = parser.parse_args().steps
    print("| a step | loop | bare | overhead | waiting for data |\n|---|---|---|---|---|")
    for name, words in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            loop, bare, waiting = measure(words, num_steps, Path(folder))
        line = f"{1e3 * loop:.1f} ms | {1e3 * bare:.1f} ms | {loop / bare - 1:+.1%} | {waiting / loop:.2%}"
        print(f"| {name} | {line} |", flush=True)


if __name__ == "__main__":
    main()
