"""The pretraining recipe as a user runs it: in processes of its own, on a small book."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from modeling_scratchgpt import ScratchGPTForCausalLM, ScratchGPTTokenizer
from tests.training.conftest import ROOT, SMALL, TORCHRUN, launch, rows
from training import pretrain
from training.data.tokens import Tokens
from training.engine.train import TrainResult
from training.errors import UserError


def test_it_leaves_a_complete_model_folder(run):
    folder, _ = run
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "checkpoints",
        "config.json",
        "configuration_scratchgpt.py",
        "cross_entropy.py",
        "generation_config.json",
        "interchange.py",
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


def test_tensorboard_is_told_the_same_numbers(book, caches, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "out"
    words = ["--dataset", book, "--output_dir", str(folder), *SMALL, "--report_to", "auto", "--max_steps", "4"]
    process = launch([sys.executable], *words, **caches)
    assert process.returncode == 0, process.stderr
    told = EventAccumulator(str(folder / "logs" / "scratchgpt")).Reload()
    for row in rows(folder):
        part = "training" if "learning_rate" in row else "validation"
        for name, value in row.items():
            if name != "step":
                (event,) = [event for event in told.Scalars(f"{part}/{name}") if event.step == row["step"]]
                assert event.value == pytest.approx(value, rel=1e-6), (name, row)


def test_the_card_tells_the_numbers(run):
    card = (run[0] / "README.md").read_text()
    last = rows(run[0])[-1]
    assert f"| after training | {last['loss']:.3f} | {last['perplexity']:,.1f} | {last['bits_per_byte']:.3f} |" in card
    assert "library_name: transformers" in card
    assert "![Loss over steps](loss.png)" in card
    assert (run[0] / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_card_holds_together_whatever_is_in_it(book, caches, tmp_path):
    """Fences, bars, back-ticks and ends of lines in texts and names stay what they are."""
    corpus = tmp_path / "a|b`c\n# d.txt"
    corpus.write_text("```\n# No heading\n" * 20 + Path(book).read_text()[:6000] + "\n```\n# No heading\n" * 60)
    output_dir = tmp_path / "x" / ".." / "out|put"
    process = launch([sys.executable], "--dataset", str(corpus), "--output_dir", str(output_dir), *SMALL, **caches)
    assert process.returncode == 0, process.stderr
    card = ModelCard((tmp_path / "out|put" / "README.md").read_text())
    parsed = MarkdownIt().enable("table").parse(card.text)
    headings = [parsed[place + 1].content for place, token in enumerate(parsed) if token.type == "heading_open"]
    assert headings == ["out|put", "How good it is", "What it writes", "Limits and risks", "How it was trained"]
    rows = [parsed[place + 5].content for place, token in enumerate(parsed) if token.type == "tr_open"]
    assert any(row.startswith("a|b`c # d.txt: documents: 1, tokens:") for row in rows), rows
    assert any("--dataset" in row and "--output_dir" in row for row in rows)
    (settings,) = [token.content for token in parsed if token.info == "yaml"]
    chosen = yaml.safe_load(settings)
    assert chosen["dataset"] == [corpus.name]
    assert chosen["output_dir"] == "out|put"
    assert "lora_r" not in chosen
    assert str(tmp_path) not in card.content


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
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    process = launch([sys.executable], "--dataset", book, "--output_dir", str(folder), *SMALL, **caches)
    assert process.returncode == 2
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line == (
        f"pretrain.py: error: --output_dir {folder} already holds a finished model: pass another --output_dir, "
        "or move that folder away."
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_two_processes_give_the_losses_of_one(run, book, caches, tmp_path):
    process = launch(
        TORCHRUN, "--dataset", book, "--output_dir", str(tmp_path / "two"), *SMALL, ACCELERATE_USE_CPU="true", **caches
    )
    assert process.returncode == 0, process.stderr
    for one, two in zip(rows(run[0]), rows(tmp_path / "two"), strict=True):
        assert one["step"] == two["step"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)  # where Muon's products are in bfloat16 it takes 2e-5
        if "tokens" in one:
            assert two["tokens"] == one["tokens"]
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "missing.txt"], "missing.txt: no such file or folder"),
        (["--context_length", "1"], "--context_length must be at least 2, got 1"),
        (["--windows", "packed", "--stride", "8"], "--stride 8 is for --windows ordered: leave it out with packed"),
        (["--mixing_alpha", "nan"], "--mixing_alpha must be zero or more, got nan"),
        (["--dataset", ""], "--dataset holds an empty name"),
        (["--batch_size", "-1"], "--batch_size must be at least 1, got -1"),
        (["--learning_rate", "nan"], "--learning_rate must be a positive number, got nan"),
        (["--vocab_size", "5"], "--vocab_size must be at least 259"),
        (["--validation_fraction", "1.5"], "--validation_fraction must be between 0 and 1, got 1.5"),
        (["--warmup_ratio", "-3"], "--warmup_ratio must be between 0 and 1, got -3"),
        (["--model", "max_position_embeddings=8"], "--context_length 32 is longer than the model's max_position_embeddings"),
        (["--model", "n_head=3"], "not a multiple of num_attention_heads (3)"),
        (["--context_length", "100000"], "text has .* tokens, fewer than one window of --context_length 100000"),
        (["--batch_size", "100000"], "--batch_size 100000 is more than the .* windows of the training text: lower it"),
        (["--unknown", "1"], "unrecognized arguments: --unknown 1"),
        (["--stride", "33"], "--stride must be between 1 and --context_length 32, got 33"),
        (["--dataset_weights", "1", "2"], "--dataset_weights gives 2 weights for 1 sources: give one a source"),
        (["--dataset_weights", "-1"], "--dataset_weights must be positive numbers, got -1.0"),
        (["--test_fraction", "0.95"], "--test_fraction must be zero or more, and leave something to train on"),
        (["--optimizer", "sgd"], "argument --optimizer: invalid choice: 'sgd'"),
        (["--tokenizer", "word", "--vocab_size", "2"], "--vocab_size must be at least 5 for --tokenizer word"),
        (["--report_to", "sparkle"], "--report_to sparkle: give auto, none, or a tracker of Accelerate that is installed"),
        (["--save_steps", "0"], "--save_steps must be at least 1, got 0"),
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


@pytest.mark.parametrize("windows", [["packed"], ["random"], ["ordered", "--stride", "7"]])
def test_whatever_else_can_be_asked(windows, book, tmp_path, monkeypatch, capsys):
    """Two sources mixed by weight, a look at the test text, and the options that the other runs here leave alone."""
    table = tmp_path / "table.jsonl"
    rows_ = [{"body": f"Row {number} tells of {'fire ' * (number % 7)}and of ice."} for number in range(60)]
    table.write_text("".join(json.dumps(row) + "\n" for row in [*rows_, rows_[0]]))
    words = [
        "--dataset", book, str(table), "--text_column", "body", "--dataset_weights", "1", "3", "--mixing_alpha", "0.5",
        *SMALL, "--test_fraction", "0.1", "--tokenizer", "bpe-gpt4", "--windows", *windows, "--optimizer", "muon",
        "--lr_scheduler_type", "wsd", "--gradient_checkpointing", "True", "--report_to", "none",
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    pretrain.main()
    said = capsys.readouterr().out
    assert "copies dropped: 1" in said
    assert "On the test text, used only now: loss" in said
    assert ("none is lost" in said) is (windows == ["packed"])
    losses = [row["loss"] for row in rows(tmp_path / "out") if "perplexity" in row]
    assert losses[-1] < losses[0] - 0.5
    assert "| after training, on the test text |" in (tmp_path / "out" / "README.md").read_text()


def test_sources_are_weighed():
    tokens = [Tokens(np.zeros(size, dtype=np.uint16), 0, np.zeros(0, dtype=np.int64)) for size in (100, 900)]

    def mixture(**options):
        return pretrain.mixture(pretrain.PretrainArguments(dataset=["a", "b"], **options), tokens)

    assert mixture() is None  # every window in its turn
    assert mixture(mixing_alpha=0.5) == pytest.approx([0.25, 0.75])
    assert mixture(mixing_alpha=0) == pytest.approx([0.5, 0.5])
    assert mixture(dataset_weights=[1, 4]) == pytest.approx([0.2, 0.8])
    assert mixture(dataset_weights=[1, 4], mixing_alpha=0.5) == pytest.approx([1 / 3, 2 / 3])


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


def test_what_a_run_took_is_said_by_a_process_without_rows_too():
    """As others than the first have none when a run goes on after its last step."""
    assert str(TrainResult(None, None, Namespace(rows=[]))) == "0 steps, 0 tokens, 0.0 seconds (evaluations apart)"
    rows = [{"step": 0, "loss": 1.0}, *({"step": step, "tokens": 1000, "seconds": 90.0} for step in (1, 2))]
    assert str(TrainResult(None, None, Namespace(rows=rows))) == "2 steps, 2,000 tokens, 3.0 minutes (evaluations apart)"
