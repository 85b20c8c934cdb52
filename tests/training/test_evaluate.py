"""Scores of a model on a text: against sums written out, against the training recipe, and for models of every origin."""

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from modeling_scratchgpt import ScratchGPTForCausalLM, ScratchGPTForSequenceClassification, ScratchGPTTokenizer
from tests.reference.test_against_transformers import pair_with_gpt2, pair_with_qwen3
from tests.training.conftest import ROOT, TORCHRUN, rows
from training import evaluate
from training.data.tokens import tokenize
from training.data.windows import Windows, evaluation_loader
from training.engine import metrics
from training.errors import UserError

TEXTS = ["It was a dark and stormy night, naïve reader.\n" * 4, "Nothing else happened. 🙂", "<|eos|> is text here.\n"]


@pytest.fixture(scope="module")
def tokenizer() -> ScratchGPTTokenizer:
    return ScratchGPTTokenizer.train(TEXTS * 3, vocab_size=290)


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path) -> Path:
    """A model and its tokenizer, saved."""
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[0])
    return path


def run_main(monkeypatch, capsys, *words: object) -> dict:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words), "--json"])
    evaluate.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def log_probability(model: torch.nn.Module, ids: list[int], start: int, place: int) -> float:
    """Of the token at a place, by itself, given those from `start` on."""
    with torch.no_grad():
        return model(torch.tensor([ids[start:place]])).logits[0, -1].float().log_softmax(-1)[ids[place]].item()


