"""How long it takes to learn: tiny Shakespeare with transformers' GPT-2 trained as nanoGPT does it, and with ScratchGPT.

    python benchmarks/time_to_loss.py --data FOLDER              # FOLDER/tinyshakespeare/input.txt; loss per character
    python benchmarks/time_to_loss.py --data FOLDER --tokenizer bpe  # byte-level BPE, 512 ids; bits per byte

The reference is nanoGPT's recipe for a CPU (4 layers x 128, context 64, 2,000 steps of 12 windows, AdamW) on `GPT2LMHeadModel`,
biases included. Ours is no larger and sees the same text through the same context; block, optimizer, batch and schedule differ.
It runs twice: once as short as it takes to get to where the reference ends, and once for as long as the reference takes.

Both sides run in this process, in float32, one after the other. Times are those of training; evaluation, over the whole
validation text in windows of 64, is not counted.
"""

import argparse
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from training.engine.optimizers import make_optimizers, make_schedules, muon_initialization

CONTEXT, WIDTH, LAYERS = 64, 128, 4
# As short as it takes: batch, steps, AdamW's rate and Muon's. A head of 512 ids costs more, and gains more by larger batches.
BRIEFLY = {"characters": (12, 205, 2e-2, 0.05), "bpe": (24, 170, 2e-2, 0.06)}
REFERENCE, SHORT, LONG = "transformers GPT-2, AdamW", "ScratchGPT, Muon", "ScratchGPT, Muon, same time"


@dataclass
class Text:
    """A text as ids, cut into a training part and a validation part."""

    training: torch.Tensor  # (tokens,)
    validation: torch.Tensor  # (tokens,)
    vocab_size: int
    scale: float  # turns nats a token into the unit that is reported
    unit: str


