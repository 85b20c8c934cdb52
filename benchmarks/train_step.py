"""A training step compared with transformers' GPT-2 or Qwen3, or with our model's own logits: tokens/s and peak memory.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --precision bfloat16 --compile true --vocab_size 4096 --width 256 --peer qwen3

Both models have the same shape and the same AdamW, by default in float32 on the CPU or, if there is one, in bfloat16 and
compiled on the GPU. Each measurement is a process of its own, so that the peak memory is that of one model. The two take turns,
and the medians are printed.
"""

import argparse
from typing import Any

import torch
from measuring import add_modes, make_parser, median_of_each, peak_bytes, run_in_subprocess, seconds_in_turns, training_step
from transformers import AutoModelForCausalLM

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from modeling_scratchgpt.interchange import ARCHITECTURE, as_transformers
from training.engine.launch import choose_attention, choose_compiler, start_accelerator

PEERS = {"gpt2": "transformers, gpt2", "qwen3": "transformers, qwen3", "logits": "the same with logits"}


def measure(is_ours: bool, arguments: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    config = ScratchGPTConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        max_position_embeddings=arguments.context,
        skip_logits=is_ours,  # as the recipes do
        **ARCHITECTURE["qwen3" if arguments.peer == "qwen3" else "gpt2"],
    )
    accelerator = start_accelerator(precision=arguments.precision)
    choose_compiler(accelerator, arguments.compile, 0)
    if is_ours or arguments.peer == "logits":
        model: Any = ScratchGPTForCausalLM(config)
        choose_attention(accelerator, model, {})  # as the recipes do
    else:
        model = AutoModelForCausalLM.from_config(as_transformers(config, arguments.peer), dtype=torch.float32)
    step = training_step(model, arguments.batch, arguments.context, arguments.compile == "true", arguments.precision)
    (seconds,) = seconds_in_turns([step], arguments.steps)
    return {"speed": arguments.batch * arguments.context / seconds, "memory": peak_bytes() / 1e9}


def main() -> None:
    parser = make_parser(__doc__, layers=6, width=384, context=256, batch=8, vocab_size=50257, steps=5, rounds=3)
    parser.add_argument("--peer", default="gpt2", choices=PEERS)
    add_modes(parser)
    arguments = parser.parse_args()
    runs = [[run_in_subprocess(measure, is_ours, arguments) for is_ours in (True, False)] for _ in range(arguments.rounds)]
    ours, theirs = (median_of_each(side) for side in zip(*runs, strict=True))
    print("| | tokens/s | peak memory |\n|---|---|---|")
    for name, side in (("scratchgpt", ours), (PEERS[arguments.peer], theirs)):
        print(f"| {name} | {side['speed']:,.0f} | {side['memory']:.2f} GB |")
    print(f"| ratio | {ours['speed'] / theirs['speed']:.2f} x | {ours['memory'] / theirs['memory']:.2f} x |")


if __name__ == "__main__":
    main()
