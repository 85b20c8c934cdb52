"""Ablation of the default settings: a shortened first run, with one setting changed at a time.

    python benchmarks/defaults.py                                  # two to three minutes per row
    ACCELERATE_MIXED_PRECISION=bf16 python benchmarks/defaults.py  # where the processor supports bfloat16

Every row trains from scratch on the same number of tokens, and is evaluated on the same held-out modules.
"""

import json
import tempfile
from pathlib import Path

from measuring import make_parser, run_recipe

BATCH_SIZE = 8  # of the recipe
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


def measure(argv: list[str], num_steps: int) -> tuple[float, float]:
    """Final bits per byte, and minutes of training."""
    batch_size = int(argv[argv.index("--batch_size") + 1]) if "--batch_size" in argv else BATCH_SIZE
    steps = str(num_steps * BATCH_SIZE // batch_size)
    with tempfile.TemporaryDirectory() as directory:
        lengths = ["--max_steps", steps, "--eval_steps", steps, "--save_steps", steps]
        run_recipe("pretrain", "--output_dir", f"{directory}/model", *argv, *lengths)
        rows = [json.loads(line) for line in Path(directory, "model", "metrics.jsonl").read_text().splitlines()]
    return rows[-1]["eval_bits_per_byte"], sum(row.get("seconds", 0) for row in rows) / 60


def main() -> None:
    num_steps = make_parser(__doc__, steps=200).parse_args().steps
    print("| | bits per byte | minutes |\n|---|---|---|")
    for name, change in CHANGES.items():
        bits, minutes = measure(change.split(), num_steps)
        print(f"| {name} | {bits:.3f} | {minutes:.1f} |", flush=True)


if __name__ == "__main__":
    main()
