"""Classification: what is particular to it, besides what test_finetuning.py shows."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer, TextClassificationPipeline

from modeling_scratchgpt import ScratchGPTForSequenceClassification
from tests.training.conftest import scores, write_rows
from training import classify, predict
from training.engine.arguments import resolve_epochs
from training.errors import UserError


def load_pipeline(folder: Path) -> TextClassificationPipeline:
    return TextClassificationPipeline(
        model=ScratchGPTForSequenceClassification.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        top_k=None,
    )


def test_printed_lines_metrics_and_card(finished):
    folder, printed = finished(classify)
    found = scores(folder)
    assert found["test"]["accuracy"] == found["test"]["macro_f1"] == found["test"]["roc_auc"] == 1
    assert found["before"]["accuracy"] < 1
    assert found["test"]["examples"] == 24
    assert found["test"]["confusion_matrix"] == [[12, 0], [0, 12]]
    for line in ("Training examples: 84 (bright 42, dark 42)", "Test examples: 24 (bright 12, dark 12)", "true: dark]"):
        assert line in printed
    card = (folder / "README.md").read_text()
    columns = (found["before"], found["validation"], found["test"])
    for name in ("loss", "accuracy", "macro_f1"):
        assert f"| {name.replace('_', ' ')} | {' | '.join(f'{column[name]:.4f}' for column in columns)} |" in card
    assert "| | validation, before | validation | test |" in card
    assert "value: 1.0" in card
    assert "| `bright` | 1.0000 | 1.0000 | 1.0000 | 12 |" in card
    assert (folder / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "mistakes.md").read_text().startswith("Mistakes: none.")


def test_printed_lengths_of_the_training_texts(tune, tmp_path, capsys):
    """Recomputed with the saved tokenizer, BOS and EOS included."""
    texts = [f"{'ab'[number % 2]}{' night' * (number * 7 % 24)} {number}" for number in range(9)]
    held_out = [{"text": f"held out {number}", "label": "ab"[number % 2]} for number in range(4)]
    files = [
        *("--dataset", write_rows(tmp_path / "train.jsonl", [{"text": text, "label": text[0]} for text in texts])),
        *("--validation_dataset", write_rows(tmp_path / "validation.jsonl", held_out[:2])),
        *("--test_dataset", write_rows(tmp_path / "test.jsonl", held_out[2:])),
    ]
    folder = tune(classify, *files, "--max_steps", "1", "--context_length", "24")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    lengths = [len(tokenizer(text, truncation=True)["input_ids"]) for text in texts]
    longer = sum(len(tokenizer(text)["input_ids"]) > 24 for text in texts)
    assert 0 < longer < 9
    line = f"Tokens per text: mean {np.mean(lengths):,.0f}, maximum 24; truncated to 24: {longer} of train, 0 of validation"
    assert line in capsys.readouterr().out


def test_the_pipeline_gives_the_probabilities_of_the_model(finished):
    classifier = load_pipeline(finished(classify)[0])
    (found,) = classifier(["It was a dark and stormy night"])
    by_name = {item["label"]: item["score"] for item in found}
    assert by_name.keys() == {"dark", "bright"}
    model = classifier.model
    ids = classifier.tokenizer("It was a dark and stormy night", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == model.config.bos_token_id
    assert ids[0, -1] == model.config.eos_token_id
    with torch.no_grad():
        expected = model(ids).logits.softmax(-1)[0]
    assert [by_name[model.config.id2label[index]] for index in range(2)] == pytest.approx(expected.tolist(), abs=1e-6)


def test_several_labels_and_numbers(tune, tmp_path):
    table = [
        {
            "text": f"It was a {['bright', 'dark'][number % 2]} night, {'stormy' if number % 3 else 'calm'}, like {number}",
            "dark": number % 2,
            "calm": int(number % 3 == 0),
            "length": 1.0 + number % 2,
        }
        for number in range(90)
    ]
    words = ["--dataset", write_rows(tmp_path / "table.jsonl", table), "--num_train_epochs", "8"]
    multi = tune(classify, *words, "--problem_type", "multi_label_classification", "--label_column", "dark", "calm")
    assert scores(multi)["test"]["accuracy"] > 0.9
    assert scores(multi)["test"]["labels"].keys() == {"dark", "calm"}
    (found,) = load_pipeline(multi)(["It was a dark night, calm, like 6"])
    assert sum(item["score"] for item in found) > 1.5
    number = tune(classify, *words, "--problem_type", "regression", "--label_column", "length", output="number")
    assert scores(number)["test"]["r2"] > 0.8
    (found,) = load_pipeline(number)(["It was a dark night, calm, like 6"])
    assert found[0]["label"] == "length"
    assert found[0]["score"] == pytest.approx(2, abs=0.4)


def test_the_tokenizer_of_the_classifier_lowercases(tune):
    folder = tune(classify, "--lowercase")
    upper, lower = load_pipeline(folder)(["IT WAS A DARK NIGHT", "it was a dark night"])
    assert upper == lower
    again = tune(classify, "--lowercase", "--max_steps", "1", base=folder, output="again")
    assert AutoTokenizer.from_pretrained(again, trust_remote_code=False)("DARK") == load_pipeline(folder).tokenizer("dark")


@pytest.mark.parametrize("tokenizer_class", [GPT2Tokenizer, Qwen2Tokenizer])
def test_the_tokenizer_of_another_base_lowercases(tokenizer_class, tune, run, tmp_path):
    """The classes of transformers take vocabulary and merges from the file, but no normalizer."""
    base = shutil.copytree(run, tmp_path / "base", ignore=shutil.ignore_patterns("checkpoints", "tokenizer*"))
    model = json.loads((run / "tokenizer.json").read_text())["model"]
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "unk_token": "<|bos|>"}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer_class(vocab=model["vocab"], merges=merges, **special).save_pretrained(base)
    assert type(AutoTokenizer.from_pretrained(base)) is tokenizer_class
    folder = tune(classify, "--lowercase", "--max_steps", "1", base=base)
    tokenizer, unchanged = (AutoTokenizer.from_pretrained(path, trust_remote_code=False) for path in (folder, base))
    assert tokenizer("DARK")["input_ids"] == tokenizer("dark")["input_ids"]
    assert unchanged("DARK")["input_ids"] != unchanged("dark")["input_ids"]


def test_steps_of_an_epoch():
    """The last evaluation is that of the last epoch, not one more after it."""
    arguments = resolve_epochs(classify.ClassifyArguments(batch_size=16, num_train_epochs=3), 3490)
    assert (arguments.max_steps, arguments.eval_steps, arguments.save_steps) == (655, 219, 219)


def test_label_smoothing_and_class_weights():
    arguments = classify.ClassifyArguments(label_smoothing=0.2, balance="weights")
    labels = np.eye(2, dtype=np.float32)[[0, 0, 0, 1]]
    weighted = classify.training_labels(arguments, labels)
    np.testing.assert_allclose(weighted[0], [0.9 * 4 / 6, 0.1 * 4 / 6], rtol=1e-6)
    np.testing.assert_allclose(weighted[3], [0.1 * 4 / 2, 0.9 * 4 / 2], rtol=1e-6)


def test_a_run_that_was_killed_while_it_published_is_resumed(tune):
    """config.json is moved last: without it, other files of the model can exist."""
    folder = tune(classify, "--lora_r", "2")
    (folder / "config.json").unlink()
    (folder / ".writing-abandoned").mkdir()
    tune(classify, "--lora_r", "2", "--resume")
    assert (folder / "config.json").exists()
    assert not list(folder.glob(".writing-*"))


def test_muon_without_matrices_to_train(tune):
    assert tune(classify, "--train_last_n_layers", "0", "--optimizer", "muon", "--max_steps", "2").is_dir()


def test_a_tokenizer_that_does_not_fit_its_model_is_refused(tune, run, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(run, base, ignore=shutil.ignore_patterns("checkpoints"))
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    tokenizer.add_tokens([f"<|{number}|>" for number in range(50)])
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match="has a tokenizer of 350 tokens, but embeddings for 300"):
        tune(classify, base=base)


def test_a_classifier_as_the_base_keeps_the_rows_of_its_labels(finished, tune, run, tmp_path, capsys):
    """By their names, wherever the labels are in the list; new labels get new rows."""
    base = finished(classify)[0]
    names = ["dark", "a new one", "bright"]
    table = [{"text": f"It was a {name} night, {number}", "label": name} for number in range(20) for name in names]
    words = ["--dataset", write_rows(tmp_path / "three.jsonl", table), "--max_steps", "1", "--learning_rate", "1e-9"]
    folder = tune(classify, *words, "--lora_r", "2", base=base)
    assert "Head: rows of the base, by the names of its labels: bright, dark; new rows: a new one\n" in capsys.readouterr().out
    old, new = (ScratchGPTForSequenceClassification.from_pretrained(path) for path in (base, folder))
    assert list(new.config.id2label.values()) == ["a new one", "bright", "dark"]
    torch.testing.assert_close(new.score.weight[1:], old.score.weight, atol=1e-6, rtol=0)
    assert 0.01 < new.score.weight[0].std() < 0.04  # initializer_range
    renamed = tmp_path / "renamed"
    old.config.id2label, old.config.label2id = {0: "dark", 1: "bright"}, {"dark": 0, "bright": 1}
    old.score.weight.data = old.score.weight.data.flip(0)  # the same model, with its labels in another order
    old.save_pretrained(renamed)
    load_pipeline(base).tokenizer.save_pretrained(renamed)
    again = tune(classify, "--max_steps", "1", "--learning_rate", "1e-9", base=renamed, output="again")
    assert scores(again)["before"]["accuracy"] == 1
    capsys.readouterr()
    unnamed = ScratchGPTForSequenceClassification.from_pretrained(base)  # as Trainer saves it by default
    unnamed.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    unnamed.save_pretrained(renamed)
    anew = tune(classify, "--max_steps", "1", "--learning_rate", "1e-9", base=renamed, output="anew")
    assert "Head: rows of the base, by the names of its labels: none; new rows: bright, dark\n" in capsys.readouterr().out
    new = ScratchGPTForSequenceClassification.from_pretrained(anew).score.weight
    assert not torch.allclose(new, unnamed.score.weight, atol=1e-3)
    fields = json.loads((run / "config.json").read_text()) | {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    shutil.copytree(run, tmp_path / "names", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "names" / "config.json").write_text(json.dumps(fields))  # a language model, which has no head for them
    assert tune(classify, "--max_steps", "1", base=tmp_path / "names", output="from-names").is_dir()


def test_two_columns_of_texts_and_macro_f1(tune, tmp_path, capsys):
    """Like ag_news, without a header; the test split has one label of three."""
    names = ["war", "sport", "money"]
    table = [{"label": names[n % 3], "title": f"Title {n}", "body": f"Report {n}."} for n in range(60)]
    held_out = [{**row, "title": "A new title"} for row in table if row["label"] == "war"]
    files = [
        "--dataset",
        write_rows(tmp_path / "train.tsv", table),
        "--test_dataset",
        write_rows(tmp_path / "test.tsv", held_out),
    ]
    columns = ["--columns", "label", "title", "body", "--text_column", "title", "body"]
    folder = tune(classify, *files, *columns, "--max_steps", "1")
    test = scores(folder)["test"]
    (row,) = test["confusion_matrix"][2:]
    predicted = np.repeat(sorted(names), row)
    expected = f1_score(["war"] * sum(row), predicted, average="macro", zero_division=0)
    assert test["macro_f1"] == pytest.approx(expected)
    assert re.search(r"true: war\] Title \d+ Report \d+\.", capsys.readouterr().out)
    predict.main([str(folder), "--input", str(tmp_path / "test.tsv"), *columns])
    assert json.loads(capsys.readouterr().out.splitlines()[0])["text"] == "A new title\nReport 0."
