"""The recipe as a user runs it, on the model that the tests of pretraining have made."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TextClassificationPipeline,
)

from modeling_scratchgpt import ScratchGPTForSequenceClassification, ScratchGPTTokenizer
from modeling_scratchgpt.lora import load_adapter
from tests.conftest import WITHOUT_THE_PACKAGE
from tests.training.conftest import ROOT, TORCHRUN, launch, rows, snippet_of
from training import classify
from training.errors import UserError

RECIPE = classify
TRAINING = ["--batch_size", "8", "--num_train_epochs", "3", "--learning_rate", "0.005", "--report_to", "none"]


@pytest.fixture(scope="session")
def nights(tmp_path_factory) -> str:
    """What kind of night it was, which one word tells."""
    path = tmp_path_factory.mktemp("examples") / "nights.jsonl"
    kinds = {"dark": "stormy", "bright": "calm"}
    texts = [
        {"text": f"It was a {word} and {other} night, like {number} before.", "label": word}
        for number in range(60)
        for word, other in kinds.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return str(path)


def pipeline_of(folder: Path) -> TextClassificationPipeline:
    return TextClassificationPipeline(
        model=ScratchGPTForSequenceClassification.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        top_k=None,
    )


def changed(folder: Path, base: Path) -> set[str]:
    """The names of the weights that differ from those of the base, by blocks and parts."""
    after, before = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    return {name for name in after if name not in before or not torch.equal(after[name], before[name])}


def test_it_learns_and_says_so(finished):
    folder, process = finished
    found = json.loads((folder / "metrics.json").read_text())
    assert found["test"]["accuracy"] == found["test"]["macro_f1"] == found["test"]["roc_auc"] == 1
    assert found["before"]["accuracy"] < 1
    assert found["test"]["examples"] == 24
    assert found["test"]["confusion_matrix"] == [[12, 0], [0, 12]]
    for line in ("Training examples: 84 (bright 42, dark 42)", "Test examples: 24 (bright 12, dark 12)", "true: dark]"):
        assert line in process.stdout
    card = (folder / "README.md").read_text()
    for part in ("pipeline_tag: text-classification", "value: 1.0", "| `bright` | 1.0000 | 1.0000 | 1.0000 | 12 |", "loss.png"):
        assert part in card
    assert str(ROOT) not in card
    for picture in ("loss.png", "predictions.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert (folder / "mistakes.md").read_text().startswith("Mistakes: none.")
    assert [row["accuracy"] for row in rows(folder) if "accuracy" in row][-1] == 1


def test_the_pipeline_says_what_was_measured(finished):
    folder, _ = finished
    classify_text = pipeline_of(folder)
    (scores,) = classify_text(["It was a dark and stormy night"])
    assert {it["label"] for it in scores} == {"dark", "bright"}
    assert sum(it["score"] for it in scores) == pytest.approx(1, abs=1e-5)
    model = classify_text.model
    ids = classify_text.tokenizer("It was a dark and stormy night", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == model.config.bos_token_id
    assert ids[0, -1] == model.config.eos_token_id
    with torch.no_grad():
        likely = model(ids).logits.softmax(-1)[0]
    by_name = {it["label"]: it["score"] for it in scores}
    assert [by_name[model.config.id2label[index]] for index in range(2)] == pytest.approx(likely.tolist(), abs=1e-6)


def test_without_the_package(finished):
    """The card's own program, and one more line."""
    folder, _ = finished
    snippet = snippet_of((folder / "README.md").read_text()).replace("PATH_OR_HUB_ID", str(folder))
    more = 'print("RESULT" + json.dumps(classify("It was a dark and stormy night", truncation=True)))'
    program = f"{WITHOUT_THE_PACKAGE}\n{snippet}\n{more}"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    (found,) = json.loads(process.stdout.partition("RESULT")[2])
    (expected,) = pipeline_of(folder)(["It was a dark and stormy night"])
    assert [it["label"] for it in found] == [it["label"] for it in expected]
    assert [it["score"] for it in found] == pytest.approx([it["score"] for it in expected], abs=1e-6)


