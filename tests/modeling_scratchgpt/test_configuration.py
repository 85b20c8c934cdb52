import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.trainer_utils import align_special_tokens

from modeling_scratchgpt import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer

ROTARY = {"position_embedding_type": "rotary"}


@pytest.mark.parametrize(
    ("preset", "parameters"), [("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1.5B", 1_557_611_200)]
)
def test_presets_have_gpt2s_sizes(preset, parameters):
    with torch.device("meta"):
        model = ScratchGPTForCausalLM(ScratchGPTConfig.from_preset(preset))
    assert model.num_parameters() == parameters


def test_the_default_is_the_smallest_preset_and_presets_can_be_overridden():
    assert ScratchGPTConfig().to_dict() == ScratchGPTConfig.from_preset("124M").to_dict()
    config = ScratchGPTConfig.from_preset("355M", hidden_size=512, norm_type="rmsnorm")
    assert (config.hidden_size, config.head_dim, config.num_hidden_layers, config.norm_type) == (512, 32, 24, "rmsnorm")


def test_gpt2s_names_are_aliases():
    old = ScratchGPTConfig(n_embd=64, n_layer=3, n_head=4, n_positions=128, n_inner=100, activation_function="relu")
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
    assert old.to_dict() == ScratchGPTConfig(**sizes, intermediate_size=100, hidden_act="relu").to_dict()
    assert old.n_embd == old.hidden_size == 64
    assert ScratchGPTConfig(n_embd=64, n_head=4).intermediate_size == 256  # derived from the old name too


def test_derived_defaults():
    config = ScratchGPTConfig(hidden_size=96, num_attention_heads=6, mlp_type="gated")
    assert (config.intermediate_size, config.head_dim, config.num_key_value_heads, config.hidden_act) == (256, 16, 6, "silu")
    assert not hasattr(config, "rope_parameters")
    rotary = ScratchGPTConfig(position_embedding_type="rotary")
    assert rotary.rope_parameters == {"rope_theta": 10_000, "rope_type": "default"}


def test_saving_and_loading_changes_nothing(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ScratchGPTConfig
    assert loaded.to_diff_dict() == tiny_config.to_diff_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"vocab_size": -5}, "vocab_size must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
        ({"intermediate_size": 0}, "intermediate_size must be a positive integer"),
        ({"hidden_size": 100, "num_attention_heads": 12}, "not a multiple of num_attention_heads"),
        ({"n_head": 7}, "not a multiple of num_attention_heads"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads"),
        ({"head_dim": 5, "position_embedding_type": "rotary"}, "head_dim must be even, got 5"),
        ({"position_embedding_type": "alibi"}, "must be one of 'learned', 'rotary', got 'alibi'"),
        ({"norm_type": "batchnorm"}, "must be one of 'layernorm', 'rmsnorm', got 'batchnorm'"),
        ({"mlp_type": "moe"}, "must be one of 'plain', 'gated', got 'moe'"),
        ({"hidden_act": "sine"}, "hidden_act 'sine' is unknown: choose one of .*silu"),
        ({"attention_dropout": 1.0}, "at least 0 and below 1, got 1.0"),
        ({"hidden_dropout": -0.1}, "at least 0 and below 1"),
        ({"embedding_dropout": float("nan")}, "at least 0 and below 1, got nan"),
        ({**ROTARY, "rope_parameters": {"rope_type": "nonsense"}}, "rope_type 'nonsense' is unknown, choose one of default"),
        ({**ROTARY, "rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({**ROTARY, "rope_parameters": {"rope_theta": 0}}, "rope_theta must be a positive number, got 0"),
        ({**ROTARY, "rope_parameters": {"rope_theta": "abc"}}, "rope_theta must be a positive number, got 'abc'"),
        ({**ROTARY, "rope_parameters": {1: 2}}, "are invalid"),
        ({"norm_eps": 0.0}, "norm_eps must be a positive number"),
        ({"initializer_range": float("inf")}, "initializer_range must be a positive number"),
        ({"eos_token_id": 50257}, r"eos_token_id must be within the vocabulary \(0 to 50256\) or None, got 50257"),
        ({"eos_token_id": [3, -1]}, "eos_token_id must be within the vocabulary"),
        ({"pad_token_id": -1}, "pad_token_id must be within the vocabulary"),
    ],
)
def test_invalid_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ScratchGPTConfig(**values)


@pytest.mark.parametrize(
    "values", [{"hidden_size": "wide"}, {"hidden_size": 7.5}, {"qk_norm": "yes"}, {"norm_type": 3}, {"n_layer": 1.5}]
)
def test_wrong_types_are_refused(values):
    name = ScratchGPTConfig.attribute_map.get(*[next(iter(values))] * 2)
    with pytest.raises(StrictDataclassError, match=name):
        ScratchGPTConfig(**values)


def test_a_trained_model_is_saved_with_a_padding_id_outside_its_vocabulary(tiny_model, tmp_path, caplog):
    """Trainer copies the ids of the tokenizer to the config before it trains, and saves at the first checkpoint."""
    tokenizer = ScratchGPTTokenizer.train(["to be or not to be"] * 9, 280)
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<|{index}|>" for index in range(60)]})
    tokenizer.pad_token = "<|59|>"
    align_special_tokens(tiny_model, tokenizer)
    assert tiny_model.config.pad_token_id >= tiny_model.config.vocab_size
    tiny_model.save_pretrained(tmp_path)
    assert "pad_token_id must be within the vocabulary (0 to 299) or None" in caplog.text
    loaded = ScratchGPTForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.pad_token_id is None
    assert loaded.config.eos_token_id == 1
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, tiny_model.state_dict()[name]), name


def test_a_changed_config_is_checked_when_a_model_is_made(tiny_config):
    tiny_config.norm_type = "batchnorm"
    with pytest.raises(ValueError, match="norm_type must be one of 'layernorm', 'rmsnorm', got 'batchnorm'"):
        ScratchGPTForCausalLM(tiny_config)


def test_overrides_are_checked(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    for load in (ScratchGPTConfig.from_pretrained, AutoConfig.from_pretrained, ScratchGPTForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="eos_token_id must be within the vocabulary .* got 300"):
            load(tmp_path, eos_token_id=300)
    config = ScratchGPTConfig.from_pretrained(tmp_path, n_positions=7, eos_token_id=[5])
    assert (config.max_position_embeddings, config.eos_token_id, config.pad_token_id) == (7, [5], 2)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset '7B': choose one of 124M, 355M, 774M, 1.5B"):
        ScratchGPTConfig.from_preset("7B")
