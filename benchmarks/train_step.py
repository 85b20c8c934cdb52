"""A training step compared with transformers' GPT-2: tokens per second and peak memory.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --precision bfloat16 --compile true --vocab_size 4096 --width 256

Both models have the same shape and the same AdamW, by default in float32 on the CPU or, if there is one, in bfloat16 and
compiled on the GPU. Each measurement is a process of its own, so that the peak memory is that of one model. The two take turns,
and the medians are printed.
"""

import argparse
from typing import Any

import torch
from measuring import add_modes, make_parser, median_of_each, peak_bytes, run_in_subprocess, seconds_in_turns, training_step
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM

SIDES: dict[str, tuple[Any, Any]] = {
    "scratchgpt": (ScratchGPTForCausalLM, ScratchGPTConfig),
    "transformers": (GPT2LMHeadModel, GPT2Config),
}


def measure(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    shape = {
        "vocab_size": arguments.vocab_size,
        "n_embd": arguments.width,
        "n_layer": arguments.layers,
        "n_head": arguments.width // 64,
        "n_positions": arguments.context,
    }
    switched_off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    model_class, config_class = SIDES[side]
    model = model_class(config_class(**shape, **switched_off))
    model.config.skip_logits = True  # as the recipes do; GPT-2 has no such field
    step = training_step(model, arguments.batch, arguments.context, arguments.compile == "true", arguments.precision)
    (seconds,) = seconds_in_turns([step], arguments.steps)
    return {"speed": arguments.batch * arguments.context / seconds, "memory": peak_bytes() / 1e9}


def main() -> None:
    parser = make_parser(__doc__, layers=6, width=384, context=256, batch=8, vocab_size=50257, steps=5, rounds=3)
    add_modes(parser)
    arguments = parser.parse_args()
    runs = [{side: run_in_subprocess(measure, side, arguments) for side in SIDES} for _ in range(arguments.rounds)]
    ours, theirs = medians = [median_of_each([run[side] for run in runs]) for side in SIDES]
    print("| | tokens/s | peak memory |\n|---|---|---|")
    for side, median in zip(SIDES, medians, strict=True):
        print(f"| {side} | {median['speed']:,.0f} | {median['memory']:.2f} GB |")
    print(f"| ratio | {ours['speed'] / theirs['speed']:.2f} x | {ours['memory'] / theirs['memory']:.2f} x |")


if __name__ == "__main__":
    main()