def label(monkeypatch, capsys, *words: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["classify.py", *words])
    capsys.readouterr()
    classify.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_labelling_a_file_a_table_and_standard_input(finished, nights, tmp_path, monkeypatch, capsys):
    folder = str(finished[0])
    texts = [json.loads(line)["text"] for line in Path(nights).read_text().splitlines()]
    by_table = label(monkeypatch, capsys, "--predict", folder, "--input", nights, "--batch_size", "7")
    assert [row["text"] for row in by_table] == texts
    classify_text = pipeline_of(finished[0])
    for row, scores in zip(by_table[:10], classify_text(texts[:10]), strict=True):
        assert row["label"] == scores[0]["label"]
        assert row["scores"] == pytest.approx({it["label"]: it["score"] for it in scores}, abs=1e-4)
    lines = tmp_path / "lines.txt"
    lines.write_text("\n" * 2000 + "\n".join([*texts, "", "  "]))
    by_line = label(monkeypatch, capsys, "--predict", folder, "--input", str(lines), "--batch_size", "7")
    nothing = {"label": None, "scores": {}}
    assert by_line == [{"text": "", **nothing}] * 2000 + by_table + [{"text": text, **nothing} for text in ("", "  ")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\r\n".join(texts).encode())))
    assert label(monkeypatch, capsys, "--predict", folder, "--batch_size", "7") == by_table


@pytest.mark.parametrize(("blocks", "parts"), [("0", {"score"}), ("1", {"score", "norm", "layers.1"}), ("2", None)])
def test_only_what_is_asked_for_is_trained(recipe, run, blocks, parts):
    """Freeze first, then the head: the other order trains no head."""
    names = changed(recipe("--train_last_n_layers", blocks, "--dropout", "0"), run[0])
    found = {name.removeprefix("model.").partition(".weight")[0] for name in names}
    top = {name if name in ("score", "norm") else ".".join(name.split(".")[:2]) for name in found}
    assert top == (parts or {"score", "norm", "layers.0", "layers.1"})


def test_lora_with_the_head_in_full(recipe, run):
    folder = recipe("--lora_r", "4", "--optimizer", "adamw")
    assert json.loads((folder / "metrics.json").read_text())["test"]["accuracy"] == 1
    names = changed(folder, run[0])
    assert "score.weight" in names
    assert not any("embed" in name or "norm" in name for name in names)
    # The adapter beside it, on the base, is the same classifier.
    labels = {"id2label": {0: "bright", 1: "dark"}, "label2id": {"bright": 0, "dark": 1}}
    base = ScratchGPTForSequenceClassification.from_pretrained(run[0], **labels)
    load_adapter(base, folder / "adapter")
    merged = ScratchGPTForSequenceClassification.from_pretrained(folder)
    ids = torch.tensor([[0, 40, 41, 42, 1]])
    with torch.no_grad():
        expected = merged(ids).logits
        torch.testing.assert_close(base.eval()(ids).logits, expected, atol=1e-5, rtol=1e-4)
    # And by the program of its card, where neither package is.
    snippet = snippet_of((folder / "adapter" / "README.md").read_text())
    snippet = snippet.replace("PATH_OR_HUB_ID_OF_THE_BASE", str(run[0])).replace("PATH_OR_HUB_ID", str(folder / "adapter"))
    more = "import torch\nprint('RESULT' + json.dumps(model.eval()(torch.tensor([[0, 40, 41, 42, 1]])).logits.tolist()))"
    program = f"{WITHOUT_THE_PACKAGE}\n{snippet}\n{more}"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.partition("RESULT")[2])
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-4)


