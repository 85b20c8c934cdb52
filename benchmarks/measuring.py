"""What the benchmarks share: each measurement in a process of its own, and the most memory that it held."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes; what the system counts memory in


def peak_bytes() -> int:
    """The most memory that this process has held: on the GPU, if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def apart(*words: object) -> Any:
    """What this script, started in a new process with these words as well, prints last, as JSON."""
    command = [sys.executable, *sys.argv, *map(str, words)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def run_recipe(name: str, *words: str) -> tuple[float, int]:
    """Run a recipe: the minutes it took, and the most bytes it held."""
    command = [sys.executable, f"training/{name}.py", *words, "--report_to", "none"]
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            raise SystemExit(said.read().decode())
    return (time.perf_counter() - start) / 60, used.ru_maxrss * UNIT
