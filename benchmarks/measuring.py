"""Helpers of the benchmarks: subprocesses, peak memory, training steps, options."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_parser(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    """A parser with an integer option for each keyword."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def peak_bytes() -> int:
    """Peak memory of this process: on the GPU, if there is one."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def run_in_subprocess(*argv: object) -> Any:
    """Start this script again with more arguments; returns its last line, as JSON."""
    command = [sys.executable, *sys.argv, *map(str, argv)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def run_recipe(name: str, *argv: str) -> tuple[float, int]:
    """Run a recipe; returns its minutes and its peak memory in bytes."""
    command = [sys.executable, f"training/{name}.py", *argv, "--report_to", "none"]
    with tempfile.TemporaryFile() as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            stderr.seek(0)
            raise SystemExit(stderr.read().decode())
    return (time.perf_counter() - start) / 60, usage.ru_maxrss * RSS_UNIT


def median_of_each(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each measurement over several runs."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


class TimedTraining:
    """Training steps with AdamW on random tokens: float32 on the CPU, bfloat16 on the GPU.

    Args:
        model: only parameters that require a gradient are trained.
        compile: on the GPU.
    """

    def __init__(self, model: torch.nn.Module, batch_size: int, context_length: int, compile: bool = False):
        model.to(DEVICE).train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        self.model = torch.compile(model) if compile and DEVICE == "cuda" else model
        self.ids = torch.randint(0, model.config.vocab_size, (batch_size, context_length), device=DEVICE)  # type: ignore
        self.seconds: list[float] = []

    def step(self) -> None:
        start = time.perf_counter()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)

    def median(self) -> float:
        """Seconds of the median step, without the first, which is slower."""
        return statistics.median(self.seconds[1:])
