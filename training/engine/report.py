"""What a person sees of a run: the bar, samples, the curve."""

from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_scratchgpt import ScratchGPTForCausalLM
from training.engine.loop import Step
from training.errors import printable

CURVE = "loss.png"
PROMPT_CHARACTERS = 60


class ProgressBar:
    """Steps done and time left, with the loss, the speed of training (evaluations apart), how much of the device's peak speed
    that is (model FLOPs utilisation: Chowdhery et al., 2022), and the memory taken.

    Args:
        num_steps, done: of the run, and before this start of it.
        flops_per_token: forward and backward.
        peak: FLOP/s that the devices reach together.
    """

    def __init__(self, num_steps: int, accelerator: Accelerator, flops_per_token: float, peak: float, done: int = 0):
        show = accelerator.is_main_process
        self.bar = tqdm(total=num_steps, initial=done, desc="Training", unit=" steps", smoothing=0, disable=not show)
        self.loss = self.speed = 0.0
        self.count, self.flops_per_token, self.peak = 0, flops_per_token, peak

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, step: Step) -> None:
        """One step on. Loss and speed are smoothed, each new step counting for a tenth."""
        self.count += 1
        weight = max(0.1, 1 / self.count)
        self.loss += weight * (step.loss - self.loss)
        self.speed += weight * (step.tokens / step.seconds - self.speed)
        utilisation = self.speed * self.flops_per_token / self.peak
        self.bar.set_postfix_str(
            f"loss {self.loss:.3f}, {self.speed:,.0f} tokens/s, MFU {utilisation:.0%}, {memory() / 2**30:.1f} GB", refresh=False
        )
        self.bar.update()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self.bar.disable:
            self.bar.write(text)


def make_prompts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Prompts: the ids of the first lines of each text, as in training after the beginning-of-text token."""
    prompts = []
    for text in texts:
        head, newline, _ = text[:PROMPT_CHARACTERS].rpartition("\n")
        opening = head + newline if head else text[:PROMPT_CHARACTERS].rpartition(" ")[0]  # whole lines, or whole words
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        prompts.append([*start, *tokenizer.backend_tokenizer.encode(opening).ids])
    return prompts


def sample(
    model: ScratchGPTForCausalLM, prompts: list[list[int]], max_new_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]]:
    """Continue each prompt with the model's generation config, from the same random numbers each time.

    Returns:
        A list of pairs: the prompt and its continuation, as text.
    """
    model.eval()
    samples: list[Any] = []
    limit = model.config.max_position_embeddings
    for seed, prompt in enumerate(prompts):
        prompt = prompt[: limit // 2]
        ids = torch.tensor([prompt], device=model.device)
        new_tokens = min(max_new_tokens, limit - len(prompt))
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens)  # type: ignore[arg-type]
        parts = (prompt, output[0, len(prompt) :].tolist())
        samples.append(tuple(tokenizer.decode(part, skip_special_tokens=True) for part in parts))
    return samples


def format_samples(samples: list[tuple[str, str]]) -> str:
    """Samples as plain text, the prompt set off from what the model wrote."""
    return printable("\n".join(f"[{prompt.lstrip()}]{continuation.rstrip()}\n" for prompt, continuation in samples))


def draw_loss(rows: list[dict[str, Any]], path: Path, unit: str) -> None:
    """Training and validation loss over steps, tokens and time, as a PNG."""
    steps = [row for row in rows if "learning_rate" in row]
    unit_of_time, length = ("minutes", 60) if sum(row["seconds"] for row in steps) >= 120 else ("seconds", 1)
    time = f"{unit_of_time} of training"
    places: dict[str, list[float]] = {"step": [0], "tokens": [0], time: [0]}
    for row in steps:
        places["step"].append(row["step"])
        places["tokens"].append(places["tokens"][-1] + row["tokens"])
        places[time].append(places[time][-1] + row["seconds"] / length)
    validation = [(places["step"].index(row["step"]), row["loss"]) for row in rows if "learning_rate" not in row]
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, where) in zip(figure.subplots(1, 3, sharey=True), places.items(), strict=True):
        axes.plot(where[1:], [row["loss"] for row in steps], color="tab:blue", alpha=0.35, linewidth=0.8, label="training")
        axes.plot(
            [where[index] for index, _ in validation],
            [loss for _, loss in validation],
            color="tab:orange",
            marker="o",
            markersize=4,
            label="validation",
        )
        axes.set(xlabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=label != time))
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel=f"loss ({unit})")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def memory() -> int:
    """Bytes that this process holds now: the most so far on a GPU, what is resident on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def duration(seconds: float) -> str:
    """A time for people."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} seconds"
