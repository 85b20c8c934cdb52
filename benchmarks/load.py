"""How long it takes to load GPT-2's weights, and how much memory: into ScratchGPT, the same after `convert`, and into
transformers' own GPT-2.

    python benchmarks/load.py                # 124M; the folder is made of random weights
    python benchmarks/load.py --runs 9

Each load is a process of its own, and they take turns. Times run from the call to the first logits, since a file that is mapped
into memory is only read when it is used; the memory is the most that the process held. Both include the same imports.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import apart, peak_bytes
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from modeling_scratchgpt import ScratchGPTForCausalLM

LOADED = {
    "transformers": (GPT2LMHeadModel, "gpt2"),
    "ScratchGPT": (ScratchGPTForCausalLM, "gpt2"),
    "ScratchGPT, converted before": (ScratchGPTForCausalLM, "scratchgpt"),
}


def make(folder: Path) -> None:
    """Random weights, as transformers' GPT-2 and as a ScratchGPT."""
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder / "gpt2")
    ScratchGPTForCausalLM.from_pretrained(folder / "gpt2").save_pretrained(folder / "scratchgpt")


def load(name: str, folder: Path) -> dict[str, float]:
    """Seconds until there is a model, seconds until there are logits, and bytes."""
    disable_progress_bar()
    model_class, form = LOADED[name]
    start = time.perf_counter()
    model: Any = model_class.from_pretrained(folder / form)
    loaded = time.perf_counter() - start
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    return {"loaded": loaded, "logits": time.perf_counter() - start, "memory": peak_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(load(arguments.one[0], Path(arguments.one[1]))))
        return
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in LOADED}
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, since a process begins with the peak memory of the one that started it.
        making = multiprocessing.get_context("spawn").Process(target=make, args=(Path(folder),))
        making.start()
        making.join()
        for _ in range(arguments.runs):
            for name in LOADED:
                taken[name].append(apart("--one", name, folder))
    print("| GPT-2 124M, float32 | loaded | first logits | peak memory |\n|---|---|---|---|")
    medians = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in taken.items()}
    for name, median in medians.items():
        print(f"| {name} | {median['loaded']:.2f} s | {median['logits']:.2f} s | {median['memory'] / 1e9:.2f} GB |")
    for name in list(LOADED)[1:]:
        ratios = (f"{value / medians['transformers'][key]:.2f} x" for key, value in medians[name].items())
        print(f"| {name}: ratio | " + " | ".join(ratios) + " |")


if __name__ == "__main__":
    main()
