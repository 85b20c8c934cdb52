"""Time to a given loss: tiny Shakespeare with transformers' GPT-2, trained as nanoGPT does, and with ScratchGPT.

    python benchmarks/time_to_loss.py --data DIRECTORY              # with tinyshakespeare/input.txt; loss per character
    python benchmarks/time_to_loss.py --data DIRECTORY --tokenizer bpe  # byte-level BPE, 512 ids; bits per byte

The reference is nanoGPT's recipe for a CPU (4 layers x 128, context 64, 2,000 steps of 12 windows, AdamW) on `GPT2LMHeadModel`,
with biases. ScratchGPT is no larger and trains on the same text with the same context; block, optimizer, batch size and
schedule differ. It is trained twice: as briefly as it takes to reach the reference's final loss, and for as long as the
reference.

All train in this process, in float32, one after the other. Times exclude evaluation, on the whole validation text in windows of
64.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from measuring import make_parser
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from modeling_scratchgpt.interchange import ARCHITECTURE
from training.engine.arguments import EngineArguments
from training.engine.optimizers import build_optimizers, lr_factor, muon_initialization, set_learning_rates

CONTEXT = 64
SHAPE = {"n_positions": CONTEXT, "n_embd": 128, "n_layer": 4, "n_head": 4}
BRIEF: dict[str, dict[str, Any]] = {  # arguments of the brief run; a larger head gains more from larger batches
    "characters": {"batch_size": 12, "max_steps": 205, "learning_rate": 2e-2, "muon_learning_rate": 0.05},
    "bpe": {"batch_size": 24, "max_steps": 170, "learning_rate": 2e-2, "muon_learning_rate": 0.06},
}
SHARED = {"optimizer": "muon", "weight_decay": 0.0, "lr_scheduler_type": "linear", "min_lr_ratio": 0.02}
REFERENCE, SHORT, LONG = "transformers GPT-2, AdamW", "ScratchGPT, Muon", "ScratchGPT, Muon, same time"


@dataclass
class Text:
    """A tokenized text."""

    train: torch.Tensor  # (tokens,)
    validation: torch.Tensor  # (tokens,)
    vocab_size: int
    scale: float  # from nats per token to `unit`
    unit: str


@dataclass
class Run:
    """A finished training; the curve has the seconds of training and the validation loss, in the text's unit."""

    name: str
    parameters: int
    steps: int
    curve: list[tuple[float, float]] = field(default_factory=list)

    @property
    def final(self) -> tuple[float, float]:
        return self.curve[-1]

    def seconds_to(self, target: float) -> float:
        """Seconds to the first evaluation with at most this loss."""
        return next((seconds for seconds, loss in self.curve if loss <= target), math.inf)


def read_text(path: Path, tokenizer: str) -> Text:
    """The first 90 % of the characters to train on, the rest for validation."""
    text = path.read_text(encoding="utf-8")
    parts = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    if tokenizer == "characters":
        vocabulary = {character: index for index, character in enumerate(sorted(set(text)))}
        ids = [torch.tensor([vocabulary[character] for character in part]) for part in parts]
        return Text(*ids, len(vocabulary), 1.0, "nats per character")
    bpe = ScratchGPTTokenizer.train([parts[0]], 512)
    ids = [torch.tensor(bpe(part, add_special_tokens=False)["input_ids"]) for part in parts]
    bits_per_nat = len(ids[1]) / len(parts[1].encode()) / math.log(2)
    return Text(*ids, len(bpe), bits_per_nat, "bits per byte")


def batch_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """The mean loss of windows (B, CONTEXT + 1) of ids: all but the first are predicted."""
    labels = windows[:, 1:].contiguous()
    return model(input_ids=windows[:, :-1], labels=labels, shift_labels=labels, use_cache=False).loss


@torch.no_grad()
def evaluate(model: nn.Module, ids: torch.Tensor) -> float:
    """The mean loss over all consecutive windows."""
    model.eval()
    windows = ids.unfold(0, CONTEXT + 1, CONTEXT)
    total = sum(batch_loss(model, batch).item() * len(batch) for batch in windows.split(128))
    model.train()
    return total / len(windows)


