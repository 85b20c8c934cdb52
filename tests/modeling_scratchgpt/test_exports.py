"""Export by the command to transformers, GGUF and ONNX, compared with the outputs of programs that read these."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, Qwen3ForCausalLM

from modeling_scratchgpt import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTTokenizer,
)
from tests.conftest import IS_CURRENT, MODERN, ROOT, TINY, shaken
from tests.modeling_scratchgpt.test_interchange import difference

TEXT = "to be, or not to be, that is the question 12"
SCALED = {"factor": 2.0, "rope_theta": 1e4}
DROPOUT = dict.fromkeys(("hidden_dropout", "embedding_dropout", "attention_dropout"), 0.1)  # affects only training


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


def test_a_classifier_is_not_exported(tmp_path, refused):
    ScratchGPTForSequenceClassification(ScratchGPTConfig(**TINY)).save_pretrained(tmp_path / "ours")
    output = refused(tmp_path / "ours", tmp_path / "out", "--to", "onnx")
    assert "is a ScratchGPTForSequenceClassification: --to takes a language model" in output


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


@can_write_onnx
@pytest.mark.parametrize(("fields", "dtype"), [({}, torch.bfloat16), (MODERN, torch.float32)], ids=["gpt2 in bf16", "qwen3"])
def test_onnxruntime_generates_the_same(fields, dtype, save, tmp_path, convert):
    ours, _ = save(fields, dtype)
    config = ours.float().config
    output = convert(tmp_path / "ours", tmp_path / "out", "--to", "onnx")
    assert "Largest difference from onnxruntime: " in output
    assert "torch.onnx" not in output
    for file in (tmp_path / "out").iterdir():  # no path of this machine
        assert str(ROOT).encode() not in file.read_bytes(), file.name
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
        ({**MODERN, "rope_parameters": {**SCALED, "rope_type": "dynamic"}}, "rope_type is 'dynamic'"),
        ({"max_position_embeddings": 4}, "max_position_embeddings is 4: ONNX requires at least 7"),
    ],
)
def test_models_that_onnx_cannot_express_are_refused(fields, expected, save, tmp_path, refused):
    save(fields)
    assert expected in refused(tmp_path / "ours", tmp_path / "out", "--to", "onnx")
