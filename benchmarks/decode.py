"""Greedy decoding beside transformers' GPT-2: tokens per second, in one run.

    python benchmarks/decode.py

The same shape with random weights, `generate(do_sample=False)` on both sides; the two take turns, and the medians are quoted.
"""

import argparse
import statistics
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM

SHAPES = {
    "tiny": {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 4096, "n_positions": 256},
    "124M": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
}


def tokens_per_second(model: torch.nn.Module, batch: int, new_tokens: int) -> float:
    ids = torch.randint(0, model.config.vocab_size, (batch, 16), device=model.device)
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
    )
    assert output.shape == (batch, 16 + new_tokens)
    return batch * new_tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| model | batch | scratchgpt | transformers | ratio |\n|---|---|---|---|---|")
    for shape in arguments.shapes:
        special = {"bos_token_id": None, "eos_token_id": None}
        ours = ScratchGPTForCausalLM(ScratchGPTConfig(**SHAPES[shape], **special)).to(device).eval()
        theirs = GPT2LMHeadModel(GPT2Config(**SHAPES[shape], **special)).to(device).eval()
        for batch in arguments.batches:
            speeds = [
                [tokens_per_second(model, batch, arguments.new_tokens) for model in (ours, theirs)]
                for _ in range(arguments.rounds + 1)
            ]
            mine, other = (statistics.median(column) for column in zip(*speeds[1:], strict=True))
            print(f"| {shape} | {batch} | {mine:,.0f} tok/s | {other:,.0f} tok/s | {mine / other:.2f} x |", flush=True)


if __name__ == "__main__":
    main()
