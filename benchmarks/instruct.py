"""Following instructions: everything trained, LoRA, and the last block, from one base; and answers in batches or one by one.

    python benchmarks/instruct.py --data ../shared/data --base_model outputs/pretrain

The task of chapter 7 of "Build a Large Language Model From Scratch": 1,100 instructions in the Alpaca shape, split 85/5/10.
Minutes and memory are those of a whole command: training, and answering the test split by base and tuned model. The base itself
is made by `accelerate launch training/pretrain.py`. Speed is counted in tokens that are said, medians of three.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import run_recipe
from transformers import AutoTokenizer

from modeling_scratchgpt import ScratchGPTForCausalLM
from training.results.responses import respond

WAYS = {
    "everything trained": "",
    "LoRA of rank 16": "--lora_r 16 --learning_rate 0.003",
    "the last block trained": "--train_last_n_layers 1 --learning_rate 0.003",
}
BATCH = 32


def speeds(folder: Path) -> dict[int, float]:
    """Tokens a second that a tuned model says, answering the test split in batches of each size."""
    model = ScratchGPTForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompts = [json.loads(line)["prompt"] for line in (folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
    found: dict[int, list[float]] = {1: [], BATCH: []}
    for _ in range(3):
        for batch_size, values in found.items():
            start = time.perf_counter()
            answers = respond(model, tokenizer, prompts, batch_size, 256)
            seconds = time.perf_counter() - start
            num_tokens = sum(len(tokenizer(it.text, add_special_tokens=False)["input_ids"]) + it.ended for it in answers)
            values.append(num_tokens / seconds)
    return {batch_size: statistics.median(values) for batch_size, values in found.items()}


def row(title: str, validation: dict[str, Any], test: dict[str, Any] | None, answers: dict[str, Any], *used: str) -> str:
    """A line of the table."""
    losses = f"{validation['loss']:.3f}", f"{test['loss']:.3f}" if test else ""
    return f"| {' | '.join((title, *losses, format(answers['ended'], '.1%'), format(answers['chrf'], '.1f'), *used))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with instructions/instruction-data.json")
    parser.add_argument("--base_model", type=Path, default=Path("outputs/pretrain"), help="a folder of a pretrained model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = (arguments.data / "instructions" / "instruction-data.json").resolve()
    print(
        "| | validation loss | test loss | test answers ended | chrF | minutes | peak memory |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as name:
        for title, change in WAYS.items():
            to = Path(name, title.replace(" ", "-"))
            words = ["--dataset", str(source), "--base_model", str(arguments.base_model.resolve()), "--output_dir", str(to)]
            words += ["--seed", str(arguments.seed), *change.split()]
            minutes, memory = run_recipe("instruct", *words)
            found = json.loads((to / "metrics.json").read_text(encoding="utf-8"))
            if title == "everything trained":
                print(row("the base", found["before"], None, found["base"], "", ""))
            used = f"{minutes:.1f}", f"{memory / 1e9:.2f} GB"
            print(row(title, found["validation"], found["test"], found["test"], *used), flush=True)
        one, many = speeds(Path(name, "everything-trained")).values()
    print(f"\nAnswers to the test split: one at a time {one:,.0f} tokens/s, {BATCH} at once {many:,.0f}: {many / one:.1f} x")


if __name__ == "__main__":
    main()
