"""How long it takes to prepare a corpus, and how much memory: documents read, copies dropped, split, tokenizer trained, tokens.

    python benchmarks/prepare.py

Each line is the recipe itself, training/pretrain.py, in a process of its own with an empty cache, told to train the smallest
of models for one step: what it takes beside the preparation, imports above all, is counted too, and shown in the first line.
The texts are lines of the docstrings of the installed libraries, drawn at random, in one .jsonl file.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from measuring import ROOT

from training.data.docstrings import read_docs

SMALLEST = "--max_steps 1 --context_length 64 --validation_fraction 0.001 --model num_hidden_layers=1 hidden_size=16"


def write_corpus(path: Path, megabytes: float, lines: list[str]) -> None:
    """Documents of ten to two hundred lines."""
    draw, size = random.Random(0), 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            text = "\n".join(draw.choices(lines, k=draw.randint(10, 200)))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())


def measure(megabytes: float, lines: list[str]) -> tuple[float, float]:
    """Seconds, and the most bytes of memory, all processes together."""
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus.jsonl", megabytes, lines)
        words = ["--dataset", f"{folder}/corpus.jsonl", "--output_dir", f"{folder}/model", *SMALLEST.split()]
        words += ["num_attention_heads=1"]
        start, peak = time.perf_counter(), 0
        command = [sys.executable, "training/pretrain.py", *words]
        environment = {**os.environ, "HF_HOME": folder}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                try:
                    family = [watched, *watched.children(recursive=True)]
                    peak = max(peak, sum(member.memory_full_info().uss for member in family))
                except psutil.Error:  # it has just ended
                    pass
                time.sleep(0.05)
            if process.returncode:
                raise SystemExit(process.stderr.read().decode())
        return time.perf_counter() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 25, 100])
    sizes = parser.parse_args().megabytes
    lines = [line for text in read_docs()["text"] for line in text.splitlines()]
    print("| corpus | time | peak memory |\n|---|---|---|")
    for size in sizes:
        seconds, peak = measure(size, lines)
        print(f"| {size:g} MB | {seconds:.0f} s | {peak / 1e9:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()
