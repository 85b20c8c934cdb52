"""GPT-2 and Qwen3 as transformers stores them, in ScratchGPT's terms: their configs, and the names of their weights.

Notable:
- A field of a config that changes what is computed is carried over, or refused by name. None is ignored.
- Qwen3's weights bear our names already. GPT-2's bear others, lie the other way around (its Conv1D multiplies from the right),
  and hold query, key and value in one matrix. transformers' own machinery converts them while it loads, file by file.
- `from_pretrained` of every class here uses this; nothing else has to be called.
"""

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.core_model_loading import Chunk, Transpose, WeightConverter, WeightRenaming, WeightTransform

# The suffixes of the models with a head, and PEFT's name of each one's task. `AutoModel{suffix}` loads `ScratchGPT{suffix}`.
HEADS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
SHARED = ("vocab_size", "initializer_range", "use_cache", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")

# What each is of all that a ScratchGPT can be (dropout, which is for training alone, may differ); what its fields are called;
# the fields that must be left as they are.
ARCHITECTURE: dict[str, dict[str, Any]] = {
    "gpt2": {
        "position_embedding_type": "learned",
        "norm_type": "layernorm",
        "qk_norm": False,
        "mlp_type": "plain",
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen3": {
        "position_embedding_type": "rotary",
        "norm_type": "rmsnorm",
        "qk_norm": True,
        "mlp_type": "gated",
        "mlp_bias": False,
    },
}
NAMES: dict[str, dict[str, str]] = {  # ours to theirs
    "gpt2": {
        "max_position_embeddings": "n_positions",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "hidden_act": "activation_function",
        "attention_dropout": "attn_pdrop",
        "hidden_dropout": "resid_pdrop",
        "embedding_dropout": "embd_pdrop",
        "norm_eps": "layer_norm_epsilon",
    },
    "qwen3": {
        **{
            name: name
            for name in (
                "max_position_embeddings",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "hidden_act",
                "attention_bias",
                "attention_dropout",
                "rope_parameters",
            )
        },
        "norm_eps": "rms_norm_eps",
    },
}
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    "qwen3": {"use_sliding_window": False},
}

# The parts of GPT-2's names and of ours. Matrices among them are transposed.
GPT2_PARTS = {
    "wte": "embed_tokens",
    "wpe": "embed_positions",
    "h": "layers",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "ln_f": "norm",
}
GPT2_MATRICES = {
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "mlp.c_fc": ["mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
}


def as_scratchgpt(fields: dict[str, Any]) -> dict[str, Any]:
    """The content of a `config.json` of ours, of GPT-2's or of Qwen3's as that of one of ours.

    Raises:
        ValueError: it is of another model type, or asks for what a ScratchGPT cannot do.
    """
    model_type = fields.get("model_type", "scratchgpt")
    if model_type == "scratchgpt":
        return fields
    if model_type not in ARCHITECTURE:
        known = ", ".join(["scratchgpt", *ARCHITECTURE])
        raise ValueError(f"model_type {model_type!r} is not one that ScratchGPT loads: these are {known}.")
    source: Any = CONFIG_MAPPING[model_type].from_dict(fields)  # older files leave out fields, or name them otherwise
    for name, needed in UNSUPPORTED[model_type].items():
        if getattr(source, name) != needed:
            raise ValueError(f"{name} is {getattr(source, name)} in this {model_type} config: ScratchGPT has only {needed}.")
    if set(getattr(source, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise ValueError(
            f"layer_types is {source.layer_types} in this {model_type} config: ScratchGPT has only full_attention."
        )
    result = {name: getattr(source, their_name) for name, their_name in NAMES[model_type].items()}
    result |= {name: getattr(source, name) for name in SHARED} | ARCHITECTURE[model_type]
    if result["hidden_act"] == "gelu_new":
        result["hidden_act"] = "gelu_pytorch_tanh"  # the same function, computed at once
    # What every config may have: labels of a classifier, data type, quantization; not what a call is to return.
    common = PreTrainedConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    common -= {"return_dict", "output_attentions", "output_hidden_states"}
    return {**{name: value for name, value in fields.items() if name in common and name not in result}, **result}


def as_transformers(config: PreTrainedConfig, model_type: str) -> PreTrainedConfig:
    """A `GPT2Config` or `Qwen3Config` of the very model that a `ScratchGPTConfig` describes.

    Raises:
        ValueError: there is none; the message names the field.
    """
    can_be = {**ARCHITECTURE[model_type]}
    if model_type == "gpt2":
        del can_be["attention_bias"], can_be["mlp_bias"]  # a bias of zero does what none does
        can_be |= {
            "num_key_value_heads": config.num_attention_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
        }
    for name, needed in can_be.items():
        if getattr(config, name) != needed:
            raise ValueError(f"{name} is {getattr(config, name)!r}, and a {model_type} model has only {needed!r}.")
    fields = {their_name: getattr(config, name) for name, their_name in NAMES[model_type].items()}
    fields |= {name: getattr(config, name) for name in SHARED}
    if model_type == "gpt2" and config.hidden_act == "gelu_pytorch_tanh":
        fields["activation_function"] = "gelu_new"
    return CONFIG_MAPPING[model_type](**fields, id2label=config.id2label, label2id=config.label2id)


def gpt2_weights() -> list[WeightTransform]:
    """How transformers loads GPT-2's weights into ours; no name of our own weights is touched."""
    renamed = [WeightRenaming(r"^transformer\.", "model.")]
    renamed += [WeightRenaming(rf"(?<![\w]){theirs}\.", f"{ours}.") for theirs, ours in GPT2_PARTS.items()]
    renamed += [WeightRenaming(r"^classifier\.", "score.")]  # of GPT2ForTokenClassification
    converted = []
    for theirs, ours in GPT2_MATRICES.items():
        pattern, split = rf"(?<!\w){re.escape(theirs)}", [Chunk(dim=0)] if len(ours) > 1 else []
        weights, biases = ([f"{name}.{kind}" for name in ours] for kind in ("weight", "bias"))
        converted.append(WeightConverter(rf"{pattern}\.weight", weights, [Transpose(), *split]))
        if split:
            converted.append(WeightConverter(rf"{pattern}\.bias", biases, [Chunk(dim=0)]))
        else:
            renamed.append(WeightRenaming(rf"{pattern}\.bias", biases))
    return [*renamed, *converted]


def gpt2_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of `ScratchGPTForCausalLM` as one of `GPT2LMHeadModel`, with biases of zero where ours has none."""
    result = {}
    for name, tensor in state.items():
        if "_proj." not in name:
            for theirs, ours in GPT2_PARTS.items():
                name = re.sub(rf"(?<!\w){ours}\.", f"{theirs}.", name)
            result[name.replace("model.", "transformer.", 1)] = tensor
    for layer in range(sum(name.endswith("mlp.up_proj.weight") for name in state)):
        for theirs, parts in GPT2_MATRICES.items():
            weight = torch.cat([state[f"model.layers.{layer}.{part}.weight"] for part in parts])
            biases = [state.get(f"model.layers.{layer}.{part}.bias") for part in parts]
            bias = weight.new_zeros(len(weight)) if biases[0] is None else torch.cat(biases)
            block = f"transformer.h.{layer}.{theirs}"
            result |= {f"{block}.weight": weight.T.contiguous(), f"{block}.bias": bias}
    return result
