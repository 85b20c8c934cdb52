"""Labelling texts with a finished classifier."""

import io
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    pipeline,
)

from tests.training.conftest import ROOT
from training import classify, predict
from training.errors import UserError


@pytest.fixture
def classifier(finished) -> str:
    return str(finished(classify)[0])


@pytest.fixture
def label(capsys):
    """Labels texts, and returns the rows that are printed."""

    def run(*argv: str) -> list[dict]:
        capsys.readouterr()
        predict.main(argv)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_a_file_a_table_and_standard_input(classifier, nights, label, tmp_path, monkeypatch):
    texts = [json.loads(line)["text"] for line in Path(nights[classify]).read_text().splitlines()]
    by_table = label(classifier, "--input", nights[classify], "--batch_size", "7")
    assert [row["text"] for row in by_table] == texts
    tokenizer = AutoTokenizer.from_pretrained(classifier, trust_remote_code=False)
    one_by_one = pipeline("text-classification", classifier, tokenizer=tokenizer, top_k=None)
    for row, scores in zip(by_table[:10], one_by_one(texts[:10]), strict=True):
        assert row["label"] == scores[0]["label"]
        assert row["scores"] == pytest.approx({item["label"]: item["score"] for item in scores}, abs=1e-4)
    lines = tmp_path / "lines.txt"
    lines.write_text("\n" * 2000 + "\n".join([*texts, "", "  "]))
    by_line = label(classifier, "--input", str(lines), "--batch_size", "7")
    nothing = {"label": None, "scores": {}}
    assert by_line == [{"text": "", **nothing}] * 2000 + by_table + [{"text": text, **nothing} for text in ("", "  ")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO("\r\n".join(texts).encode()))))
    assert label("--model", classifier, "--batch_size", "7") == by_table


def test_a_pipe_is_answered_line_by_line(classifier, monkeypatch):
    """Before more lines arrive; lines that arrive together are a batch."""
    pipes = [os.pipe() for _ in range(2)]
    (standard_input, send), (receive, standard_output) = (
        (os.fdopen(pipe[0]), os.fdopen(pipe[1], "w", buffering=1)) for pipe in pipes
    )
    monkeypatch.setattr(sys, "stdin", standard_input)
    monkeypatch.setattr(sys, "stdout", os.fdopen(os.dup(standard_output.fileno()), "w"))  # with a buffer, as a pipe has
    thread = Thread(target=predict.main, args=([classifier],), daemon=True)
    thread.start()
    for text in ("It was a dark night", "It was a bright night"):
        print(text, file=send)
        assert select.select([receive], [], [], 60)[0], "no answer to the line"
        assert json.loads(receive.readline())["text"] == text
    send.close()
    thread.join(60)
    assert not thread.is_alive()


def test_a_mistake_is_an_error(run, tmp_path):
    for words, message in (  # before the model is looked up
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--columns", "a", "b"], "--columns is for files: standard input is read line by line"),
        (["--input", ""], "--input is empty: pass a file, or - for standard input"),
        (["--input", "nothing.csv"], "nothing.csv: no such file or directory"),
        (["--dataset", "a.csv"], "unrecognized arguments: --dataset a.csv: did you mean --input?"),
        (["--input", str(run / "metrics.jsonl"), "--text_column", "words"], "has no 'words'; it has"),
    ):
        with pytest.raises(UserError, match=message):
            predict.main(["nobody/nothing", *words])
    for folder, message in (
        (run, "is not a text classifier, or incomplete .it lacks score.weight.: pass another model"),
        (tmp_path, "config.json"),
        (tmp_path / "mistyped", "mistyped is not a directory: pass the directory or the Hub id of a model"),
        ("", "no model was given: pass the directory or the Hub id of a model"),
    ):
        with pytest.raises(UserError, match=message):
            predict.main(["--model", str(folder)])


def test_a_classifier_without_a_padding_token(classifier, label, tmp_path):
    """As transformers' GPT-2 is saved."""
    folder = tmp_path / "gpt2"
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=2)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(classifier, trust_remote_code=False)
    tokenizer.pad_token = None
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|eos|>").save_pretrained(folder)
    lines = tmp_path / "lines.txt"
    lines.write_text("short\nand a longer one\n")
    assert [row["text"] for row in label(str(folder), "--input", str(lines))] == ["short", "and a longer one"]


def test_longest_text_of_other_classifiers(classifier, label, tmp_path):
    """RoBERTa's positions begin at 2; Bloom has no limit, and a tokenizer may have none."""
    tokenizer = AutoTokenizer.from_pretrained(classifier, trust_remote_code=False)
    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 2}
    models = {
        "roberta": RobertaForSequenceClassification(RobertaConfig(**shape, max_position_embeddings=20, pad_token_id=1)),
        "bloom": BloomForSequenceClassification(BloomConfig(**{**shape, "n_layer": 1, "n_head": 2})),
    }
    lines = tmp_path / "lines.txt"
    lines.write_text("It was a dark and stormy night, like 7 before. " * 9)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        settings = {"pad_token": "<|pad|>", "model_input_names": ["input_ids", "attention_mask"]}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **settings).save_pretrained(tmp_path / name)
        (row,) = label(str(tmp_path / name), "--input", str(lines))
        assert len(row["scores"]) == 2


def test_out_of_memory_is_explained(classifier, nights, monkeypatch):
    def fail(*_, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(predict.TextClassificationPipeline, "__call__", fail)
    with pytest.raises(UserError, match="out of memory .*: lower --batch_size"):
        predict.main([classifier, "--input", nights[classify]])


def test_a_reader_that_closes_the_pipe_causes_no_traceback(classifier, tmp_path):
    """As `head` does."""
    lines = tmp_path / "lines.txt"
    lines.write_text("It was a dark night\n" * 3000)
    command = f"{sys.executable} training/predict.py {classifier} --input {lines} --batch_size 64 | head -n 1"
    process = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert process.stdout.count("\n") == 1
    assert "Traceback" not in process.stderr
