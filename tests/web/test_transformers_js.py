"""transformers.js in Node against Python: token ids, greedy text, a classifier's scores, a chat."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import AutoTokenizer, TokenizersBackend

from modeling_scratchgpt import ScratchGPTForCausalLM, ScratchGPTForSequenceClassification, ScratchGPTTokenizer
from modeling_scratchgpt.convert.reading import tokenizer_as
from modeling_scratchgpt.convert.tokenizer_js import as_tokenizer_js, check_tokenizer_js
from modeling_scratchgpt.tokenization_scratchgpt import TOKENIZERS
from tests.conftest import IS_CURRENT
from tests.exported import CLASSIFIERS, LANGUAGE_MODELS, STRINGS

pytestmark = [pytest.mark.web, pytest.mark.skipif(not IS_CURRENT, reason="takes transformers 5.23")]


@pytest.fixture
def in_node(node_modules, tmp_path):
    """Runs cases of cases.mjs, each a dictionary, and returns their results."""

    def run(*cases: dict[str, Any]) -> list[Any]:
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        words = ["node", Path(__file__).with_name("cases.mjs"), node_modules, tmp_path / "cases.json"]
        process = subprocess.run(words, capture_output=True, text=True, check=True)
        return json.loads(process.stdout)

    return run


def make_tokenizer(kind: str) -> ScratchGPTTokenizer:
    """A tokenizer of this kind, or `bpe` with another setting."""
    if kind == "unigram with ties":  # two splits of a word with the same tokens, for which rounding errors decided
        random.Random(0).shuffle(texts := [*STRINGS])
        return ScratchGPTTokenizer.train(texts[:500], 5000, kind="unigram")
    tokenizer = ScratchGPTTokenizer.train(STRINGS[::2], 6000, kind=kind if kind in TOKENIZERS else "bpe")
    if kind == "lowercase":
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase()])
    if kind == "special tokens":
        tokenizer.add_bos_token = tokenizer.add_eos_token = True
    return tokenizer


def test_all_kinds_of_tokenizers_compute_the_same_ids(in_node, tmp_path):
    kinds, expected = [*TOKENIZERS, "unigram with ties", "lowercase", "special tokens"], []
    for kind in kinds:
        tokenizer = make_tokenizer(kind)
        expected.append(tokenizer(STRINGS)["input_ids"])
        exported = tokenizer_as(TokenizersBackend, tokenizer)
        check_tokenizer_js(exported)
        as_tokenizer_js(exported).save_pretrained(tmp_path / kind)
        assert AutoTokenizer.from_pretrained(tmp_path / kind)(STRINGS)["input_ids"] == expected[-1], kind
    results = in_node(*({"task": "ids", "model": str(tmp_path / kind), "texts": STRINGS} for kind in kinds))
    for kind, ids, found in zip(kinds, expected, results, strict=True):
        assert [text for text, a, b in zip(STRINGS, ids, found, strict=True) if a != b] == [], kind


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_text_and_a_chat_are_generated_the_same(kind, exported, in_node):
    """Twenty prompts, and a chat of three turns."""
    directory = exported(kind)
    model = ScratchGPTForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")

    def generate(**inputs: Any) -> list[int]:
        return model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()

    prompts = [text for text in STRINGS[::45] if text.strip()][:20]
    texts = [generate(**tokenizer(text, return_tensors="pt")) for text in prompts]
    chats, messages, answers = [], [], []
    for question in ("What is it?", "to be, or not to be 🙂", "naïve"):
        messages = [*messages, {"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answers.append(generate(**inputs))
        chats.append(messages)
        answer = tokenizer.decode(answers[-1][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages = [*messages, {"role": "assistant", "content": answer}]
    case = {"task": "generate", "model": str(directory / "export"), "dtype": "fp32", "max_new_tokens": 12}
    assert in_node({**case, "prompts": prompts}, {**case, "chats": chats}) == [texts, answers]


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_computes_the_same_scores(kind, exported, in_node):
    directory = exported(kind)
    model = ScratchGPTForSequenceClassification.from_pretrained(directory / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    texts = STRINGS[:20]
    with torch.no_grad():
        expected = [model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0].tolist() for text in texts]
    (found,) = in_node({"task": "classify", "model": str(directory / "export"), "texts": texts, "dtype": "fp32"})
    np.testing.assert_allclose(found, expected, atol=1e-4)
