"""Greedy decoding compared with transformers' GPT-2: tokens per second.

    python benchmarks/decode.py

Both models have the same shape and random weights, and run `generate(do_sample=False)` in turns. The medians are printed.
"""

from functools import partial
from typing import Any

import torch
from measuring import DEVICE, make_parser, seconds_in_turns
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 4096, "n_positions": 256},
    "124M": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
}


def generate(model: Any, batch_size: int, num_tokens: int) -> None:
    ids = torch.randint(0, model.config.vocab_size, (batch_size, 16), device=DEVICE)
    lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **lengths)
    assert output.shape == (batch_size, 16 + num_tokens)


def main() -> None:
    parser = make_parser(__doc__, new_tokens=64, rounds=5)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    arguments = parser.parse_args()
    print("| model | batch | scratchgpt | transformers | ratio |\n|---|---|---|---|---|")
    for shape in arguments.shapes:
        values = {**SHAPES[shape], "bos_token_id": None, "eos_token_id": None}
        models = [ScratchGPTForCausalLM(ScratchGPTConfig(**values)), GPT2LMHeadModel(GPT2Config(**values))]
        models = [model.to(DEVICE).eval() for model in models]
        for batch_size in arguments.batches:
            functions = [partial(generate, model, batch_size, arguments.new_tokens) for model in models]
            seconds = seconds_in_turns(functions, arguments.rounds)
            ours, theirs = (batch_size * arguments.new_tokens / taken for taken in seconds)
            print(f"| {shape} | {batch_size} | {ours:,.0f} tok/s | {theirs:,.0f} tok/s | {ours / theirs:.2f} x |", flush=True)


if __name__ == "__main__":
    main()
