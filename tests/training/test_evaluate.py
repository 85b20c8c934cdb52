"""Metrics of a model on a text: against sums written out, against pretraining, and for models of every origin."""

import inspect
import itertools
import json
import math
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tqdm import tqdm
from transformers import BloomConfig, BloomForCausalLM

from modeling_scratchgpt import ScratchGPTForCausalLM, ScratchGPTForSequenceClassification, ScratchGPTTokenizer
from modeling_scratchgpt.cross_entropy import IGNORE_INDEX
from tests.conftest import on_two_processes
from tests.reference.test_against_transformers import pair_with_gpt2, pair_with_qwen3
from tests.training.conftest import evaluations, run_program, write_rows
from training import evaluate, progress
from training.data.datasets import TokenizedExamples, evaluation_dataloader, evaluation_rows
from training.data.splits import SPLITS
from training.data.tokens import tokenize_documents
from training.engine import metrics
from training.engine.pretrained import load_model_and_tokenizer
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


@pytest.fixture
def report(capsys):
    """Evaluates a model, and returns the JSON report."""

    def run(*argv: object) -> dict:
        capsys.readouterr()
        evaluate.main([*map(str, argv), "--json"])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def log_probability(model: torch.nn.Module, ids: list[int], start: int, position: int) -> float:
    """That of a single token, given those from `start` on."""
    with torch.no_grad():
        return model(torch.tensor([ids[start:position]])).logits[0, -1].float().log_softmax(-1)[ids[position]].item()


