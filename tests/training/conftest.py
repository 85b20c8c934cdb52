"""Runs of the recipes on small data: in this process by `main(argv)`, or as a user launches them."""

import contextlib
import functools
import gc
import importlib
import io
import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT
from training import classify, instruct, pretrain
from training.cli import run_main
from training.engine import launch
from training.engine.run_folder import RunFolder

SMALL = [
    "--vocab_size", "300", "--context_length", "32", "--batch_size", "4", "--max_steps", "12", "--eval_steps", "6",
    "--validation_fraction", "0.1", "--report_to", "none", "--precision", "float32",
    "--model", "hidden_size=32", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=64",
]  # fmt: skip
PRETRAIN = str(ROOT / "training" / "pretrain.py")
# Options with which each recipe learns the data of `nights` from the model of `run`.
FLOAT32 = ["--report_to", "none", "--precision", "float32"]
TUNING: dict[ModuleType, list[str]] = {
    pretrain: [
        *("--context_length", "32", "--batch_size", "4", "--max_steps", "14", "--eval_steps", "8", "--save_steps", "4"),
        *("--validation_fraction", "0.1", *FLOAT32),
    ],
    classify: ["--batch_size", "8", "--num_train_epochs", "3", "--learning_rate", "0.005", *FLOAT32],
    instruct: [
        *("--batch_size", "8", "--num_train_epochs", "12", "--learning_rate", "0.01", "--dropout", "0"),
        *("--validation_fraction", "0.1", "--max_new_tokens", "12", *FLOAT32),
    ],
}
ANSWERS = {"dark": "stormy", "bright": "calm"}


def run_module(name: str, *argv: str) -> None:
    """Run a module with these arguments, as `python -m` in a process of its own: the launchers."""
    sys.argv = [name, *argv]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_program(name: str, *argv: str) -> None:
    """Run a program of training/ with these arguments, as in a process of its own."""
    sys.argv = [f"{name}.py", *argv]
    launch.has_fast_bfloat16 = lambda _: False
    run_main(importlib.import_module(f"training.{name}").main)


@pytest.fixture(scope="session", autouse=True)
def _float32():
    """What is compared is computed in float32 on every processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "has_fast_bfloat16", lambda _: False)
        yield


def write_rows(path: Path, table: list[dict]) -> str:
    """Write a table in the format of its extension; any other: tab-separated, without a header."""
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(table))
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in table))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(table), path)
        case ".csv":
            quoted = [",".join(f'"{value}"' for value in row.values()) for row in table]
            path.write_text("\n".join([",".join(table[0]), *quoted]))
        case _:
            path.write_text("".join("\t".join(map(str, row.values())) + "\n" for row in table))
    return str(path)


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "book.txt"
    path.write_text(
        "".join(f"Chapter {number}. It was a dark and stormy night, like {number} before.\n" for number in range(300))
    )
    return str(path)


@pytest.fixture(scope="session")
def nights(book, tmp_path_factory) -> dict[ModuleType, str]:
    """Data for each recipe: a text, and labels and answers that follow from one word."""
    directory = tmp_path_factory.mktemp("nights")
    examples = [
        {"text": f"It was a {word} and {other} night, like {number} before.", "label": word}
        for number in range(60)
        for word, other in ANSWERS.items()
    ]
    conversations = [
        {"instruction": f"night {number}", "input": word, "output": answer}
        for number in range(40)
        for word, answer in ANSWERS.items()
    ]
    files = {"examples.jsonl": examples, "conversations.json": conversations}
    return dict(zip(TUNING, (book, *(write_rows(directory / name, table) for name, table in files.items())), strict=True))


@pytest.fixture(scope="session")
def finished(nights, tmp_path_factory) -> Callable[..., tuple[Path, str]]:
    """The output directory of a finished run of a recipe, and what it printed."""

    @functools.cache
    def finish(recipe: Any) -> tuple[Path, str]:
        output_dir = tmp_path_factory.mktemp("outputs") / "nights"
        options = SMALL if recipe is pretrain else ["--base_model", str(finish(pretrain)[0]), *TUNING[recipe]]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            recipe.main(["--dataset", nights[recipe], "--output_dir", str(output_dir), *options])
        return output_dir, printed.getvalue()

    return finish


@pytest.fixture(scope="session")
def run(finished) -> Path:
    """The directory of a finished run of pretraining."""
    return finished(pretrain)[0]


@pytest.fixture
def tune(run, nights, tmp_path) -> Callable[..., Path]:
    """Fine-tunes a model with a recipe in this process, and returns the output directory."""

    def start(recipe: Any, *argv: str, output: str = "model", base: Path = run) -> Path:
        output_dir = tmp_path / output
        words = ["--base_model", str(base), "--output_dir", str(output_dir), *TUNING[recipe]]
        words += [] if "--dataset" in argv else ["--dataset", nights[recipe]]  # a second one would be read, too
        recipe.main([*words, *argv])
        return output_dir

    return start


@contextlib.contextmanager
def interrupted_after(step: int) -> Iterator[None]:
    """Within this context, a run in this process gets SIGTERM after a step, and stops."""
    log_step = RunFolder.log_step

    def log_and_signal(self: RunFolder, done: Any) -> None:
        log_step(self, done)
        if done.number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "log_step", log_and_signal)
        with pytest.raises(SystemExit, match="^130$"):
            yield
    gc.collect()  # the run, which holds the lock of its directory


def snippet_of(card: str) -> str:
    """The first program of a card."""
    return re.findall(r"```python\n(.*?)```", card, re.S)[0]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def evaluations(folder: Path) -> list[dict]:
    return [row for row in rows(folder) if "eval_loss" in row]


def scores(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())
