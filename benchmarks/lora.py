"""Fine-tuning with LoRA beside PEFT: time of a step and peak memory, in one run; and what a merged adapter costs.

    python benchmarks/lora.py                      # 124M, rank 16 on all linear layers of the blocks
    python benchmarks/lora.py --preset 355M --steps 20

Both adapt the same model, with the same AdamW, in float32 on the CPU or, where there is one, in bfloat16 on the GPU.
Steps are timed in one process, in which the two take turns, and the medians are quoted. Peak memory is that of a process that
makes two steps of one of them.
"""

import argparse
import statistics
import time

import torch
from measuring import apart, peak_bytes

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM
from modeling_scratchgpt.lora import LoraConfig, add_adapter, merge_and_unload

SIDES = ("ScratchGPT", "PEFT")  # the second is what the first is measured by


def make(side: str, arguments: argparse.Namespace) -> torch.nn.Module:
    config = ScratchGPTConfig.from_preset(arguments.preset, hidden_dropout=0.0, attention_dropout=0.0, embedding_dropout=0.0)
    model = ScratchGPTForCausalLM(config)
    if side == "PEFT":
        import peft

        settings = peft.LoraConfig(r=arguments.rank, lora_alpha=32, target_modules="all-linear", use_dora=arguments.dora)
        return peft.get_peft_model(model, settings)
    add_adapter(model, LoraConfig(r=arguments.rank, lora_alpha=32, use_dora=arguments.dora))
    return model


class Training:
    """A model, its optimizer, and what each step took."""

    def __init__(self, side: str, arguments: argparse.Namespace):
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = make(side, arguments).to(self.device).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        self.ids = torch.randint(0, 50257, (arguments.batch, arguments.context), device=self.device)
        self.seconds: list[float] = []

    def step(self) -> None:
        start = time.perf_counter()
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device == "cuda"):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)


def peak_gigabytes(side: str, arguments: argparse.Namespace) -> float:
    training = Training(side, arguments)
    training.step()
    training.step()
    return peak_bytes() / 1e9


@torch.no_grad()
def merged_beside_base(arguments: argparse.Namespace) -> tuple[float, float]:
    """Seconds for the same texts: a model that never had an adapter, and one that has been merged; they take turns."""
    base = ScratchGPTForCausalLM(ScratchGPTConfig.from_preset(arguments.preset)).eval()
    adapted = ScratchGPTForCausalLM(base.config).eval()
    add_adapter(adapted, LoraConfig(r=arguments.rank))
    models = (base, merge_and_unload(adapted))
    ids = torch.randint(0, 50257, (1, arguments.context))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(arguments.steps + 1):
        for model, taken in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(input_ids=ids)
            taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="124M")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(peak_gigabytes(arguments.side, arguments))
        return
    memory = {side: apart("--side", side) for side in SIDES}
    trainings = {side: Training(side, arguments) for side in SIDES}
    for _ in range(arguments.steps + 1):
        for training in trainings.values():
            training.step()
    seconds = {side: statistics.median(training.seconds[1:]) for side, training in trainings.items()}
    print("| | a step | peak memory |\n|---|---|---|")
    for side in SIDES:
        print(f"| {side} | {seconds[side]:.2f} s | {memory[side]:.2f} GB |")
    ours, theirs = SIDES
    print(f"| ratio | {seconds[ours] / seconds[theirs]:.2f} x | {memory[ours] / memory[theirs]:.2f} x |")
    del trainings
    base, merged = merged_beside_base(arguments)
    print(f"\nLogits of {arguments.context} tokens: base {base:.3f} s, merged {merged:.3f} s, ratio {merged / base:.2f} x")


if __name__ == "__main__":
    main()
