"""Loading GPT-2's weights: time and peak memory of ScratchGPT, of ScratchGPT after `convert`, and of transformers' GPT-2.

    python benchmarks/load.py                # 124M, random weights
    python benchmarks/load.py --runs 9

Each load is a process of its own, and they take turns. Times are from the call to the first logits, because a memory-mapped
file is only read when it is used. The memory is the peak of the process. Both include the same imports.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import make_parser, median_of_each, peak_bytes, run_in_subprocess
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from modeling_scratchgpt import ScratchGPTForCausalLM

SOURCES: dict[str, tuple[Any, str]] = {
    "transformers": (GPT2LMHeadModel, "gpt2"),
    "ScratchGPT": (ScratchGPTForCausalLM, "gpt2"),
    "ScratchGPT, converted before": (ScratchGPTForCausalLM, "scratchgpt"),
}


def save_models(directory: Path) -> None:
    """Random weights, as transformers' GPT-2 and as a ScratchGPT."""
    GPT2LMHeadModel(GPT2Config()).save_pretrained(directory / "gpt2")
    ScratchGPTForCausalLM.from_pretrained(directory / "gpt2").save_pretrained(directory / "scratchgpt")


def load(name: str, directory: Path) -> dict[str, float]:
    """Seconds to the model, seconds to the first logits, and peak memory in bytes."""
    disable_progress_bar()
    model_class, source = SOURCES[name]
    start = time.perf_counter()
    model = model_class.from_pretrained(directory / source)
    loaded = time.perf_counter() - start
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    return {"loaded": loaded, "logits": time.perf_counter() - start, "memory": peak_bytes()}


def main() -> None:
    num_runs = make_parser(__doc__, runs=5).parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        run_in_subprocess(save_models, directory)  # a process inherits the peak memory of the one that started it
        runs = [{source: run_in_subprocess(load, source, directory) for source in SOURCES} for _ in range(num_runs)]
    print("| GPT-2 124M, float32 | loaded | first logits | peak memory |\n|---|---|---|---|")
    medians = {name: median_of_each([run[name] for run in runs]) for name in SOURCES}
    for name, median in medians.items():
        print(f"| {name} | {median['loaded']:.2f} s | {median['logits']:.2f} s | {median['memory'] / 1e9:.2f} GB |")
    for name in list(SOURCES)[1:]:
        ratios = (f"{value / medians['transformers'][key]:.2f} x" for key, value in medians[name].items())
        print(f"| {name}: ratio | " + " | ".join(ratios) + " |")


if __name__ == "__main__":
    main()
