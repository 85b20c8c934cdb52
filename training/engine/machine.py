"""The cores and the memory that this process may use: of the machine, of its container, of its affinity mask."""

import math
import os
from pathlib import Path

import psutil

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # Linux, version 2


def available_cores() -> int:
    """The number of physical cores, within the affinity mask, the container's quota and `OMP_THREAD_LIMIT`."""
    limits = [psutil.cpu_count(logical=False) or 1]
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    limits += [math.ceil(int(quota) / int(period)) for quota, period in _limits("cpu.max")]
    if (limit := os.environ.get("OMP_THREAD_LIMIT", "")).isdigit():
        limits.append(int(limit))  # with more threads than OpenMP gives, torch computes nonsense
    return max(1, min(limits))


def available_memory() -> int:
    """Bytes of the machine's memory, or of the container's limit."""
    return min([psutil.virtual_memory().total, *(int(limit) for (limit,) in _limits("memory.max"))])


def _limits(name: str) -> list[list[str]]:
    """The words of a file of this process's control group (a container, a job) and of those above it, if they set a limit."""
    own = OWN_CGROUP.read_text().rpartition("0::/")[2].strip() if OWN_CGROUP.exists() else ""
    files = [CGROUPS / parent / name for parent in (Path(own), *Path(own).parents)]
    return [file.read_text().split() for file in files if file.exists() and not file.read_text().startswith("max")]
