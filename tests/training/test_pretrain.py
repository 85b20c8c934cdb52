"""Pretraining on a small book: the files, the printed lines, the numbers."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modeling_scratchgpt import ScratchGPTForCausalLM, ScratchGPTTokenizer
from tests.conftest import Processes
from tests.training.conftest import PRETRAIN, SMALL, evaluations, rows, run_module, write_rows
from training import evaluate, pretrain
from training.data import docstrings
from training.data.corpora import CorpusArguments, split_documents
from training.errors import UserError


def test_the_model_directory_is_complete(run):
    code = ("configuration_scratchgpt", "modeling_scratchgpt", "tokenization_scratchgpt")
    code += ("cross_entropy", "attention", "interchange", "packed_linear")
    files = {"README.md", "checkpoints", "config.json", "generation_config.json", "held_out.jsonl", "loss.png", "metrics.jsonl"}
    files |= {"model.safetensors", "tokenizer.json", "tokenizer_config.json", *(f"{name}.py" for name in code)}
    assert {path.name for path in run.iterdir()} == files
    model = ScratchGPTForCausalLM.from_pretrained(run)
    tokenizer = ScratchGPTTokenizer.from_pretrained(run)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    text = "It was a dark and"
    best = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].topk(5).indices
    assert any(tokenizer.decode([token]).startswith(" s") for token in best)  # something was learned


def test_metrics_and_printed_lines(finished):
    folder, printed = finished(pretrain)
    steps, evaluated = [row for row in rows(folder) if "loss" in row], evaluations(folder)
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["step"] for row in evaluated] == [0, 6, 12]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] - 0.5
    tokens = sum(row["tokens"] for row in steps)
    last = evaluated[-1]
    for phrase in (
        f"step 12: loss {last['eval_loss']:.3f}, perplexity {last['eval_perplexity']:,.1f}, ",
        "Training documents: 1 (",
        f"Trained for 12 steps, {tokens:,} tokens, {sum(row['seconds'] for row in steps):.1f} seconds (excluding evaluation)",
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)",
    ):
        assert phrase in printed, phrase


def test_tensorboard_and_the_curve_show_the_metrics(book, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    folder = tmp_path / "out"
    pretrain.main(["--dataset", book, "--output_dir", str(folder), *SMALL, "--report_to", "auto", "--max_steps", "4"])
    events = EventAccumulator(str(folder / "logs" / "scratchgpt")).Reload()
    for row in rows(folder):
        for name, value in row.items():
            if name != "step":
                tag = name.replace("eval_", "eval/") if "eval_loss" in row else f"train/{name}"
                (event,) = [event for event in events.Scalars(tag) if event.step == row["step"]]
                assert event.value == pytest.approx(value, rel=1e-6), (name, row)
    steps = [row for row in rows(folder) if "loss" in row]
    (figure,) = figures
    for axes, label, length in zip(
        figure.axes, ("step", "tokens", "seconds of training"), (None, "tokens", "seconds"), strict=True
    ):
        reached = [sum(row[length] if length else 1 for row in steps[:number]) for number in range(5)]
        training, validation = axes.lines
        assert axes.get_xlabel() == label
        np.testing.assert_allclose(training.get_data(), (reached[1:], [row["loss"] for row in steps]))
        np.testing.assert_allclose(validation.get_data(), (reached[::4], [row["eval_loss"] for row in evaluations(folder)]))


def test_the_card_shows_the_metrics(run):
    card = (run / "README.md").read_text()
    first, *_, last = evaluations(run)
    for name, row in (("before", first), ("after", last)):
        numbers = f"{row['eval_loss']:.3f} | {row['eval_perplexity']:,.1f} | {row['eval_bits_per_byte']:.3f}"
        assert f"| {name} training | {numbers} |" in card
    assert "On held-out text, windows across documents:" in card


def test_the_samples_can_be_reproduced_from_the_model_directory(run):
    """The prompt, with the BOS token before it as in training, is in brackets; sample n is drawn with seed n."""
    model, tokenizer = ScratchGPTForCausalLM.from_pretrained(run), ScratchGPTTokenizer.from_pretrained(run)
    samples = re.search(r"After training:\n\n```text\n(.*?)\n```", (run / "README.md").read_text(), re.S)[1]
    prompt, continuation = re.fullmatch(r"\[(.*?)\](.*)", samples, re.S).groups()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
    torch.manual_seed(0)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32 - ids.shape[1])
    assert continuation == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).rstrip()


def test_a_card_is_valid_markdown_whatever_it_contains(book, tmp_path):
    """Fences, bars, back-ticks and line ends in texts and names are shown verbatim. The run is started as the README says."""
    corpus = tmp_path / "a|b`c\n# d.txt"
    corpus.write_text("```\n# No heading\n" * 20 + Path(book).read_text()[:6000] + "\n```\n# No heading\n" * 60)
    output_dir = tmp_path / "x" / ".." / "out|put"
    launcher = ["accelerate.commands.launch", "--config_file", "training/configs/accelerate/cpu.yaml", PRETRAIN]
    words = ["--dataset", str(corpus), "--output_dir", str(output_dir), *SMALL, "--max_steps", "2"]
    Processes(run_module, tmp_path / "log", [*launcher, *words]).wait()
    card = ModelCard((tmp_path / "out|put" / "README.md").read_text())
    parsed = MarkdownIt().enable("table").parse(card.text)
    headings = [parsed[index + 1].content for index, token in enumerate(parsed) if token.type == "heading_open"]
    assert headings == ["out|put", "Evaluation", "Samples", "Limitations", "Training"]
    table = [parsed[index + 5].content for index, token in enumerate(parsed) if token.type == "tr_open"]
    assert any(row.startswith("a|b`c # d.txt: documents: 1, tokens:") for row in table), table
    assert any("--dataset" in row and "--output_dir" in row for row in table)
    (settings,) = [token.content for token in parsed if token.info == "yaml"]
    chosen = yaml.safe_load(settings)
    assert chosen["dataset"] == [corpus.name]
    assert chosen["output_dir"] == "out|put"
    assert "lora_r" not in chosen
    assert str(tmp_path) not in card.content


def test_the_loss_in_the_metrics_is_that_of_the_model(book, tmp_path, monkeypatch, capsys):
    """Computed again from the saved files alone: the held-out end of the book, all of it and its first 200 tokens. The data is
    prepared before."""
    run = tmp_path / "out"
    words = ["--dataset", book, "--output_dir", str(run), *SMALL, "--seed", "5", "--eval_tokens", "200"]
    pretrain.main([*words, "--prepare_only"])
    assert "Tokenizer: " in (printed := capsys.readouterr().out)
    assert printed.endswith("The data is ready: to train on it, run the same command without --prepare_only.\n")
    assert not run.exists()
    with monkeypatch.context() as patch:
        patch.setattr(ScratchGPTTokenizer, "train", pytest.fail)
        pretrain.main(words)
    tokenizer = ScratchGPTTokenizer.from_pretrained(run)
    model = ScratchGPTForCausalLM.from_pretrained(run).eval()
    text = Path(book).read_text()
    cut = round(len(text) * 0.9)
    held_out = text[max(text.rfind(" ", 0, cut), text.rfind("\n", 0, cut)) + 1 :]
    ids = [tokenizer.bos_token_id, *tokenizer(held_out)["input_ids"], tokenizer.eos_token_id]
    last, whole = rows(run)[-2:]
    for row, prefix, count in ((last, "eval", 200), (whole, "whole_eval", len(ids))):
        scored = ids[:count]
        nats = 0.0
        with torch.no_grad():
            for start in range(0, count - 1, 32):
                window = torch.tensor([scored[start : start + 33]])
                nats += model(window[:, :-1], shift_labels=window[:, 1:]).loss.item() * (window.shape[1] - 1)
        num_bytes = len(tokenizer.decode(scored, skip_special_tokens=True).encode())
        assert row[f"{prefix}_loss"] == pytest.approx(nats / (count - 1), rel=1e-4)
        assert row[f"{prefix}_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)
    assert num_bytes == len(held_out.encode())
    loss = f"{whole['whole_eval_loss']:.3f}"
    assert f"On all of the held-out data: loss {loss}, " in capsys.readouterr().out
    card = (run / "README.md").read_text()
    assert f"| after training | {loss} |" in card
    assert f"| before training, on the first 200 tokens | {rows(run)[0]['eval_loss']:.3f} |" in card


def test_a_packed_run_is_scored_as_it_is_trained(tmp_path, capsys):
    """Computed again from the saved files alone, one document at a time; the longest do not fit into a row."""
    names = ["".join(letters).title() for letters in itertools.islice(itertools.permutations("aeinrtl"), 0, None, 25)][:200]
    texts = [*names, *(" ".join(names[start : start + 20]) for start in range(0, 200, 20))]
    path, folder = write_rows(tmp_path / "names.jsonl", [{"text": text} for text in texts]), tmp_path / "packed"
    fractions = ["--validation_fraction", "0.3", "--test_fraction", "0.2"]
    pretrain.main(["--dataset", path, "--output_dir", str(folder), *SMALL, "--windows", "packed", *fractions])
    tokenizer = ScratchGPTTokenizer.from_pretrained(folder)
    model = ScratchGPTForCausalLM.from_pretrained(folder).eval()
    losses, longest = {}, 0
    arguments = CorpusArguments(validation_fraction=0.3, test_fraction=0.2)
    for split, part in split_documents(Dataset.from_dict({"text": texts}), arguments).items():
        nats, count = 0.0, 0
        for text in part["text"]:
            ids = [tokenizer.bos_token_id, *tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
            longest, count = max(longest, len(ids)), count + len(ids) - 1
            for piece in (torch.tensor([ids[start : start + 33]]) for start in range(0, len(ids) - 1, 32)):
                nats += model(piece, labels=piece).loss.item() * (piece.shape[1] - 1)
        losses[split] = nats / count
    assert longest > 66
    assert evaluations(folder)[-1]["eval_loss"] == pytest.approx(losses["validation"], rel=1e-4)
    card = (folder / "README.md").read_text()
    assert "On held-out text, each document by itself:" in card
    assert f"| after training, on the test text | {losses['test']:.3f} |" in card
    capsys.readouterr()
    words = [str(folder), "--dataset", path, "--split", "test", *fractions]
    evaluate.main(words)
    assert re.fullmatch(rf"loss {losses['test']:.3f}, .*; each document by itself; float32\)\n", capsys.readouterr().out)
    evaluate.main([str(max((folder / "checkpoints").iterdir())), *words[1:]])  # of the last step
    assert re.fullmatch(rf"loss {losses['test']:.3f}, .*; each document by itself; float32\)\n", capsys.readouterr().out)
    evaluate.main([*words, "--windows", "ordered"])
    ordered = re.fullmatch(r"loss (\S+), .*; windows across documents; float32\)\n", capsys.readouterr().out)[1]
    assert float(ordered) > losses["test"] + 0.01


def test_a_second_run_does_not_change_the_first(run, book, tmp_path, capsys):
    """Resuming a finished run is no error, and does nothing."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words = ["--dataset", book, "--output_dir", str(run), *SMALL]
    with pytest.raises(UserError, match=f"^--output_dir {run} already contains a finished model: pass another"):
        pretrain.main(words)
    pretrain.main([*words, "--resume"])
    assert capsys.readouterr().out == f"The run in {run} is finished. To train longer, raise its number of steps or epochs.\n"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    pretrain.main(["--dataset", book, "--output_dir", str(copy), *SMALL, "--resume"])
    assert f"pass --base_model {copy} and another --output_dir" in capsys.readouterr().out


