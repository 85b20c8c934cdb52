"""Export by the command to transformers, GGUF and ONNX, compared with the outputs of programs that read these."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, Qwen3ForCausalLM

from modeling_scratchgpt import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTTokenizer,
)
from modeling_scratchgpt.convert import web
from modeling_scratchgpt.convert.web import read_held_out
from tests.conftest import IS_CURRENT, MODERN, ROOT, TINY, shaken
from tests.exported import CLASSIFIED, CLASSIFIERS, DROPOUT, LABELS, LANGUAGE_MODELS, MEASURED, TEXT
from tests.modeling_scratchgpt.test_interchange import difference

SCALED = {"factor": 2.0, "rope_theta": 1e4}


@pytest.fixture
def save(tmp_path) -> Callable[..., tuple[ScratchGPTForCausalLM, ScratchGPTTokenizer]]:
    """Saves a model with these fields and a tokenizer in the directory `ours`."""

    def save(fields: dict[str, Any], dtype: torch.dtype = torch.float32, kind: str = "bpe") -> tuple:
        ours = shaken(ScratchGPTForCausalLM(ScratchGPTConfig(**{**TINY, **DROPOUT, **fields}))).to(dtype)
        tokenizer = ScratchGPTTokenizer.train([TEXT] * 9, 290, kind=kind)
        for each in (ours, tokenizer):
            each.save_pretrained(tmp_path / "ours")
        return ours, tokenizer

    return save


# --to gpt2, --to qwen3 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_a_round_trip_through_gpt2_loses_nothing(tie, save, tmp_path, convert):
    ours, tokenizer = save({"tie_word_embeddings": tie})
    ours.generation_config.update(do_sample=True, top_k=7)
    ours.save_pretrained(tmp_path / "ours")
    output = convert(tmp_path / "ours", tmp_path / "gpt2", "--to", "gpt2")
    assert "a complete GPT2LMHeadModel" in output
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    assert type(reference) is GPT2LMHeadModel
    assert difference(ours, reference) < 1e-5
    assert reference.generation_config.top_k == 7
    other = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    assert not isinstance(other, ScratchGPTTokenizer)
    assert other(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert other.special_tokens_map == tokenizer.special_tokens_map
    assert not list((tmp_path / "gpt2").glob("*.py"))

    convert(tmp_path / "gpt2", tmp_path / "again")
    again = ScratchGPTForCausalLM.from_pretrained(tmp_path / "again")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    ignored = {"_name_or_path", "auto_map", "transformers_version", "architectures", "dtype"}
    first, second = ({k: v for k, v in model.config.to_dict().items() if k not in ignored} for model in (ours, again))
    assert first == second


def test_without_biases_gpt2_gets_zeros(save, tmp_path, convert):
    ours, _ = save({"attention_bias": False, "mlp_bias": False})
    convert(tmp_path / "ours", tmp_path / "gpt2", "--to", "gpt2")
    assert difference(ours, GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_through_qwen3_loses_nothing(dtype, save, tmp_path, convert):
    ours, _ = save(MODERN, dtype)
    convert(tmp_path / "ours", tmp_path / "qwen3", "--to", "qwen3")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3")
    assert type(reference) is Qwen3ForCausalLM
    assert reference.dtype == dtype
    assert "Qwen3ForCausalLM of transformers" in convert(tmp_path / "qwen3", tmp_path / "again")
    for name, tensor in ScratchGPTForCausalLM.from_pretrained(tmp_path / "again").state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    again = ScratchGPTForCausalLM.from_pretrained(tmp_path / "ours")  # its rotary frequencies are not in bfloat16
    assert difference(again.float(), reference.float()) < 1e-5


def test_other_heads_are_not_exported(tmp_path, refused):
    ScratchGPTForTokenClassification(ScratchGPTConfig(**TINY)).save_pretrained(tmp_path / "ours")
    for to, other in (("gpt2", ""), ("onnx", " or a ScratchGPTForSequenceClassification")):
        output = refused(tmp_path / "ours", tmp_path / "out", "--to", to)
        assert f"is a ScratchGPTForTokenClassification: --to {to} takes a ScratchGPTForCausalLM{other}." in output


@pytest.mark.parametrize(
    ("fields", "target", "expected"),
    [
        (MODERN, "gpt2", "position_embedding_type is 'rotary', but a gpt2 model has only 'learned'"),
        ({}, "qwen3", "position_embedding_type is 'learned', but a qwen3 model has only 'rotary'"),
        ({"num_key_value_heads": 2}, "gpt2", "num_key_value_heads is 2, but a gpt2 model has only 4"),
        ({**MODERN, "qk_norm": False}, "qwen3", "qk_norm is False, but a qwen3 model has only True"),
    ],
)
def test_fields_that_the_target_does_not_support_are_refused_by_name(fields, target, expected, save, tmp_path, refused):
    save(fields)
    assert expected in refused(tmp_path / "ours", tmp_path / "out", "--to", target)


# --to gguf --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{}, {"attention_bias": False, "mlp_bias": False}, MODERN], ids=["gpt2", "no biases", "qwen3"]
)
@pytest.mark.parametrize(("kind", "most"), [("f32", 1e-5), ("f16", 1e-2), ("q8_0", 0.15)])
def test_transformers_reads_our_gguf(fields, kind, most, save, tmp_path, convert):
    ours, tokenizer = save(fields)
    output = convert(tmp_path / "ours", tmp_path / "out", "--to", "gguf", "--type", kind)
    assert f"Read back from {kind}. Largest difference from " in output
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", config=config, dtype=torch.float32)
    assert type(theirs) in (GPT2LMHeadModel, Qwen3ForCausalLM)
    assert difference(ours, theirs) < most
    other = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "to be, naïve 🙂 or  not\n" + "<|eos|>" * IS_CURRENT  # older readers split it into characters
    assert other(text)["input_ids"] == tokenizer(text)["input_ids"]
    if IS_CURRENT:
        assert (other.bos_token, other.eos_token, other.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gguf_of_a_half_precision_model(dtype, save, tmp_path, convert):
    """Its rotary frequencies stay in float32, also while the model is compared twice."""
    save(MODERN, dtype)
    output = convert(tmp_path / "ours", tmp_path / "out", "--to", "gguf", "--type", "f32")
    assert "Read back from f32. Largest difference from " in output


@pytest.mark.parametrize("fields", [{}, MODERN], ids=["gpt2", "qwen3"])
def test_llama_cpp_generates_the_same(fields, save, tmp_path, convert):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python (it compiles llama.cpp)")
    ours, tokenizer = save(fields)
    convert(tmp_path / "ours", tmp_path / "out", "--to", "gguf", "--type", "f32")
    llama = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), n_ctx=64, verbose=False)
    for prompt in ("to be, or not", "naïve 🙂 question<|eos|>12"):
        ids = tokenizer(prompt)["input_ids"]
        assert llama.tokenize(prompt.encode(), add_bos=False, special=True) == ids
        output = ours.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        expected = output[0, len(ids) :].tolist()
        going_on = llama.generate(ids, temp=0.0)
        assert [next(going_on) for _ in expected] == expected


@pytest.mark.parametrize(
    ("fields", "kind", "expected"),
    [
        ({"hidden_act": "relu"}, "bpe", "hidden_act is 'relu', but 'gelu_pytorch_tanh' in a GGUF gpt2"),
        ({**MODERN, "rope_parameters": {**SCALED, "rope_type": "linear"}}, "bpe", "scaled rope_parameters"),
        ({}, "bpe-gpt4", "GGUF can only contain the tokenizer `bpe`"),
        ({}, "character", "GGUF can only contain the tokenizer `bpe`"),
        ({}, "lowercase", "would ignore these and compute other ids"),
    ],
)
def test_models_that_gguf_cannot_express_are_refused(fields, kind, expected, save, tmp_path, refused):
    _, tokenizer = save(fields, kind="bpe" if kind == "lowercase" else kind)
    if kind == "lowercase":
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.save_pretrained(tmp_path / "ours")
    assert expected in refused(tmp_path / "ours", tmp_path / "out", "--to", "gguf")


# --to onnx --------------------------------------------------------------------------------------------------------------

can_write_onnx = pytest.mark.skipif(not IS_CURRENT, reason="takes transformers 5.23")
GRAPH = "onnx/model.onnx"


def bits_per_byte(model: Any, tokenizer: ScratchGPTTokenizer, text: str) -> float:
    """By hand: windows of all positions, each but the first beginning with the last token of the one before."""
    ids, nats = tokenizer(f"<|bos|>{text}", return_tensors="pt")["input_ids"], 0.0
    size = model.config.max_position_embeddings
    for start in range(0, ids.shape[1] - 1, size - 1):
        window = ids[:, start : start + size]
        with torch.no_grad():
            logits = model(window).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return nats / math.log(2) / len(text.encode())


@can_write_onnx
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_onnxruntime_generates_the_same(kind, exported):
    """With padding, a cache, the attention of all heads, and 8 bits whose cost is measured."""
    directory = exported(kind)
    out, output = directory / "export", (directory / "printed").read_text()
    ours = ScratchGPTForCausalLM.from_pretrained(directory / "model", dtype=torch.float32, attn_implementation="eager")
    tokenizer = ScratchGPTTokenizer.from_pretrained(directory / "model")
    assert "Largest difference from onnxruntime: " in output
    assert "torch.onnx" not in output
    size, full, before, after = re.search(r"8 bits: (\S+) MB instead of (\S+); bits per byte (\S+) -> (\S+) ", output).groups()
    assert float(before) == pytest.approx(bits_per_byte(ours, tokenizer, MEASURED), abs=2e-4)
    assert float(before) * 0.9 < float(after) < float(before) * 1.01
    sizes = [round((out / name).stat().st_size / 1e6, 1) for name in (GRAPH, "onnx/model_quantized.onnx")]
    assert [float(full), float(size)] == sizes
    assert re.search("^8 bits.*", output, re.MULTILINE)[0] in (out / "README.md").read_text()
    for file in filter(Path.is_file, out.rglob("*")):  # no path of this machine
        assert str(ROOT).encode() not in file.read_bytes(), file.name
        assert b"site-packages" not in file.read_bytes(), file.name

    session = onnxruntime.InferenceSession(out / GRAPH)
    past, present = (
        [f"{name}.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")] for name in ("past_key_values", "present")
    )
    attentions = ["attentions.0", "attentions.1"] if "--attentions" in LANGUAGE_MODELS[kind][2] else []
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask", "position_ids", *past]
    assert [value.name for value in session.get_outputs()] == ["logits", *present, *attentions]
    heads, size = ours.config.num_key_value_heads, ours.config.vocab_size
    assert session.get_inputs()[1].shape == ["batch_size", "total_sequence_length"]
    assert session.get_inputs()[3].shape == ["batch_size", heads, "past_sequence_length", 8]
    assert session.get_outputs()[0].shape == ["batch_size", "sequence_length", size]
    for value in session.get_outputs()[5:]:
        assert value.shape == ["batch_size", 4, "sequence_length", "total_sequence_length"]

    batch = tokenizer(["to be, or not", "the question 12 that is"], return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.0}
    expected = ours.generate(**batch, **options)[:, ids.shape[1] :]
    cache = {name: np.zeros((2, heads, 0, 8), np.float32) for name in past}
    positions, made = (mask.cumsum(1) - 1).clamp(min=0), []
    for _ in range(8):
        tokens = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits, *states = session.run(None, {name: tensor.numpy() for name, tensor in tokens.items()} | cache)
        if attentions and not made:
            attention = ours(**batch, output_attentions=True).attentions[1].detach().numpy()
            np.testing.assert_allclose(states[-1][0], attention[0], atol=1e-5)
        cache = dict(zip(past, states, strict=False))
        scores = torch.from_numpy(logits)[:, -1]
        scores[:, ours.config.eos_token_id] = -torch.inf
        ids = scores.argmax(-1, keepdim=True)
        mask, positions = torch.cat([mask, torch.ones_like(ids)], 1), positions[:, -1:] + 1
        made.append(ids)
    assert torch.equal(torch.cat(made, 1), expected)


@can_write_onnx
def test_a_format_that_costs_more_than_one_percent_is_not_used(save, tmp_path, convert, monkeypatch):
    """One weight of the head is so large that 8 bits have no room for the others. What it is multiplied by is always zero."""
    ours, tokenizer = save({**MODERN, "tie_word_embeddings": False, "num_hidden_layers": 1})
    ids, optimizer = tokenizer(TEXT, return_tensors="pt")["input_ids"], torch.optim.AdamW(ours.parameters(), lr=0.01)
    for _ in range(30):
        ours(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        ours.model.norm.weight[0], ours.lm_head.weight[299, 0] = 0, 2000
    ours.save_pretrained(tmp_path / "ours")
    rows = [{"messages": [{"role": "user", "content": TEXT}]}, {"text": TEXT, "title": "a\u2028b"}]
    lines = [
        json.dumps(row, ensure_ascii=False) for row in rows
    ]  # with a byte-order mark and empty lines, as editors leave them
    (tmp_path / "ours" / "held_out.jsonl").write_text("\n\n".join(lines) + "\n\n", encoding="utf-8-sig")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "ours")
    output = convert(tmp_path / "ours", tmp_path / "out", "--to", "onnx")
    lines = re.findall(
        "^(8 bits|8 bits, head and embedding 32|16 bits): .* on at most 20,000 tokens of held_out.jsonl(.*)$",
        output,
        re.MULTILINE,
    )
    assert lines == [("8 bits", ": more than 1 %, not used"), ("16 bits", "")]  # the next smallest, with this large vocabulary
    assert sorted(path.name for path in (tmp_path / "out" / "onnx").iterdir()) == [
        "model.onnx",
        "model_fp16.onnx",
    ]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["transformers.js_config"] == {"dtype": "fp16"}
    monkeypatch.setattr(web, "MAX_BYTES", 1)  # of one file, which 16 bits would exceed
    formats = web._write_formats(tmp_path / "out" / GRAPH, tmp_path)
    assert [name for name, _ in formats] == ["q8", "q8 except head and embedding"]


@can_write_onnx
def test_without_a_text_the_model_samples_one(save, tmp_path, convert):
    """It is almost certain of its next token, so that its own text has few bits per byte, where any other would have many."""
    ours, _ = save({**MODERN, "tie_word_embeddings": False})
    with torch.no_grad():
        ours.lm_head.weight.mul_(20)
    ours.save_pretrained(tmp_path / "ours")
    output = convert(tmp_path / "ours", tmp_path / "out", "--to", "onnx")
    (before, source), *_ = re.findall(r"bits per byte (\S+) -> .* on (.*)", output)
    assert source.startswith("text that the model has sampled")
    assert float(before) < 2


def test_at_most_so_many_tokens_are_measured(monkeypatch):
    monkeypatch.setattr(web, "MAX_TOKENS", 100)
    tokenizer = ScratchGPTTokenizer.train([TEXT] * 9, 290)
    texts = ["to be ", "naïve 🙂 " * 200, "not read"]
    windows, num_bytes = web._windows(texts, tokenizer, 1000)
    first, second = windows
    assert 95 < len(first) + len(second) <= 100
    measured = tokenizer.decode(first[1:]) + tokenizer.decode(second[1:])
    assert "".join(texts).startswith(measured)
    assert num_bytes == len(measured.encode())


@can_write_onnx
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_is_exported_with_its_pooling(kind, exported):
    directory = exported(kind)
    ours = ScratchGPTForSequenceClassification.from_pretrained(directory / "model").eval()
    batch = ScratchGPTTokenizer.from_pretrained(directory / "model")(CLASSIFIED, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = ours(**batch).logits
    assert "accuracy 75.00% -> " in (directory / "printed").read_text()
    session = onnxruntime.InferenceSession(directory / "export" / GRAPH)
    assert [value.name for value in session.get_outputs()] == ["logits"]
    (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    config = transformers.AutoConfig.from_pretrained(directory / "export")
    architecture = {"gpt2 classifier": "GPT2", "qwen3 classifier": "Qwen3"}[kind] + "ForSequenceClassification"
    assert (config.architectures, config.id2label) == ([architecture], LABELS["id2label"])


@can_write_onnx
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({**MODERN, "rope_parameters": {**SCALED, "rope_type": "dynamic"}}, "rope_type is 'dynamic'"),
        ({"max_position_embeddings": 4}, "max_position_embeddings is 4: ONNX requires at least 7"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2, but a gpt2 model has only 4"),
    ],
)
def test_models_that_onnx_cannot_express_are_refused(fields, expected, save, tmp_path, refused):
    save(fields)
    assert expected in refused(tmp_path / "ours", tmp_path / "out", "--to", "onnx")


@can_write_onnx
@pytest.mark.parametrize(
    ("part", "change", "expected"),
    [
        ("normalizer", normalizers.BertNormalizer(), "normalizer BertNormalizer"),
        ("normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]), "normalizer Strip"),
        ("pre_tokenizer", pre_tokenizers.Punctuation(), "pre_tokenizer Punctuation"),
        ("pre_tokenizer", pre_tokenizers.Split(" ", "merged_with_next"), "Split MergedWithNext"),
        ("pre_tokenizer", pre_tokenizers.Split(" ", "isolated", invert=True), "inverted Split"),
        ("pre_tokenizer", pre_tokenizers.Split(Regex("(?m)."), "isolated"), "flag in (?m)."),
    ],
)
def test_tokenizers_that_javascript_reads_otherwise_are_refused(part, change, expected, save, tmp_path, refused):
    _, tokenizer = save({})
    setattr(tokenizer.backend_tokenizer, part, change)
    tokenizer.save_pretrained(tmp_path / "ours")
    assert f"as Python does: it has {expected}" in refused(tmp_path / "ours", tmp_path / "out", "--to", "onnx")


@can_write_onnx
@pytest.mark.parametrize(
    ("words", "content", "expected"),
    [
        (
            ["--to", "onnx"],
            '{"title": "a"}',
            "text.jsonl cannot be measured on (KeyError: 'text'): pass JSON lines with text or",
        ),
        (["--to", "onnx"], '{"text": 5}', "text.jsonl cannot be measured on (TypeError: "),
        (["--to", "onnx"], '{"text": "\\ud800"}', "text.jsonl cannot be measured on (TypeError: "),
        (["--to", "onnx"], '{"messages": [{"role": "tool", "content": "a"}]}', "measured on (TemplateError: no tool)"),
        (["--to", "onnx"], "[" * 5000, "text.jsonl cannot be measured on (RecursionError: "),
        (["--to", "onnx"], "\xff", "text.jsonl cannot be measured on (UnicodeDecodeError: "),
        (["--to", "onnx"], "", "text.jsonl has no text to measure on: pass another --text"),
        (["--to", "gguf"], "", "--attentions and --text are for --to onnx: leave them out"),
    ],
)
def test_a_text_to_measure_on_is_checked_first(words, content, expected, save, tmp_path, refused):
    _, tokenizer = save({})
    tokenizer.chat_template = "{{ raise_exception('no tool') }}"
    tokenizer.save_pretrained(tmp_path / "ours")
    (tmp_path / "text.jsonl").write_text(content, encoding="latin-1")
    assert expected in refused(tmp_path / "ours", tmp_path / "out", *words, "--text", tmp_path / "text.jsonl")


@pytest.mark.parametrize(
    ("problem_type", "row", "expected"),
    [
        ("regression", {"text": "a", "label": None}, "label None is not finite"),
        ("single_label_classification", {"text": "a", "label": "2"}, "the model has no label 2"),
        ("single_label_classification", {"text": "a", "label": 1}, None),  # a name, as in training
        ("multi_label_classification", {"text": "a", "label": [0, 1]}, "the model has no label [01]"),  # not positions
        ("single_label_classification", {"text": "", "label": "1"}, "has no text to measure on"),
        (None, {"text": "b"}, "has no text to measure on"),  # one token, after which nothing is predicted
    ],
)
def test_labels_and_texts_that_cannot_be_measured(problem_type, row, expected, tmp_path):
    config = ScratchGPTConfig(**TINY, id2label={0: "0", 1: "1"}, problem_type=problem_type)
    config.architectures = ["GPT2ForSequenceClassification" if problem_type else "GPT2LMHeadModel"]
    if problem_type == "regression":
        config.id2label = {0: "score"}
    tokenizer = ScratchGPTTokenizer.train([TEXT] * 9, 290)
    tokenizer.bos_token = tokenizer.eos_token = None
    (tmp_path / "text.jsonl").write_text(json.dumps(row))
    if expected is None:
        assert read_held_out(tmp_path / "text.jsonl", config, tokenizer)
        return
    with pytest.raises(ValueError, match=expected):
        read_held_out(tmp_path / "text.jsonl", config, tokenizer)
