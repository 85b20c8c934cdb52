"""Preparing a corpus: time and memory of reading, deduplicating, splitting, training a tokenizer, and tokenizing.

    python benchmarks/prepare.py

Each row is training/pretrain.py with an empty cache, training a minimal model for one step. So the rest of the recipe, imports
above all, is included; the first row shows how much that is. The texts are lines of the docstrings of the installed libraries,
drawn at random, in one .jsonl file.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from measuring import ROOT, make_parser

from training.data.docstrings import read_docs

MINIMAL = (
    "--max_steps 1 --context_length 64 --validation_fraction 0.001 "
    "--model num_hidden_layers=1 hidden_size=16 num_attention_heads=1"
)


def write_corpus(path: Path, megabytes: float, lines: list[str]) -> None:
    """Documents of ten to two hundred lines."""
    generator, size = random.Random(0), 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            text = "\n".join(generator.choices(lines, k=generator.randint(10, 200)))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())


def measure(megabytes: float, lines: list[str]) -> tuple[float, float]:
    """Seconds, and the peak memory of all processes together in bytes."""
    with tempfile.TemporaryDirectory() as directory:
        write_corpus(Path(directory) / "corpus.jsonl", megabytes, lines)
        argv = ["--dataset", f"{directory}/corpus.jsonl", "--output_dir", f"{directory}/model", *MINIMAL.split()]
        command, environment = [sys.executable, "training/pretrain.py", *argv], {**os.environ, "HF_HOME": directory}
        start, peak = time.perf_counter(), 0
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            parent = psutil.Process(process.pid)
            while process.poll() is None:
                try:
                    processes = [parent, *parent.children(recursive=True)]
                    peak = max(peak, sum(each.memory_full_info().uss for each in processes))
                except psutil.Error:  # it has just ended
                    pass
                time.sleep(0.05)
            if process.returncode and process.stderr:
                raise SystemExit(process.stderr.read().decode())
        return time.perf_counter() - start, peak


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 25, 100])
    sizes = parser.parse_args().megabytes
    lines = [line for text in read_docs()["text"] for line in text.splitlines()]
    print("| corpus | time | peak memory |\n|---|---|---|")
    for size in sizes:
        seconds, peak = measure(size, lines)
        print(f"| {size:g} MB | {seconds:.0f} s | {peak / 1e9:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()
