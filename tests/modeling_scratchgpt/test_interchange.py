"""GPT-2 and Qwen3 as saved by transformers, loaded into ScratchGPT and compared with the original."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

import modeling_scratchgpt
from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTModel
from tests.conftest import shaken

GPT2: dict[str, Any] = {
    "vocab_size": 90, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
QWEN3 = {
    "vocab_size": 90, "max_position_embeddings": 32, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
IDS = torch.arange(40).view(2, 20)


def difference(ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        first, second = (model(IDS, attention_mask=mask)[0].float() for model in (ours, theirs))
    return (first - second).abs().max().item()


def as_published(theirs: GPT2LMHeadModel, folder: Path) -> None:
    """The file of openai-community/gpt2: no prefix, no head, the causal mask of every layer."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items() if "lm_head" not in name}
    for layer in range(theirs.config.n_layer):
        state[f"h.{layer}.attn.bias"] = torch.ones(32, 32).tril().view(1, 1, 32, 32)
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    theirs.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})


def as_bin(theirs: GPT2LMHeadModel, folder: Path) -> None:
    theirs.config.save_pretrained(folder)
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")


SAVED = {
    "safetensors": lambda theirs, folder: theirs.save_pretrained(folder),
    "sharded": lambda theirs, folder: theirs.save_pretrained(folder, max_shard_size="20KB"),
    "bin": as_bin,
    "as published": as_published,
    "without a head": lambda theirs, folder: theirs.transformer.save_pretrained(folder),
}


@pytest.mark.parametrize("saved", SAVED)
def test_gpt2_loads_from_every_file_format(saved, tmp_path):
    theirs = shaken(GPT2LMHeadModel(GPT2Config(**GPT2)))
    SAVED[saved](theirs, tmp_path)
    ours, report = ScratchGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert difference(ours, theirs) < 1e-5
    assert difference(ScratchGPTModel.from_pretrained(tmp_path), theirs.transformer) < 1e-5


def test_gpt2_with_an_untied_head(tmp_path):
    theirs = shaken(GPT2LMHeadModel(GPT2Config(**GPT2, tie_word_embeddings=False)))
    theirs.save_pretrained(tmp_path)
    ours = ScratchGPTForCausalLM.from_pretrained(tmp_path)
    assert difference(ours, theirs) < 1e-5
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight


HEADS = {
    "ForSequenceClassification": GPT2ForSequenceClassification,
    "ForTokenClassification": GPT2ForTokenClassification,
    "ForQuestionAnswering": GPT2ForQuestionAnswering,
}


@pytest.mark.parametrize("head", HEADS)
def test_every_head_of_gpt2_loads(head, tmp_path):
    theirs = shaken(HEADS[head](GPT2Config(**GPT2, id2label={0: "a", 1: "b", 2: "c"}, pad_token_id=89)))
    theirs.save_pretrained(tmp_path)
    ours, report = getattr(modeling_scratchgpt, f"ScratchGPT{head}").from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert difference(ours, theirs) < 1e-5
    assert ours.config.id2label == theirs.config.id2label


def test_a_new_head_on_gpt2_is_reported_as_missing(tmp_path):
    shaken(GPT2LMHeadModel(GPT2Config(**GPT2))).save_pretrained(tmp_path)
    ours, report = modeling_scratchgpt.ScratchGPTForSequenceClassification.from_pretrained(
        tmp_path, num_labels=4, output_loading_info=True
    )
    assert report["missing_keys"] == {"score.weight"}
    assert ours.score.weight.shape == (4, 24)


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}, "dtype": "auto"}]
)
def test_options_of_from_pretrained(options, tmp_path):
    theirs = shaken(GPT2LMHeadModel(GPT2Config(**GPT2)))
    theirs.save_pretrained(tmp_path)
    ours = ScratchGPTForCausalLM.from_pretrained(tmp_path, **options)
    expected = options.get("dtype") if isinstance(options.get("dtype"), torch.dtype) else torch.float32
    assert {parameter.dtype for parameter in ours.parameters()} == {expected}
    assert difference(ours, theirs) < (1e-5 if expected == torch.float32 else 0.1)