def encode_documents(tokenizer: ScratchGPTTokenizer, texts: list[str]) -> list[int]:
    """The ids of documents as in training; what is spelled like a special token is text."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    return [token for text in texts for token in (0, *backend.encode(text, add_special_tokens=False).ids, 1)]


@pytest.mark.parametrize("has_skip_logits", [True, False], ids=["from hidden states", "from logits"])
@pytest.mark.parametrize(
    ("windows", "context", "stride"),
    [
        ("packed", 16, 16),
        ("packed", 64, 64),
        *(("ordered", *sizes) for sizes in ((16, 16), (16, 4), (16, 1), (64, 64), (5, 3))),
    ],
)
def test_the_loss_is_the_sum_of_log_probabilities(
    tiny_model, tokenizer, windows, context, stride, has_skip_logits, monkeypatch
):
    """One token at a time, of all documents in a row or of each by itself."""
    tokens = tokenize_documents(Dataset.from_dict({"text": TEXTS}), tokenizer, "a test")
    texts = [encode_documents(tokenizer, part) for part in ([TEXTS] if windows == "ordered" else [[text] for text in TEXTS])]
    assert tokens.ids.tolist() == list(itertools.chain(*texts))
    nats, count = 0.0, 0
    for ids in texts:
        for position in range(1, len(ids)):
            start = max(0, math.ceil((position - context) / stride)) * stride
            nats -= log_probability(tiny_model, ids, start, position)
            count += 1
            assert position - start > context - stride or start == 0
    if not has_skip_logits:
        monkeypatch.setattr(metrics.inspect, "signature", lambda _: inspect.Signature())
    rows = evaluation_rows(tokens, windows, context, 2, stride)
    result = metrics.evaluate(Accelerator(), tiny_model, evaluation_dataloader(rows, 3), rows.num_bytes)
    assert rows.num_labels == count
    assert result.loss == pytest.approx(nats / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in TEXTS), rel=1e-5)


def test_one_token_between_documents_if_bos_and_eos_are_the_same(tokenizer):
    def tokens(**special_tokens: str) -> TokenizedExamples:
        other = ScratchGPTTokenizer(tokenizer_object=tokenizer.backend_tokenizer, **special_tokens)
        return tokenize_documents(Dataset.from_dict({"text": TEXTS[:2]}), other, "a test")

    def packed_labels(examples: TokenizedExamples) -> list[list[int]]:
        rows = evaluation_rows(examples, "packed", 99, 2)
        return sorted(label for row in (rows[0], rows[1]) for label in row["shift_labels"].tolist() if label != IGNORE_INDEX)

    parts = [tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    for shared in (tokens(bos_token="<|eos|>", eos_token="<|eos|>"), tokens(eos_token="<|eos|>")):
        assert shared.ids.tolist() == [1, *parts[0], 1, *parts[1], 1]
        assert packed_labels(shared) == sorted([*parts[0], 1, *parts[1], 1])  # the shared token begins the second document, too
    bare = tokens()
    assert bare.ids.tolist() == [*parts[0], *parts[1]]
    assert packed_labels(bare) == sorted([*parts[0][1:], *parts[1][1:]])
    assert evaluation_rows(bare, "packed", 99, 2).num_bytes is None  # not all of the text is predicted


@pytest.mark.parametrize("options", [(), ("--stride", 8), ("--windows", "packed")])
def test_models_of_transformers_have_the_same_loss(tiny_model, tokenizer, folder, options, tmp_path, report):
    is_gpt2 = tiny_model.config.position_embedding_type == "learned"
    if not is_gpt2:
        tiny_model.config.num_key_value_heads = 2
    reference = (pair_with_gpt2 if is_gpt2 else pair_with_qwen3)(tiny_model)
    reference.save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "reference")
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    words = ("--dataset", texts, "--context_length", 32, *options)
    mine = report(folder, *words)
    other = report(tmp_path / "reference", *words)
    assert other["loss"] == pytest.approx(mine["loss"], rel=1e-5)
    assert other["bytes"] == mine["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert mine["context_length"] == 32
    expected = {(): ("ordered", 32), ("--stride", 8): ("ordered", 8), ("--windows", "packed"): ("packed", None)}
    assert (mine["windows"], mine["stride"]) == expected[options]
    assert other["tokens"] == mine["tokens"]


def test_the_printed_line_with_the_longest_context(folder, text, report, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0)
    evaluate.main([str(folder), "--dataset", str(text)])
    line, bar = capsys.readouterr()
    facts = report("--model", folder, "--dataset", text, "--context_length", 64)
    assert line == (
        f"loss {facts['loss']:.3f}, perplexity {facts['perplexity']:,.1f}, {facts['bits_per_byte']:.3f} bits per byte "
        f"({facts['tokens']:,} tokens, {facts['bytes']:,} bytes; windows across documents; float32)\n"
    )
    assert "Evaluating" in bar


def test_the_printed_speed_is_tokens_over_time(tiny_model, monkeypatch):
    """Between bounds that hold on every machine."""
    begin, speeds = time.perf_counter(), []

    def batches():
        for _ in range(3):
            time.sleep(0.05)
            yield {"input_ids": torch.ones(2, 10, dtype=torch.long), "shift_labels": torch.ones(2, 10, dtype=torch.long)}

    def keep(bar: tqdm, text: str, refresh: bool) -> None:
        speeds.append((int(re.search(r"([\d,]+) tokens/s", text)[1].replace(",", "")), time.perf_counter() - begin))

    monkeypatch.setattr(tqdm, "set_postfix_str", keep)
    metrics.evaluate(Accelerator(), tiny_model, batches(), num_bytes=1)
    for number, (speed, elapsed) in enumerate(speeds, 1):
        assert 20 * number / elapsed - 1 <= speed <= 20 / 0.05 + 1


def test_pretraining_has_the_same_metrics_of_its_validation_text(run, book, report):
    words = ("--dataset", book, "--split", "validation", "--validation_fraction", 0.1)
    result, last = report(run, *words), evaluations(run)[-1]
    assert result["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(last["eval_bits_per_byte"], rel=1e-5)
    assert result["context_length"] == 32


def test_the_splits_together_are_the_text(run, book, report):
    fractions = ("--validation_fraction", 0.1, "--test_fraction", 0.2)
    sizes = {split: report(run, "--dataset", book, "--split", split, *fractions)["bytes"] for split in ("all", *SPLITS)}
    assert sizes["all"] == sizes["train"] + sizes["validation"] + sizes["test"] == Path(book).stat().st_size
    assert sizes["validation"] < sizes["test"] < sizes["train"]


@pytest.mark.parametrize("tiny_config", ["modern"], indirect=True)
def test_two_processes_report_the_same(folder, report, tmp_path):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    words = ["--dataset", texts, "--windows", "packed", "--context_length", "16", "--batch_size", "2"]
    one = report(folder, *words)
    printed = on_two_processes(run_program, tmp_path, ["evaluate", str(folder), *words, "--json"], ACCELERATE_USE_CPU="true")
    (two,) = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert two.pop("loss") == pytest.approx(one["loss"], rel=1e-6)
    assert two["tokens"] == one["tokens"]


def test_code_in_the_directory_of_a_scratchgpt_does_not_run(folder, text, report):
    (folder / "modeling_scratchgpt.py").write_text("raise RuntimeError('this must not run')\n")
    assert report(folder, "--dataset", text, "--trust_remote_code")["loss"] > 0
    model, _ = load_model_and_tokenizer(str(folder), True, torch.device("cpu"))
    assert type(model) is ScratchGPTForCausalLM
    assert not model.training


def test_a_mistake_is_an_error_of_one_line(folder, text, tiny_model, tokenizer, tmp_path):
    names = ("empty.txt", "bare", "foreign", "odd", "wide", "classifier")
    empty, no_tokenizer, foreign, odd, wide, classifier = (tmp_path / name for name in names)
    empty.write_text(" \n")
    tiny_model.save_pretrained(no_tokenizer)
    foreign.mkdir()
    odd.mkdir()
    (odd / "config.json").write_text('{"model_type": ["gpt2"], "auto_map": {}}')
    shutil.copytree(folder, wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "intermediate_size": 8}))
    (foreign / "config.json").write_text('{"model_type": "alien", "auto_map": {"AutoModelForCausalLM": "alien.Alien"}}')
    tiny_model.config.tie_word_embeddings = False
    ScratchGPTForSequenceClassification(tiny_model.config).save_pretrained(classifier)
    tokenizer.save_pretrained(classifier)
    without_positions = tmp_path / "bloom"
    BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=8, n_layer=1, n_head=2)).save_pretrained(without_positions)
    tokenizer.save_pretrained(without_positions)
    missing = tmp_path / "missing"
    for words, message in (
        ([], "no model was given: pass the directory or the Hub id of a model"),
        ([missing], f"{missing} is not a directory: pass the directory or the Hub id"),
        (["nobody/nothing"], "nobody/nothing: no such directory, and not found on the Hub"),
        ([tmp_path], "has no config.json"),
        ([odd], "its config.json cannot be read"),
        ([wide], "its weights do not have the sizes in its config: model.layers.0.mlp.down_proj"),
        ([no_tokenizer], "tokenizer"),
        ([foreign], "pass --trust_remote_code if you trust it"),
        ([classifier], "is not a causal language model, or incomplete (it lacks lm_head.weight): pass another model"),
        ([folder, "--context_length", 65], "--context_length 65 is longer than the model's 64 positions"),
        ([folder, "--stride", 65], "--stride 65 would skip tokens: it must be at most 64"),
        ([folder, "--stride", 8, "--windows", "packed"], "--stride 8 is for --windows ordered, and this model is scored with"),
        (
            [without_positions, "--windows", "packed", "--context_length", 9],
            "bloom does not keep documents in a row apart: pass --windows ordered",
        ),
        ([folder, "--stride", -1], "--stride must be at least 0, got -1"),
        ([folder, "--split", "test"], "--split test: pass the --test_fraction of the training run"),
        ([folder, "--validation_fraction", 1], "--validation_fraction must be above 0 and below 1, got 1.0"),
        ([folder, "--dataset", empty], "no text"),
        ([folder, "--dataset", missing], "missing"),
    ):
        dataset = [] if "--dataset" in words else ["--dataset", text]
        with pytest.raises(UserError) as caught:
            evaluate.main([*map(str, [*words, *dataset])])
        assert message in str(caught.value), words
        assert "\n" not in str(caught.value)


def test_long_contexts(folder, text, tokenizer, report, tmp_path, monkeypatch):
    """The default is short enough for large vocabularies, also for a model without a limit; else it is told what to lower."""
    model = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=8, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    monkeypatch.setattr(evaluate, "LONG", 40)
    assert [report(path, "--dataset", text)["context_length"] for path in (tmp_path / "bloom", folder)] == [40, 57]
    assert report(folder, "--dataset", text, "--context_length", 50)["context_length"] == 50

    def fail(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr(evaluate, "evaluate", fail)
    with pytest.raises(UserError, match="out of memory .*: lower --batch_size or --context_length"):
        evaluate.main([str(folder), "--dataset", str(text)])


def test_a_model_that_does_not_fit_its_tokenizer_or_is_not_finite(tiny_model, folder, text, tmp_path):
    larger = ScratchGPTTokenizer.train([chr(code) * 9 for code in range(0x4E00, 0x4F00)], vocab_size=800)
    chinese = tmp_path / "chinese.txt"
    chinese.write_text("".join(map(chr, range(0x4E00, 0x4F00))))
    larger.save_pretrained(folder)
    with pytest.raises(UserError, match="but the model has 300 embeddings: they do not match"):
        evaluate.main([str(folder), "--dataset", str(chinese)])
    with torch.no_grad():
        tiny_model.lm_head.weight.fill_(math.nan)
    tiny_model.save_pretrained(folder)
    with pytest.raises(UserError, match="the held-out loss is nan: .* the model has weights that are not finite"):
        evaluate.main([str(folder), "--dataset", str(text)])
