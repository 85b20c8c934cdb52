"""The cores and the memory that this process may use, whether bfloat16 is fast, and what compiling needs."""

import math
import os
import shutil
import sys
import sysconfig
from functools import cache
from pathlib import Path
from time import perf_counter

import psutil
import torch
from torch.utils._triton import has_triton

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # Linux, version 2
FAST = 1.5  # times the speed of float32, from which products in bfloat16 are worth the casts around them


def available_cores() -> int:
    """The number of physical cores, within the affinity mask, the container's quota and `OMP_THREAD_LIMIT`."""
    limits = [psutil.cpu_count(logical=False) or os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    limits += [math.ceil(int(quota) / int(period)) for quota, period in _limits("cpu.max")]
    if (limit := os.environ.get("OMP_THREAD_LIMIT", "")).isdigit():
        limits.append(int(limit))  # with more threads than OpenMP gives, torch computes nonsense
    return max(1, min(limits))


def available_memory() -> int:
    """Bytes of the machine's memory, or of the container's limit."""
    return min([psutil.virtual_memory().total, *(int(limit) for (limit,) in _limits("memory.max"))])


@cache
def has_fast_bfloat16(device_type: str) -> bool:
    """True if a GPU has instructions for bfloat16, or if a CPU's matrix products, measured, are 1.5 x as fast as in float32.

    CPUs differ by a factor of a thousand: 15 x the speed of float32 with AMX, 2 x with AVX-512, 0.01 x where it is emulated.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    # The first product is small, because an emulated one of 512 x 512 takes half a second.
    return _bfloat16_speedup(128) > FAST / 4 and _bfloat16_speedup(512) >= FAST


def _bfloat16_speedup(side: int) -> float:
    """Seconds of a product of square matrices in float32, divided by those in bfloat16: the best of five."""
    matrices = [torch.ones(side, side, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    seconds = [math.inf, math.inf]
    for _ in range(6):  # the first ones also load the library
        for index, matrix in enumerate(matrices):
            start = perf_counter()
            matrix @ matrix
            seconds[index] = min(seconds[index], perf_counter() - start)
    return seconds[0] / seconds[1]


def device_name(device_type: str) -> str:
    """The name of a GPU, or the instructions of a CPU that torch uses."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    capabilities = torch.cpu.get_capabilities() if device_type == "cpu" else {}
    return " ".join([device_type, *sorted(name for name, value in capabilities.items() if value is True)])


def float32_name(device_type: str) -> str:
    """`float32`, or `float32 (TF32)` if the device rounds the factors of matrix products."""
    is_exact = device_type != "cuda" or torch.get_float32_matmul_precision() == "highest"
    return "float32" if is_exact or not torch.cuda.is_tf32_supported() else "float32 (TF32)"


def missing_compiler(device_type: str) -> str:
    """The name of what `torch.compile` needs and does not find; empty if everything is installed."""
    language, compilers = "C++", [os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))]
    if device_type == "cuda":
        if not has_triton():
            return "triton"
        # Triton compiles a module that talks to the driver; on Windows with a compiler of its own.
        language, compilers = "C", [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not (device_type == "cuda" and sys.platform == "win32") and not any(map(shutil.which, compilers)):
        return f"the {language} compiler {compilers[0]}"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.exists() else f"{header.name}, of the package python3-dev"


def _limits(name: str) -> list[list[str]]:
    """The words of a file of this process's control group (a container, a job) and of those above it, if they set a limit."""
    own = OWN_CGROUP.read_text().rpartition("0::/")[2].strip() if OWN_CGROUP.exists() else ""
    files = [CGROUPS / parent / name for parent in (Path(own), *Path(own).parents)]
    return [file.read_text().split() for file in files if file.exists() and not file.read_text().startswith("max")]
