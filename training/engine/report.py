"""Progress bar, samples, loss curve."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from modeling_scratchgpt import ScratchGPTForCausalLM
from training.engine.launch import sdpa_attention
from training.engine.loop import Step
from training.errors import printable
from training.progress import bar_options, is_interactive

PROMPT_CHARACTERS = 60


class ProgressBar(tqdm):
    """Steps, time left, loss, tokens/s (excluding evaluation), model FLOPs utilization (Chowdhery et al., 2022) and memory.

    Args:
        num_steps, done: steps of the run, and those before this process started.
        flops_per_token: forward and backward.
        peak: FLOP/s of all devices together.
    """

    def __init__(self, num_steps: int, accelerator: Accelerator, flops_per_token: float, peak: float, done: int = 0):
        options = bar_options(hidden=not accelerator.is_main_process)
        if "bar_format" in options:
            options["bar_format"] = "step {n_fmt}/{total_fmt}: {measured}, {remaining} left"
        super().__init__(total=num_steps, initial=done, desc="Training", unit=" steps", smoothing=0, **options)
        self.is_main, self.is_on_gpu = accelerator.is_main_process, accelerator.device.type == "cuda"
        self.loss = self.speed = 0.0
        self.count, self.flops_per_token, self.peak = 0, flops_per_token, peak

    @property
    def format_dict(self) -> dict[str, Any]:
        """Values for `bar_format`, in which `postfix` would begin with a comma, and `measured` does not."""
        return {**super().format_dict, "measured": self.postfix}

    def log(self, step: Step) -> None:
        """Advance by one step. Loss and speed are exponential moving averages, a new step weighs a tenth."""
        self.count += 1
        weight = max(0.1, 1 / self.count)
        self.loss += weight * (step.loss - self.loss)
        self.speed += weight * (step.tokens / step.seconds - self.speed)
        self.peak = max(self.peak, self.speed * self.flops_per_token)  # a busy machine measures too low a peak
        mfu = self.speed * self.flops_per_token / self.peak
        # The peak on a GPU, the resident set on a CPU.
        memory = torch.cuda.max_memory_allocated() if self.is_on_gpu else psutil.Process().memory_info().rss
        values = f"loss {self.loss:.3f}, {self.speed:,.0f} tokens/s, MFU {mfu:.0%}, {memory / 2**30:.1f} GB"
        self.set_postfix_str(values, refresh=False)
        self.update()

    def print(self, text: str) -> None:
        """Print a text, above the bar if there is one."""
        if self.is_main:
            self.write(text) if is_interactive() and not self.disable else print(text, flush=True)


def make_prompts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Prompts: the ids of the first lines of each text, after the BOS token, as in training."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = []
    for text in texts:
        head, newline, _ = text[:PROMPT_CHARACTERS].rpartition("\n")
        opening = head + newline if head else text[:PROMPT_CHARACTERS].rpartition(" ")[0]  # whole lines, or whole words
        encoded: Any = tokenizer(opening or text[:PROMPT_CHARACTERS], add_special_tokens=False)
        prompts.append([*bos, *encoded["input_ids"]])
    return prompts


def sample(
    model: ScratchGPTForCausalLM, prompts: list[list[int]], max_new_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Continue each prompt by the generation config, with the same random numbers each time; prompts are put in brackets."""
    model.eval()
    samples = []
    limit = model.config.max_position_embeddings
    for seed, prompt in enumerate(prompts):
        prompt = prompt[: limit // 2]
        ids = torch.tensor([prompt], device=model.device)
        new_tokens = min(max_new_tokens, limit - len(prompt))
        # Without the GPUs: by default the state of all of them is saved, with a warning; each training step sets its own.
        with torch.random.fork_rng(devices=[]), torch.no_grad(), sdpa_attention(model):
            torch.manual_seed(seed)
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens)  # type: ignore[arg-type]
        parts = [prompt, output[0, len(prompt) :].tolist()]
        text, continuation = tokenizer.batch_decode(parts, skip_special_tokens=True)
        samples.append(printable(f"[{text.lstrip()}]{continuation.rstrip()}"))
    return samples


def describe_sampling(config: GenerationConfig) -> str:
    """Describe how `sample` chooses tokens."""
    if not config.do_sample:
        return "Greedy decoding"
    values = {"temperature": config.temperature, "top-k": config.top_k, "top-p": config.top_p}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None).capitalize()


def draw_loss(history: list[dict[str, Any]], path: Path, unit: str) -> None:
    """Draw the losses, in this unit, over steps, tokens and time as a PNG, from the rows of metrics.jsonl (see `RunFolder`)."""
    steps = [row for row in history if "loss" in row]
    evaluations = [row for row in history if "eval_loss" in row]
    whole = [row for row in history if "whole_eval_loss" in row][-1:]
    held_out = "validation, its beginning" if whole else "validation"
    unit_of_time, length = ("minutes", 60) if sum(row["seconds"] for row in steps) >= 120 else ("seconds", 1)
    columns = {
        "step": [row["step"] for row in steps],
        "tokens": list(accumulate(row["tokens"] for row in steps)),
        f"{unit_of_time} of training": list(accumulate(row["seconds"] / length for row in steps)),
    }
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (label, column) in zip(figure.subplots(1, 3, sharey=True), columns.items(), strict=True):
        axes.plot(column, [row["loss"] for row in steps], color="tab:blue", alpha=0.35, linewidth=0.8, label="training")
        at_step = dict(zip([0, *columns["step"]], [0, *column], strict=True))
        points = [at_step[row["step"]] for row in evaluations], [row["eval_loss"] for row in evaluations]
        axes.plot(*points, color="tab:orange", marker="o", markersize=4, label=held_out)
        for row in whole:
            axes.plot(at_step[row["step"]], row["whole_eval_loss"], "k*", label="validation, all of it")
        axes.set(xlabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer="training" not in label))
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel=f"loss ({unit})")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def duration(seconds: float) -> str:
    """A duration in the largest fitting unit."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} seconds"
