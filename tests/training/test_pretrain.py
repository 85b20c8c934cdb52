"""The pretraining recipe as a user runs it: in processes of its own, on a small book."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_scratchgpt import ScratchGPTForCausalLM, ScratchGPTTokenizer
from training import pretrain
from training.arguments import UserError

ROOT = Path(__file__).parents[2]
SMALL = [
    "--vocab_size", "300", "--context_length", "32", "--batch_size", "4", "--max_steps", "12", "--eval_every", "6",
    "--validation_fraction", "0.1",
    "--model", "hidden_size=32", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=64",
]  # fmt: skip


def launch(launcher: list[str], *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*launcher, "training/pretrain.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> dict[str, str]:
    return {"HF_HOME": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "book.txt"
    path.write_text(
        "".join(f"Chapter {number}. It was a dark and stormy night, like {number} before.\n" for number in range(300))
    )
    return str(path)


@pytest.fixture(scope="module")
def run(book, caches, tmp_path_factory):
    """A finished run, started as the README says."""
    output_dir = tmp_path_factory.mktemp("outputs") / "book"
    process = launch(["accelerate", "launch"], "--dataset", book, "--output_dir", str(output_dir), *SMALL, **caches)
    assert process.returncode == 0, process.stderr
    return output_dir, process


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_leaves_a_complete_model_folder(run):
    folder, _ = run
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "configuration_scratchgpt.py",
        "cross_entropy.py",
        "generation_config.json",
        "loss.png",
        "metrics.jsonl",
        "model.safetensors",
        "modeling_scratchgpt.py",
        "packed_linear.py",
        "tokenization_scratchgpt.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = ScratchGPTForCausalLM.from_pretrained(folder)
    tokenizer = ScratchGPTTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    text = "It was a dark and"
    best = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].topk(5).indices
    assert any(tokenizer.decode([token]).startswith(" s") for token in best)  # something was learned


def test_it_says_what_it_did(run):
    folder, process = run
    for phrase in ("Before training: loss", "After training: loss", "bits per byte", "Documents to train on: 1 (", str(folder)):
        assert phrase in process.stdout, phrase
    assert "tokens/s" in process.stderr
    assert "12/12" in process.stderr


def test_metrics_are_whole_and_the_loss_falls(run):
    steps = [row for row in rows(run[0]) if "learning_rate" in row]
    evaluations = [row for row in rows(run[0]) if "perplexity" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["step"] for row in evaluations] == [0, 6, 12]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 0.5


def test_the_card_tells_the_numbers(run):
    card = (run[0] / "README.md").read_text()
    last = rows(run[0])[-1]
    assert f"| after training | {last['loss']:.3f} | {last['perplexity']:,.1f} | {last['bits_per_byte']:.3f} |" in card
    assert "library_name: transformers" in card
    assert "![Loss over steps](loss.png)" in card
    assert (run[0] / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_in_the_metrics_is_the_models(run, book):
    """Counted again from the saved files alone: every byte of the held-out end of the book."""
    folder, _ = run
    tokenizer = ScratchGPTTokenizer.from_pretrained(folder)
    model = ScratchGPTForCausalLM.from_pretrained(folder).eval()
    text = Path(book).read_text()
    place = round(len(text) * 0.9)
    held_out = text[max(text.rfind(" ", 0, place), text.rfind("\n", 0, place)) + 1 :]
    ids = [tokenizer.bos_token_id, *tokenizer(held_out)["input_ids"], tokenizer.eos_token_id]
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            window = torch.tensor([ids[start : start + 33]])
            nats += model(window[:, :-1], shift_labels=window[:, 1:]).loss.item() * (window.shape[1] - 1)
    last = rows(folder)[-1]
    assert last["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-4)
    assert last["bits_per_byte"] == pytest.approx(nats / 0.6931471805599453 / len(held_out.encode()), rel=1e-4)


def test_a_second_run_does_not_touch_the_first(run, book, caches):
    folder, _ = run
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    process = launch([sys.executable], "--dataset", book, "--output_dir", str(folder), *SMALL, **caches)
    assert process.returncode == 2
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line == (
        f"pretrain.py: error: --output_dir {folder} already holds a finished model: pass another --output_dir, "
        "or move that folder away."
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_two_processes_give_the_losses_of_one(run, book, caches, tmp_path):
    torchrun = ["torchrun", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    process = launch(
        torchrun, "--dataset", book, "--output_dir", str(tmp_path / "two"), *SMALL, ACCELERATE_USE_CPU="true", **caches
    )
    assert process.returncode == 0, process.stderr
    for one, two in zip(rows(run[0]), rows(tmp_path / "two"), strict=True):
        assert one["step"] == two["step"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        if "tokens" in one:
            assert two["tokens"] == one["tokens"]
            assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "missing.txt"], "--dataset missing.txt: no such file or folder"),
        (["--context_length", "0"], "--context_length must be at least 1, got 0"),
        (["--batch_size", "-1"], "--batch_size must be at least 1, got -1"),
        (["--learning_rate", "nan"], "--learning_rate must be a positive number, got nan"),
        (["--vocab_size", "5"], "--vocab_size must be at least 259"),
        (["--validation_fraction", "1.5"], "--validation_fraction must be between 0 and 1, got 1.5"),
        (["--warmup_fraction", "-3"], "--warmup_fraction must be between 0 and 1, got -3"),
        (["--model", "max_position_embeddings=8"], "--context_length 32 is longer than the model's max_position_embeddings"),
        (["--model", "n_head=3"], "not a multiple of num_attention_heads (3)"),
        (["--context_length", "100000"], "text has .* tokens, fewer than one window of --context_length 100000"),
        (["--unknown", "1"], "unrecognized arguments: --unknown 1"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_written(arguments, message, book, tmp_path, monkeypatch):
    output_dir = tmp_path / "out"
    words = ["--dataset", book, "--output_dir", str(output_dir), *SMALL, *arguments]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    with pytest.raises(UserError, match=message if ".*" in message else re.escape(message)):
        pretrain.main()
    assert not output_dir.exists()


def test_help_is_worth_reading():
    process = launch([sys.executable], "--help")
    assert process.returncode == 0
    for phrase in (
        "training/pretrain.py --dataset book.txt",
        "--output_dir",
        "Tokens the model sees at once",
    ):
        assert phrase in process.stdout


def test_the_default_corpus(caches, tmp_path):
    """The README's first command, cut short: the docstrings of what is installed, and the YAML's model in small."""
    cut = ["--max_steps", "2", "--model", "hidden_size=32", "num_hidden_layers=1"]
    process = launch(["accelerate", "launch"], "--output_dir", str(tmp_path / "docs"), *cut, **caches)
    assert process.returncode == 0, process.stderr
    documents = int(re.search(r"Documents to train on: ([\d,]+)", process.stdout)[1].replace(",", ""))
    assert documents > 3000
    assert (tmp_path / "docs" / "model.safetensors").exists()