def test_offloaded_to_disk(tmp_path):
    theirs = shaken(GPT2LMHeadModel(GPT2Config(**GPT2)))
    theirs.save_pretrained(tmp_path / "gpt2")
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.embed_positions": "cpu", "model.norm": "cpu"}
    device_map |= {"model.dropout": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    ours = ScratchGPTForCausalLM.from_pretrained(tmp_path / "gpt2", device_map=device_map, offload_folder=tmp_path / "offload")
    assert difference(ours, theirs) < 1e-5


@register_quantization_config("rounding")
class RoundingConfig(QuantizationConfigMixin):
    def __init__(self, **_):
        self.quant_method = "rounding"


@register_quantizer("rounding")
class RoundingQuantizer(HfQuantizer):
    """Rounds the weights of linear layers while they are loaded, by the same interface as torchao and quanto."""

    requires_calibration, is_trainable = False, False

    def is_serializable(self):
        return False

    def param_needs_quantization(self, model, param_name, **_):
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, torch.nn.Linear) and name == "weight" and "lm_head" not in param_name

    def get_quantize_ops(self):
        return Round()


class Round(ConversionOps):
    def convert(self, input_dict, model=None, full_layer_name=None, missing_keys=None, **_):
        ((_, value),) = input_dict.items()  # like theirs, for one parameter
        module, name = get_module_from_name(model, full_layer_name)
        module._parameters[name] = torch.nn.Parameter(value[0].mul(8).round())
        module._parameters[name]._is_hf_initialized = True
        missing_keys.discard(full_layer_name)
        return {}


def test_gpt2_is_quantized_while_it_is_loaded(tmp_path):
    shaken(GPT2LMHeadModel(GPT2Config(**GPT2))).save_pretrained(tmp_path / "gpt2")
    plain = ScratchGPTForCausalLM.from_pretrained(tmp_path / "gpt2").state_dict()
    ours, report = ScratchGPTForCausalLM.from_pretrained(
        tmp_path / "gpt2", quantization_config=RoundingConfig(), output_loading_info=True
    )
    assert not report["missing_keys"]
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, plain[name].mul(8).round() if name.endswith("_proj.weight") else plain[name]), name
    changed_config(tmp_path / "gpt2", quantization_config={"quant_method": "rounding"})
    with pytest.raises(ValueError, match="the weights of this GPT-2 are quantized: load its original weights"):
        ScratchGPTForCausalLM.from_pretrained(tmp_path / "gpt2")


def test_a_model_loaded_from_gpt2_is_saved_as_scratchgpt(tmp_path):
    theirs = shaken(GPT2LMHeadModel(GPT2Config(**GPT2)))
    theirs.save_pretrained(tmp_path / "gpt2")
    ours = ScratchGPTForCausalLM.from_pretrained(tmp_path / "gpt2")
    ours.save_pretrained(tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.weight" in saved
    for name, tensor in ScratchGPTForCausalLM.from_pretrained(tmp_path / "ours").state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["model_type"] == "scratchgpt"
    assert config["architectures"] == ["ScratchGPTForCausalLM"]
    assert not config.keys() & {"n_embd", "n_inner", "activation_function", "scale_attn_weights"}


def test_all_fields_of_gpt2s_config_are_converted(tmp_path):
    fields = {"n_inner": 50, "activation_function": "relu", "layer_norm_epsilon": 1e-3, "initializer_range": 0.5}
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.3, "attn_pdrop": 0.4}
    theirs = shaken(GPT2LMHeadModel(GPT2Config(**GPT2, **fields, **dropout, use_cache=False)))
    theirs.save_pretrained(tmp_path)
    ours = ScratchGPTForCausalLM.from_pretrained(tmp_path)
    assert difference(ours, theirs) < 1e-5
    config = ours.config
    assert (config.hidden_dropout, config.embedding_dropout, config.attention_dropout) == (0.2, 0.3, 0.4)
    assert (config.initializer_range, config.use_cache, config.norm_eps) == (0.5, False, 1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
    ],
)
def test_unsupported_features_are_refused_by_name(field, value, tmp_path):
    GPT2Config(**GPT2, **{field: value}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{field} is {value} in this gpt2 config"):
        ScratchGPTConfig.from_pretrained(tmp_path)


def changed_config(folder: Path, *removed: str, **changed: object) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields = {name: value for name, value in (fields | changed).items() if name not in removed}
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("ids", "kept", "line"),
    [
        ({"bos_token_id": 50256, "eos_token_id": 50256}, (None, None, None), "bos_token_id 50256, eos_token_id 50256"),
        ({"eos_token_id": [7, 50256], "bos_token_id": 1, "pad_token_id": -1}, (1, [7], None), "eos_token_id [7, 50256], pad"),
        (None, (None, None, None), "bos_token_id 50256, eos_token_id 50256"),  # GPT-2's defaults, which are not in the file
    ],
)
def test_special_ids_outside_the_vocabulary_are_ignored(ids, kept, line, tmp_path, caplog):
    transformers.logging.warning_once.cache_clear()
    theirs = shaken(GPT2LMHeadModel(GPT2Config(**GPT2)))
    theirs.save_pretrained(tmp_path)
    changed_config(tmp_path, *(["bos_token_id", "eos_token_id"] if ids is None else []), **(ids or {}))
    config = ScratchGPTConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == kept
    (record,) = [record for record in caplog.records if "token_id" in record.getMessage()]
    assert f"Ignored outside the vocabulary of 90 tokens: {line}" in record.getMessage()
    ours = ScratchGPTForCausalLM.from_pretrained(tmp_path, eos_token_id=3)
    assert ours.config.eos_token_id == 3
    assert difference(ours, theirs) < 1e-5
    with pytest.raises(ValueError, match="eos_token_id must be within the vocabulary .* got 99"):
        ScratchGPTForCausalLM.from_pretrained(tmp_path, eos_token_id=99)