def test_a_finished_run_is_trained_longer(run, book, tmp_path):
    """The same data may have another path; what has changed is on the card."""
    folder, copy = tmp_path / "longer", tmp_path / "copy.txt"
    shutil.copytree(run, folder)
    shutil.copy(book, copy)
    pretrain.main(["--dataset", str(copy), "--output_dir", str(folder), *SMALL, "--resume", "--max_steps", "14"])
    assert [row["step"] for row in rows(folder) if "loss" in row] == list(range(1, 15))
    card = (folder / "README.md").read_text()
    assert re.search(r"\| Notes \| from step 12 with dataset book.txt -> copy.txt, max_steps 12 -> 14 \|", card)
    assert re.search(r"\| Hardware \| \S+ CPU, processes: 1, threads per process: \d+, float32 \|", card)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "missing.txt"], "missing.txt: no such file or directory"),
        (["--context_length", "1"], "--context_length must be at least 2, got 1"),
        (["--windows", "packed", "--stride", "8"], "--stride 8 is for --windows ordered: omit it with packed"),
        (["--mixing_alpha", "nan"], "--mixing_alpha must be at least 0, got nan"),
        (["--dataset", ""], "--dataset holds an empty name"),
        (["--batch_size", "-1"], "--batch_size must be at least 1, got -1"),
        (["--learning_rate", "nan"], "--learning_rate must be above 0, got nan"),
        (["--vocab_size", "5"], "--vocab_size must be at least 259"),
        (["--validation_fraction", "1.5"], "--validation_fraction must be above 0 and below 1, got 1.5"),
        (["--warmup_ratio", "-3"], "--warmup_ratio must be at least 0 and at most 1, got -3"),
        (["--model", "max_position_embeddings=8"], "--context_length 32 is longer than the model's max_position_embeddings"),
        (["--model", "n_head=3"], "not a multiple of num_attention_heads (3)"),
        (["--context_length", "100000"], "text has .* tokens, fewer than one window of --context_length 100000"),
        (["--batch_size", "100000"], "--batch_size 100000 is more than the .* windows of the training text: lower it"),
        (["--unknown", "1"], "unrecognized arguments: --unknown 1"),
        (
            ["--lr", "1", "--block-size=8"],
            "unrecognized arguments: --lr 1 --block-size=8: did you mean --learning_rate and --context_length?",
        ),
        (["--eval_tokens", "1"], "--eval_tokens must be 0 or at least 2, got 1"),
        (["--stride", "33"], "--stride must be at most --context_length 32, got 33"),
        (["--dataset_weights", "1", "2"], "--dataset_weights has 2 weights for 1 sources: pass one per source"),
        (["--dataset_weights", "-1"], "--dataset_weights must be positive numbers, got -1.0"),
        (["--test_fraction", "0.95"], "--validation_fraction 0.1 and --test_fraction 0.95 leave nothing to train on"),
        (["--optimizer", "sgd"], "argument --optimizer: invalid choice: 'sgd'"),
        (["--tokenizer", "word", "--vocab_size", "2"], "--vocab_size must be at least 5 for --tokenizer word"),
        (["--report_to", "sparkle"], "--report_to sparkle: pass auto, none, or a tracker of Accelerate that is installed"),
        (["--save_steps", "0"], "--save_steps must be at least 1, got 0"),
        (["--lora_r", "4"], "--lora_r 4 adapts a pretrained model: pass it as --base_model"),
    ],
)
def test_a_mistake_is_an_error_before_anything_is_written(arguments, message, book, tmp_path):
    with pytest.raises(UserError, match=message if ".*" in message else re.escape(message)):
        pretrain.main(["--dataset", book, "--output_dir", str(tmp_path / "out"), *SMALL, *arguments])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("windows", [["packed"], ["random"], ["ordered", "--stride", "7"]])
