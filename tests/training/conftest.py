"""Runs of a recipe as a user starts them: in processes of their own, on a small book."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    "--vocab_size", "300", "--context_length", "32", "--batch_size", "4", "--max_steps", "12", "--eval_steps", "6",
    "--validation_fraction", "0.1", "--report_to", "none",
    "--model", "hidden_size=32", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=64",
]  # fmt: skip

TORCHRUN = ["torchrun", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]


def launch(
    launcher: list[str], *arguments: str, script: str = "pretrain.py", **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*launcher, f"training/{script}", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="session")
def caches(tmp_path_factory) -> dict[str, str]:
    return {"HF_HOME": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "book.txt"
    path.write_text(
        "".join(f"Chapter {number}. It was a dark and stormy night, like {number} before.\n" for number in range(300))
    )
    return str(path)


@pytest.fixture(scope="session")
def run(book, caches, tmp_path_factory):
    """A finished run, started as the README says."""
    output_dir = tmp_path_factory.mktemp("outputs") / "book"
    process = launch(["accelerate", "launch"], "--dataset", book, "--output_dir", str(output_dir), *SMALL, **caches)
    assert process.returncode == 0, process.stderr
    return output_dir, process


@pytest.fixture
def recipe(request, run, nights, tmp_path, monkeypatch):
    """Runs the recipe that a module of tests is about in this process, on its data, and gives the folder it made."""

    def start(*words: str, output: str = "model", base: Path | str = run[0]) -> Path:
        folder = tmp_path / output
        base_words = ["--base_model", str(base), "--dataset", nights, "--output_dir", str(folder)]
        monkeypatch.setattr(sys, "argv", ["recipe.py", *base_words, *request.module.TRAINING, *words])
        request.module.RECIPE.main()
        return folder

    return start


@pytest.fixture(scope="module")
def finished(request, run, nights, caches, tmp_path_factory):
    """A finished run of the same recipe, started as the README says."""
    folder = tmp_path_factory.mktemp("outputs") / "nights"
    words = ["--base_model", str(run[0]), "--dataset", nights, "--output_dir", str(folder), *request.module.TRAINING]
    script = Path(request.module.RECIPE.__file__).name
    process = launch(["accelerate", "launch"], *words, script=script, **caches)
    assert process.returncode == 0, process.stderr
    return folder, process


def snippet_of(card: str) -> str:
    """The program that a card gives first."""
    return re.findall(r"```python\n(.*?)```", card, re.S)[0]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
