"""Processes that are not parts of the same run."""

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import on_two_processes
from tests.training.conftest import SMALL
from training import pretrain
from training.errors import UserError


def train_apart(book: str, run: Path, folder: Path) -> None:
    """Called by two processes, which have directories of their own, as two machines without a shared disk have."""
    own = folder / os.environ["RANK"]
    shutil.copytree(run, own / "model")
    is_other = os.environ["RANK"] == "1"
    text = Path(book).read_text()
    (own / "same.txt").write_text(text)
    (own / "other.txt").write_text(text.replace("dark", "black") if is_other else text)
    if is_other:
        shutil.rmtree(own / "model" / "checkpoints")
        weights = own / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4] + b"same")

    def train(dataset: str, *options: object, output: object = folder / "out") -> None:
        pretrain.main([*SMALL, "--dataset", str(own / dataset), "--output_dir", str(output), *map(str, options)])

    for what, words, options in (
        ("data", ("other.txt",), {}),
        ("--learning_rate", ("same.txt", "--learning_rate", 0.1 if is_other else 0.2), {}),
        ("initial weights", ("same.txt", "--base_model", own / "model"), {}),
        ("checkpoint to resume from", ("same.txt", "--resume"), {"output": own / "model"}),
    ):
        with pytest.raises(UserError, match=rf"^process 1 does not have the same {what} as process 0 \(.+ instead of .+\)"):
            train(*words, **options)
    train("same.txt", "--max_steps", 1)  # another path to the same data


def test_processes_that_differ_are_refused_before_the_first_step(book, run, tmp_path):
    printed = on_two_processes(train_apart, tmp_path, (book, run, tmp_path), ACCELERATE_USE_CPU="true")
    assert printed.count("Before training") == 1