def test_a_model_of_gpt2_is_a_base_too(recipe, tmp_path):
    """It has one token for the beginning and the end, and none to pad with."""
    base = tmp_path / "gpt2"
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(base)
    tokenizer = ScratchGPTTokenizer.train(["It was a dark and stormy night"] * 9, 290)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    end = "<|bos|>"
    PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=end, eos_token=end, unk_token=end
    ).save_pretrained(base)
    folder = recipe("--classifier_pooling", "mean", "--num_train_epochs", "6", base=base)
    found = json.loads((folder / "metrics.json").read_text())
    assert found["test"]["accuracy"] == 1
    classify_text = pipeline_of(folder)
    texts = ["It was a dark night", "It was a bright and calm night, like 7 before."]
    together = classify_text(texts, batch_size=2)
    for text, scores in zip(texts, together, strict=True):
        (alone,) = classify_text(text)
        assert {it["label"]: it["score"] for it in alone} == pytest.approx(
            {it["label"]: it["score"] for it in scores}, abs=1e-5
        )


def test_several_labels_and_numbers(recipe, tmp_path):
    examples = [
        {
            "text": f"It was a {'dark' if number % 2 else 'bright'} night, and {'stormy' if number % 3 else 'calm'}",
            "dark": number % 2,
            "calm": int(number % 3 == 0),
            "length": 1.0 + number % 2,
        }
        for number in range(90)
    ]
    for number, example in enumerate(examples):
        example["text"] += f", like {number} before"
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in examples))
    words = ["--dataset", str(table), "--num_train_epochs", "8"]
    multi = recipe(*words, "--problem_type", "multi_label_classification", "--label_column", "dark", "calm")
    found = json.loads((multi / "metrics.json").read_text())["test"]
    assert found["accuracy"] > 0.9
    assert found["labels"].keys() == {"dark", "calm"}
    (scores,) = pipeline_of(multi)(["It was a dark night, and calm, like 6 before"])
    assert sum(it["score"] for it in scores) > 1.5
    number = recipe(*words, "--problem_type", "regression", "--label_column", "length", output="number")
    assert json.loads((number / "metrics.json").read_text())["test"]["r2"] > 0.8
    (answer,) = pipeline_of(number)(["It was a dark night, and calm, like 6 before"])
    assert answer[0]["label"] == "length"
    assert answer[0]["score"] == pytest.approx(2, abs=0.4)


def test_early_stopping_takes_the_best(recipe, tmp_path):
    """Labels without rule can only be learned by heart: the held-out loss rises, and the run ends two evaluations later."""
    chance = np.random.default_rng(0).integers(2, size=80).tolist()
    table = tmp_path / "chance.jsonl"
    table.write_text(
        "".join(json.dumps({"text": f"night {n * 7919}", "label": label}) + "\n" for n, label in enumerate(chance))
    )
    folder = recipe(
        "--dataset", str(table), "--early_stopping_patience", "2", "--num_train_epochs", "60", "--save_steps", "1000"
    )
    measured = {row["step"]: row["loss"] for row in rows(folder) if "accuracy" in row and row["step"]}
    best = min(measured, key=measured.__getitem__)
    assert [step for step in measured if step > best] == [best + 7, best + 14]
    assert list(measured)[-1] < 420
    found = json.loads((folder / "metrics.json").read_text())
    assert found["validation"]["loss"] == pytest.approx(measured[best], rel=1e-4)


def test_small_letters(recipe):
    """The tokenizer of the classifier makes them, so whoever calls it does not have to."""
    folder = recipe("--lowercase", "True")
    capitals, small = pipeline_of(folder)(["IT WAS A DARK NIGHT", "it was a dark night"])
    assert capitals == small
    again = recipe("--lowercase", "True", "--max_steps", "1", base=folder, output="again")
    assert AutoTokenizer.from_pretrained(again, trust_remote_code=False)("DARK") == pipeline_of(folder).tokenizer("dark")