def train(name: str, text: Text, model: nn.Module, arguments: EngineArguments, **group: object) -> Run:
    """Train on windows at random offsets; `group` changes the parameter groups of the first optimizer."""
    optimizers = build_optimizers(arguments, model)
    for parameters in optimizers[0].param_groups:
        parameters.update(group)
    run = Run(name, sum(parameter.numel() for parameter in model.parameters()), arguments.max_steps)
    generator = torch.Generator().manual_seed(0)
    seconds = 0.0
    for step in range(1, arguments.max_steps + 1):
        start = time.perf_counter()
        offsets = torch.randint(len(text.train) - CONTEXT, (arguments.batch_size, 1), generator=generator)
        batch_loss(model, text.train[offsets + torch.arange(CONTEXT + 1)]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        set_learning_rates(optimizers, lr_factor(step - 1, arguments))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds += time.perf_counter() - start
        if step % arguments.eval_steps == 0 or step == arguments.max_steps:
            run.curve.append((seconds, text.scale * evaluate(model, text.validation)))
            print(f"{name}: step {step:,}, {seconds:.1f} s, {run.final[1]:.4f} {text.unit}", flush=True)
    return run


def train_reference(text: Text) -> Run:
    """nanoGPT's README, "I only have a macbook", on transformers' GPT-2."""
    switched_off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=text.vocab_size, **SHAPE, **switched_off))
    arguments = EngineArguments(batch_size=12, max_steps=2000, warmup_ratio=0.05, eval_steps=200)  # otherwise the defaults
    return train(REFERENCE, text, model, arguments, betas=(0.9, 0.99))


def train_scratchgpt(name: str, text: Text, settings: dict[str, Any], eval_steps: int) -> Run:
    """The modern block with Muon: a short warm-up, then linear decay to nearly zero."""
    n_inner = 304  # the largest with which the model is smaller than the reference
    shape = {"vocab_size": text.vocab_size, "n_inner": n_inner, "attention_bias": False, "tie_word_embeddings": False, **SHAPE}
    config = ScratchGPTConfig(**shape, **ARCHITECTURE["qwen3"], skip_logits=True)
    model = ScratchGPTForCausalLM(config)
    muon_initialization(model)
    warmup_ratio = 14.5 / settings["max_steps"]  # 15 steps, as fractions of a step are rounded up
    arguments = EngineArguments(**SHARED, **settings, warmup_ratio=warmup_ratio, max_grad_norm=math.inf, eval_steps=eval_steps)
    return train(name, text, model, arguments, momentum=0.9)  # batches of a thousand tokens: old gradients are soon outdated


def print_table(runs: list[Run], text: Text) -> None:
    reference, short, long = runs
    target = reference.final[1]
    ratio = reference.seconds_to(target) / short.seconds_to(target)
    print(f"\n| {text.unit} | parameters | steps | seconds to {target:.3f} | after all its steps |\n|---|---|---|---|---|")
    for run in runs:
        (seconds, loss), reached = run.final, run.seconds_to(target)
        print(f"| {run.name} | {run.parameters:,} | {run.steps:,} | {reached:.1f} | {loss:.3f} in {seconds:.1f} s |")
    print(f"\n{SHORT}: {target:.3f} {ratio:.1f} times as fast; at equal time {long.final[1]:.3f} instead of {target:.3f}.")


def draw(runs: list[Run], text: Text, path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    for run, color, style in zip(runs, ("tab:gray", "tab:blue", "tab:blue"), ("-", "--", "-"), strict=True):
        axes.plot(*zip(*run.curve, strict=True), style, color=color, marker=".", label=run.name)
    axes.axhline(runs[0].final[1], color="tab:gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="seconds of training", ylabel=f"validation loss, {text.unit}", title="Tiny Shakespeare, context 64", xlim=0)
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"The curves are in {path}")


def main() -> None:
    parser = make_parser(__doc__, seed=0)
    parser.add_argument("--data", type=Path, required=True, help="directory that contains tinyshakespeare/input.txt")
    parser.add_argument("--tokenizer", choices=BRIEF, default="characters")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/time_to_loss.png"))
    arguments = parser.parse_args()
    text = read_text(arguments.data / "tinyshakespeare" / "input.txt", arguments.tokenizer)
    set_seed(arguments.seed)
    reference = train_reference(text)
    brief = BRIEF[arguments.tokenizer]
    short = train_scratchgpt(SHORT, text, brief, eval_steps=5)
    max_steps = int(0.97 * reference.final[0] / short.final[0] * short.steps)  # slightly fewer, so that it is not slower
    settings = {**brief, "max_steps": max_steps, "learning_rate": 8e-3, "muon_learning_rate": 0.035}
    long = train_scratchgpt(LONG, text, settings, eval_steps=-(-max_steps // 8))
    print_table([reference, short, long], text)
    draw([reference, short, long], text, arguments.output)


if __name__ == "__main__":
    main()