def test_other_options(windows, book, tmp_path, capsys):
    """Two sources mixed by weight, a test split, and the options that the other runs leave out."""
    table = tmp_path / "table.jsonl"
    texts = [{"body": f"Row {number} tells of {'fire ' * (number % 7)}and of ice."} for number in range(60)]
    table.write_text("".join(json.dumps(row) + "\n" for row in [*texts, texts[0]]))
    words = [
        "--dataset", book, str(table), "--text_column", "body", "--dataset_weights", "1", "3", "--mixing_alpha", "0.5",
        *SMALL, "--test_fraction", "0.1", "--tokenizer", "bpe-gpt4", "--windows", *windows, "--optimizer", "muon",
        "--lr_scheduler_type", "wsd", "--gradient_checkpointing", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    pretrain.main(words)
    printed = capsys.readouterr().out
    assert "duplicates dropped: 1;" in printed
    assert ("of the positions hold a token" in printed) is (windows == ["packed"])
    losses = [row["eval_loss"] for row in evaluations(tmp_path / "out")]
    assert losses[-1] < losses[0] - 0.5
    loss, perplexity = re.search(r"Test text, evaluated once, at the end: loss (\S+), perplexity (\S+),", printed).groups()
    row = f"| after training, on the test text | {loss} | {perplexity} |"
    assert row in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("size", [400, 5_000, 20_000])
def test_the_first_command_on_a_tiny_text(size, tmp_path, capsys):
    """It works, or names the one option with which it does."""
    words, text = np.random.default_rng(0).choice(Path(pretrain.__file__).read_text().split(), 9999), tmp_path / "story.txt"
    text.write_text(" ".join(words)[:size])
    command = ["--dataset", str(text), "--output_dir", str(tmp_path / "out"), "--report_to", "none", "--max_steps", "2"]
    command += ["--model", "hidden_size=32", "num_hidden_layers=1"]
    try:
        pretrain.main(command)
    except UserError as error:
        (remedy,) = re.findall(r"--context_length \d+$", str(error).rstrip("."))
        pretrain.main([*command, *remedy.split()])
    printed = capsys.readouterr().out
    steps, epochs, windows = re.search(r"^(\d+) steps are (\S+) epochs of (\S+) windows$", printed, re.M).groups()
    assert (steps, epochs) == ("2", f"{2 * 8 / int(windows):.1f}")
    (held_out,) = re.findall(r"held out: 1 \((\d+) tokens\)", printed)
    assert f"Only {int(held_out) - 1} tokens are held out: a larger --validation_fraction" in printed


@pytest.mark.parametrize(("steps", "is_many"), [(3, False), (500, True)])
def test_more_steps_than_a_short_text_is_good_for(steps, is_many, book, tmp_path, capsys):
    words = ["--dataset", book, *SMALL, "--max_steps", str(steps), "--prepare_only", "--output_dir", str(tmp_path)]
    pretrain.main(words)
    printed = capsys.readouterr().out
    (windows,) = re.findall(r"epochs of (\S+) windows", printed)
    fewer = math.ceil(3 * int(windows) / 4)  # of batches of 4 rows
    assert (f"is memorized: for 3 epochs, pass --max_steps {fewer:,}\n" in printed) == is_many


def test_a_tokenizer_that_loses_text_has_no_bits_per_byte(book, tmp_path, capsys):
    folder = tmp_path / "words"
    pretrain.main(["--dataset", book, *SMALL, "--max_steps", "1", "--tokenizer", "word", "--output_dir", str(folder)])
    printed, card = capsys.readouterr().out, (folder / "README.md").read_text()
    assert "bits per byte" not in printed.replace("so bits per byte are not reported", "")
    (share,) = re.findall(r"tokens per word, (\S+%) of them unknown; it loses some of the text", printed)
    assert f"{share} of them unknown" in card
    assert [row["eval_bits_per_byte"] for row in evaluations(folder)] == [None, None]
    evaluate.main([str(folder), "--dataset", book])
    assert re.fullmatch(
        r"loss \S+, perplexity \S+ \(\S+ tokens; windows across documents; float32\)\n", capsys.readouterr().out
    )


def test_the_split_depends_on_its_own_seed_alone(run, tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl", [{"text": f"Night {number} was dark, and {number} too."} for number in range(60)]
    )

    def held_out(**options):
        sizes = {"vocab_size": 300, "context_length": 32, "validation_fraction": 0.2}
        arguments = pretrain.PretrainArguments(dataset=[path], **sizes, **options)
        return pretrain.PretrainRecipe(arguments, Accelerator()).texts["validation"]["text"][:]

    first = held_out()
    assert first == held_out(seed=1) == held_out(base_model=str(run)) == held_out(windows="packed", batch_size=4)
    assert first != held_out(split_seed=1)


def test_probabilities_of_sources():
    def mixture(**options):
        return pretrain.mixture(pretrain.PretrainArguments(dataset=["a", "b"], **options), [100, 900])

    assert mixture() is None  # every window once per epoch
    assert mixture(mixing_alpha=0.5) == pytest.approx([0.25, 0.75])
    assert mixture(mixing_alpha=0) == pytest.approx([0.5, 0.5])
    assert mixture(dataset_weights=[1, 4]) == pytest.approx([0.2, 0.8])
    assert mixture(dataset_weights=[1, 4], mixing_alpha=0.5) == pytest.approx([1 / 3, 2 / 3])
    assert mixture(dataset_weights=[1, 4], mixing_alpha=5) == pytest.approx([1 / 1025, 1024 / 1025])
    for options in ({"mixing_alpha": 200}, {"dataset_weights": [1e-300, 1]}):
        with pytest.raises(UserError, match=r"a would almost never be read \(probability .*\): lower --mixing_alpha"):
            mixture(**options)


ALL_LIBRARIES = pytest.param(docstrings.DOCS_LIBRARIES, marks=pytest.mark.slow, id="all libraries")


@pytest.mark.parametrize("libraries", [pytest.param(("numpy",), id="numpy"), ALL_LIBRARIES])
def test_the_default_corpus(libraries, tmp_path, monkeypatch, capsys):
    """The first command of the README, with fewer documents and steps and a smaller model."""
    monkeypatch.setattr(docstrings, "DOCS_LIBRARIES", libraries)
    short = ["--max_documents", "300", "--max_steps", "2", "--model", "hidden_size=32", "num_hidden_layers=1"]
    pretrain.main(["--output_dir", str(tmp_path / "docs"), *short])
    assert "Training documents: 297 (" in capsys.readouterr().out
    config = json.loads((tmp_path / "docs" / "config.json").read_text())
    assert (config["vocab_size"], config["position_embedding_type"]) == (4096, "rotary")
