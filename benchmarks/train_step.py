"""A training step beside transformers' GPT-2: tokens per second and peak memory, in one run.

    python benchmarks/train_step.py

Both models have the same shape and the same AdamW, in float32 on the CPU or, where there is one, in bfloat16 and compiled on
the GPU. Each measurement is a process of its own, so that its peak memory is its own; the two take turns, and the medians are
quoted.
"""

import argparse
import json
import statistics
import time

import torch
from measuring import apart, peak_bytes
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM

SIDES = ("scratchgpt", "transformers")


def make(side: str, arguments: argparse.Namespace) -> torch.nn.Module:
    shape = {
        "vocab_size": arguments.vocab_size,
        "n_embd": arguments.width,
        "n_layer": arguments.layers,
        "n_head": arguments.width // 64,
        "n_positions": arguments.context,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if side == "scratchgpt":
        return ScratchGPTForCausalLM(ScratchGPTConfig(**shape))
    return GPT2LMHeadModel(GPT2Config(**shape))


def measure(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Train for a few steps; the median step counts, the first does not."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make(side, arguments).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step_model = torch.compile(model) if device == "cuda" else model
    ids = torch.randint(0, arguments.vocab_size, (arguments.batch, arguments.context), device=device)
    seconds = []
    for _ in range(arguments.steps + 1):
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = step_model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"tokens_per_second": ids.numel() / statistics.median(seconds[1:]), "peak_gigabytes": peak_bytes() / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments)))
        return
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side in SIDES:
            results[side].append(apart("--side", side))
    medians = {
        side: {name: statistics.median(result[name] for result in results[side]) for name in results[side][0]} for side in SIDES
    }
    print("| | tokens/s | peak memory |\n|---|---|---|")
    for side in SIDES:
        print(f"| {side} | {medians[side]['tokens_per_second']:,.0f} | {medians[side]['peak_gigabytes']:.2f} GB |")
    ours, theirs = medians["scratchgpt"], medians["transformers"]
    speed = ours["tokens_per_second"] / theirs["tokens_per_second"]
    memory = ours["peak_gigabytes"] / theirs["peak_gigabytes"]
    print(f"| ratio | {speed:.2f} x | {memory:.2f} x |")


if __name__ == "__main__":
    main()