@dataclass
class Run:
    """What one training gave: the validation loss, in the text's unit, after so many seconds of training."""

    name: str
    parameters: int
    steps: int
    curve: list[tuple[float, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.curve[-1][0]

    @property
    def loss(self) -> float:
        return self.curve[-1][1]

    def seconds_to(self, loss: float) -> float:
        """When it was first seen at this loss or below."""
        return next((seconds for seconds, reached in self.curve if reached <= loss), math.inf)


def read_text(path: Path, tokenizer: str) -> Text:
    """The first 90 % of the characters to train on, the rest to validate on."""
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
    """The mean loss of windows (B, CONTEXT + 1) of ids: each but the first is predicted."""
    following = windows[:, 1:].contiguous()
    return model(input_ids=windows[:, :-1], labels=following, shift_labels=following, use_cache=False).loss


@torch.no_grad()
def evaluate(model: nn.Module, ids: torch.Tensor) -> float:
    """The mean loss over all the windows that follow one another."""
    model.eval()
    windows = ids.unfold(0, CONTEXT + 1, CONTEXT)
    total = sum(batch_loss(model, batch).item() * len(batch) for batch in windows.split(128))
    model.train()
    return total / len(windows)


def train(
    name: str,
    text: Text,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    schedules: list[torch.optim.lr_scheduler.LambdaLR],
    batch_size: int,
    max_steps: int,
    max_grad_norm: float,
    evaluate_every: int,
) -> Run:
    """Train on windows that start anywhere."""
    run = Run(name, sum(parameter.numel() for parameter in model.parameters()), max_steps)
    generator = torch.Generator().manual_seed(0)
    seconds = 0.0
    for step in range(1, max_steps + 1):
        start = time.perf_counter()
        offsets = torch.randint(len(text.training) - CONTEXT, (batch_size, 1), generator=generator)
        batch_loss(model, text.training[offsets + torch.arange(CONTEXT + 1)]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seconds += time.perf_counter() - start
        if step % evaluate_every == 0 or step == max_steps:
            run.curve.append((seconds, text.scale * evaluate(model, text.validation)))
            print(f"{name}: step {step:,}, {seconds:.1f} s, {run.loss:.4f} {text.unit}", flush=True)
    return run


def train_reference(text: Text) -> Run:
    """nanoGPT's README, "I only have a macbook", on transformers' GPT-2."""
    config = GPT2Config(
        vocab_size=text.vocab_size,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    optimizers = make_optimizers(model, "adamw", 1e-3, 0.0, weight_decay=0.1)
    for group in optimizers[0].param_groups:
        group["betas"] = (0.9, 0.99)
    schedules = make_schedules(optimizers, "cosine", 100, 2000, min_lr_ratio=0.1, decay_ratio=1.0)
    return train(REFERENCE, text, model, optimizers, schedules, 12, 2000, 1.0, evaluate_every=200)


def train_ours(
    name: str,
    text: Text,
    batch_size: int,
    max_steps: int,
    learning_rate: float,
    muon_learning_rate: float,
    evaluate_every: int,
) -> Run:
    """The modern blocks with Muon; few steps warm up, and the rates fall in a line to nearly nothing."""
    config = ScratchGPTConfig(
        vocab_size=text.vocab_size,
        max_position_embeddings=CONTEXT,
        hidden_size=WIDTH,
        intermediate_size=304,  # keeps the whole below the reference in size
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        position_embedding_type="rotary",
        norm_type="rmsnorm",
        qk_norm=True,
        mlp_type="gated",
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
    )
    model = ScratchGPTForCausalLM(config)
    muon_initialization(model)
    optimizers = make_optimizers(model, "muon", learning_rate, muon_learning_rate, weight_decay=0.0)
    optimizers[0].param_groups[0]["momentum"] = 0.9  # batches of a thousand tokens: old gradients age fast
    schedules = make_schedules(optimizers, "linear", 15, max_steps, min_lr_ratio=0.02, decay_ratio=1.0)
    return train(name, text, model, optimizers, schedules, batch_size, max_steps, math.inf, evaluate_every)


def print_table(runs: list[Run], text: Text) -> None:
    reference, short, long = runs
    target = reference.loss
    ratio = reference.seconds_to(target) / short.seconds_to(target)
    print(f"\n| {text.unit} | parameters | steps | seconds to {target:.3f} | after all its steps |\n|---|---|---|---|---|")
    for run in runs:
        reached = f"{run.seconds_to(target):.1f}"
        print(f"| {run.name} | {run.parameters:,} | {run.steps:,} | {reached} | {run.loss:.3f} in {run.seconds:.1f} s |")
    print(f"\n{SHORT}: {target:.3f} {ratio:.1f} times as fast; at equal time {long.loss:.3f} instead of {reference.loss:.3f}.")


def draw(runs: list[Run], text: Text, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for run, colour, style in zip(runs, ("tab:gray", "tab:blue", "tab:blue"), ("-", "--", "-"), strict=True):
        axes.plot(*zip(*run.curve, strict=True), style, color=colour, marker=".", label=run.name)
    axes.axhline(runs[0].loss, color="tab:gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="seconds of training", ylabel=f"validation loss, {text.unit}", title="Tiny Shakespeare, context 64", xlim=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"Drawn to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds tinyshakespeare/input.txt")
    parser.add_argument("--tokenizer", choices=("characters", "bpe"), default="characters")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/time_to_loss.png"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    text = read_text(arguments.data / "tinyshakespeare" / "input.txt", arguments.tokenizer)
    set_seed(arguments.seed)
    reference = train_reference(text)
    short = train_ours(SHORT, text, *BRIEFLY[arguments.tokenizer], evaluate_every=5)
    batch_size = BRIEFLY[arguments.tokenizer][0]
    max_steps = int(0.97 * reference.seconds / short.seconds * short.steps)  # a little less, not to take longer than it
    long = train_ours(LONG, text, batch_size, max_steps, 8e-3, 0.035, evaluate_every=-(-max_steps // 8))
    print_table([reference, short, long], text)
    draw([reference, short, long], text, arguments.output)


if __name__ == "__main__":
    main()
