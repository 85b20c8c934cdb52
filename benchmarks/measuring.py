"""Helpers of the benchmarks: subprocesses, peak memory, training steps, options."""

import argparse
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
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


def add_modes(parser: argparse.ArgumentParser) -> None:
    """Add options for precision and compilation."""
    on_gpu = DEVICE == "cuda"
    parser.add_argument("--precision", default="bfloat16" if on_gpu else "float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", default="true" if on_gpu else "false", choices=["true", "false"])


def peak_bytes() -> int:
    """Peak memory of this process: on the GPU, if there is one."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def run_in_subprocess(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function of this script in a new process, whose peak memory is then its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


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


def seconds_in_turns(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The median seconds of each function. They are called in turns, and once before, because a first call is slower."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, taken in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in seconds]


def training_step(
    model: Any, batch_size: int, context_length: int, compile: bool = False, precision: str = ""
) -> Callable[[], None]:
    """A function for a step of AdamW on random tokens; by default in bfloat16 on a GPU and in float32 on a CPU."""
    dtype = getattr(torch, precision or ("bfloat16" if DEVICE == "cuda" else "float32"))
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (batch_size, context_length), device=DEVICE)
    forward = torch.compile(model) if compile else model

    def step() -> None:
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