def test_a_run_goes_on_where_it_was(recipe, nights, tmp_path, monkeypatch):
    """Weights and scores are those of a run that was not stopped; with other data it does not go on."""
    examples = tmp_path / "nights.jsonl"
    examples.write_text(Path(nights).read_text())
    words = ["--early_stopping_patience", "5", "--subword_dropout", "0.2", "--token_dropout", "0.1", "--dataset", str(examples)]
    straight = recipe(*words, output="straight")
    steps = classify.train.__globals__["training_steps"]

    def stopped(*arguments, **keywords):
        for step in steps(*arguments, **keywords):
            yield step
            if step.number == 12:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.engine.run.training_steps", stopped)
        with pytest.raises(KeyboardInterrupt):
            recipe(*words, output="stopped")
    examples.write_text(Path(nights).read_text().replace("calm", "quiet"))
    with pytest.raises(UserError, match="the data of the run in .* has changed since"):
        recipe(*words, "--resume", "True", output="stopped")
    examples.write_text(Path(nights).read_text())
    assert not (tmp_path / "stopped" / "config.json").exists()
    resumed = recipe(*words, "--resume", "True", output="stopped")
    one, two = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert json.loads((straight / "metrics.json").read_text()) == json.loads((resumed / "metrics.json").read_text())


def test_two_processes_learn_what_one_does(finished, run, nights, caches, tmp_path):
    folder = tmp_path / "two"
    words = ["--base_model", str(run[0]), "--dataset", nights, "--output_dir", str(folder), *TRAINING, "--dropout", "0"]
    process = launch(TORCHRUN, *words, script="classify.py", ACCELERATE_USE_CPU="true", **caches)
    assert process.returncode == 0, process.stderr
    one, two = ([row["loss"] for row in rows(path) if "accuracy" in row] for path in (finished[0], folder))
    assert two[0] == pytest.approx(one[0], rel=1e-4)
    assert json.loads((folder / "metrics.json").read_text())["test"]["accuracy"] == 1


def test_what_an_epoch_decides():
    """The last look is that of the last epoch, not one more after it."""
    arguments = classify.resolve_epochs(classify.ClassifyArguments(batch_size=16, num_train_epochs=3), 3490)
    assert (arguments.max_steps, arguments.eval_steps, arguments.save_steps) == (655, 219, 219)


