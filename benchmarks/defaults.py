"""Why the recipe's settings are what they are: the first run, shortened, with one thing changed at a time.

    python benchmarks/defaults.py                                  # two to three minutes a row
    ACCELERATE_MIXED_PRECISION=bf16 python benchmarks/defaults.py  # where the processor has bfloat16

Every row trains on as many tokens, from scratch, and is measured on the same held-out modules.
"""

import argparse
import json
import tempfile
from pathlib import Path

from measuring import run_recipe

BATCH = 8  # the recipe's
GPT2 = "--model preset=124M hidden_size=256 num_hidden_layers=6 num_attention_heads=4"
CHANGES = {
    "the recipe": "",
    "Muon's rate 0.01": "--muon_learning_rate 0.01",
    "Muon's rate 0.04": "--muon_learning_rate 0.04",
    "AdamW's rate 0.004": "--learning_rate 0.004",
    "AdamW's rate 0.016": "--learning_rate 0.016",
    "batches of 4, twice the steps": "--batch_size 4",
    "batches of 16, half the steps": "--batch_size 16",
    "embeddings tied": "--model tie_word_embeddings=true",
    "cosine schedule": "--lr_scheduler_type cosine",
    "AdamW for everything, 0.002": "--optimizer adamw --learning_rate 0.002 --weight_decay 0.1",
    "AdamW for everything, 0.004": "--optimizer adamw --learning_rate 0.004 --weight_decay 0.1",
    "GPT-2's architecture": GPT2,
    "GPT-2's architecture, AdamW, 0.002": f"{GPT2} --optimizer adamw --learning_rate 0.002 --weight_decay 0.1",
}


def measure(words: list[str], num_steps: int) -> tuple[float, float]:
    """Bits per byte at the end, and the minutes of training."""
    batch_size = int(words[words.index("--batch_size") + 1]) if "--batch_size" in words else BATCH
    steps = str(num_steps * BATCH // batch_size)
    with tempfile.TemporaryDirectory() as folder:
        often = ["--max_steps", steps, "--eval_steps", steps, "--save_steps", steps]
        run_recipe("pretrain", "--output_dir", f"{folder}/model", *words, *often)
        rows = [json.loads(line) for line in Path(folder, "model", "metrics.jsonl").read_text().splitlines()]
    return rows[-1]["bits_per_byte"], sum(row.get("seconds", 0) for row in rows) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    num_steps = parser.parse_args().steps
    print("| | bits per byte | minutes |\n|---|---|---|")
    for name, change in CHANGES.items():
        bits, minutes = measure(change.split(), num_steps)
        print(f"| {name} | {bits:.3f} | {minutes:.1f} |", flush=True)


if __name__ == "__main__":
    main()
