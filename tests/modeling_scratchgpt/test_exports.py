"""Export to GGUF and ONNX by the command, compared with the outputs of programs that read these."""

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, Qwen3ForCausalLM

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer, convert
from tests.conftest import IS_CURRENT, MODERN, TINY
from tests.modeling_scratchgpt.test_convert import refused, run
from tests.modeling_scratchgpt.test_interchange import difference, shaken

# --to gguf --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{}, {"attention_bias": False, "mlp_bias": False}, MODERN], ids=["gpt2", "no biases", "qwen3"]
)
@pytest.mark.parametrize(("kind", "most"), [("f32", 1e-5), ("f16", 1e-2), ("q8_0", 0.15)])
def test_transformers_reads_our_gguf(fields, kind, most, tmp_path, monkeypatch, capsys):
    ours = shaken(ScratchGPTForCausalLM(ScratchGPTConfig(**TINY, **fields)))
    ours.save_pretrained(tmp_path / "ours")
    tokenizer = ScratchGPTTokenizer.train(["to be, or not to be, that is the question 12"] * 9, 290)
    tokenizer.save_pretrained(tmp_path / "ours")
    output = run(monkeypatch, capsys, tmp_path / "ours", tmp_path / "out", "--to", "gguf", "--type", kind)
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


@pytest.mark.parametrize("fields", [{}, MODERN], ids=["gpt2", "qwen3"])
def test_llama_cpp_generates_the_same(fields, tmp_path, monkeypatch, capsys):
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python (it compiles llama.cpp)")
    ours = shaken(ScratchGPTForCausalLM(ScratchGPTConfig(**TINY, **fields)))
    ours.save_pretrained(tmp_path / "ours")
    tokenizer = ScratchGPTTokenizer.train(["to be, or not to be, that is the question 12"] * 9, 290)
    tokenizer.save_pretrained(tmp_path / "ours")
    run(monkeypatch, capsys, tmp_path / "ours", tmp_path / "out", "--to", "gguf", "--type", "f32")
    llama = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), n_ctx=64, verbose=False)
    for prompt in ("to be, or not", "naïve 🙂 question<|eos|>12"):
        ids = tokenizer(prompt)["input_ids"]
        assert llama.tokenize(prompt.encode(), add_bos=False, special=True) == ids
        expected = ours.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None)[
            0, len(ids) :
        ].tolist()
        going_on = llama.generate(ids, temp=0.0)
        assert [next(going_on) for _ in expected] == expected


@pytest.mark.parametrize(
    ("fields", "kind", "expected"),
    [
        ({"hidden_act": "relu"}, "bpe", "hidden_act is 'relu', but 'gelu_pytorch_tanh' in a GGUF gpt2"),
        (
            {**MODERN, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "bpe",
            "scaled rope_parameters",
        ),
        ({}, "bpe-gpt4", "GGUF can only contain the tokenizer `bpe`"),
        ({}, "character", "GGUF can only contain the tokenizer `bpe`"),
        ({}, "lowercase", "would ignore these and compute other ids"),
    ],
)
def test_models_that_gguf_cannot_express_are_refused(fields, kind, expected, tmp_path, monkeypatch, capsys):
    ScratchGPTForCausalLM(ScratchGPTConfig(**TINY, **fields)).save_pretrained(tmp_path / "ours")
    tokenizer = ScratchGPTTokenizer.train(["to be, or not to be"] * 9, 290, kind="bpe" if kind == "lowercase" else kind)
    if kind == "lowercase":
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(tmp_path / "ours")
    assert expected in refused(monkeypatch, capsys, tmp_path / "ours", tmp_path / "out", "--to", "gguf")


# --to onnx --------------------------------------------------------------------------------------------------------------

can_write_onnx = pytest.mark.skipif(not IS_CURRENT, reason="takes transformers 5.23")


@can_write_onnx
@pytest.mark.parametrize("fields", [{"dtype": "bfloat16"}, {**MODERN, "dtype": "float32"}], ids=["gpt2 in bfloat16", "qwen3"])
def test_onnxruntime_generates_the_same(fields, tmp_path, monkeypatch, capsys):
    config = ScratchGPTConfig(**TINY, **fields)
    ours = shaken(ScratchGPTForCausalLM(config).to(config.dtype))
    ours.save_pretrained(tmp_path / "ours")
    ours.float()
    tokenizer = ScratchGPTTokenizer.train(["to be, or not to be, that is the question 12"] * 9, 290)
    tokenizer.save_pretrained(tmp_path / "ours")
    output = run(monkeypatch, capsys, tmp_path / "ours", tmp_path / "out", "--to", "onnx")
    assert "Largest difference from onnxruntime: " in output
    assert "torch.onnx" not in output
    for file in (tmp_path / "out").iterdir():  # no path of this machine
        assert str(Path(convert.__file__).parent).encode() not in file.read_bytes(), file.name
        assert b"site-packages" not in file.read_bytes(), file.name

    from transformers.exporters.base import ExportedModel

    exported = ExportedModel.from_pretrained(tmp_path / "out")  # transformers' reader, on a batch with padding
    texts = ["to be, or not", "the question 12 that is"]
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(texts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = ours.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)[:, ids.shape[1] :]
    shape = (2, config.num_key_value_heads, 0, config.head_dim)
    cache = transformers.DynamicCache([(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)])
    positions, made = (mask.cumsum(1) - 1).clamp(min=0), []
    for _ in range(8):
        output = exported(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        scores = output.logits[:, -1]
        scores[:, config.eos_token_id] = -torch.inf
        ids, cache = scores.argmax(-1, keepdim=True), output.past_key_values
        mask, positions = torch.cat([mask, torch.ones_like(ids)], 1), positions[:, -1:] + 1
        made.append(ids)
    assert torch.equal(torch.cat(made, 1), expected)


@can_write_onnx
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({**MODERN, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is 'dynamic'"),
        ({"max_position_embeddings": 4}, "max_position_embeddings is 4: ONNX requires at least 7"),
    ],
)
def test_models_that_onnx_cannot_express_are_refused(fields, expected, tmp_path, monkeypatch, capsys):
    ScratchGPTForCausalLM(ScratchGPTConfig(**{**TINY, **fields})).save_pretrained(tmp_path / "ours")
    assert expected in refused(monkeypatch, capsys, tmp_path / "ours", tmp_path / "out", "--to", "onnx")