def with_marks(tokenizer: ScratchGPTTokenizer, texts: list[str]) -> list[int]:
    """Documents as they stand in training; what is spelled like a special token is text."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    return [token for text in texts for token in (0, *backend.encode(text, add_special_tokens=False).ids, 1)]


@pytest.mark.parametrize("is_ours", [True, False], ids=["from hidden states", "from logits"])
@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 4), (16, 1), (16, 7), (64, 64), (5, 3)])
def test_the_loss_is_the_sum_of_log_probabilities(tiny_model, tokenizer, context, stride, is_ours, monkeypatch):
    tokens = tokenize(Dataset.from_dict({"text": TEXTS}), tokenizer, "a test")
    ids = with_marks(tokenizer, TEXTS)
    assert tokens.ids.tolist() == ids
    nats = 0.0
    for place in range(1, len(ids)):
        start = max(0, math.ceil((place - context) / stride)) * stride
        nats -= log_probability(tiny_model, ids, start, place)
        assert place - start > context - stride or start == 0
    if not is_ours:
        monkeypatch.setattr(metrics.inspect, "signature", lambda _: inspect.Signature())
    loader = evaluation_loader(Windows(tokens, context, 2, "test", stride, once=True), 3)
    result = metrics.evaluate(Accelerator(), tiny_model, loader, tokens.num_bytes)
    assert result.loss == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in TEXTS), rel=1e-5)


def test_one_mark_between_documents_where_beginning_and_end_are_one(tokenizer):
    def ids(**marks: str) -> list[int]:
        other = ScratchGPTTokenizer(tokenizer_object=tokenizer.backend_tokenizer, **marks)
        return tokenize(Dataset.from_dict({"text": TEXTS[:2]}), other, "a test").ids.tolist()

    parts = [tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    assert ids(bos_token="<|eos|>", eos_token="<|eos|>") == [1, *parts[0], 1, *parts[1], 1]
    assert ids(eos_token="<|eos|>") == [1, *parts[0], 1, *parts[1], 1]
    assert ids() == [*parts[0], *parts[1]]


@pytest.mark.parametrize("stride", [0, 8])
def test_transformers_models_get_the_score_of_ours(tiny_model, tokenizer, folder, text, stride, tmp_path, monkeypatch, capsys):
    is_gpt2 = tiny_model.config.position_embedding_type == "learned"
    if not is_gpt2:
        tiny_model.config.num_key_value_heads = 2
    theirs = (pair_with_gpt2 if is_gpt2 else pair_with_qwen3)(tiny_model)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    words = ("--dataset", text, "--context_length", 32, "--stride", stride)
    mine = run_main(monkeypatch, capsys, folder, *words)
    other = run_main(monkeypatch, capsys, tmp_path / "theirs", *words)
    assert other["loss"] == pytest.approx(mine["loss"], rel=1e-5)
    assert other["bytes"] == mine["bytes"] == len(TEXTS[0].encode())
    assert mine["context_length"] == 32
    assert mine["stride"] == (stride or 32)


def test_more_context_is_the_default_and_the_line_says_all(folder, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(folder), "--dataset", str(text)])
    evaluate.main()
    line, bar = capsys.readouterr()
    facts = run_main(monkeypatch, capsys, "--model", folder, "--dataset", text, "--context_length", 64)
    assert line == (
        f"loss {facts['loss']:.3f}, perplexity {facts['perplexity']:,.1f}, {facts['bits_per_byte']:.3f} bits per byte "
        f"({facts['tokens']:,} tokens, {facts['bytes']:,} bytes)\n"
    )
    assert "Evaluating" in bar


def test_the_recipe_says_the_same_of_its_validation_text(run, book, monkeypatch, capsys):
    words = ("--dataset", book, "--split", "validation", "--validation_fraction", 0.1)
    result = run_main(monkeypatch, capsys, run[0], *words)
    (last,) = [row for row in rows(run[0])[-1:] if "bits_per_byte" in row]
    assert result["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-5)
    assert result["context_length"] == 32


def test_the_splits_are_the_whole(run, book, monkeypatch, capsys):
    fractions = ("--validation_fraction", 0.1, "--test_fraction", 0.2)
    sizes = {
        split: run_main(monkeypatch, capsys, run[0], "--dataset", book, "--split", split, *fractions)["bytes"]
        for split in ("all", *evaluate.SPLITS)
    }
    assert sizes["all"] == sizes["train"] + sizes["validation"] + sizes["test"] == Path(book).stat().st_size
    assert sizes["validation"] < sizes["test"] < sizes["train"]


def test_two_processes_say_what_one_says(folder, text, caches, monkeypatch, capsys):
    words = ["--dataset", str(text), "--context_length", "16", "--batch_size", "2"]
    one = run_main(monkeypatch, capsys, folder, *words)
    process = subprocess.run(
        [*TORCHRUN, "training/evaluate.py", str(folder), *words, "--json"],
        cwd=ROOT,
        env={**os.environ, **caches, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr
    two = json.loads(process.stdout)
    assert two.pop("loss") == pytest.approx(one["loss"], rel=1e-6)
    assert two["tokens"] == one["tokens"]


def test_a_scratchgpt_folder_runs_no_code_of_its_own(folder, text, monkeypatch, capsys):
    (folder / "modeling_scratchgpt.py").write_text("raise RuntimeError('this must not run')\n")
    assert run_main(monkeypatch, capsys, folder, "--dataset", text, "--trust_remote_code")["loss"] > 0


def test_mistakes_end_in_one_line(folder, text, tiny_model, tokenizer, tmp_path, monkeypatch):
    empty, no_tokenizer, foreign, classifier = (tmp_path / name for name in ("empty.txt", "bare", "foreign", "classifier"))
    empty.write_text(" \n")
    tiny_model.save_pretrained(no_tokenizer)
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "alien", "auto_map": {"AutoModelForCausalLM": "alien.Alien"}}')
    tiny_model.config.tie_word_embeddings = False
    ScratchGPTForSequenceClassification(tiny_model.config).save_pretrained(classifier)
    tokenizer.save_pretrained(classifier)
    missing = tmp_path / "missing"
    for words, message in (
        ([], "no model is named: give the folder or the Hub id of a model"),
        ([missing], f"{missing} is no folder: give the folder or the Hub id"),
        (["nobody/nothing"], "nobody/nothing: no such folder here, and the Hub did not give it"),
        ([tmp_path], "holds no config.json"),
        ([no_tokenizer], "tokenizer"),
        ([foreign], "pass --trust_remote_code if you trust it"),
        ([classifier], "is no causal language model, or not a whole one (it lacks lm_head.weight): give the folder of one"),
        ([folder, "--context_length", 65], "--context_length 65 is longer than the model's 64 positions"),
        ([folder, "--stride", 65], "--stride 65 would leave tokens out: it must be at most 64"),
        ([folder, "--stride", -1], "--stride must be at least 0, got -1"),
        ([folder, "--split", "test"], "--split test: say what part"),
        ([folder, "--split", "train", "--validation_fraction", 1], "--validation_fraction must be between 0 and 1, got 1.0"),
        ([folder, "--dataset", empty], "no text"),
        ([folder, "--dataset", missing], "missing"),
    ):
        dataset = [] if "--dataset" in words else ["--dataset", text]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, [*words, *dataset])])
        with pytest.raises(UserError) as caught:
            evaluate.main()
        assert message in str(caught.value), words
        assert "\n" not in str(caught.value)


def test_models_that_do_not_fit_their_text(tiny_model, folder, text, tmp_path, monkeypatch):
    larger = ScratchGPTTokenizer.train([chr(code) * 9 for code in range(0x4E00, 0x4F00)], vocab_size=800)
    chinese = tmp_path / "chinese.txt"
    chinese.write_text("".join(map(chr, range(0x4E00, 0x4F00))))
    larger.save_pretrained(folder)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(folder), "--dataset", str(chinese)])
    with pytest.raises(UserError, match="the model knows 300: they do not belong together"):
        evaluate.main()
    with torch.no_grad():
        tiny_model.lm_head.weight.fill_(math.nan)
    tiny_model.save_pretrained(folder)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(folder), "--dataset", str(text)])
    with pytest.raises(UserError, match="the loss on the text is nan: the model's weights"):
        evaluate.main()


def test_the_model_stays_on_our_class(folder):
    model = evaluate.load_model(str(folder), False, torch.device("cpu"))
    assert type(model) is ScratchGPTForCausalLM
    assert not model.training