def test_a_directory_of_2019(tmp_path):
    theirs = shaken(GPT2DoubleHeadsModel(GPT2Config(**GPT2, num_labels=1, summary_proj_to_labels=True)))
    theirs.save_pretrained(tmp_path)
    changed_config(tmp_path, "model_type", "architectures", "dtype", torch_dtype="bfloat16", output_past=True, n_ctx=32)
    ours, report = ScratchGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    reference = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert ours.dtype == reference.dtype == torch.bfloat16
    assert difference(ours.float(), reference.float()) < 1e-5


def test_overrides_of_a_config_win_before_it_is_checked(tmp_path):
    theirs = shaken(GPT2LMHeadModel(GPT2Config(**GPT2)))
    theirs.save_pretrained(tmp_path)
    changed_config(tmp_path, reorder_and_upcast_attn=True)
    ours = ScratchGPTForCausalLM.from_pretrained(tmp_path, reorder_and_upcast_attn=False, resid_pdrop=0.3)
    assert difference(ours, theirs) < 1e-5
    assert ours.config.hidden_dropout == 0.3


def test_other_model_types_are_refused(tmp_path):
    transformers.LlamaConfig(hidden_size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'llama' is not supported: ScratchGPT loads scratchgpt, gpt2, qwen3"):
        ScratchGPTForCausalLM.from_pretrained(tmp_path)
    Qwen3Config(**QWEN3, is_causal=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is_causal is False in this qwen3 config"):
        ScratchGPTConfig.from_pretrained(tmp_path)
    Qwen3Config(**QWEN3, use_sliding_window=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_sliding_window is True in this qwen3 config"):
        ScratchGPTForCausalLM.from_pretrained(tmp_path)
    Qwen3Config(**QWEN3, layer_types=["sliding_attention", "full_attention"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer_types is .* ScratchGPT supports only full_attention"):
        ScratchGPTForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_qwen3_loads(tie, bias, tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}
    config = Qwen3Config(**QWEN3, tie_word_embeddings=tie, attention_bias=bias, rope_parameters=rope, rms_norm_eps=1e-4)
    theirs = shaken(Qwen3ForCausalLM(config))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    ours, report = ScratchGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert difference(ours, theirs) < 1e-5


def test_qwen3s_older_files_and_heads(tmp_path):
    theirs = shaken(Qwen3ForSequenceClassification(Qwen3Config(**QWEN3, num_labels=3, pad_token_id=89, rope_theta=5e4)))
    theirs.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["rope_parameters"], fields["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps({**fields, "rope_theta": 5e4, "rope_scaling": None}))
    ours = modeling_scratchgpt.ScratchGPTForSequenceClassification.from_pretrained(tmp_path)
    assert ours.config.rope_parameters["rope_theta"] == 5e4
    assert difference(ours, theirs) < 1e-5
