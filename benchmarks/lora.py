"""Fine-tuning with LoRA compared with PEFT: time of a step and peak memory; and the speed of a merged model.

    python benchmarks/lora.py                      # 124M, rank 16 on all linear layers of the blocks
    python benchmarks/lora.py --preset 355M --steps 20

Both adapt the same model with the same AdamW, in float32 on the CPU or, if there is one, in bfloat16 on the GPU. Steps are
timed in one process, in turns, and the medians are printed. The peak memory is that of a process that makes two steps of one.
"""

import argparse
from collections.abc import Callable
from functools import partial

import peft
import torch
from measuring import make_parser, peak_bytes, run_in_subprocess, seconds_in_turns, training_step

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from modeling_scratchgpt.lora import LoraConfig, add_adapter, merge_and_unload

SIDES = ("ScratchGPT", "PEFT")


def make_step(side: str, arguments: argparse.Namespace) -> Callable[[], None]:
    torch.manual_seed(0)
    config = ScratchGPTConfig.from_preset(arguments.preset, skip_logits=True)  # as the recipes do
    model: torch.nn.Module = ScratchGPTForCausalLM(config)
    settings = {"r": arguments.rank, "lora_alpha": 32, "use_dora": arguments.dora}
    if side == "PEFT":
        model = peft.get_peft_model(model, peft.LoraConfig(**settings, target_modules="all-linear"))
    else:
        add_adapter(model, LoraConfig(**settings))
    return training_step(model, arguments.batch, arguments.context)


def peak_gigabytes(side: str, arguments: argparse.Namespace) -> float:
    step = make_step(side, arguments)
    step()
    step()
    return peak_bytes() / 1e9


@torch.no_grad()
def forward_seconds(arguments: argparse.Namespace) -> list[float]:
    """Seconds of a forward pass of a model that never had an adapter, and of one whose adapter is merged."""
    base = ScratchGPTForCausalLM(ScratchGPTConfig.from_preset(arguments.preset)).eval()
    adapted = ScratchGPTForCausalLM(base.config).eval()
    add_adapter(adapted, LoraConfig(r=arguments.rank))
    ids = torch.randint(0, base.config.vocab_size, (1, arguments.context))
    models = (base, merge_and_unload(adapted))
    return seconds_in_turns([partial(model, input_ids=ids) for model in models], arguments.steps)


def main() -> None:
    parser = make_parser(__doc__, rank=16, context=256, batch=4, steps=9)
    parser.add_argument("--preset", default="124M")
    parser.add_argument("--dora", action="store_true")
    arguments = parser.parse_args()
    memory = [run_in_subprocess(peak_gigabytes, side, arguments) for side in SIDES]
    seconds = seconds_in_turns([make_step(side, arguments) for side in SIDES], arguments.steps)
    print("| | a step | peak memory |\n|---|---|---|")
    for side, taken, gigabytes in zip(SIDES, seconds, memory, strict=True):
        print(f"| {side} | {taken:.2f} s | {gigabytes:.2f} GB |")
    print(f"| ratio | {seconds[0] / seconds[1]:.2f} x | {memory[0] / memory[1]:.2f} x |")
    base, merged = forward_seconds(arguments)
    print(f"\nLogits of {arguments.context} tokens: base {base:.3f} s, merged {merged:.3f} s, ratio {merged / base:.2f} x")


if __name__ == "__main__":
    main()
