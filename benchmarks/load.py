"""How long it takes to load GPT-2's weights, and how much memory: into ScratchGPT, and into transformers' own GPT-2.

    python benchmarks/load.py                # 124M; the folder is made of random weights
    python benchmarks/load.py --runs 9

Each load is a process of its own, and they take turns. Times run from the call to the first logits, since a file that is mapped
into memory is only read when it is used; the memory is the most that the process held. Both include the same imports.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_scratchgpt import ScratchGPTForCausalLM

CLASSES = {"transformers": GPT2LMHeadModel, "ScratchGPT": ScratchGPTForCausalLM}


def load(name: str, folder: str) -> dict[str, float]:
    """Seconds until there is a model, seconds until there are logits, and bytes."""
    start = time.perf_counter()
    model = CLASSES[name].from_pretrained(folder)
    loaded = time.perf_counter() - start
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"loaded": loaded, "logits": time.perf_counter() - start, "memory": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(load(*arguments.one)))
        return
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in CLASSES}
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        for _ in range(arguments.runs):
            for name in CLASSES:
                command = [sys.executable, __file__, "--one", name, folder]
                output = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
                ).stdout
                taken[name].append(json.loads(output.splitlines()[-1]))
    print("| GPT-2 124M, float32 | loaded | first logits | peak memory |\n|---|---|---|---|")
    medians = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in taken.items()}
    for name, median in medians.items():
        print(f"| {name} | {median['loaded']:.2f} s | {median['logits']:.2f} s | {median['memory'] / 1e9:.2f} GB |")
    ours, theirs = medians["ScratchGPT"], medians["transformers"]
    print("| ratio | " + " | ".join(f"{ours[key] / theirs[key]:.2f} x" for key in ours) + " |")


if __name__ == "__main__":
    main()