def test_labels_carry_smoothing_and_weights():
    arguments = classify.ClassifyArguments(label_smoothing=0.2, balance="weights")
    labels = np.eye(2, dtype=np.float32)[[0, 0, 0, 1]]
    weighted = classify.training_labels(arguments, labels)
    np.testing.assert_allclose(weighted[0], [0.9 * 4 / 6, 0.1 * 4 / 6], rtol=1e-6)
    np.testing.assert_allclose(weighted[3], [0.1 * 4 / 2, 0.9 * 4 / 2], rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_train_epochs", "0"], "--num_train_epochs must be above 0 and at most 1,000,000, got 0.0"),
        (["--num_train_epochs", "nan"], "--num_train_epochs must be above 0 and at most 1,000,000, got nan"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps must be at least 1, got 0"),
        (["--batch_size", "85"], "--batch_size 85 is more than the 84 examples: lower it"),
        (["--input", "x.txt"], "--input x.txt is for --predict: say which model is to label it"),
        (["--base_model", "/nowhere"], "/nowhere is no folder: give the folder or the Hub id of a model"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1, got 1.0"),
        (["--label_smoothing", "-0.1"], "--label_smoothing must be at least 0 and below 1"),
        (["--train_last_n_layers", "-2"], r"--train_last_n_layers must be -1 \(everything\), 0 \(the head\) or more, got -2"),
        (["--train_last_n_layers", "3"], "--train_last_n_layers 3 is more than the 2 blocks of the model"),
        (["--train_last_n_layers", "1", "--lora_r", "2"], "--train_last_n_layers and --lora_r are two ways"),
        (["--context_length", "3"], "--context_length must be at least 4, got 3"),
        (["--context_length", "33"], "--context_length 33 is longer than the 32 positions"),
        (["--context_length", "6"], "every text of the training split is longer than the 6 tokens that are read of it"),
        (["--base_model", "nowhere/at-all"], "--base_model nowhere/at-all cannot be loaded"),
        (["--text_column", "body"], "line 1 has no 'body'"),
        (["--label_smoothing", "0.1", "--problem_type", "regression"], "--label_smoothing is for one label a text"),
        (["--early_stopping_patience", "-1"], "--early_stopping_patience must be zero or more, got -1"),
    ],
)
def test_mistakes_are_refused_before_the_first_step(recipe, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        recipe(*words)
    assert not (tmp_path / "model" / "metrics.jsonl").exists()


def test_labelling_refuses_what_is_no_classifier(run, tmp_path, monkeypatch):
    for words, message in (  # before the model is looked for
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--columns", "a", "b"], "--columns is for files: standard input is read line by line"),
        (["--input", ""], "--input is empty: give a file, or - for standard input"),
        (["--input", "nothing.csv"], "nothing.csv: no such file or folder"),
        (["--input", str(run[0] / "metrics.jsonl"), "--text_column", "words"], "has no 'words'; it has"),
    ):
        monkeypatch.setattr(sys, "argv", ["classify.py", "--predict", "nobody/nothing", *words])
        with pytest.raises(UserError, match=message):
            classify.main()
    for folder, message in (
        (run[0], "is no text classifier, or not a whole one .it lacks score.weight.: give the folder of one"),
        (tmp_path, "config.json"),
        (tmp_path / "mistyped", "mistyped is no folder: give the folder or the Hub id of a model"),
    ):
        monkeypatch.setattr(sys, "argv", ["classify.py", "--predict", str(folder)])
        with pytest.raises(UserError, match=message):
            classify.main()


def test_a_run_that_was_killed_while_it_moved_its_files_goes_on(recipe):
    """config.json comes last: without it the adapter's folder is there already."""
    folder = recipe("--lora_r", "2")
    (folder / "config.json").unlink()
    (folder / ".writing-abandoned").mkdir()
    recipe("--lora_r", "2", "--resume", "True")
    assert (folder / "config.json").exists()
    assert not list(folder.glob(".writing-*"))


def test_a_head_alone_needs_no_muon(recipe):
    assert recipe("--train_last_n_layers", "0", "--optimizer", "muon").is_dir()


def test_a_classifier_that_cannot_pad_labels_too(finished, tmp_path, monkeypatch, capsys):
    """As transformers' GPT-2 is saved."""
    folder = tmp_path / "gpt2"
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=2)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(finished[0], trust_remote_code=False)
    tokenizer.pad_token = None
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|eos|>").save_pretrained(folder)
    lines = tmp_path / "lines.txt"
    lines.write_text("short\nand a longer one\n")
    found = label(monkeypatch, capsys, "--predict", str(folder), "--input", str(lines))
    assert [row["text"] for row in found] == ["short", "and a longer one"]


def test_a_tokenizer_that_does_not_fit_its_model_is_refused(recipe, run, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(run[0], base, ignore=shutil.ignore_patterns("checkpoints"))
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    tokenizer.add_tokens([f"<|{number}|>" for number in range(50)])
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match="has 350 tokens, and rows for 300"):
        recipe(base=base)


def test_whoever_reads_the_labels_may_stop(finished, tmp_path):
    """As `head` does: no traceback."""
    lines = tmp_path / "lines.txt"
    lines.write_text("It was a dark night\n" * 3000)
    command = f"{sys.executable} training/classify.py --predict {finished[0]} --input {lines} --batch_size 64 | head -n 1"
    process = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert process.stdout.count("\n") == 1
    assert "Traceback" not in process.stderr


def test_a_classifier_is_a_base_too(finished, recipe, tmp_path):
    """With other labels it gets a new head."""
    base = tmp_path / "base"
    shutil.copytree(finished[0], base, ignore=shutil.ignore_patterns("checkpoints"))
    table = tmp_path / "three.jsonl"
    names = ["one", "two", "three"]
    table.write_text(
        "".join(json.dumps({"text": f"{names[n % 3]} nights, {n}", "label": names[n % 3]}) + "\n" for n in range(60))
    )
    folder = recipe("--dataset", str(table), base=base)
    assert ScratchGPTForSequenceClassification.from_pretrained(folder).config.num_labels == 3
