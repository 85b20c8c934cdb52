"""Tiny models and their ONNX exports, which the tests of several files read: writing a graph takes many seconds."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch

from modeling_scratchgpt import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTTokenizer,
)
from modeling_scratchgpt.convert.__main__ import main
from tests.conftest import MODERN, TINY, shaken
from tests.web.strings import make_strings
from training.data.prompts import CHAT_TEMPLATES, set_up_chat_template

STRINGS = make_strings()
TEXT = "to be, or not to be, that is the question 12"
MEASURED = f"{TEXT}, naïve 🙂 " * 30  # several contexts
CLASSIFIED = ["to be", "the question 12 that is", "not", "or 1"]
LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}, "problem_type": "single_label_classification"}
DROPOUT = dict.fromkeys(("hidden_dropout", "embedding_dropout", "attention_dropout"), 0.1)  # affects only training
# Each architecture and each option once: the fields of the model, its type on disk, and options of the command.
LANGUAGE_MODELS: dict[str, tuple[dict[str, Any], torch.dtype, list[str]]] = {
    "gpt2 in bf16": ({}, torch.bfloat16, ["--attentions"]),
    "qwen3": (MODERN, torch.float32, []),
}
CLASSIFIERS = {"gpt2 classifier": {"classifier_pooling": "mean"}, "qwen3 classifier": {**MODERN, "classifier_pooling": "last"}}


def make_export(kind: str, directory: Path) -> None:
    """Write a model, its export and what the command has printed to `model`, `export` and `printed` in a directory."""
    torch.manual_seed(0)
    options: list[str] = []
    if kind in LANGUAGE_MODELS:
        fields, dtype, options = LANGUAGE_MODELS[kind]
        tokenizer = ScratchGPTTokenizer.train([*STRINGS[:40], TEXT], 340)
        set_up_chat_template(tokenizer, CHAT_TEMPLATES["chat"], 512)
        shape = {**TINY, **DROPOUT, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
        model: Any = ScratchGPTForCausalLM(ScratchGPTConfig(**{**shape, **fields})).to(dtype)
        model.generation_config.update(repetition_penalty=1.1)
        text = directory / "text.txt"
        text.write_text(MEASURED)
    else:
        tokenizer = ScratchGPTTokenizer.train([*STRINGS[:40], TEXT], 290)
        tokenizer.add_bos_token = tokenizer.add_eos_token = True
        tokenizer.model_max_length = 64
        config = ScratchGPTConfig(**{**TINY, **LABELS, **CLASSIFIERS[kind], "num_hidden_layers": 1})
        model = ScratchGPTForSequenceClassification(config)
    shaken(model, 0.2).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    if kind in CLASSIFIERS:
        with torch.no_grad():
            logits = model(**tokenizer(CLASSIFIED, return_tensors="pt", padding=True)).logits
        predicted = [config.id2label[index] for index in logits.argmax(-1).tolist()]
        labels = ["b" if predicted[0] == "a" else "a", *predicted[1:]]  # the first is wrong
        rows = [{"text": text, "label": label} for text, label in zip(CLASSIFIED, labels, strict=True)]
        text = directory / "text.jsonl"
        text.write_text("\n".join(map(json.dumps, rows)))
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        main([str(directory / "model"), str(directory / "export"), "--to", "onnx", "--text", str(text), *options])
    assert not errors.getvalue()
    (directory / "printed").write_text(printed.getvalue())
