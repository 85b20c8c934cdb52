"""Instruction tuning of one base model: full fine-tuning, LoRA, and the last block; and answers in batches or one by one.

    python benchmarks/instruct.py --data ../shared/data --base_model outputs/pretrain

The task of chapter 7 of "Build a Large Language Model From Scratch": 1,100 instructions in the Alpaca format, split 85/5/10.
Minutes and memory are those of a whole command: training, and answering the test split with the base and the tuned model. The
base is trained by `accelerate launch training/pretrain.py`. Speed is in generated tokens, the median of three.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import make_parser, run_recipe
from transformers import AutoTokenizer

from modeling_scratchgpt import ScratchGPTForCausalLM
from training.results.responses import respond

METHODS = {
    "everything trained": "",
    "LoRA of rank 16": "--lora_r 16 --learning_rate 0.003",
    "the last block trained": "--train_last_n_layers 1 --learning_rate 0.003",
}
BATCH_SIZE = 32


def generation_speed(directory: Path, batch_size: int) -> float:
    """Tokens per second that a tuned model generates in answering the test split."""
    model = ScratchGPTForCausalLM.from_pretrained(directory)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    rows = (directory / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(row)["prompt"] for row in rows]
    speeds = []
    for _ in range(3):
        start = time.perf_counter()
        answers = respond(model, tokenizer, prompts, batch_size, 256)
        seconds = time.perf_counter() - start
        lengths = [len(tokenizer(answer.text, add_special_tokens=False)["input_ids"]) for answer in answers]
        speeds.append((sum(lengths) + sum(answer.finished for answer in answers)) / seconds)
    return statistics.median(speeds)


def main() -> None:
    parser = make_parser(__doc__, seed=0)
    parser.add_argument("--data", type=Path, required=True, help="directory with instructions/instruction-data.json")
    parser.add_argument("--base_model", type=Path, default=Path("outputs/pretrain"), help="directory of a pretrained model")
    arguments = parser.parse_args()
    source = (arguments.data / "instructions" / "instruction-data.json").resolve()
    shared = ["--dataset", str(source), "--base_model", str(arguments.base_model.resolve()), "--seed", str(arguments.seed)]
    print("|  | validation loss | test loss | test answers finished | chrF | minutes | peak memory |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for method, options in METHODS.items():
            directory = Path(name, method.replace(" ", "-"))
            minutes, memory = run_recipe("instruct", *shared, "--output_dir", str(directory), *options.split())
            scores = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
            base, test = (f"{scores[key]['finished']:.1%} | {scores[key]['chrf']:.1f}" for key in ("base", "test"))
            if method == "everything trained":
                print(f"| the base | {scores['before']['loss']:.3f} |  | {base} |  |  |")
            losses = " | ".join(f"{scores[key]['loss']:.3f}" for key in ("validation", "test"))
            print(f"| {method} | {losses} | {test} | {minutes:.1f} | {memory / 1e9:.2f} GB |", flush=True)
        one, many = (generation_speed(Path(name, "everything-trained"), size) for size in (1, BATCH_SIZE))
    print(f"\nAnswers to the test split: one by one {one:,.0f} tokens/s, {BATCH_SIZE} at once {many:,.0f}: {many / one:.1f} x")


if __name__ == "__main__":
    main()
