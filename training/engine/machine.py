"""The cores and the memory that this process may use: of the machine, of its container, of its affinity mask."""

import math
import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # of a container (Linux, version 2)


def available_cores() -> int:
    """The number of physical cores, within the affinity mask, the container's quota and `OMP_THREAD_LIMIT`."""
    limits = [psutil.cpu_count(logical=False) or 1]
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    quota, *period = _read("cpu.max", "max").split()
    if quota != "max":
        limits.append(math.ceil(int(quota) / int(period[0])))
    if (limit := os.environ.get("OMP_THREAD_LIMIT", "")).isdigit():
        limits.append(int(limit))  # with more threads than OpenMP gives, torch computes nonsense
    return max(1, min(limits))


def available_memory() -> int:
    """Bytes of the machine's memory, or of the container's limit."""
    limit = _read("memory.max", "max")
    total = psutil.virtual_memory().total
    return total if limit == "max" else min(total, int(limit))


def _read(name: str, default: str) -> str:
    file = CGROUP / name
    return file.read_text().strip() if file.exists() else default
